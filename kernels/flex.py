"""The FlexAttention backend: the plan as a BlockMask.

On a GPU the kernel is compiled. On the CPU it runs eagerly over the full score matrix, where only the mask
function counts: a cross-check of plans and masks, without gradients. Needs torch 2.9 or newer.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from dit_sparse.kernels.ops import _needs_grad
from dit_sparse.order import broadcast_heads
from dit_sparse.plan import Plan


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    valid: Tensor | None,
    scale: float,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`dit_sparse.kernels.block_sparse_attention`.

    Raises:
        ValueError: Gradients asked for on the CPU, or on a GPU a block that is no multiple of 16 tokens.
    """
    heads = q.shape[1]
    if valid is not None:
        valid = broadcast_heads(valid, heads)
    if positions is not None:
        positions = broadcast_heads(positions[None], heads)[0]
    needs_grad = _needs_grad(q, k, v)
    mask = plan.to_block_mask(q.shape[2], k.shape[2], valid, positions, needs_grad)
    arguments: dict[str, Any] = {
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": k.shape[1] != heads,
        "return_aux": AuxRequest(lse=True),
    }
    if q.device.type == "cpu":
        if needs_grad:
            raise ValueError("flex gives no gradients on the CPU; use backend 'cpu' or 'reference'")
        # Without this stance eager flex compiles its own wrapper, anew for every plan.
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            out, aux = flex_attention(q, k, v, **arguments)
    else:
        if plan.block[0] % 16 or plan.block[1] % 16:
            raise ValueError(f"flex on a GPU needs blocks of a multiple of 16 tokens, got {plan.block}")
        tiles = {"fwd_BLOCK_M": _tile(plan.block[0], 128), "fwd_BLOCK_N": _tile(plan.block[1], 64)}
        out, aux = _compiled()(q, k, v, kernel_options=tiles, **arguments)
    return out.contiguous(), aux.lse.contiguous()


def _tile(block: int, most: int) -> int:
    """The largest power of two that divides a block and is at most ``most``."""
    return min(block & -block, most)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
