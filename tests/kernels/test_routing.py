"""The gather kernels of plans with few query tokens a block, against the reference in float64.

They run on a GPU (``-m gpu``), and on the CPU in the process ``test_under_the_interpreter`` starts.
"""

from dataclasses import dataclass

import pytest
import torch
from interpreter import INTERPRETED, run_under_interpreter

from dit_sparse.kernels import block_sparse_attention
from dit_sparse.plan import Plan

pytest.importorskip("triton")

from dit_sparse.kernels import routing
from dit_sparse.kernels.routing import routed_attention

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=GPU)]
# RMS of the error over RMS of the result, against float64. One bound per dtype, from its unit roundoff.
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LSE_BOUND = {torch.float32: 5e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison; ``plan`` and ``valid`` are the (batch, heads) of those two."""

    queries: int
    keys: int
    head_dim: int
    block: tuple[int, int]
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    plan: tuple[int, int] = (1, 1)
    valid: tuple[int, int] | None = None


CASES = [
    Case(40, 96, 3, (1, 16), plan=(1, 2)),
    Case(500, 63, 16, (1, 7)),
    Case(200, 200, 64, (1, 37), batch=2, heads=4, kv_heads=2, plan=(2, 1), valid=(2, 4)),
    Case(127, 300, 40, (1, 64), batch=2, heads=4, kv_heads=2, plan=(2, 4)),
    Case(63, 500, 128, (1, 200), heads=3, kv_heads=1, plan=(1, 3), valid=(1, 1)),
    Case(127, 300, 48, (5, 100), heads=4, kv_heads=2, plan=(1, 4), valid=(1, 2)),
]
IN_ROUNDS = Case(23, 40, 16, (5, 9), batch=2, heads=4, kv_heads=2, plan=(2, 4), valid=(1, 2))


def make(case, dtype=torch.float32, device="cpu"):
    """q, k, v, plan and valid. Query block 1 lists nothing, and key block 1 is all holes."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(case.batch, case.heads, case.queries, case.head_dim, generator=g)
    k = torch.randn(case.batch, case.kv_heads, case.keys, case.head_dim, generator=g)
    v = torch.randn(case.batch, case.kv_heads, case.keys, case.head_dim, generator=g)
    rows, columns = -(-case.queries // case.block[0]), -(-case.keys // case.block[1])
    keep = torch.rand(*case.plan, rows, columns, generator=g) < 0.5
    keep[:, :, 1] = False
    keep[:, :, 2] = torch.arange(columns) == 1
    valid = None
    if case.valid is not None:
        valid = torch.rand(*case.valid, case.keys, generator=g) < 0.9
        valid[..., case.block[1] : 2 * case.block[1]] = False
        valid[0, 0, : case.block[1]] = True
    plan = Plan.from_blocks(keep, case.block).to(device)
    tensors = [x.to(device, dtype) for x in (q, k, v)]
    return *tensors, plan, None if valid is None else valid.to(device)


def routed(q, k, v, plan, valid):
    scale = q.shape[-1] ** -0.5
    return routed_attention(q, k, v, plan.indices, plan.counts, plan.block, valid=valid, scale=scale)


def reference(q, k, v, plan, valid):
    return block_sparse_attention(q, k, v, plan, valid=valid, backend="reference")


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN, so a kernel that forgets to write shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poison)


def check(case, dtype, device):
    q, k, v, plan, valid = make(case, dtype, device)
    truth, truth_lse = reference(q.double(), k.double(), v.double(), plan, valid)
    out, lse = routed(q, k, v, plan, valid)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert lse.shape == q.shape[:3]
    assert lse.dtype == torch.float32
    empty = truth_lse == float("-inf")
    assert empty.any()
    assert torch.equal(lse == float("-inf"), empty)
    assert not out[empty].any()
    assert rms(out - truth) <= BOUND[dtype] * rms(truth)
    assert rms((lse - truth_lse)[~empty]) <= LSE_BOUND[dtype] * rms(truth_lse[~empty])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case, device, poisoned):
    check(case, torch.float32, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_low_precision(dtype, device, poisoned):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter has no bfloat16 product")
    check(CASES[2], dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget", [1, 3_000, 10_000, 30_000])
def test_rounds_do_not_change_results(budget, device, poisoned, monkeypatch):
    """Budgets for a query block, for several, for a head, and for several."""
    tensors = make(IN_ROUNDS, device=device)
    want = routed(*tensors)
    monkeypatch.setattr(routing, "PARTS_BYTES", budget)
    sizes = []
    launch = routing._launch_parts
    monkeypatch.setattr(
        routing, "_launch_parts", lambda k, own, *a: (sizes.append(own[0].nbytes), launch(k, own, *a))
    )
    for got, expected in zip(routed(*tensors), want, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert len(sizes) > 1
    assert budget == 1 or max(sizes) <= budget


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_read(device):
    q, k, v, plan, _ = make(CASES[0], device=device)
    none = Plan.from_blocks(torch.zeros(40, 6, dtype=torch.bool), (1, 16)).to(device)
    assert none.indices.shape[-1] == 0
    q.requires_grad_()
    for lists, valid in ((none, None), (plan, torch.zeros(1, 1, 96, dtype=torch.bool, device=device))):
        out, lse = routed(q, k, v, lists, valid)
        assert not out.any()
        assert (lse == float("-inf")).all()
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert not grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_takes_strided_inputs_and_aliases_none(device):
    q, k, v, plan, valid = make(CASES[3], device=device)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out, lse = routed(*strided, plan, valid)
    torch.testing.assert_close(out, routed(q, k, v, plan, valid)[0])
    inputs = {x.untyped_storage().data_ptr() for x in strided}
    assert not inputs & {out.untyped_storage().data_ptr(), lse.untyped_storage().data_ptr()}


def gradients(attention, q, k, v, plan, valid):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, plan, valid)
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.device)
    lse_weight = torch.randn(lse.shape, generator=g, dtype=torch.float64).to(out.device)
    # An empty query's lse is -inf whatever its inputs: it takes no part in a loss.
    finite = torch.where(lse == float("-inf"), 0, lse)
    loss = (out * weight).sum() + (finite * lse_weight).sum()
    return torch.autograd.grad(loss, (q, k, v))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "budget"), [*((c, None) for c in CASES), (IN_ROUNDS, 3_000)], ids=str)
