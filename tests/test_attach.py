"""Attaching as users do it: the seam, pipelines and their clock, errors, copies, trainable parts."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import tiny_models as tiny
import torch
from packaging.version import Version
from torch import nn

import dit_sparse
from dit_sparse import Phase, RadialProcessor
from dit_sparse.layout import Layer

RADIAL = RadialProcessor(block=8, decay=0.3, decimate_below=32)


def rows(session: dit_sparse.Session, phase: Phase) -> list[Any]:
    return [r for r in session.report().rows if r.where.phase is phase]


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.41"), reason="WanPipeline tells its transformer no steps"
)
def test_the_seam_works_literally() -> None:
    pipe = tiny.wan_pipeline()
    stock = tiny.run_wan(pipe)
    pipe.transformer.set_attn_processor(RADIAL)
    session = dit_sparse.session(pipe.transformer)
    assert session is not None
    sparse = tiny.run_wan(pipe)
    assert (sparse - stock).abs().max() > 1e-3
    # The family's schedule: layer 0 and the first quarter of 4 steps stay dense.
    where = [(r.where.step, r.where.layer, r.where.branch) for r in rows(session, Phase.SPARSE)]
    assert sorted(where) == [(s, i, b) for s in (1, 2, 3) for i in (1, 2) for b in ("cond", "uncond")]
    assert all(r.density < 0.7 for r in rows(session, Phase.SPARSE))
    assert {r.where.reason for r in rows(session, Phase.DENSE)} == {"schedule"}
    assert len(session.report().rows) == 4 * 3 * 2
    session.remove()
    assert torch.equal(tiny.run_wan(pipe), stock)


def test_stock_processors_end_the_session() -> None:
    model = tiny.wan()
    before = dict(model.attn_processors)
    model.set_attn_processor(RADIAL)
    session = dit_sparse.session(model)
    model.set_attn_processor(model.attn_processors)  # its own: nothing happens
    assert dit_sparse.session(model) is session
    model.set_attn_processor(dict(before))
    assert dit_sparse.session(model) is None
    assert not session.active
    assert model.attn_processors == before
    model.set_attn_processor(RADIAL)
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    model.set_attn_processor(WanAttnProcessor())
    assert dit_sparse.session(model) is None


@pytest.mark.parametrize("value", ["stock", "method"])
def test_a_dict_that_is_refused_leaves_the_session_as_it_was(value: str) -> None:
    model = tiny.wan()
    stock = dict(model.attn_processors)
    model.set_attn_processor(RADIAL)
    session = dit_sparse.session(model)
    assert session is not None
    (name, processor), *_ = stock.items()
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({name: processor if value == "stock" else RADIAL})
    assert dit_sparse.session(model) is session
    assert session.active


def test_a_second_attach_replaces_the_first() -> None:
    model = tiny.wan()
    first = dit_sparse.apply(model, RADIAL)
    second = dit_sparse.apply(model, "dense")
    assert not first.active
    assert dit_sparse.session(model) is second
    second.remove()
    second.remove()
    assert not any("Sparse" in type(p).__name__ for p in model.attn_processors.values())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*outside a pipeline run")
def test_a_dict_may_mix_methods_and_stock_processors() -> None:
    model = tiny.wan()
    mixed: dict[str, Any] = dict(model.attn_processors)
    mixed["blocks.1.attn1.processor"] = tiny.TopK()
    mixed["blocks.2.attn1.processor"] = RADIAL
    mixed["blocks.2.attn2.processor"] = RADIAL  # cross-attention keeps its stock processor
    given = dict(mixed)
    model.set_attn_processor(mixed)
    assert mixed == given
    session = dit_sparse.session(model)
    assert session is not None
    model(**tiny.wan_inputs())
    assert {r.where.name for r in session.report().rows} == {"blocks.1.attn1", "blocks.2.attn1"}
    assert len(rows(session, Phase.SPARSE)) == 2
    mixed.popitem()
    with pytest.raises(ValueError, match=r"processors, 5, .*: missing \['blocks.2.attn2.processor'\]"):
        model.set_attn_processor(mixed)


def test_two_pipelines_at_once_do_not_disturb_each_other() -> None:
    pipes = [tiny.wan_pipeline(), tiny.wan_pipeline()]
    alone = []
    for pipe, method in zip(pipes, (RADIAL, tiny.Cached(keep=2)), strict=True):
        dit_sparse.apply(pipe, method, schedule="refresh 2")
        alone.append(tiny.run_wan(pipe))
    together = [tiny.run_wan(pipe) for pipe in pipes]
    first, second = ([], [])

    # Interleaved at every step: the second pipeline runs inside the first one's step callback.
    def inner(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        if step == 1:
            second.append(tiny.run_wan(pipes[1]))
        return {}

    first.append(tiny.run_wan(pipes[0], callback_on_step_end=inner))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first[0], alone[0])
    assert torch.equal(second[0], alone[1])


def test_wan22_experts_share_one_clock() -> None:
    pipe = tiny.wan_pipeline(two=True)
    session = dit_sparse.apply(pipe, RADIAL, schedule="dense 0-25%; layers 0")
    tiny.run_wan(pipe, steps=8)
    report = session.report()
    by_model = {name: sorted({r.where.step for r in report.rows if r.where.model == name})
                for name in ("transformer", "transformer_2")}  # fmt: skip
    assert by_model["transformer"]
    assert by_model["transformer_2"]
    assert by_model["transformer"] + by_model["transformer_2"] == list(range(8))
    assert {r.where.step for r in rows(session, Phase.SPARSE)} == set(range(2, 8))
    assert {r.where.layer for r in rows(session, Phase.SPARSE)} == {1, 2}


def test_the_size_may_change_between_two_calls_of_a_pipe() -> None:
    pipe = tiny.wan_pipeline()
    session = dit_sparse.apply(pipe, tiny.Cached(keep=3), schedule="refresh 2")
    outs = [tiny.run_wan(pipe, **size) for size in ({}, {"height": 96, "num_frames": 9}, {})]
    assert torch.equal(outs[0], outs[2])
    assert len(session.report().rows) == 4 * 3 * 2  # the last run only


def test_step_caches_refresh_when_the_schedule_says() -> None:
    made = []

    @dataclass(frozen=True, kw_only=True)
    class Spy(tiny.Cached):
        def plan(self, q: Any, k: Any, call: Any) -> Any:
            return call.cached("plan", lambda: made.append((call.step, call.layer, call.branch)) or tiny.TopK.plan(self, q, k, call))  # fmt: skip  # noqa: E501

    pipe = tiny.wan_pipeline()
    session = dit_sparse.apply(pipe, Spy(), schedule="dense 0-25%; layers 0; refresh 60%")
    tiny.run_wan(pipe, steps=5)
    both = ("cond", "uncond")
    # Steps 0 and 1 are dense; the first sparse step fills the empty memory, the step at 60 % renews it.
    assert sorted(made) == [(s, i, b) for s in (2, 3) for i in (1, 2) for b in both]
    assert {(r.where.step, r.where.phase) for r in session.report().rows if r.where.layer == 1} == {
        (0, Phase.DENSE), (1, Phase.DENSE), (2, Phase.REFRESH), (3, Phase.REFRESH), (4, Phase.SPARSE)
    }  # fmt: skip
    made.clear()
    tiny.run_wan(pipe, steps=5)
    assert len(made) == 8  # nothing is carried over from the last run


@torch.no_grad()
def test_a_bare_transformer_warns_once_and_ignores_step_rules() -> None:
    model = tiny.wan()
    session = dit_sparse.apply(model, RADIAL, schedule="dense 0-100%; layers 0")
    with pytest.warns(UserWarning, match=r"dit_sparse\.apply\(pipe, \.\.\.\)"):
        model(**tiny.wan_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**tiny.wan_inputs())
    assert len(rows(session, Phase.SPARSE)) == 2


def test_a_run_that_was_interrupted_leaves_nothing_behind() -> None:
    pipe = tiny.wan_pipeline()
    session = dit_sparse.apply(pipe, tiny.Cached(), schedule="refresh 2")
    whole = tiny.run_wan(pipe)

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.run_wan(pipe, callback_on_step_end=stop, generator=torch.Generator().manual_seed(1))
    assert torch.equal(tiny.run_wan(pipe), whole)
    rows = session.report().rows
    assert len(rows) == 4 * 3 * 2
    assert all(row.calls == 1 for row in rows)


@torch.no_grad()
def test_a_layer_on_its_own_runs_dense_and_says_why() -> None:
    model, x = tiny.wan(), tiny.randn(1, 120, 24)
    stock = model.blocks[0].attn1(x)
    session = dit_sparse.apply(model, RADIAL, schedule="always")
    assert torch.equal(model.blocks[0].attn1(x), stock)
    assert [r.where.reason for r in session.report().rows] == [
        "called outside its transformer's forward, which tells the grid"
    ]


def test_replaced_processors_are_noticed() -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    pipe = tiny.wan_pipeline()
    session = dit_sparse.apply(pipe, RADIAL)
    pipe.transformer.blocks[1].attn1.processor = replaced = WanAttnProcessor()
    with pytest.warns(UserWarning, match=r"1 of 3 layers no longer .*blocks\.1\.attn1"):
        tiny.run_wan(pipe)
    session.remove()
    assert pipe.transformer.blocks[1].attn1.processor is replaced


@torch.no_grad()
def test_key_padding_masks_are_honoured_and_others_run_dense() -> None:
    """A padded sequence gives the same as the trimmed one; any other mask leaves the call to the model."""
    model = tiny.wan()
    session = dit_sparse.apply(model, tiny.TopK(keep=2), schedule="always")
    model(**tiny.wan_inputs())
    attn = model.blocks[0].attn1
    x = tiny.randn(2, 120, 24)
    keys = torch.ones(2, 120, dtype=torch.bool)
    keys[0, 70:] = False
    keys[1, 100:] = False
    masked = attn(x, None, keys[:, None, None], None)
    assert session.report().rows[-1].where.phase is Phase.SPARSE
    # Values behind the mask must not matter at all.
    poisoned = torch.where(keys[..., None], x, x + 100)
    again = attn(poisoned, None, keys[:, None, None], None)
    torch.testing.assert_close(again[0, :70], masked[0, :70], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again[1, :100], masked[1, :100], atol=1e-5, rtol=1e-5)
    additive = torch.where(keys, 0.0, -1e9)[:, None, None]
    torch.testing.assert_close(attn(x, None, additive, None), masked, atol=1e-5, rtol=1e-5)
    for odd in (torch.rand(120, 120) > 0.5, torch.randn(1, 1, 1, 120)):
        before = len(rows(session, Phase.DENSE))
        attn(x, None, odd, None)
        last = rows(session, Phase.DENSE)
        assert len(last) == before + 1
        assert "mask" in last[-1].where.reason
    session.strict = True
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn1 cannot run sparse: an attention mask of shape \(120, 120\)"
    ):
        attn(x, None, torch.rand(120, 120) > 0.5, None)


@torch.no_grad()
def test_the_users_attention_backend_survives() -> None:
    model = tiny.wan()
    with dit_sparse.apply(model, RADIAL, schedule="layers 0-2"):
        model.blocks[0].attn1.set_attention_backend("_native_math")
        model(**tiny.wan_inputs())
    processor = model.blocks[0].attn1.processor
    assert type(processor).__name__ == "WanAttnProcessor"
    assert processor._attention_backend == "_native_math"


def test_bad_input_is_one_clear_error() -> None:
    pipe = tiny.wan_pipeline()
    with pytest.raises(ValueError, match=r"unknown method 'radail'; there are .*radial"):
        dit_sparse.apply(pipe, "radail")
    with pytest.raises(ValueError, match=r"radial has no parameter decai; it has .*decay"):
        dit_sparse.apply(pipe, "radial", decai=1.0)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; there are auto, reference"):
        dit_sparse.apply(pipe, "radial", backend="cuda")
    with pytest.raises(ValueError, match=r"expected .*\n  dense 0-25%; lairs 0\n               \^"):
        dit_sparse.apply(pipe, "radial", schedule="dense 0-25%; lairs 0")
    with pytest.raises(
        ValueError, match=r"Linear is not a supported transformer; supported are .*WanTransformer3D"
    ):
        dit_sparse.apply(nn.Linear(2, 2), "radial")
    with pytest.raises(ValueError, match="expected a diffusers pipeline or a transformer, got str"):
        dit_sparse.apply("wan2.1", "radial")
    with pytest.raises(ValueError, match="belong to a method given by name"):
        dit_sparse.apply(pipe, RADIAL, block=64)
    assert dit_sparse.session(pipe) is None
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_a_density_may_be_asked_for() -> None:
    pipe = tiny.wan_pipeline()
    session = dit_sparse.apply(pipe, "radial", block=4, decimate_below=4, density=0.8, schedule="always")
    tiny.run_wan(pipe, steps=1, num_frames=33)
    assert abs(session.report().sparse_density - 0.8) < 0.05
    dit_sparse.apply(pipe, tiny.Diagonal(), density=0.5, schedule="always")
    with pytest.raises(ValueError, match="Diagonal has no setting that follows a density"):
        tiny.run_wan(pipe, steps=1)


def test_a_report_is_a_table_and_json() -> None:
    pipe = tiny.wan_pipeline()
    session = dit_sparse.apply(pipe, RADIAL)
    tiny.run_wan(pipe)
    report = session.report()
    table = str(report)
    assert "full run" in table
    assert "sparse calls only" in table
    told = json.loads(report.to_json(heads=True))
    assert told == report.to_dict(heads=True)
    totals = told["totals"]
    for name, chosen in (("full_run", report.rows), ("sparse_calls_only", report.sparse_rows)):
        pairs, every = sum(sum(r.pairs) for r in chosen), sum(sum(r.every) for r in chosen)
        assert totals[name] == {
            "calls": len(chosen),
            "pairs": pairs,
            "all_pairs": every,
            "density": pairs / every,
        }
    assert totals["sparse_calls_only"]["density"] < totals["full_run"]["density"] < 1
    row = told["rows"][-1]
    assert {"step", "layer", "branch", "phase", "density", "backend", "reason"} <= set(row)
    assert len(row["heads"]) == 2
    assert sum(h["pairs"] for h in row["heads"]) == row["pairs"]


class Gate(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads,), 0.5))


@dataclass(frozen=True, kw_only=True)
class Gated(tiny.Diagonal):
    """A method with one trainable number per head."""

    reads: ClassVar[frozenset[str]] = frozenset({"layout"})

    def module(self, layer: Layer) -> nn.Module:
        return Gate(layer.heads)

    def attend(self, q: Any, k: Any, v: Any, call: Any) -> Any:
        return super().attend(q, k, v, call) * call.part.weight[:, None, None]


@pytest.mark.filterwarnings("ignore:.*outside a pipeline run")
def test_trainable_parts_are_the_models_while_attached(tmp_path: Path) -> None:
    model, inputs = tiny.wan(), tiny.wan_inputs()
    keys = list(model.state_dict())
    session = dit_sparse.apply(model, Gated(), schedule="layers 0")
    assert "blocks.2.attn1.sparse_branch.weight" in model.state_dict()
    model(**inputs)[0].square().mean().backward()
    grads = [model.blocks[i].attn1.sparse_branch.weight.grad for i in range(3)]
    assert grads[0] is None
    assert grads[1].abs().sum() > 0
    with torch.no_grad():
        model.blocks[1].attn1.sparse_branch.weight.fill_(0.25)
        wanted = model(**inputs)[0]
    session.save_pretrained(tmp_path / "parts")
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [
        "sparse_config.json",
        "sparse_modules.safetensors",
    ]
    session.remove()
    assert list(model.state_dict()) == keys
    session = dit_sparse.apply(model, Gated(), schedule="layers 0")
    session.load_pretrained(tmp_path / "parts")
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], wanted)
    other = dit_sparse.apply(tiny.wan(num_layers=2), Gated())
    with pytest.raises(ValueError, match=r"unexpected \['transformer/blocks\.2\.attn1\.weight'\]"):
        other.load_pretrained(tmp_path / "parts")
    with pytest.raises(ValueError, match="no trainable parts"):
        dit_sparse.apply(model, RADIAL).save_pretrained(tmp_path / "none")


def test_import_is_lazy() -> None:
    code = (
        "import sys, dit_sparse\n"
        "assert not {'diffusers', 'torch', 'triton', 'peft', 'torchmetrics'} & set(sys.modules)\n"
        "dit_sparse.TokenLayout((1, 2, 3))\n"
        "assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_method_of_ones_own_needs_no_other_import_for_the_seam() -> None:
    code = (
        "from dit_sparse import SparseProcessor\n"
        "from diffusers.models.attention import AttentionMixin\n"
        "class Own(SparseProcessor): pass\n"
        "try: AttentionMixin().set_attn_processor(Own())\n"
        "except ValueError as refused: assert 'AttentionMixin' in str(refused), refused\n"
        "else: raise AssertionError('the stock function took a method')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_peft_and_torchmetrics_are_optional() -> None:
    code = (
        "import sys\n"
        "for name in ('triton', 'peft', 'torchmetrics'): sys.modules[name] = None\n"
        "import torch, dit_sparse\n"
        "from dit_sparse.kernels import block_sparse_attention\n"
        "from dit_sparse import TokenLayout, Call, RadialProcessor\n"
        "q = torch.randn(1, 1, 64, 8); layout = TokenLayout((4, 4, 4))\n"
        "method = RadialProcessor(block=16); call = Call.standalone(layout)\n"
        "block_sparse_attention(q, q, q, method.select(q, q, call))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.no_grad()
def test_a_method_is_no_processor_of_one_layer() -> None:
    model = tiny.wan()
    model.blocks[0].attn1.set_processor(RADIAL)
    with pytest.raises(ValueError, match=r"RadialProcessor cannot be one layer's processor: use model\.set"):
        model(**tiny.wan_inputs())


def test_nothing_is_remembered_beyond_the_last_step() -> None:
    pipe = tiny.wan_pipeline()
    session = dit_sparse.apply(pipe, tiny.Cached(), schedule="dense 0-25%")
    kept = []

    def look(*_: Any) -> None:
        kept.append(len(session._memory))

    hook = pipe.transformer.register_forward_hook(look)
    tiny.run_wan(pipe, steps=4)
    hook.remove()
    assert kept == [3, 6, 6, 6, 6, 6, 3, 0]  # three layers, two branches
    assert sum(row.where.phase is Phase.SPARSE for row in session.report().rows) == 2 * 2 * 3


@torch.no_grad()
def test_a_density_by_name_is_that_of_all_pairs() -> None:
    """Also of a method that calls its own share of the grid "density"."""
    model = tiny.wan()
    session = dit_sparse.apply(model, "draft", density=0.5, pool=(2, 2), schedule="always")
    model(**tiny.wan_inputs())
    assert session.report().sparse_density == pytest.approx(0.5, abs=0.02)
    assert session.report().about["requested density"] == "0.5"
