"""Re-ttention: the authors' traces, its definition step by step in float64, what it keeps and how long."""

import json
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch import Tensor

import dit_sparse
from dit_sparse.kernels.reference import token_mask
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor
from dit_sparse.order import Order
from dit_sparse.processors.adaspa import AdaSpaProcessor
from dit_sparse.processors.dense import DenseProcessor
from dit_sparse.processors.draft import DraftProcessor
from dit_sparse.processors.radial import RadialProcessor
from dit_sparse.processors.rettention import Measured, ReTtentionProcessor
from dit_sparse.processors.spatial_window import SpatialWindowProcessor
from dit_sparse.schedule import Phase, Schedule

VECTORS = Path(__file__).parents[1] / "vectors" / "rettention"
RADIAL = RadialProcessor(block=8, decay=0.2, decimate_below=32)
CHOOSING = DraftProcessor(density=0.3, pool=(2, 3))
LAYOUT = TokenLayout((5, 4, 7), text=9, text_first=True)
pytestmark = pytest.mark.filterwarnings("ignore:Re-ttention keeps")


def qkv(layout: TokenLayout, *, batch: int = 2, kv_heads: int = 2, seed: int = 0) -> list[Tensor]:
    shapes = [(batch, n, layout.sequence, 12) for n in (4, kv_heads, kv_heads)]
    return [tiny.randn(*shape, seed=3 * seed + i) for i, shape in enumerate(shapes)]


