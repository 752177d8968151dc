"""Efficient-vDiT: the paper's Table 1, the mask token by token, the search."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.calibration import Calibration
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.plan import Plan
from dit_sparse.processors.efficient_vdit import EfficientVDiTProcessor, global_frames

TABLE = json.loads(
    (Path(__file__).parents[1] / "vectors" / "efficient_vdit" / "table1_sparsity.json").read_text()
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def select(method: EfficientVDiTProcessor, layout: TokenLayout, **call: Any) -> Plan:
    q = torch.zeros(1, 1, layout.sequence, 1)
    return method.select(q, q, Call.standalone(layout, **call))


def density(method: EfficientVDiTProcessor, layout: TokenLayout) -> float:
    filled = method.order(Call.standalone(layout)).filled(method.block)
    return select(method, layout).density(filled, filled)


def calibrated(layout: TokenLayout, layers: dict[str, Any], **settings: Any) -> EfficientVDiTProcessor:
    found = Calibration(
        method="efficient_vdit", models={}, source="a test", grid=layout.grid, heads=1, steps=1,
        prompts=("a",), seeds=(0,), settings=settings, layers=layers,
    )  # fmt: skip
    return EfficientVDiTProcessor(calibration=found)


@pytest.mark.parametrize("case", TABLE["cases"], ids=lambda c: f"{c['k']}:{c['frames'] - c['k']}")
def test_table_1(case: dict[str, Any]) -> None:
    """Every published block sparsity, to the last digit, at 45x80 tokens a frame."""
    frames, k, size = case["frames"], case["k"], case["tokens_per_frame"]
    assert list(global_frames(frames, k)) == case["global_frames"]
    layout = TokenLayout((frames, size // 80, 80))
    keep = select(EfficientVDiTProcessor(frames=k, block=case["block"]), layout).to_blocks()
    assert round(100 * (1 - keep.double().mean().item()), 2) == case["sparsity_pct"] == case["paper_pct"]
    tiles = select(EfficientVDiTProcessor(frames=k, block=size), layout).to_blocks()
    assert round(100 * (1 - tiles.double().mean().item()), 2) == case["frame_level_pct"]
    assert int(tiles.sum()) == frames * k * 2 - k * k + frames - k


def test_every_row_of_the_table_is_there() -> None:
    assert [(c["frames"], c["k"]) for c in TABLE["cases"]] == [
        (8, 4), (8, 3), (8, 2), (8, 1), (24, 12), (24, 8), (24, 6), (24, 4), (24, 3),
    ]  # fmt: skip


def slow_blocks(layout: TokenLayout, k: int, block: int) -> np.ndarray:
    """The block mask out of the token mask: every block with an allowed pair."""
    frames, size = layout.grid[0], layout.frame
    wanted = set(global_frames(frames, min(k, frames)))
    frame = [position // size for position in range(layout.tokens)]
    grid, n = -(-layout.tokens // block), -(-layout.extra // block)
    keep = np.ones((grid + n, grid + n), dtype=bool)
    keep[:grid, :grid] = False
    for q in range(layout.tokens):
        for j in range(layout.tokens):
            if frame[q] == frame[j] or frame[q] in wanted or frame[j] in wanted:
                keep[q // block, j // block] = True
    return keep


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 5)),
    st.integers(1, 10),
    st.sampled_from([1, 3, 4, 7, 16]),
    st.sampled_from([0, 5]),
)
def test_equals_the_token_level_definition(grid: Any, k: int, block: int, text: int) -> None:
    layout = TokenLayout(grid, text=text, text_first=bool(text), suffix=text)
    found = select(EfficientVDiTProcessor(frames=k, block=block), layout).to_blocks()
    np.testing.assert_array_equal(found[0, 0].numpy(), slow_blocks(layout, k, block))


def test_a_frame_reads_itself_and_the_global_ones() -> None:
    """With whole blocks: dense attention of each frame over its own and the gathered global keys."""
    layout, method = TokenLayout((6, 2, 4)), EfficientVDiTProcessor(frames=2, block=8)
    q, k, v = (randn(1, 2, 48, 8, seed=s) for s in range(3))
    call = Call.standalone(layout, heads=2)
    call = call.at(order=method.order(call))
    out = method.attend(q, k, v, call).unflatten(2, (6, 8))
    chosen = list(global_frames(6, 2))
    assert chosen == [0, 3]
    for frame in range(6):
        rows = range(6) if frame in chosen else sorted({frame, *chosen})
        keys, values = (x.double().unflatten(2, (6, 8))[:, :, rows].flatten(2, 3) for x in (k, v))
        weights = (q.double().unflatten(2, (6, 8))[:, :, frame] @ keys.mT * 8**-0.5).softmax(-1)
        torch.testing.assert_close(out[:, :, frame].double(), weights @ values, atol=1e-6, rtol=0)


def test_linear_in_frames() -> None:
    counts = [
        int(select(EfficientVDiTProcessor(frames=3, block=4), TokenLayout((f, 2, 2))).counts.sum())
        for f in (30, 60, 90)
    ]
    assert counts[1] - counts[0] == counts[2] - counts[1]


def test_an_image_is_dense() -> None:
    assert density(EfficientVDiTProcessor(block=8), TokenLayout((1, 7, 9), text=5)) == 1


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize(("grid", "block"), [((21, 6, 10), 16), ((13, 8, 16), 32), ((17, 1, 3), 8)])
def test_at_density_is_the_nearest(grid: tuple[int, int, int], block: int, text: int) -> None:
    layout, method = TokenLayout(grid, text=text), EfficientVDiTProcessor(block=block)
    every = sorted(density(replace(method, frames=k), layout) for k in range(1, grid[0] + 1))
    for wanted in np.linspace(every[0], 1, 9):
        found = method.at_density(float(wanted), layout)
        assert found == replace(method, frames=found.frames)
        assert abs(density(found, layout) - wanted) <= min(abs(d - wanted) for d in every) + 1e-12
    with pytest.raises(ValueError, match=f"floor {every[0]:.4f}.*use a smaller block"):
        method.at_density(every[0] / 2, layout)


def observed(method: EfficientVDiTProcessor, layout: TokenLayout, calls: int = 2) -> Any:
    """The result of a search over two layers: one of near frames, one that needs all."""
    search = method.search()
    for seed in range(calls):
        for layer in (0, 1):
            call = Call.standalone(layout, layer=layer, heads=2)
            call = call.at(order=method.order(call))
            frame = torch.arange(layout.tokens) // layout.frame
            own = torch.nn.functional.one_hot(frame, layout.grid[0]).float().expand(1, 2, -1, -1)
            q = 30 * own * (layer == 0)
            v = randn(1, 2, layout.tokens, layout.grid[0], seed=10 * seed + layer)
            search.observe(q, own, v, *call.run_dense(q, own, v), call)
    return search.result()


def test_the_search_takes_the_fewest_frames_that_are_good_enough() -> None:
    layout = TokenLayout((8, 2, 4))
    layers, tensors = observed(EfficientVDiTProcessor(block=8, threshold=0.05), layout)
    assert not tensors
    near, far = layers["0"], layers["1"]
    assert (near["frames"], far["frames"]) == (1, 8)
    assert set(near["errors"]) == {"1", "2", "3", "4", "8"}
    assert near["errors"]["1"] < 1e-3
    assert far["errors"]["4"] > 0.05
    assert far["errors"]["8"] < 1e-6
    assert near["density"] == pytest.approx(density(EfficientVDiTProcessor(block=8, frames=1), layout))
    method = calibrated(layout, layers, block=8)
    for layer, frames in (("0", 1), ("1", 8)):
        plan = select(method, layout, layer=int(layer))
        assert plan.same(select(EfficientVDiTProcessor(block=8, frames=frames), layout))


def test_the_threshold_in_the_papers_own_metric() -> None:
    layout = TokenLayout((8, 2, 4))
    mse = observed(EfficientVDiTProcessor(block=8, metric="mse"), layout)[0]["1"]["errors"]
    relative = observed(EfficientVDiTProcessor(block=8), layout)[0]["1"]["errors"]
    assert 0 < mse["1"] < relative["1"]
    between = (mse["2"] + mse["3"]) / 2
    found = observed(EfficientVDiTProcessor(block=8, metric="mse", threshold=between), layout)
    assert found[0]["1"]["frames"] == 3


def test_a_budget_goes_where_it_helps() -> None:
    layout = TokenLayout((8, 2, 4))
    layers, _ = observed(EfficientVDiTProcessor(block=8, budget=0.7), layout)
    assert layers["0"]["frames"] == 1
    assert layers["1"]["frames"] > 1
    assert sum(layer["density"] for layer in layers.values()) / 2 <= 0.7
    layers, _ = observed(EfficientVDiTProcessor(block=8, budget=1.0), layout)
    assert layers["1"]["frames"] == 8


def test_a_calibration_that_does_not_fit() -> None:
    layout = TokenLayout((8, 2, 4))
    method = calibrated(layout, {"0": {"frames": 2}, "1": {"frames": 0}}, block=8, threshold=0.3)
    assert (method.block, method.threshold) == (8, 0.3)
    with pytest.raises(ValueError, match=r"has 0 frames for layer 1"):
        select(method, layout, layer=1)
    with pytest.raises(ValueError, match=r"1 heads in 2 layers, not 1 heads in layer 2"):
        select(method, layout, layer=2)
    with pytest.raises(ValueError, match=r"is for the token grid \(8, 2, 4\), got \(9, 2, 4\)"):
        select(method, TokenLayout((9, 2, 4)))
    with pytest.raises(ValueError, match=r"fixes the density: calibrate with budget=0\.5"):
        method.at_density(0.5, layout)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 0}, "frames and block must be >= 1, got 0 and 128"),
        ({"block": 0}, "frames and block must be >= 1"),
        ({"threshold": -0.1}, "threshold must be finite and >= 0, got -0.1"),
        ({"budget": 0.0}, r"budget must be None or lie in \(0, 1\], got 0.0"),
        ({"metric": "l1"}, "metric must be one of relative, mse, got 'l1'"),
    ],
)
def test_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientVDiTProcessor(**wrong)
