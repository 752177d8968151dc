"""Calibration: the file and its schema, every way it may not fit, the search through a pipeline, budgets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

import dit_sparse
from dit_sparse import Calibration, TokenLayout, calibrate
from dit_sparse.calibration import CalibratedProcessor, Search, error, fingerprint, layer_key, under, within
from dit_sparse.method import Call
from dit_sparse.order import Order

MADE = Calibration(
    method="recorder",
    models={"transformer": "WanTransformer3DModel:0123456789ab"},
    source="random-wan",
    grid=(5, 4, 6),
    heads=2,
    steps=4,
    prompts=("a cat runs", "a dog sits"),
    seeds=(0, 1),
    settings={"level": 3, "rule": "mse", "budget": None},
    layers={"transformer/blocks.0.attn1": {"modes": ["diagonal", "skip"], "density": 0.25}},
    tensors={"transformer/blocks.0.attn1/mask": torch.tensor([[True, False], [False, True]])},
    schedule="dense 0-25%",
)


class Recorder:
    """Keeps what it was shown."""

    def __init__(self) -> None:
        self.calls: list[tuple[Call, tuple[Tensor, ...]]] = []

    def observe(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> None:
        self.calls.append((call, (q, k, v, out, lse)))

    def result(self) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        names = {layer_key(call) for call, _ in self.calls}
        return {name: {"level": 1} for name in names}, {}


@dataclass(frozen=True, kw_only=True)
class Recording(CalibratedProcessor):
    calibrates: ClassVar[str] = "recorder"
    searched: ClassVar[tuple[str, ...]] = ("level", "budget")

    level: int = 1
    budget: float | None = None
    free: int = 0
    recorder: Any = None

    def search(self) -> Search:
        return self.recorder


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    MADE.save(tmp_path / "c.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "c.safetensors"]
    loaded = Calibration.load(str(tmp_path / "c.json"))
    for f in fields(Calibration):
        if f.name != "tensors":
            assert getattr(loaded, f.name) == getattr(MADE, f.name), f.name
    assert set(loaded.tensors) == set(MADE.tensors)
    assert all(torch.equal(loaded.tensors[name], x) for name, x in MADE.tensors.items())


def test_a_file_without_tensors_stands_alone(tmp_path: Path) -> None:
    replace(MADE, tensors={}).save(tmp_path / "c.json")
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    assert Calibration.load(tmp_path / "c.json").tensors == {}


def test_the_schema_describes_every_field() -> None:
    schema = json.loads(files("dit_sparse").joinpath("calibration.schema.json").read_text())
    names = {"format", *(f.name for f in fields(Calibration))}
    assert set(schema["properties"]) == set(schema["required"]) == names
    assert all("description" in entry for entry in schema["properties"].values())


def broken(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the content of the JSON file."""

    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is no readable calibration: .*No such file"),
        (lambda p: p.write_text(p.read_text()[:200]), "is no readable calibration: .*line"),
        (lambda p: p.write_bytes(b"\xff\xfe{}"), "is no readable calibration"),
        (lambda p: p.write_text("[1, 2]"), "is no calibration: it has no format"),
        (lambda p: p.write_text('{"prompt": "a cat"}'), "is no calibration: it has no format"),
        (broken(lambda c: c.update(format=2)), "is of calibration format 2, expected 1: calibrate again"),
        (broken(lambda c: c.pop("grid")), "is no calibration: \\$: 'grid' is a required"),
        (broken(lambda c: c.update(extra=1)), "'extra' was unexpected"),
        (broken(lambda c: c.update(grid=[5, 4])), r"\$.grid: \[5, 4\] is too short"),
        (broken(lambda c: c.update(grid=[5, 4, 0])), r"\$.grid\[2\]: 0 is less than the minimum of 1"),
        (broken(lambda c: c.update(grid=[5, 4, 6.5])), r"\$.grid\[2\]: 6.5 is not of type 'integer'"),
        (broken(lambda c: c.update(heads=True)), r"\$.heads: True is not of type 'integer'"),
        (broken(lambda c: c.update(heads="2")), r"\$.heads: '2' is not of type 'integer'"),
        (broken(lambda c: c.update(method=None)), r"\$.method: None is not of type 'string'"),
        (broken(lambda c: c.update(prompts=[])), r"\$.prompts: \[\] should be non-empty"),
        (
            broken(lambda c: c.update(models={"transformer": 1})),
            r"\$.models.transformer: 1 is not of type 'string'",
        ),
        (broken(lambda c: c.update(layers={"a": [1]})), r"\$.layers.a: \[1\] is not of type 'object'"),
        (
            broken(lambda c: c.update(tensors="c.safetensors")),
            r"\$.tensors: .* is not of type 'object', 'null'",
        ),
        (broken(lambda c: c["tensors"].pop("sha256")), r"\$.tensors: 'sha256' is a required"),
        (
            broken(lambda c: c["tensors"].update(file="../c.safetensors")),
            r"\$.tensors.file: .* not match",
        ),
        (broken(lambda c: c["tensors"].update(sha256="0" * 64)), "is not the file that .* was saved with"),
        (lambda p: p.with_suffix(".safetensors").unlink(), "needs c.safetensors beside it"),
        (
            lambda p: save_file({"mask": torch.zeros(1)}, p.with_suffix(".safetensors")),
            "is not the file that .* was saved with",
        ),
        (
            lambda p: p.with_suffix(".safetensors").write_bytes(
                p.with_suffix(".safetensors").read_bytes()[:-1]
            ),
            "is not the file that .* was saved with",
        ),
    ],
)
def test_a_file_that_is_wrong_is_one_clear_error(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "c.json"
    MADE.save(path)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        Recording(calibration=path)
    assert str(path) in str(caught.value) or "c.safetensors" in str(caught.value)


def test_a_calibration_of_another_method_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Recording needs a calibration of recorder, got Calibration\('paro'"
    ):
        Recording(calibration=replace(MADE, method="paro"))
    with pytest.raises(ValueError, match="SparseVDiTProcessor needs a calibration of sparse_vdit"):
        dit_sparse.SparseVDiTProcessor(calibration=MADE)


def test_a_calibration_of_another_model_is_refused_when_attached() -> None:
    model = tiny.wan()
    fits = replace(MADE, models={"transformer": fingerprint(model)})
    dit_sparse.apply(model, Recording(calibration=fits)).remove()
    with pytest.raises(ValueError, match=r"was made with random-wan .*, got WanTransformer3DModel:"):
        dit_sparse.apply(tiny.wan(num_layers=2), Recording(calibration=fits))
    assert fingerprint(tiny.wan()) == fingerprint(model) != fingerprint(tiny.wan(num_layers=2))
    assert fingerprint(model) != fingerprint(tiny.wan_vace())


def test_a_call_that_does_not_fit_is_refused() -> None:
    call = Call.standalone(TokenLayout(MADE.grid), heads=2).at(name="transformer/blocks.0.attn1")
    assert MADE.layer(call)["density"] == 0.25
    with pytest.raises(ValueError, match=r"for the token grid \(5, 4, 6\), got \(5, 4, 7\): calibrate at"):
        MADE.layer(call.at(layout=TokenLayout((5, 4, 7))))
    with pytest.raises(ValueError, match="has 2 heads in 1 layers, not 4 heads in layer"):
        MADE.layer(call.at(heads=4))
    with pytest.raises(ValueError, match=r"not 2 heads in layer transformer/blocks\.1\.attn1"):
        MADE.layer(call.at(name="transformer/blocks.1.attn1"))


def test_searched_parameters_are_the_files() -> None:
    method = Recording(calibration=MADE, free=7)
    assert (method.level, method.budget, method.free) == (3, None, 7)
    assert Recording(calibration=MADE, level=3) == Recording(calibration=MADE)
    with pytest.raises(ValueError, match="level=2 does not fit a calibration that was made with level=3"):
        Recording(calibration=MADE, level=2)
    with pytest.raises(ValueError, match=r"budget=0\.5 does not fit"):
        replace(method, budget=0.5)


def test_calibrate_shows_every_call_and_leaves_the_model_as_it_was() -> None:
    pipe = tiny.wan_pipeline(two=True)
    settings = {
        "negative_prompt": "a dog", "num_inference_steps": 8, "guidance_scale": 5.0, "height": 64,
        "width": 96, "num_frames": 17, "max_sequence_length": 16,
    }  # fmt: skip
    before = tiny.run_wan(pipe)
    recorder = Recorder()
    found = calibrate(
        pipe,
        Recording(recorder=recorder, level=5),
        ["a cat runs", "a dog sits"],
        seeds=[3, 4],
        source="random",
        settings=settings,
        schedule="dense 0-10%; layers 0",
    )
    assert dit_sparse.session(pipe) is None
    assert torch.equal(tiny.run_wan(pipe), before)
    assert {call.step for call, _ in recorder.calls} == set(range(1, 8))
    assert len(recorder.calls) == 2 * 7 * 2 * 3  # prompts, steps, branches, layers
    for call, (q, k, v, out, lse) in recorder.calls[:4]:
        assert call.order is not None
        assert call.order.identity
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, (q @ k.mT / q.shape[-1] ** 0.5).logsumexp(-1), atol=1e-5, rtol=1e-5)
    assert (found.method, found.source, found.grid) == ("recorder", "random", (5, 4, 6))
    assert (found.heads, found.steps, found.prompts) == (2, 8, ("a cat runs", "a dog sits"))
    assert (found.seeds, found.schedule) == ((3, 4), "dense 0-10%")
    assert found.settings == {"level": 5, "budget": None, "free": 0, "recorder": recorder}
    assert set(found.models) == {"transformer", "transformer_2"}
    assert {name.split("/")[0] for name in found.layers} == {"transformer", "transformer_2"}
    assert "transformer/blocks.0.attn1" in found.layers  # a layer rule is the run's, not the search's


