"""CPU attention without a compiler: gather the keys each query block reads, then PyTorch's fused attention.

It also serves plans with a rule.

A *task* is one query block of one head. Tasks that read equally many keys form a batch, so no task is padded
and no mask is needed for holes, key padding or a ragged tail: keys that do not exist are not gathered.
Letters: B batch, H query heads, KV key/value heads, S tokens, D head dim, Q and K blocks, T tasks,
G tasks of one batch, M keys each of them reads.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.operands import exact_dtype
from dit_sparse.plan import Plan

_fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Temporary memory of one batch per thread. What is gathered is read at once, so it should stay in the cache.
BYTES_PER_THREAD = 2 << 20
MAX_BYTES = 128 << 20


@dataclass(frozen=True)
class _Grouping:
    """The tasks of one plan at one shape, sorted by how much they read; empty ones are left out."""

    task: Tensor  # int64 [T']: (b * H + h) * Q + i
    row: Tensor  # int64 [T']: row of the plan's lists
    start: Tensor  # int64 [T']: first token of the task's keys among all B * KV * Sk
    usable_row: Tensor  # int64 [T']: row of `usable`
    usable: Tensor | None  # bool [rows, K * bk]: which keys exist; None where every key does
    runs: tuple[tuple[int, int, int, int], ...]  # (first task, last + 1, blocks, keys) of equal tasks


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
    """See :func:`dit_sparse.kernels.block_sparse_attention`. Both results are differentiable.

    Raises:
        ValueError: Tensors that are not on the CPU.
    """
    if q.device.type != "cpu":
        raise ValueError(f"the gathered backend needs tensors on the CPU, got {q.device}")
    grouping = _grouping(plan, q.shape, k.shape, valid)
    if plan.rule is not None and positions is None:
        positions = torch.arange(k.shape[2])[None]
    return _Attention.apply(q, k, v, plan, grouping, scale, positions)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, grouping, scale, positions):
        out, lse = _forward(q, k, v, plan, grouping, scale, positions)
        ctx.save_for_backward(q, k, v, out, lse, positions)
        ctx.plan, ctx.grouping, ctx.scale = plan, grouping, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, positions = ctx.saved_tensors
        grads = _backward(q, k, v, out, lse, grad_out, grad_lse, ctx.plan, ctx.grouping, ctx.scale, positions)
        return (*grads, None, None, None, None)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, grouping: _Grouping, scale: float, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, size = plan.counts.shape[-1], plan.block[0]
    queries, keys, values = _blocks(q, rows, size), k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3])
    out = torch.zeros_like(queries)
    exact = exact_dtype(q.dtype)
    lse = queries.new_full(queries.shape[:2], float("-inf"), dtype=exact)
    # Per gathered key: its key and value, and its column of the rule's mask.
    per_key = 2 * q.shape[3] * q.element_size() + (4 * size if plan.rule is not None else 0)
    for tasks, tokens, allowed in _batches(plan, grouping, q.shape[1], k.shape, positions, per_key):
        chosen = tokens.flatten()
        bias = None
        if allowed is not None:
            bias = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, float("-inf"))[:, None]
        part, part_lse = _fused_attention(
            queries.index_select(0, tasks)[:, None],
            keys.index_select(0, chosen).view(len(tasks), 1, -1, k.shape[3]),
            values.index_select(0, chosen).view(len(tasks), 1, -1, k.shape[3]),
            attn_mask=bias,
            scale=scale,
        )
        part_lse = part_lse[:, 0]
        if allowed is not None:  # the fused op reports 0, not -inf, for a query whose every key is masked
            part_lse = part_lse.masked_fill(~allowed.any(-1), float("-inf"))
        out.index_copy_(0, tasks, part[:, 0])
        lse.index_copy_(0, tasks, part_lse)
    return _tokens(out, q.shape), _tokens(lse, q.shape[:3])


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    plan: Plan,
    grouping: _Grouping,
    scale: float,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, size, exact = plan.counts.shape[-1], plan.block[0], lse.dtype
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    # dS = P * (dP - delta): the gradient of lse is P itself, so it enters with the opposite sign.
    delta = (grad_out.to(exact) * out.to(exact)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    queries, outer = _blocks(q.to(exact), rows, size), _blocks(grad_out.to(exact), rows, size)
    deltas = _blocks(delta[..., None], rows, size)
    # An empty query has every score masked; any finite value keeps exp(-inf - lse) at 0.
    lses = _blocks(lse.masked_fill(lse == float("-inf"), 0)[..., None], rows, size)
    keys, values = k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3])
    grad_q = torch.zeros_like(queries)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=exact) for x in (keys, values))
    per_key = (4 * q.shape[3] + 3 * size) * lse.element_size()
    for tasks, tokens, allowed in _batches(plan, grouping, q.shape[1], k.shape, positions, per_key):
        chosen, shape = tokens.flatten(), (*tokens.shape, k.shape[3])
        b_q, b_do, b_delta, b_lse = (x.index_select(0, tasks) for x in (queries, outer, deltas, lses))
        b_k, b_v = (x.index_select(0, chosen).to(exact).view(shape) for x in (keys, values))
        p = (b_q @ b_k.mT).mul_(scale)
        if allowed is not None:
            p.masked_fill_(~allowed, float("-inf"))
        p.sub_(b_lse).exp_()
        grad_v.index_add_(0, chosen, (p.mT @ b_do).flatten(0, 1))
        ds = (b_do @ b_v.mT).sub_(b_delta).mul_(p).mul_(scale)
        grad_q.index_copy_(0, tasks, ds @ b_k)
        grad_k.index_add_(0, chosen, (ds.mT @ b_q).flatten(0, 1))
    return (
        _tokens(grad_q, q.shape).to(q.dtype),
        grad_k.view(k.shape).to(k.dtype),
        grad_v.view(v.shape).to(v.dtype),
    )


def _batches(
    plan: Plan, grouping: _Grouping, heads: int, k_shape: torch.Size, positions: Tensor | None, per_key: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Batches of tasks: their numbers [G], keys among all B * KV * Sk [G, M] and rule [G, bq, M]."""
    (bq, bk), rows = plan.block, plan.counts.shape[-1]
    lists = plan.indices.flatten(0, 2)
    inside = torch.arange(bk)
    budget = min(BYTES_PER_THREAD * torch.get_num_threads(), MAX_BYTES)
    for first, last, blocks, keys in grouping.runs:
        parts = max(1, -(-(last - first) * keys * per_key // budget))
        step = -(-(last - first) // parts)
        for at in range(first, last, step):
            batch = slice(at, min(at + step, last))
            listed = lists[:, :blocks].index_select(0, grouping.row[batch]).long()
            slots = (listed.mul_(bk)[..., None] + inside).flatten(1)
            if grouping.usable is not None and keys != blocks * bk:
                line = grouping.usable_row[batch, None] * grouping.usable.shape[1]
                exists = grouping.usable.view(-1)[line + slots]
                slots = slots[exists].view(-1, keys)
            allowed = None
            if plan.rule is not None and positions is not None:
                head = grouping.task[batch] // rows % heads * positions.shape[0] // heads
                here = grouping.task[batch, None] % rows * bq + torch.arange(bq)
                here = here.clamp_(
                    max=positions.shape[1] - 1
                )  # a ragged last block; its extra rows are cut off
                at_q, at_k = positions[head[:, None], here], positions[head[:, None], slots]
                allowed = plan.rule(at_q[:, :, None], at_k[:, None]).expand(-1, bq, keys)
            yield grouping.task[batch], slots + grouping.start[batch, None], allowed


# Plans are frozen and often run for hundreds of steps; an entry dies with its plan.
_groupings: weakref.WeakKeyDictionary[Plan, dict] = weakref.WeakKeyDictionary()
_GROUPINGS_PER_PLAN = 8


def _grouping(plan: Plan, q_shape: torch.Size, k_shape: torch.Size, valid: Tensor | None) -> _Grouping:
    shape = (*q_shape[:3], *k_shape[1:3])
    if valid is not None and valid.is_inference():  # has no version, so a change in place could not be seen
        return _group(plan, shape, valid)
    known = _groupings.setdefault(plan, {})
    key = (*shape, 0 if valid is None else id(valid), 0 if valid is None else valid._version)
    if key in known:
        seen, grouping = known[key]
        # An id may be used again once its tensor is gone.
        if seen is None or seen() is valid:
            return grouping
    if len(known) >= _GROUPINGS_PER_PLAN:
        known.clear()
    grouping = _group(plan, shape, valid)
    known[key] = (None if valid is None else weakref.ref(valid), grouping)
    return grouping


def _group(plan: Plan, shape: tuple[int, ...], valid: Tensor | None) -> _Grouping:
    batch, heads, _, kv_heads, keys = shape
    plan_batch, plan_heads, rows, width = plan.indices.shape
    bk = plan.block[1]
    task = torch.arange(batch * heads * rows)
    i, h, b = task % rows, task // rows % heads, task // (rows * heads)
    row = (b * plan_batch // batch * plan_heads + h * plan_heads // heads) * rows + i
    start = (b * kv_heads + h * kv_heads // heads) * keys
    blocks = plan.counts.reshape(-1).long()[row]
    usable, usable_row, tokens = None, torch.zeros_like(task), blocks * bk
    if valid is not None or keys % bk:
        if valid is None:
            valid = torch.ones((1, 1, keys), dtype=torch.bool)
        exists = torch.nn.functional.pad(valid, (0, -keys % bk))
        filled = exists.unflatten(-1, (-1, bk)).sum(-1)
        # Counted once for what plan and validity broadcast to, not once per task.
        sharing = max(plan_heads, valid.shape[1])
        filled = filled.repeat_interleave(sharing // valid.shape[1], 1)
        lead = torch.broadcast_shapes((plan_batch, sharing), filled.shape[:2])
        lists = plan.indices.long().expand(*lead, -1, -1)
        used = torch.arange(width) < plan.counts[..., None]
        per_row = filled.expand(*lead, -1).gather(-1, lists.flatten(2)).view(lists.shape).mul_(used).sum(-1)
        tokens = per_row[b * lead[0] // batch, h * lead[1] // heads, i]
        usable = exists.reshape(-1, exists.shape[-1]).contiguous()
        usable_row = b * valid.shape[0] // batch * valid.shape[1] + h * valid.shape[1] // heads
    kind = tokens * (plan.keys + 1) + blocks
    kind, order = kind.sort(stable=True)
    order = order[(tokens > 0)[order]]
    kinds, sizes = kind[len(kind) - len(order) :].unique_consecutive(return_counts=True)
    runs, first = [], 0
    for value, size in zip(kinds.tolist(), sizes.tolist(), strict=True):
        runs.append((first, first + size, value % (plan.keys + 1), value // (plan.keys + 1)))
        first += size
    return _Grouping(task[order], row[order], start[order], usable_row[order], usable, tuple(runs))


def _blocks(x: Tensor, rows: int, size: int) -> Tensor:
    """[B, H, S, D] -> [B * H * rows, size, D]; the tail of a ragged last block is zeros."""
    pad = rows * size - x.shape[2]
    x = torch.nn.functional.pad(x, (0, 0, 0, pad)) if pad else x
    return x.reshape(-1, size, x.shape[3])


def _tokens(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_blocks`: [B * H * rows, size, ...] -> [B, H, S, ...], cut to S."""
    return x.reshape(*shape[:2], -1, *shape[3:])[:, :, : shape[2]].contiguous()
