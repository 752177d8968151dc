"""Dense attention for training on a CPU: bfloat16 matrix products over rows that fit the cache.

PyTorch's fused CPU attention keeps its scores in float32 and takes 70 to 80 % of a training step of tiny-wan.
Written as plain products, whose scores stay bfloat16 and in the cache, it takes half as long.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from dit_sparse.redirect import redirected

# Scores held at a time: 1.4 MB of bfloat16.
SCORES = 700_000


def _heads(q: Tensor, k: Tensor) -> list[tuple[tuple, list[slice]]]:
    """For [B, S, H, D] queries and keys: every (batch, head) and the slices of rows to take at a time."""
    rows = max(1, SCORES // k.shape[1])
    slices = [slice(i, i + rows) for i in range(0, q.shape[1], rows)]
    return [((b, slice(None), h), slices) for b in range(q.shape[0]) for h in range(q.shape[2])]


@torch.library.custom_op("tiny_wan::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of [B, S, H, D] tensors of one dtype, whose precision the scores have."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    scale = q.shape[-1] ** -0.5
    for head, slices in _heads(q, k):
        keys, values = k[head].t(), v[head]
        for rows in slices:
            out[head][rows] = torch.softmax((q[head][rows] * scale) @ keys, -1) @ values
    return out


@attention.register_fake
def _(q, k, v):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("tiny_wan::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; the probabilities are computed again."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    for head, slices in _heads(q, k):
        keys, values = k[head], v[head].t()
        for rows in slices:
            queries, d = q[head][rows] * scale, grad[head][rows]
            p = torch.softmax(queries @ keys.t(), -1)
            ds = torch._softmax_backward_data(d @ values, p, -1, p.dtype)
            dq[head][rows] = (ds @ keys) * scale
            dk[head].addmm_(ds.t(), queries)
            dv[head].addmm_(p.t(), d)
    return dq, dk, dv


@attention_backward.register_fake
def _(grad, q, k, v):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


attention.register_autograd(
    lambda ctx, grad: attention_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class _Core:
    def _core(self, attn: Any, kind: str, original: Any, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return attention(q.to(v.dtype), k.to(v.dtype), v)


def use_fast_attention(model: WanTransformer3DModel) -> None:
    """Let every attention layer call `attention`; the model has no masks and no dropout."""
    cls = redirected(WanAttnProcessor, _Core)
    assert cls is not None
    model.set_attn_processor(cls())
