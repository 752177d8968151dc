"""The definition of correct: eager attention under an explicit token mask.

Computed in float32 (float64 for float64 inputs), quadratic in time and memory. No other kernel imports it;
tests compare all of them with it.
Letters: B batch, H query heads, KV key/value heads, Sq and Sk tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.plan import Plan


def token_mask(
    plan: Plan,
    queries: int,
    keys: int,
    heads: int,
    valid: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Which query may read which key: bool [B or 1, H or 1, queries, keys]."""
    keep = plan.to_blocks()
    keep = keep.repeat_interleave(plan.block[0], 2)[:, :, :queries]
    keep = keep.repeat_interleave(plan.block[1], 3)[..., :keys]
    if valid is not None:
        keep = keep & _per_head(valid, 1, heads)[:, :, None]
    if plan.rule is not None:
        if positions is None:
            positions = torch.arange(keys, device=keep.device)[None]
        where = _per_head(positions, 0, heads)
        keep = keep & plan.rule(where[:, :, None], where[:, None])
    return keep


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
    """See :func:`dit_sparse.kernels.block_sparse_attention`. Differentiable by autograd."""
    heads = q.shape[1]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    keep = token_mask(plan, q.shape[2], k.shape[2], heads, valid, positions)
    keys, values = (_per_head(x, 1, heads).to(exact) for x in (k, v))
    scores = (q.to(exact) @ keys.transpose(-1, -2) * scale).masked_fill(~keep, float("-inf"))
    # The peak cancels out of both results, so no gradient goes through it.
    peak = scores.detach().amax(-1, keepdim=True)
    empty = peak == float("-inf")
    peak = peak.masked_fill(empty, 0)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True).masked_fill(empty, 1)
    out = weights @ values / total
    lse = (total.log() + peak).masked_fill(empty, float("-inf")).squeeze(-1)
    return out.to(q.dtype).contiguous(), lse


def _per_head(x: Tensor, axis: int, heads: int) -> Tensor:
    """Repeat each of several KV heads for the query heads that share it; a single one broadcasts as it is."""
    return x if x.shape[axis] in (1, heads) else x.repeat_interleave(heads // x.shape[axis], axis)
