"""Weights stored in fp8 or int8: attention sees what the model computes in, and so do the trained parts."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch

import dit_sparse
from dit_sparse import RadialProcessor, SLAProcessor, VSAProcessor
from dit_sparse.method import SparseProcessor, ZeroLinear

pytestmark = pytest.mark.filterwarnings("ignore:.*outside a pipeline run", "ignore:.*untrained parameters")

METHODS = {
    "radial": RadialProcessor(block=8, decay=0.3, decimate_below=32),
    "step-cached": tiny.Cached(keep=2),
    "sla": SLAProcessor(ratio=0.3, block=8),
    "vsa": VSAProcessor(keep=0.3, tile=(2, 2, 2), gate=True),
}
FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16


def attach(model: Any, method: SparseProcessor) -> dit_sparse.Session:
    """With parts of random weights that fp8 holds exactly."""
    session = dit_sparse.apply(model, method, schedule="always")
    for part in session.sparse_modules().values():
        for i, parameter in enumerate(part.parameters()):
            parameter.data.copy_((0.3 * tiny.randn(*parameter.shape, seed=i)).to(FP8))
    return session


def stock_linears(model: Any) -> list[torch.nn.Linear]:
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and not isinstance(m, ZeroLinear)]


@torch.no_grad()
@pytest.mark.parametrize("first", ["attach", "cast"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_fp8_layers_give_what_their_values_give_in_bf16(method: SparseProcessor, first: str) -> None:
    """Cast to fp8 and back by hand, the model is the same without casts."""
    inputs = {k: v.to(BF16) if torch.is_tensor(v) and v.is_floating_point() else v
              for k, v in tiny.wan_inputs().items()}  # fmt: skip
    model, plain = tiny.wan().to(BF16), tiny.wan().to(BF16)
    steps = [
        lambda: attach(model, method),
        lambda: model.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=BF16),
    ]
    for step in steps if first == "attach" else reversed(steps):
        step()
    assert model.blocks[0].attn1.to_q.weight.dtype == FP8
    for module, twin in zip(stock_linears(model), stock_linears(plain), strict=True):
        for name, parameter in module.named_parameters():
            getattr(twin, name).copy_(parameter.to(BF16))
    attach(plain, method)
    out = model(**inputs)[0]
    assert out.dtype == BF16
    assert torch.equal(out, plain(**inputs)[0])
    parts = [m for m in model.modules() if isinstance(m, ZeroLinear)]
    assert all(part.weight.dtype == (FP8 if first == "attach" else torch.float32) for part in parts)
    assert bool(parts) == (method in (METHODS["sla"], METHODS["vsa"]))


@torch.no_grad()
@pytest.mark.parametrize("first", ["attach", "quantise"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_int8_weights_of_torchao(method: SparseProcessor, first: str) -> None:
    """Against the same weights, quantised and dequantised."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, plain, inputs = tiny.wan(), tiny.wan(), tiny.wan_inputs()

    def quantise(model: Any) -> None:
        """The stock weights only: those of the parts would lose what makes the comparison exact."""
        stock = stock_linears(model)
        config = quantization.Int8WeightOnlyConfig()
        quantization.quantize_(model, config, filter_fn=lambda module, name: module in stock)

    steps = [lambda: attach(model, method), lambda: quantise(model)]
    for step in steps if first == "attach" else reversed(steps):
        step()
    quantise(plain)
    for module in stock_linears(plain):
        module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    attach(plain, method)
    torch.testing.assert_close(model(**inputs)[0], plain(**inputs)[0], atol=1e-5, rtol=1e-5)
