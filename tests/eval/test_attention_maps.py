"""Attention maps are the softmax of the model, block by block, and say which pattern a head follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from dit_sparse import Phase, TokenLayout
from dit_sparse.cli import app
from dit_sparse.eval.attention_maps import BlockMaps, block_of, capture, measure, order_of, picks
from dit_sparse.eval.patterns import WIDTHS, toy_attention
from dit_sparse.method import Call

SMALL = ["--num-frames", "9", "--steps", "4", "--height", "64", "--width", "128"]


def everything(resolution: int = 128, **changes: Any) -> BlockMaps:
    chosen: dict[str, Any] = {"layers": None, "heads": None, "steps": None, "resolution": resolution}
    return BlockMaps(**{**chosen, **changes})


class Kept(BlockMaps):
    """Also keeps q and k in the order [grid, rest], key validity and scale of every call."""

    def __init__(self, **chosen: Any) -> None:
        super().__init__(**chosen)
        self.calls: list[tuple[Tensor, Tensor, Call]] = []

    def observe(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> None:
        assert call.order is not None
        self.calls.append((call.order.undo(q).double(), call.order.undo(k).double(), call))
        super().observe(q, k, v, out, lse, call)


def by_hand(q: Tensor, k: Tensor, call: Call, block: int, item: int, head: int) -> Tensor:
    """The map out of all scores, its blocks cut frame by frame and then from everything after the grid."""
    layout = call.layout
    scores = q[item, head] @ k[item, head // (call.heads // call.kv_heads)].T
    scores = scores * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    valid = torch.ones(layout.sequence, dtype=torch.bool)
    if call.valid is not None:
        valid = call.valid.expand(q.shape[0], -1)[item]
    weights = scores.masked_fill(~valid, -torch.inf).softmax(-1)[valid]
    place = torch.arange(layout.sequence)
    start = layout.grid_start
    grid = place[start : start + layout.tokens]
    before, after = place[:start], place[start + layout.tokens :]
    # History, reference and text, wherever the model has them.
    rest = torch.cat([before[layout.text :], after, before[: layout.text]])
    if not layout.text_first:
        rest = torch.cat([before, after])
    cuts = [b for f in grid.view(layout.grid[0], -1) for b in f.split(block)] + list(rest.split(block))
    number = torch.empty(layout.sequence, dtype=torch.int64)
    for i, tokens in enumerate(b for b in cuts if len(b)):
        number[tokens] = i
    blocks = int(number.max()) + 1
    total = torch.zeros(blocks, blocks, dtype=torch.float64)
    asking = number[valid]
    total.index_put_(
        (asking[:, None].expand_as(weights), number.expand_as(weights)), weights, accumulate=True
    )
    return total / torch.bincount(asking, minlength=blocks).clamp(min=1)[:, None]


def check(maps: Kept) -> None:
    found = iter(maps.maps)
    for q, k, call in maps.calls:
        for item in range(q.shape[0]):
            for head in picks("--heads", maps.heads, call.heads):
                m = next(found)
                assert (m.layer, m.head, m.step) == (call.layer, head, call.step)
                expected = by_hand(q, k, call, m.block, item, head)
                torch.testing.assert_close(m.mass.double(), expected, atol=2e-5, rtol=1e-3)
                rows = m.mass.sum(1)
                torch.testing.assert_close(rows, (m.queries > 0).float(), atol=1e-4, rtol=0)
    assert next(found, None) is None


def test_maps_of_a_run_are_the_models_softmax() -> None:
    pipe = tiny.wan_pipeline()
    maps = Kept(layers=(0, -1), heads=(1,), steps=(1, -1), branch="cond", resolution=23)
    report = capture(pipe, maps, lambda: tiny.run_wan(pipe))
    assert [(m.step, m.layer, m.head, m.branch) for m in maps.maps] == [
        (1, 0, 1, "cond"),
        (1, 2, 1, "cond"),
        (3, 0, 1, "cond"),
        (3, 2, 1, "cond"),
    ]
    assert all(len(m.mass) <= 23 for m in maps.maps)
    check(maps)
    by_us = [r.where for r in report.rows if r.where.phase is not Phase.DENSE]
    assert {(w.step, w.layer, w.branch) for w in by_us} == {(m.step, m.layer, m.branch) for m in maps.maps}
    assert all(r.where.backend == "model" for r in report.rows if r.where not in by_us)


CASES = families.cases()


@pytest.mark.parametrize(
    "name",
    ["cogvideox", "flux-kontext", "hunyuan", "qwen-image"],
)
def test_text_images_and_padding(name: str) -> None:
    """Text first and last, one frame, and a batch whose padded prompts are no keys."""
    case = CASES[name]
    model = case.model()
    inputs = case.inputs(model, 2, case.grid, 0)
    if case.padded is not None:
        inputs = case.padded(model)[0]  # a batch of two
    maps = Kept(layers=(0, -1), heads=None, steps=None, resolution=31)
    capture(model, maps, lambda: model(**inputs))
    check(maps)
    assert (case.padded is not None) == any(call.valid is not None for _, _, call in maps.calls)
    assert {m.item for m in maps.maps} == {0, 1}
    assert all(m.layout.text > 0 for m in maps.maps)
    for m in maps.maps[:3]:
        said = measure(m)
        assert 0 < said["text"] < 1
        assert said["captured"][said["pattern"]] <= said["captured"]["best"] + 1e-6


def test_heads_that_share_keys() -> None:
    layout = TokenLayout((3, 4, 5), text=7, text_first=True)
    order = order_of(layout, 20)
    q = tiny.randn(2, 4, layout.sequence, 8)
    k = tiny.randn(2, 2, layout.sequence, 8, seed=1)
    valid = torch.ones(2, layout.sequence, dtype=torch.bool)
    valid[1, 3:7] = False
    call = Call.standalone(layout, heads=4, kv_heads=2, valid=valid).at(order=order, name="t/x")
    maps = Kept(layers=None, heads=(1, 2), steps=None, resolution=20)
    ordered = order.apply(q), order.apply(k)
    out, lse = call.run_dense(*ordered, ordered[1])
    maps.observe(*ordered, ordered[1], out, lse, call)
    check(maps)
    assert list(maps.named()) == ["0/0/1/cond.0", "0/0/2/cond.0", "0/0/1/cond.1", "0/0/2/cond.1"]


def toy_maps(layout: TokenLayout, resolution: int = 128) -> BlockMaps:
    q, k = toy_attention(layout)
    order = order_of(layout, resolution)
    call = Call.standalone(layout, heads=4).at(order=order)
    maps = everything(resolution)
    ordered = order.apply(q), order.apply(k)
    maps.observe(*ordered, ordered[1], *call.run_dense(*ordered, ordered[1]), call)
    return maps


def test_what_is_said_of_heads_that_are_known() -> None:
    """The toy's heads attend within the frame, along time, along rows of near frames, and everywhere."""
    inside, along, rows, everywhere = map(measure, toy_maps(TokenLayout((8, 6, 8), text=4)).maps)
    assert WIDTHS[0][0] < 1 < WIDTHS[1][0]  # what the order of the names is
    assert inside["pattern"] == "spatial"
    assert along["pattern"] == "temporal"
    assert inside["frame"] > 2 * max(along["frame"], everywhere["frame"])
    assert along["position"] > 2 * max(inside["position"], rows["position"])
    assert everywhere["entropy"] == max(s["entropy"] for s in (inside, along, rows, everywhere))
    for said in (inside, along, rows, everywhere):
        assert said["captured"]["best"] >= max(said["captured"].values()) - 1e-9