def test_calibrate_asks_for_prompts_and_seeds() -> None:
    with pytest.raises(ValueError, match="expected prompts and as many seeds, got 0 and 0"):
        calibrate(None, Recording(), [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        calibrate(None, Recording(), ["a"], seeds=[0, 1])


def test_calibrate_says_when_nothing_was_seen() -> None:
    settings = {"num_inference_steps": 2, "height": 64, "width": 96, "num_frames": 17}
    with pytest.raises(ValueError, match="no attention call could be observed"):
        calibrate(
            tiny.wan_pipeline(),
            Recording(recorder=Recorder()),
            ["a cat runs"],
            settings=settings,
            schedule="dense 0-100%",
        )


def test_under_takes_tensors_from_one_order_to_another() -> None:
    layout = TokenLayout((3, 2, 5), text=4, text_first=True)
    x = torch.randn(1, 2, layout.sequence, 3)
    first, second = Order.raster(layout), Order.axes(layout, "hwf", 8)
    call = Call.standalone(layout, heads=2).at(order=first)
    there, (y,) = under(second, call, first.apply(x))
    assert there.order is second
    assert torch.equal(y, second.apply(x))
    assert torch.equal(under(first, there, y)[1][0], first.apply(x))


def test_errors() -> None:
    dense, out = torch.ones(2, 2, 4, 3), torch.ones(2, 2, 4, 3)
    dense[:, 1] = 3
    out[:, 1] = 2
    out[1, 0] = 5
    layout = TokenLayout((1, 2, 2))
    call = Call.standalone(layout, heads=2).at(order=Order.raster(layout))
    relative = error(out, dense, "relative", call)
    torch.testing.assert_close(error(out, dense, "mse", call), torch.tensor([[0.0, 1.0], [16.0, 1.0]]))
    torch.testing.assert_close(relative, torch.tensor([[0.0, 0.2], [3.2, 0.2]]))
    torch.testing.assert_close(error(7 * out, 7 * dense, "relative", call), relative)
    assert error(dense * 0, dense * 0, "relative", call).tolist() == [[0, 0], [0, 0]]
    here = torch.tensor([[True, True, True, False]])
    out[:, :, 3], dense[:, :, 3] = 100.0, -100.0
    torch.testing.assert_close(error(out, dense, "relative", call.at(valid=here)), relative)


@pytest.mark.parametrize("seed", range(8))
def test_within_keeps_to_the_budget_and_none_as_cheap_is_better(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(2, 4, 3, generator=generator) * 10.0 ** (seed - 4)
    costs = torch.rand(3, generator=generator)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    spent = costs.double()[every].mean(-1)
    for budget in (0.0, 0.2, 0.5, 0.9, 2.0):
        chosen = within(errors, costs, budget)
        for item in range(2):
            cost = float(costs.double()[chosen[item]].mean())
            assert cost <= budget + 1e-9 or cost == pytest.approx(float(costs.min()))
            lost = errors[item].double().expand(81, 4, 3).gather(-1, every[..., None])[..., 0].sum(-1)
            mine = float(errors[item].double().gather(-1, chosen[item][:, None]).sum())
            if cost <= budget + 1e-9:
                assert mine <= float(lost[spent <= cost + 1e-12].min()) * (1 + 1e-9)
            alone = within(errors[item], costs, budget)
            assert torch.equal(alone, chosen[item])
    assert torch.equal(within(errors, costs, 2.0), errors.argmin(-1))
