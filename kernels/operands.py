"""What backends have in common: how operands lie in memory, what is summed in, what results look like.

Letters: B batch, H query heads, S tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics of operands are made in: float32, for float64 ones float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(x: Tensor) -> Tensor:
    """``x``, or a copy if entries of its last axis are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def lead_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of the first two axes, batch and heads; 0 where one entry serves all, or for no tensor."""
    if x is None:
        return 0, 0
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def empty_as(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Of each tensor one with its shape, dtype and device, contiguous and not written."""
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)


def empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, H, S, D] and lse [B, H, S] of attention for ``q``, contiguous and not written."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=exact_dtype(q.dtype), device=q.device)