def test_what_is_said_of_maps_that_are_written_down() -> None:
    """Two frames of two blocks and one of text, of two tokens each."""
    m = toy_maps(TokenLayout((2, 2, 2), text=2), 5).maps[0]
    assert m.mass.shape == (5, 5)
    own, other, words, even = 0.4, 0.3, 0.2, 0.05
    mass = torch.tensor(
        [
            [own, even, other, even, words],
            [even, own, even, other, words],
            [other, even, own, even, words],
            [even, other, even, own, words],
            [0, 0, 0, 0, 1.0],
        ]
    )
    said = measure(type(m)(**{**vars(m), "mass": mass}))
    assert said["frame"] == pytest.approx(own + even)
    assert said["position"] == pytest.approx(other)
    assert said["text"] == pytest.approx(words)
    row = torch.tensor([own, other, words, even, even], dtype=torch.float64)
    assert said["entropy"] == pytest.approx(float(-(row * row.log()).sum()) / 1.6094379)
    # A quarter of 10 tokens are 2.5: the nearest block, and a quarter of the next.
    captured = {
        "spatial": own + even / 4,
        "temporal": own + other / 4,
        "text": words,
        "best": own + other / 4,
    }
    for name, expected in captured.items():
        assert said["captured"][name] == pytest.approx(expected, abs=1e-6), name
    assert said["pattern"] == "temporal"