def attend(method: SparseProcessor, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Model order in and out."""
    order = method.order(call)
    return order.undo(method.attend(*(order.apply(x) for x in (q, k, v)), call.at(order=order)))


def tokens_read(method: SparseProcessor, q: Tensor, k: Tensor, call: Call) -> Tensor:
    """The token mask of a method's plan in model order, bool [B or 1, H, S, S]."""
    order, plan = method.order(call), method.select(q, k, call)
    mask = token_mask(plan, order.slots, order.slots, q.shape[1], order.valid(call.valid), order.index)
    mask = mask.float().expand(-1, q.shape[1], -1, -1)
    return order.undo(order.undo(mask).mT.contiguous()).mT.bool()


def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) in float64."""
    q, k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (q, k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("path", sorted(VECTORS.glob("trace_*.json")), ids=lambda path: path.stem)
def test_vectors(path):
    """Step by step as the released processor ran: dense 0-4, refresh at 5, 10 and 15."""
    given = json.loads(path.read_text())["inputs"]
    stored = {name: torch.tensor(x) for name, x in np.load(path.with_suffix(".npz")).items()}
    window = SpatialWindowProcessor(keep=given["keep_fraction"], exact=True)
    method = ReTtentionProcessor(
        inner=window, clamp=False, use_ratio=given["use_ratio"], residual="float32", ramp=0.04
    )
    schedule = Schedule.parse("dense 0-4").with_refresh(method.refresh)
    call = Call.standalone(TokenLayout((1, 8, 8)), heads=2, steps=given["steps"])
    call = call.at(order=method.order(call))
    used = replace(method, use_ratio=True)  # the released code measures rho also where it leaves it out

    def heads(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight.T).unflatten(-1, (2, 8)).transpose(1, 2)

    def project(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2) @ stored["Wo"].T

    sparse = 0
    for step, x in enumerate(stored["x"]):
        q, k, v = 1.5 * heads(x, stored["Wq"]), 1.5 * heads(x, stored["Wk"]), heads(x, stored["Wv"])
        phase = schedule.phase(step, given["steps"], 0, 1)
        if phase is Phase.DENSE:
            continue
        here = call.at(step=step, phase=phase)
        out = method.attend(q, k, v, here)
        torch.testing.assert_close(project(out) + stored["bo"], stored["y"][step], atol=1e-5, rtol=1e-5)
        residual = project(here.cache["rettention"][0].residual())
        torch.testing.assert_close(residual, stored["residual_after_step"][step], atol=1e-5, rtol=1e-5)
        if given["use_ratio"]:  # the stored one already has the step's increment
            after = method.ratio(here.at(step=step + 1))[0]
            torch.testing.assert_close(after, stored["rho_after_step"][step], atol=1e-5, rtol=1e-5)
        elif phase is Phase.REFRESH:
            other = here.at(cache={})
            used.attend(q, k, v, other)
            rho = other.cache["rettention"][0].rho[0]
            torch.testing.assert_close(rho, stored["rho_after_step"][step], atol=1e-5, rtol=1e-5)
        sparse += phase is Phase.SPARSE
    assert sparse == {20: 12, 12: 5}[given["steps"]]


def test_every_vector_is_there():
    assert len(list(VECTORS.glob("*.json"))) == 9


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize(
    ("inner", "layout"),
    [
        (RADIAL, LAYOUT),
        (SpatialWindowProcessor(keep=0.4, block=8), TokenLayout((1, 9, 11), text=5)),
        (SpatialWindowProcessor(keep=0.2, block=8), TokenLayout((3, 5, 7), text=4, prefix=6, suffix=2)),
        (SpatialWindowProcessor(keep=0.3, block=16, exact=True), LAYOUT),
        (CHOOSING, LAYOUT),
    ],
)
def test_equals_its_definition(inner, layout, valid):
    """Refresh, 3 steps, refresh, 2 steps: each from float64 softmaxes over the tokens of the inner plan."""
    mask = torch.ones(2, layout.sequence, dtype=torch.bool)
    if valid:
        mask[0, layout.text_start + 1 : layout.text_start + layout.text] = False
        mask[1, 3:40] = False
    call = Call.standalone(layout, heads=4, kv_heads=2, steps=20, valid=mask if valid else None)
    method = ReTtentionProcessor(inner=inner, ramp=0.1, residual="float32")
    for step, phase in enumerate([Phase.SPARSE] * 4 + [Phase.REFRESH] + [Phase.SPARSE] * 2):
        q, k, v = qkv(layout, seed=step)
        out = attend(method, q, k, v, call.at(step=step, phase=phase))
        if step in (0, 4):
            made, read = step, tokens_read(inner, q, k, call)
            assert read.double().mean() < 0.9
            dense, total = softmax(q, k, v, mask[:, None, None])
            sparse, lse = softmax(q, k, v, read & mask[:, None, None])
            rho = (lse - total).exp()
            rest, expected = dense - rho[..., None] * sparse, dense
        else:
            sparse, _ = softmax(q, k, v, read & mask[:, None, None])
            share = (rho + 0.1 * (step - made - 1)).clamp(max=1)
            expected = share[..., None] * sparse + rest
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("residual", ["float32", "bfloat16", "float8", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_inner_plan_is_dense_at_every_step(residual, dtype):
    method = ReTtentionProcessor(inner=DenseProcessor(block=8), residual=residual)
    call = Call.standalone(LAYOUT, heads=4, kv_heads=2, steps=20)
    atol = 2e-6 if dtype is torch.float32 else 0.02
    for step in range(4):
        q, k, v = (x.to(dtype) for x in qkv(LAYOUT, seed=step))
        out = attend(method, q, k, v, call.at(step=step))
        assert out.dtype == dtype
        expected = attend(DenseProcessor(block=8), q, k, v, call)
        torch.testing.assert_close(out, expected, atol=atol, rtol=0)


def test_the_output_of_a_refresh_is_the_dense_one():
    call = Call.standalone(LAYOUT, heads=4, kv_heads=2, steps=20)
    method = ReTtentionProcessor(inner=RADIAL)
    for step, phase in ((3, Phase.SPARSE), (5, Phase.REFRESH), (10, Phase.REFRESH)):
        q, k, v = qkv(LAYOUT, seed=step)
        here = call.at(step=step, phase=phase)
        order = method.order(call)
        dense, _ = here.at(order=order).run_dense(*(order.apply(x) for x in (q, k, v)))
        assert torch.equal(attend(method, q, k, v, here), order.undo(dense))
        assert here.made_at("rettention") == step


def test_with_unchanged_inputs_the_next_step_is_dense_too():
    """What R is for: kept keys and the frozen rest add up to the whole, whatever was left out."""
    call, (q, k, v) = Call.standalone(LAYOUT, heads=4, kv_heads=2, steps=20), qkv(LAYOUT)
    dense = attend(DenseProcessor(block=8), q, k, v, call)
    for inner in (RADIAL, SpatialWindowProcessor(keep=0.0, block=8), CHOOSING):
        for use_ratio in (True, False):
            method = ReTtentionProcessor(inner=inner, residual="float32", use_ratio=use_ratio)
            cache: dict = {}
            for step in (0, 1):
                out = attend(method, q, k, v, call.at(step=step, cache=cache))
                torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)
        assert (attend(inner, q, k, v, call) - dense).abs().max() > 0.1


def test_rho_grows_with_the_steps_since_it_was_measured():
    call, (q, k, v) = Call.standalone(LAYOUT, heads=4, kv_heads=2, steps=20), qkv(LAYOUT)
    method = ReTtentionProcessor(inner=RADIAL)
    attend(method, q, k, v, call.at(step=5))
    rho = call.cache["rettention"][0].rho
    assert rho.dtype == torch.float32
    assert 0 < rho.min() < 0.5
    text = torch.isin(method.order(call).index[0], torch.arange(LAYOUT.text))
    assert (rho[..., text] > 0.99999).all()  # text reads everything
    kept = rho.clone()
    for step in (9, 6, 7):  # a function of the step, not of how often it was asked
        grown = rho + 0.04 * (step - 6)
        torch.testing.assert_close(method.ratio(call.at(step=step)), grown.clamp(max=1))
        torch.testing.assert_close(replace(method, clamp=False).ratio(call.at(step=step)), grown)
        attend(method, q, k, v, call.at(step=step))
    assert torch.equal(rho, kept)
    assert (replace(method, use_ratio=False).ratio(call.at(step=5 + 1)) == rho).all()
    assert method.ratio(call.at(step=9)).max() == 1
    assert replace(method, clamp=False).ratio(call.at(step=9)).max() > 1.1


def test_the_inner_plan_stays_from_one_refresh_to_the_next():
    call = Call.standalone(LAYOUT, heads=4, kv_heads=2, steps=20)
    method = ReTtentionProcessor(inner=CHOOSING)
    plans = []
    for step, phase in enumerate([Phase.SPARSE, Phase.SPARSE, Phase.SPARSE, Phase.REFRESH, Phase.SPARSE]):
        q, k, v = qkv(LAYOUT, seed=step)
        here = call.at(step=step, phase=phase)
        attend(method, q, k, v, here)
        plans.append(method.select(q, k, here.at(phase=Phase.SPARSE)))
        if step in (0, 3):
            assert plans[-1].same(CHOOSING.select(q, k, call))
    assert plans[0].same(plans[1])
    assert plans[0].same(plans[2])
    assert not plans[0].same(plans[3])
    assert plans[3].same(plans[4])


def test_the_inner_order_is_used():
    call = Call.standalone(LAYOUT)
    for inner in (RADIAL, SpatialWindowProcessor()):
        assert torch.equal(ReTtentionProcessor(inner=inner).order(call).index, inner.order(call).index)


def test_a_new_batch_in_a_run_is_measured_anew():
    """Guidance that ends within a run."""
    call = Call.standalone(LAYOUT, heads=4, kv_heads=2, steps=20)
    for inner in (RADIAL, CHOOSING):
        method, cache = ReTtentionProcessor(inner=inner), {}
        attend(method, *qkv(LAYOUT), call.at(step=1, cache=cache))
        q, k, v = qkv(LAYOUT, batch=1, seed=1)
        out = attend(method, q, k, v, call.at(step=2, cache=cache))
        torch.testing.assert_close(out, attend(DenseProcessor(block=8), q, k, v, call))
        assert cache["rettention"][1] == 2
        attend(method, q, k, v, call.at(step=3, cache=cache))
        assert cache["rettention"][1] == 2


def test_queries_without_keys_keep_the_dense_output():
    """Where nothing of the inner plan may be read rho is 0, and where nothing at all, so is the output."""

    @dataclass(frozen=True, kw_only=True)
    class FirstBlock(tiny.Diagonal):
        def plan(self, q, k, call):
            keep = torch.zeros(super().plan(q, k, call).to_blocks().shape, dtype=torch.bool)
            keep[..., 0] = True
            return dit_sparse.Plan.from_blocks(keep, self.block)

    layout = TokenLayout((2, 4, 6))
    valid = torch.ones(2, 48, dtype=torch.bool)
    valid[0, :16] = False
    valid[1] = False
    call = Call.standalone(layout, heads=4, kv_heads=2, steps=20, valid=valid)
    method, (q, k, v) = ReTtentionProcessor(inner=FirstBlock()), qkv(layout)
    expected = attend(DenseProcessor(block=8), q, k, v, call)
    for step in range(3):
        out = attend(replace(method, residual="float32", ramp=0.0), q, k, v, call.at(step=step))
        torch.testing.assert_close(out, expected)
    assert (expected[1] == 0).all()
    assert (call.cache["rettention"][0].rho == 0).all()


def test_gradients_see_constants():
    """At a refresh those of dense attention; later rho times those of the inner method."""
    call = Call.standalone(LAYOUT, heads=4, kv_heads=2, steps=20)
    method = ReTtentionProcessor(inner=RADIAL)
    inputs = [x.requires_grad_() for x in qkv(LAYOUT)]

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * tiny.randn(*out.shape, seed=9)).sum(), inputs)

    dense = attend(DenseProcessor(block=8), *inputs, call)
    for a, b in zip(gradients(attend(method, *inputs, call.at(step=5))), gradients(dense), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    measured = call.cache["rettention"][0]
    assert not measured.rho.requires_grad
    assert not measured.stored.requires_grad
    out = attend(method, *inputs, call.at(step=7))
    ratio = method.order(call).undo(method.ratio(call.at(step=7))[..., None])
    scaled = ratio * attend(RADIAL, *inputs, call)
    for a, b in zip(gradients(out), gradients(scaled), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("residual", "channel", "query"), [
    ("float32", 4, 0), ("bfloat16", 2, 0), ("float8", 1, 2), ("cpu", 2, 0),
])  # fmt: skip
def test_memory_is_what_is_kept(residual, channel, query):
    method = ReTtentionProcessor(inner=RADIAL, residual=residual)
    call, (q, k, v) = Call.standalone(LAYOUT, heads=4, kv_heads=2, steps=20), qkv(LAYOUT)
    attend(method, q, k, v, call)
    measured = call.cache["rettention"][0]
    parts = [x for x in (measured.rho, measured.stored, measured.scale) if x is not None]
    kept = sum(x.numel() * x.element_size() for x in parts)
    slots = 5 * 32 + 9  # frames of 28 tokens in blocks of 8, then text
    assert kept == 2 * 4 * slots * (4 + query + channel * 12)
    assert method.memory(LAYOUT, 4, 12, calls=2) == kept
    assert measured.stored.device.type == "cpu"


def test_published_memory():
    """R of CogVideoX-2B, 17776 tokens, 30 layers of 30 heads of 64 and two branches: 4.1 GB in 16 bits."""
    layout = TokenLayout((13, 30, 45), text=226, text_first=True)
    method = ReTtentionProcessor(inner=SpatialWindowProcessor(block=2))
    rho = 4 * 30 * layout.sequence * 60
    assert round((method.memory(layout, 30, 64, calls=60) - rho) / 1e9, 1) == 4.1
    assert replace(method, residual="float8").memory(layout, 30, 64, calls=60) < 2.4e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_errors_of_what_is_kept(dtype):
    """At most 2^-8 of a value in bfloat16; in float8 1/15 of it, or 1/450,000 of the query's largest."""
    call, (q, k, v) = Call.standalone(LAYOUT, heads=4, kv_heads=2, steps=20), qkv(LAYOUT)
    q, k, v = (x.to(dtype) for x in (q, k, v * 10 ** tiny.randn(1, 1, 1, 12)))
    kept: dict[str, Measured] = {}
    for residual in ("float32", "bfloat16", "float8", "cpu"):
        here = call.at(cache={})
        attend(ReTtentionProcessor(inner=RADIAL, residual=residual), q, k, v, here)
        kept[residual] = here.cache["rettention"][0]
    exact = kept["float32"].residual()
    assert exact.dtype == torch.float32
    assert exact.abs().max() > 100 * exact.abs().median()
    for residual in ("bfloat16", "cpu"):
        assert ((kept[residual].residual() - exact).abs() <= exact.abs() / 256).all()
    error = (kept["float8"].residual().float() - exact).abs()
    assert (error <= exact.abs() / 15 + exact.abs().amax(-1, keepdim=True) / 450_000).all()
    assert error.square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()
    assert kept["float8"].stored.dtype == torch.float8_e4m3fn
    zero = ReTtentionProcessor(inner=DenseProcessor(block=8), residual="float8")
    attend(zero, q, k, torch.zeros_like(v), here := call.at(cache={}))
    assert (here.cache["rettention"][0].residual() == 0).all()