def test_gradients(case, budget, device, poisoned, monkeypatch):
    if budget is not None:
        monkeypatch.setattr(routing, "PARTS_BYTES", budget)
    q, k, v, plan, valid = make(case, device=device)
    want = gradients(reference, *(x.double() for x in (q, k, v)), plan, valid)
    for name, got, exact in zip("qkv", gradients(routed, q, k, v, plan, valid), want, strict=True):
        assert got.dtype == torch.float32
        assert rms(got - exact) <= 5e-6 * rms(exact), f"gradient of {name}"


@pytest.mark.parametrize("device", DEVICES)
def test_low_precision_gradients(device, poisoned):
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    q, k, v, plan, valid = make(CASES[2], dtype, device)
    want = gradients(reference, *(x.double() for x in (q, k, v)), plan, valid)
    for got, exact in zip(gradients(routed, q, k, v, plan, valid), want, strict=True):
        assert got.dtype == dtype
        assert rms(got - exact) <= 1e-2 * rms(exact)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_one_output(device):
    q, k, v, plan, valid = make(CASES[0], device=device)
    q.requires_grad_()
    for i in range(2):
        (got,) = torch.autograd.grad(routed(q, k, v, plan, valid)[i][:, :, 3:].sum(), q)
        (want,) = torch.autograd.grad(reference(q, k, v, plan, valid)[i][:, :, 3:].sum(), q)
        torch.testing.assert_close(got, want, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    q, k, v, plan, valid = make(CASES[0], device=device)
    for exists in (None, torch.ones(1, 1, 96, dtype=torch.bool, device=device)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        lists = plan.indices, plan.counts, *plan.block
        torch.library.opcheck(
            torch.ops.dit_sparse.routed_attention_triton.default, (*inputs, *lists, exists, 0.3)
        )
    out, lse = routed(q, k, v, plan, valid)
    backward = torch.ops.dit_sparse.routed_attention_triton_backward.default
    torch.library.opcheck(backward, (out, lse, q, k, v, out, lse, *lists, None, 0.3))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    q, k, v, plan, valid = make(CASES[2], device=device)
    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(q, k, v, plan, valid), routed(q, k, v, plan, valid), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")
def test_under_the_interpreter():
    run_under_interpreter(__file__)
