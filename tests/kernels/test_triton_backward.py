"""Gradients of the Triton kernels against autograd of the reference in float64.

They run on a GPU (``-m gpu``), and on the CPU in the process ``test_under_the_interpreter`` starts.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CASES, Case, make, rms
from interpreter import INTERPRETED, run_under_interpreter

from dit_sparse.kernels import block_sparse_attention, merge
from dit_sparse.plan import Plan

pytest.importorskip("triton")

from dit_sparse.kernels.block_sparse_backward import backward, tiles
from dit_sparse.kernels.targets import TARGETS

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=GPU)]
# RMS of the error over RMS of the gradient, against float64.
BOUND = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Blocks of several tiles on both sides, whole ones and ragged ones; the group shares keys but not validity.
LARGE = [
    Case(500, 300, 32, (128, 64), plan=(1, 2)),
    Case(200, 500, 72, (64, 128), heads=4, kv_heads=2, plan=(1, 4), valid=(1, 4)),
]


def upstream(q):
    """Gradients of out and lse."""
    g = torch.Generator().manual_seed(2)
    grad_out = torch.randn(q.shape, generator=g).to(q.device, q.dtype)
    return grad_out, torch.randn(q.shape[:3], generator=g).to(q.device)


def exact(q, k, v, plan, valid, grad_out, grad_lse, scale):
    """out, lse and the gradients in float64; a gradient of None leaves that output out of the loss."""
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(*inputs, plan, valid=valid, scale=scale, backend="reference")
    # An empty query's lse is -inf whatever its inputs: it takes no part in a loss.
    finite = lse.masked_fill(lse == float("-inf"), 0)
    loss = sum((x * g).sum() for x, g in ((out, grad_out), (finite, grad_lse)) if g is not None)
    return out.detach(), lse.detach(), torch.autograd.grad(loss, inputs)


def run(q, k, v, plan, valid, grad_out, grad_lse, scale, out, lse):
    lists = (plan.indices, plan.counts, *plan.block, plan.keys)
    return backward(grad_out, grad_lse, q, k, v, out.to(q.dtype), lse.float(), *lists, valid, scale)


def check(case, dtype, device):
    q, k, v, plan, valid = make(case, dtype, device)
    grads = upstream(q)
    out, lse, want = exact(q, k, v, plan, valid, *grads, 0.3)
    got = run(q, k, v, plan, valid, *grads, 0.3, out, lse)
    for name, x, g, w in zip("qkv", (q, k, v), got, want, strict=True):
        assert g.shape == x.shape
        assert g.dtype == dtype
        assert g.is_contiguous()
        assert rms(g - w) <= BOUND[dtype] * rms(w), f"gradient of {name}"
        assert not g[w == 0].any(), f"gradient of {name} where nothing reads or is read"


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN, so a kernel that forgets to write shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_agrees_with_float64(device, case, poisoned):
    check(case, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[7], *LARGE], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_low_precision(device, case, dtype, poisoned):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter has no bfloat16 product")
    check(case, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_full_plan_is_dense_attention(device):
    q, k, v, _, _ = make(CASES[1], device=device)
    plan = Plan.from_blocks(torch.ones(4, 4, dtype=torch.bool), 32).to(device)
    grad_out, _ = upstream(q)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    dense = F.scaled_dot_product_attention(*inputs, scale=0.3)
    want = torch.autograd.grad((dense * grad_out).sum(), inputs)
    lse = (q.double() @ k.double().mT * 0.3).logsumexp(-1)
    got = run(q, k, v, plan, None, grad_out, None, 0.3, dense.detach(), lse)
    for g, w in zip(got, want, strict=True):
        assert rms(g - w) <= BOUND[torch.float32] * rms(w)


@pytest.mark.parametrize("used", ["out", "lse"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_one_output(device, used):
    q, k, v, plan, valid = make(CASES[4], device=device)
    grad_out, grad_lse = upstream(q)
    loss = (grad_out, None) if used == "out" else (torch.zeros_like(grad_out), grad_lse)
    out, lse, want = exact(q, k, v, plan, valid, *loss, 0.3)
    for g, w in zip(run(q, k, v, plan, valid, *loss, 0.3, out, lse), want, strict=True):
        assert rms(g - w) <= BOUND[torch.float32] * rms(w)


@pytest.mark.parametrize("cause", ["plan", "valid"])
@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_read(device, cause, poisoned):
    q, k, v, plan, _ = make(CASES[0], device=device)
    valid = torch.full((1, 1, 63), cause == "plan", device=device)
    if cause == "plan":
        plan = Plan.from_blocks(torch.zeros(4, 4, dtype=torch.bool), 16).to(device)
    lse = torch.full(q.shape[:3], -float("inf"), device=device)
    for g in run(q, k, v, plan, valid, *upstream(q), 0.3, torch.zeros_like(q), lse):
        assert not g.any()


@pytest.mark.parametrize("device", DEVICES)
def test_holes_may_hold_anything(device):
    q, k, v, plan, valid = make(CASES[3], device=device)
    grads = upstream(q)
    out, lse, _ = exact(q, k, v, plan, valid, *grads, 0.3)
    want = run(q, k, v, plan, valid, *grads, 0.3, out, lse)
    k, v = (x.masked_fill(~valid[..., None], float("nan")) for x in (k, v))
    for g, w in zip(run(q, k, v, plan, valid, *grads, 0.3, out, lse), want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_for_any_strides_and_order_of_programs(device, monkeypatch):
    q, k, v, plan, valid = make(CASES[6], device=device)
    grads = upstream(q)
    out, lse, _ = exact(q, k, v, plan, valid, *grads, 0.3)
    want = run(q, k, v, plan, valid, *grads, 0.3, out, lse)
    monkeypatch.setattr(
        "dit_sparse.kernels.block_sparse_backward.schedule",
        lambda counts, batch, heads: torch.arange(
            batch * heads * counts.shape[-1] - 1, -1, -1, dtype=torch.int32, device=counts.device
        ),
    )
    q, k, v, grad_out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grads[0]))
    for g, w in zip(run(q, k, v, plan, valid, grad_out, grads[1], 0.3, out, lse), want, strict=True):
        assert torch.equal(g, w)
        assert g.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_autograd_through_merge(device):
    """Attention over two disjoint plans, merged: its gradient needs that of both outputs of each part."""
    q, k, v, plan, valid = make(CASES[2], device=device)
    grad_out, grad_lse = upstream(q)
    _, _, want = exact(q, k, v, plan, valid, grad_out, grad_lse, 0.3)
    keep = plan.to_blocks()
    even = torch.arange(plan.keys, device=device) % 2 == 0
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    parts = [
        block_sparse_attention(*inputs, Plan.from_blocks(part, plan.block), scale=0.3, backend="triton")
        for part in (keep & even, keep & ~even)
    ]
    out, lse = merge(*zip(*parts, strict=True))
    loss = (out * grad_out).sum() + (lse.masked_fill(lse == float("-inf"), 0) * grad_lse).sum()
    for g, w in zip(torch.autograd.grad(loss, inputs), want, strict=True):
        assert rms(g - w) <= BOUND[torch.float32] * rms(w)


@pytest.mark.parametrize("device", DEVICES)
def test_is_a_proper_op(device):
    q, k, v, plan, valid = make(CASES[4], device=device)
    grads = upstream(q)
    out, lse, _ = exact(q, k, v, plan, valid, *grads, 0.3)
    lists = (plan.indices, plan.counts, *plan.block, plan.keys)
    torch.library.opcheck(backward, (*grads, q, k, v, out.float(), lse.float(), *lists, valid, 0.3))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_target_has_tiles(target):
    for head_dim, itemsize in itertools.product((1, 32, 64, 96, 128, 160, 256), (2, 4)):
        for block in ((128, 128), (128, 64), (64, 64), (24, 40), (160, 160), (1, 64), (1, 7)):
            dq, dkdv = tiles(target, head_dim, itemsize, block)
            assert dq.queries <= max(16, 2 * block[0])
            assert dkdv.keys <= max(16, 2 * block[1])
            for tile in (dq.queries, dq.keys, dkdv.queries, dkdv.keys):
                assert tile >= 16
                assert tile & (tile - 1) == 0


@pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")
def test_under_the_interpreter():
    run_under_interpreter(__file__)
