"""The definition of correct: eager attention under an explicit token mask.

Computed in float32 (float64 for float64 inputs), quadratic in time and memory. No other kernel imports it;
tests compare all of them with it.
Letters: B batch, H query heads, KV key/value heads, Sq and Sk tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.operands import exact_dtype
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
    exact = exact_dtype(q.dtype)
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


def features(x: Tensor, feature_map: str) -> Tensor:
    """The features of linear attention of each token's head vector; "hedgehog" takes the projected one."""
    if feature_map == "hedgehog":
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)
    if feature_map == "softmax":
        return x.softmax(-1)
    return torch.nn.functional.elu(x) + 1 if feature_map == "elu" else x.relu()


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | None,
    *,
    feature_map: str,
    weights: tuple[Tensor, Tensor] | None,
    valid: Tensor | None,
    eps: float,
) -> Tensor:
    """See :func:`dit_sparse.kernels.linear_attention`. Differentiable by autograd."""
    heads = q.shape[1]
    exact = exact_dtype(q.dtype)
    queries, keys, values = (_per_head(x, 1, heads).to(exact) for x in (q, k, v))
    if weights is not None:
        queries, keys = (
            x @ _per_head(w, 0, heads).to(exact) for x, w in zip((queries, keys), weights, strict=True)
        )
    scores = features(queries, feature_map) @ features(keys, feature_map).mT
    if plan is not None:
        scores = scores.masked_fill(token_mask(plan, q.shape[2], k.shape[2], heads), 0)
    if valid is not None:
        scores = scores.masked_fill(~_per_head(valid, 1, heads)[:, :, None], 0)
    total = scores.sum(-1, keepdim=True)
    empty = total == 0
    out = scores @ values / (total + eps).masked_fill(empty, 1)
    return out.masked_fill(empty, 0).to(q.dtype).contiguous()


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block: tuple[int, int], *, valid: Tensor | None, scale: float
) -> Tensor:
    """See :func:`dit_sparse.kernels.block_mass`."""
    probabilities, _ = _probabilities(q, k, lse, valid, scale)
    return _by_block(probabilities, block).sum((3, 5))


def block_statistics(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block: tuple[int, int],
    small: float,
    *,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dit_sparse.kernels.block_statistics`."""
    probabilities, there = _probabilities(q, k, lse, valid, scale)
    pairs = _by_block(probabilities, block)
    count = _by_block((probabilities < small) & there, block).sum((3, 5), dtype=torch.int32)
    return pairs.sum((3, 5)), pairs.amax((3, 5)), count


def block_means(x: Tensor, block: int, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See :func:`dit_sparse.plan.pool`."""
    tokens = torch.arange(x.shape[2], device=x.device)
    inside = tokens // block == torch.arange(-(-x.shape[2] // block), device=x.device)[:, None]
    if valid is not None:
        inside = inside & valid[:, :, None]
        x = x.masked_fill(~valid[..., None], 0)
    inside = inside.to(dtype)
    return inside @ x.to(dtype) / inside.sum(-1, keepdim=True).clamp(min=1)


def _probabilities(
    q: Tensor, k: Tensor, lse: Tensor, valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """exp(score - lse), 0 for those that do not count, and which do: [B, H, Sq, Sk] both."""
    heads = q.shape[1]
    exact = exact_dtype(q.dtype)
    there = lse.isfinite()[..., None].expand(-1, -1, -1, k.shape[2])
    if valid is not None:
        there = there & _per_head(valid, 1, heads)[:, :, None]
    scores = q.to(exact) @ _per_head(k, 1, heads).to(exact).mT * scale
    return (scores - lse[..., None]).exp().masked_fill(~there, 0), there


def _by_block(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[B, H, Sq, Sk] -> [B, H, Q, query block, K, key block], zeros after the last token."""
    x = torch.nn.functional.pad(x, (0, -x.shape[3] % block[1], 0, -x.shape[2] % block[0]))
    return x.unflatten(3, (-1, block[1])).unflatten(2, (-1, block[0]))


def _per_head(x: Tensor, axis: int, heads: int) -> Tensor:
    """Repeat each of several KV heads for the query heads that share it; a single one broadcasts as it is."""
    return x if x.shape[axis] in (1, heads) else x.repeat_interleave(heads // x.shape[axis], axis)