def test_says_what_it_will_keep_before_it_does():
    method = ReTtentionProcessor(inner=RADIAL, residual="float8")
    layout = TokenLayout((30, 16, 16))
    call = Call.standalone(layout, heads=4, kv_heads=2, layers=40, steps=20)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for layer in range(3):
            q, k, v = qkv(layout)
            attend(method, q, k, v, call.at(layer=layer, cache={}))
    assert len(said) == 1, [str(one.message) for one in said]
    mib = 40 * 2 * 4 * layout.sequence * (4 + 2 + 12) / 2**20
    assert f"keeps {mib:.1f} MiB in 40 layers for each branch of guidance" in str(said[0].message)
    assert "residual='float8'" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="keeps"):
            attend(replace(method, residual="float32"), q, k, v, call.at(cache=(cache := {})))
    assert not cache


@torch.no_grad()
def test_refreshes_in_a_pipeline_and_starts_anew_with_each_run():
    pipe = tiny.wan_pipeline()
    method = ReTtentionProcessor(inner=RadialProcessor(block=8, decay=0.3, decimate_below=32))
    with dit_sparse.apply(pipe, method, schedule="dense 0-25%; layers 0") as session:
        latents, reports = [], []
        for prompt in ("a cat runs", "a dog sits", "a cat runs"):
            latents.append(tiny.run_wan(pipe, steps=12, prompt=prompt))
            reports.append(session.report())
    assert torch.equal(latents[0], latents[2])
    assert not torch.equal(latents[0], latents[1])
    for report in reports:
        phases = {}
        for row in report.rows:
            if row.where.layer > 0 and row.where.step is not None:
                phases.setdefault(row.where.step, set()).add((row.where.branch, row.where.phase))
                is_refresh = row.where.phase is Phase.REFRESH
                assert is_refresh == (row.density > 1) or row.where.phase is Phase.DENSE
        for step in range(12):
            expected = Phase.DENSE if step < 3 else Phase.REFRESH if step in (3, 5, 10) else Phase.SPARSE
            assert phases[step] == {(branch, expected) for branch in ("cond", "uncond")}, step


