"""The definition of quantised attention: it emulates, in float32 on any device, what the kernels round.

A kernel does not round more where it differs: it sums in another order, and rounds a row's weights relative
to the peak so far, not the last one. (What is rounded under a lower peak shrinks later, its error with it.)
Letters: B batch, H query heads, KV key/value heads, S tokens, D head dim, Q and K blocks, N tokens of a
block, W blocks of a row, M tokens of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_sparse.kernels.quant_ops import FLOOR, GROUP, LIMITS, STORED, WEIGHT_OF_ONE, per_kv_head
from dit_sparse.plan import Plan


def quantize_rows(x: Tensor, block: int, kind: str) -> tuple[Tensor, Tensor]:
    """Quantise queries or keys.

    Args:
        x: float32 [B, heads, S, D], 0 where there is no token.
        block: Tokens of a block.

    Returns:
        The rounded numbers [B, heads, blocks, N, D], and what one is worth, float32 [B, heads, blocks, N, 1].
    """
    group = min(block, GROUP)
    x = pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
    peak = pad(x, (0, 0, 0, -block % group)).unflatten(3, (-1, group)).abs().amax((-2, -1))
    peak = peak.clamp(min=FLOOR).repeat_interleave(group, 3)[:, :, :, :block, None]
    return _round(x, peak, kind)


def quantize_channels(v: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Quantise values, float32 [B, KV, S, D]: the rounded numbers, and what one is worth, [B, KV, 1, D]."""
    peak = v.abs().amax(2, keepdim=True).clamp(min=FLOOR)
    return _round(v, peak, kind)


def _round(x: Tensor, peak: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    # A number divided by a tensor would be its reciprocal times that number, which rounds twice.
    limit = torch.full_like(peak, LIMITS[kind])
    return _cast(x * (limit / peak), kind), peak / limit


def _cast(x: Tensor, kind: str) -> Tensor:
    return (x.round() if kind == "int8" else x).to(STORED[kind])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    qk: str,
    pv: str,
    smooth_k: bool,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`dit_sparse.kernels.quantized_block_sparse_attention`."""
    (bq, bk), heads, group = plan.block, q.shape[1], q.shape[1] // k.shape[1]
    queries, keys, values = q.float(), k.float(), v.float()
    shift = queries.new_zeros(())
    if valid is None:
        valid = torch.ones((1, 1, k.shape[2]), dtype=torch.bool, device=k.device)
    exists = per_kv_head(valid, k.shape[1])[..., None]
    keys, values = keys.masked_fill(~exists, 0), values.masked_fill(~exists, 0)
    if smooth_k:
        mean = keys.sum(2, keepdim=True) / exists.sum(2, keepdim=True).clamp(min=1)
        keys = (keys - mean).masked_fill(~exists, 0)
        shift = (queries * mean.repeat_interleave(group, 1)).sum(-1) * scale

    query_tiles, query_units = quantize_rows(queries, bq, qk)
    key_tiles, key_units = quantize_rows(keys, bk, qk)
    values, value_units = quantize_channels(values, pv)
    value_tiles = pad(values.float(), (0, 0, 0, -v.shape[2] % bk)).unflatten(2, (-1, bk))
    there = pad(valid, (0, -valid.shape[2] % bk)).unflatten(2, (-1, bk))[..., None]
    per_query_head = [x.float().repeat_interleave(group, 1) for x in (key_tiles, key_units, value_tiles)]
    sources = [x.expand(q.shape[0], -1, -1, -1, -1) for x in (*per_query_head, _per_head(there, heads))]

    outs, lses = [], []
    for i in range(plan.counts.shape[-1]):
        counts = plan.counts[:, :, i].expand(q.shape[0], heads)
        lists = plan.indices[:, :, i, : int(counts.max())].long().expand(q.shape[0], heads, -1)
        used = torch.arange(lists.shape[-1], device=q.device) < counts[..., None]
        row_keys, units, row_values, present = (_gather(x, lists) for x in sources)
        keep = (present[..., 0] & used.repeat_interleave(bk, -1))[:, :, None]
        scores = query_tiles[:, :, i].float() @ row_keys.mT
        scores = (scores * query_units[:, :, i] * units.mT * scale).masked_fill(~keep, float("-inf"))
        out, lse = _softmax(scores, row_values, pv)
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs, 2)[:, :, : q.shape[2]] * value_units.repeat_interleave(group, 1)
    lse = torch.cat(lses, 2)[:, :, : q.shape[2]] + shift
    return out.to(q.dtype).contiguous(), lse.contiguous()


def _softmax(scores: Tensor, values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Of scores [B, H, N, M] and values [B, H, M, D]: output by rounded weights, and lse of the scores."""
    if scores.shape[-1] == 0:
        scores, values = pad(scores, (0, 1), value=float("-inf")), pad(values, (0, 0, 0, 1))
    peak = scores.amax(-1, keepdim=True)
    empty = peak == float("-inf")
    peak = peak.masked_fill(empty, 0)
    weights = (scores - peak).exp() * WEIGHT_OF_ONE[kind]
    total = weights.sum(-1, keepdim=True).masked_fill(empty, 1)
    lse = ((total / WEIGHT_OF_ONE[kind]).log() + peak).masked_fill(empty, float("-inf"))
    return _cast(weights, kind).float() @ values / total, lse.squeeze(-1)


def _gather(x: Tensor, lists: Tensor) -> Tensor:
    """Blocks ``lists`` [B, H, W] of [B, H, K, N, ...], one after another: [B, H, M, ...]."""
    index = lists[..., None, None].expand(-1, -1, -1, *x.shape[3:])
    return x.gather(2, index).flatten(2, 3)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Repeat what each head has for the query heads that share it."""
    return (
        x.expand(-1, heads, *x.shape[2:]) if x.shape[1] == 1 else x.repeat_interleave(heads // x.shape[1], 1)
    )
