"""The attached model on a GPU, and what of the kernels only a GPU can show: `make gpu-check`.

The kernels' own suites run there too, through the cases marked gpu in their files.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch

import dit_sparse
from dit_sparse import DenseProcessor, RadialProcessor
from dit_sparse.kernels import block_sparse_attention
from dit_sparse.kernels.bench import Case, Shape
from dit_sparse.kernels.contenders import sdpa_loop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*outside a pipeline run"),
]

RADIAL = RadialProcessor(block=16, decay=0.3, decimate_below=32)


def run(method: Any, backend: str, dtype: torch.dtype, how: str | None = None) -> tuple[torch.Tensor, Any]:
    torch._dynamo.reset()
    model = tiny.wan().to("cuda", dtype)
    inputs = {k: v.cuda() if torch.is_tensor(v) else v for k, v in tiny.wan_inputs(2).items()}
    inputs = {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()
    }
    if method is None:
        with torch.no_grad():
            return model(**inputs)[0].float(), None
    session = dit_sparse.apply(model, method, schedule="always", backend=backend)
    session.full_plan_is_dense = False
    if how == "regional":
        model.compile_repeated_blocks(fullgraph=True)
    call = torch.compile(model, fullgraph=True) if how == "whole" else model
    with torch.no_grad():
        return call(**inputs)[0].float(), session.report()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "triton", "flex"])
def test_backends_agree_with_the_reference(backend: str, dtype: torch.dtype) -> None:
    bound = 1e-4 if dtype == torch.float32 else 0.05
    wanted, _ = run(RADIAL, "reference", dtype)
    out, report = run(RADIAL, backend, dtype)
    assert (out - wanted).square().mean().sqrt() <= bound * wanted.square().mean().sqrt()
    assert report.sparse_density < 0.9
    assert all(
        row.where.backend == ("triton" if backend == "auto" else backend) for row in report.sparse_rows
    )


def test_full_budget_equals_stock() -> None:
    stock, _ = run(None, "auto", torch.float32)
    out, report = run(DenseProcessor(block=16), "auto", torch.float32)
    assert len(report.sparse_rows) == 3
    torch.testing.assert_close(out, stock, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("how", ["whole", "regional"])
def test_compiled_equals_eager(how: str) -> None:
    eager, _ = run(RADIAL, "auto", torch.float32)
    out, report = run(RADIAL, "auto", torch.float32, how)
    assert len(report.sparse_rows) == 3
    torch.testing.assert_close(out, eager, atol=1e-3, rtol=1e-3)


def test_gradients_reach_every_parameter() -> None:
    grads = []
    for backend in ("reference", "auto"):
        model = tiny.wan().cuda().train()
        dit_sparse.apply(model, RADIAL, schedule="always", backend=backend)
        inputs = {k: v.cuda() if torch.is_tensor(v) else v for k, v in tiny.wan_inputs().items()}
        model(**inputs)[0].square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("backend", ["triton", "flex"])
@pytest.mark.parametrize("block", [(64, 64), (128, 64), (128, 128)], ids=str)
def test_the_length_of_a_real_model(block: tuple[int, int], backend: str) -> None:
    """Wan2.1 1.3B at 480p: no interpreter gets there."""
    case = Case(Shape(32_760, 2, 128, block), 0.1, "cuda", "bfloat16", "uneven")
    plan, tensors = case.plan(), case.tensors()
    exact = sdpa_loop(plan, case.shape.tokens, torch.float32)(*tensors)
    out, _ = block_sparse_attention(*tensors, plan, backend=backend)
    assert rms(out - exact) <= 8e-3 * rms(exact)


@pytest.mark.parametrize("block", [(64, 64), (128, 64), (128, 128)], ids=str)
def test_gradients_at_the_length_of_a_real_model(block: tuple[int, int]) -> None:
    case = Case(Shape(32_760, 1, 128, block), 0.1, "cuda", "bfloat16", "uneven")
    plan = case.plan()
    leaves = [x.requires_grad_() for x in case.tensors()]
    out, _ = block_sparse_attention(*leaves, plan)
    weight = torch.randn_like(out)
    exact = sdpa_loop(plan, case.shape.tokens, torch.float32)(*leaves)
    wanted = torch.autograd.grad(exact, leaves, weight.float())
    for got, want in zip(torch.autograd.grad(out, leaves, weight), wanted, strict=True):
        assert rms(got - want) <= 1e-2 * rms(want)


def test_offsets_beyond_32_bits() -> None:
    """Heads that lie more than 2**31 elements apart."""
    tokens, head_dim, far = 300, 64, 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 3 * far:
        pytest.skip("needs 6.5 GB of free memory")
    size = tokens * head_dim
    room = torch.empty(far + 3 * size, dtype=torch.bfloat16, device="cuda")
    strides = (2 * far, far, head_dim, 1)
    tensors = [room.as_strided((1, 2, tokens, head_dim), strides, i * size).normal_() for i in range(3)]
    plan = Case(Shape(tokens, 2, head_dim, (64, 64)), 0.5, "cuda").plan()
    out, lse = block_sparse_attention(*tensors, plan, backend="triton")
    want, want_lse = block_sparse_attention(*(x.contiguous() for x in tensors), plan, backend="triton")
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    case = Case(Shape(300, 2, 64, (64, 64)), 0.5, "cuda")
    plan, tensors = case.plan(), case.tensors()
    want, _ = block_sparse_attention(*tensors, plan, backend="triton")
    out, _ = block_sparse_attention(*(x.to("cuda:1") for x in tensors), plan.to("cuda:1"), backend="triton")
    assert out.device == torch.device("cuda:1")
    torch.testing.assert_close(out.to(want.device), want)


def test_a_call_does_not_wait_for_the_device() -> None:
    case = Case(Shape(300, 2, 64, (64, 64)), 0.5, "cuda", "bfloat16")
    plan, tensors = case.plan(), case.tensors()
    block_sparse_attention(*tensors, plan, backend="triton")  # compiles, and prepares what it keeps of a plan
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_sparse_attention(*tensors, plan, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
