"""The attached model on a GPU: `make gpu-check`."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch

import dit_sparse
from dit_sparse import DenseProcessor, RadialProcessor

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