def test_at_density_is_that_of_the_inner_method():
    layout, inner = TokenLayout((9, 8, 10), text=5), RadialProcessor(block=8, decimate_below=64)
    found = ReTtentionProcessor(inner=inner, ramp=0.01).at_density(0.5, layout)
    assert found == ReTtentionProcessor(inner=inner.at_density(0.5, layout), ramp=0.01)
    q = torch.zeros(1, 1, layout.sequence, 1)
    filled = inner.order(Call.standalone(layout)).filled(8)
    assert abs(found.select(q, q, Call.standalone(layout)).density(filled, filled) - 0.5) < 0.03
    with pytest.raises(ValueError, match="floor"):
        ReTtentionProcessor(inner=inner).at_density(0.01, layout)


@dataclass(frozen=True, kw_only=True)
class Reordering(tiny.TopK):
    orders_by_qk: ClassVar[bool] = True

    def order(self, call: Call) -> Order:
        return Order.raster(call.layout, self.block)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inner": None}, "only chooses blocks, got None"),
        ({"inner": "radial"}, "only chooses blocks, got 'radial'"),
        ({"inner": AdaSpaProcessor()}, r"only chooses blocks, got AdaSpaProcessor\("),
        ({"inner": ReTtentionProcessor()}, r"only chooses blocks, got ReTtentionProcessor\("),
        ({"inner": Reordering()}, r"only chooses blocks, got Reordering\("),
        ({"period": 0}, "period must be >= 1 and ramp finite and >= 0, got .*period=0"),
        ({"ramp": -0.1}, "ramp finite and >= 0, got .*ramp=-0.1"),
        ({"ramp": math.inf}, "ramp finite"),
        ({"ramp": math.nan}, "ramp finite"),
        ({"residual": "int8"}, "residual must be one of float32, bfloat16, float8, cpu, got 'int8'"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        ReTtentionProcessor(**wrong)