def test_an_image_has_no_time() -> None:
    said = measure(toy_maps(TokenLayout((1, 9, 11))).maps[0])
    assert set(said["captured"]) == {"neighbourhood", "best"}
    assert said["frame"] == pytest.approx(1, abs=1e-5)
    assert said["position"] == 0


def test_blocks_are_as_small_as_fit() -> None:
    for layout in (TokenLayout((3, 5, 7), text=11), TokenLayout((1, 13, 9)), TokenLayout((4, 2, 2), text=40)):
        for resolution in (6, 17, 40, 999):
            sizes = range(1, 200)
            rows = [layout.grid[0] * -(-layout.frame // b) + -(-layout.extra // b) for b in sizes]
            fitting = [b for b, n in zip(sizes, rows, strict=True) if n <= resolution]
            assert block_of(layout, resolution) == fitting[0]
            assert order_of(layout, resolution).slots <= fitting[0] * resolution
    with pytest.raises(ValueError, match="--resolution must be at least 4 for 3 frames and text, got 3"):
        block_of(TokenLayout((3, 5, 7), text=11), 3)


def test_two_transformers_keep_their_names() -> None:
    pipe = tiny.wan_pipeline(two=True)
    maps = everything(layers=(-1,), heads=(0,), branch=None)
    capture(pipe, maps, lambda: tiny.run_wan(pipe))
    assert {m.model for m in maps.maps} == {"transformer", "transformer_2"}
    assert len(maps.named()) == len(maps.maps) == 4 * 2
    assert {m.branch for m in maps.maps} == {"cond", "uncond"}


def test_what_cannot_be_had_is_said() -> None:
    pipe = tiny.wan_pipeline()
    with pytest.raises(ValueError, match="--layers 3: there are 3, 0 to 2 or -3 to -1"):
        capture(pipe, everything(layers=(3,)), lambda: tiny.run_wan(pipe))
    with pytest.raises(ValueError, match=r"none|branches seen: cond, uncond"):
        capture(pipe, everything(branch="other"), lambda: tiny.run_wan(pipe))
    with pytest.raises(ValueError, match="more than 0 MiB: choose fewer"):
        capture(pipe, everything(limit=1000), lambda: tiny.run_wan(pipe))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["attention-maps", *map(str, arguments)])


def test_the_command_writes_maps_and_pictures(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    done = run(
        "--output-dir", tmp_path / "maps", "--layers", "2,-1", "--heads", "0,3", "--at-steps", "-1",
        "--branch", "all", "--resolution", "33", *SMALL,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    tensors = load_file(tmp_path / "maps/maps.safetensors")
    said = json.loads((tmp_path / "maps/maps.json").read_text())
    assert set(tensors) == {f"3/{i}/{h}/{b}" for i in (2, 7) for h in (0, 3) for b in ("cond", "uncond")}
    assert {m["name"] for m in said["maps"]} == set(tensors)
    assert all(x.dtype == torch.float32 and max(x.shape) <= 33 for x in tensors.values())
    assert all(torch.allclose(x.sum(1), torch.ones(len(x)), atol=1e-4) for x in tensors.values())
    assert said["settings"]["num_inference_steps"] == 4
    assert said["maps"][0]["grid"] == [5, 8, 16]
    assert {p.name for p in tmp_path.glob("maps/*.png")} == {"layer-02.png", "layer-07.png"}
    assert plt.get_fignums() == before
    assert "temporal" in done.output or "spatial" in done.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "8"], "error: --layers 8: there are 8, 0 to 7 or -8 to -1"),
        (["--heads", "-5"], "error: --heads -5: there are 4, 0 to 3 or -4 to -1"),
        (["--at-steps", "4"], "error: --at-steps 4: there are 4"),
        (["--layers", "one"], "error: --layers must be indices with commas between them, or all, got 'one'"),
        (["--resolution", "4"], "error: --resolution must be at least 5 for 5 frames, got 4"),
        (
            [
                "--layers",
                "all",
                "--at-steps",
                "all",
                "--resolution",
                "2000",
                "--branch",
                "all",
                "--steps",
                "9",
            ],
            "more than 512 MiB: choose fewer --layers, --heads or --at-steps, or a lower --resolution",
        ),
    ],
)
def test_errors_come_before_weights(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("dit_sparse.generate.placed_pipeline", loaded)
    done = run("--output-dir", tmp_path / "maps", *SMALL, *flags)
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert message in done.output
    assert not list(tmp_path.glob("maps/*"))
