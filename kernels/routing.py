"""The Triton kernels of plans with few query tokens a block, (1, c) most of all: each token has its own list.

A tile of queries that share a list would be one row high, and tensor cores want 16 and more. So the work is
turned around: one program takes a tile of the queries that list the *same* key block, gathered from wherever
they are, attends it to that block, and writes the part where the block is in the list of each query. Another
kernel then combines the parts of each query. Gradients of q go the same way; those of k and v are gathered by
key block as for any plan.

Importing this module imports triton. Letters: B batch, H query heads, KV key/value heads, S tokens (SQ, SK),
D head dim, Q and K blocks of BQ and BK tokens, W slots of a list, E all slots of a head, T tiles.
In kernels: i_ index, o_ offsets, b_ block of values, p_ pointer, s_ stride, m_ mask, n_ count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.block_sparse import _rows, _weights, precision
from dit_sparse.kernels.block_sparse_backward import (
    Tiles,
    _dq_step,
    _load_rows,
    _padded,
    key_gradients,
    prepare,
)
from dit_sparse.kernels.lists import Columns, transpose
from dit_sparse.kernels.operands import empty_as, empty_results, lead_strides, unit_stride
from dit_sparse.kernels.targets import Target, Variant, target_of
from dit_sparse.order import broadcast_heads

LN2 = tl.constexpr(math.log(2.0))

# What the parts of one round of launches may take; heads, and then queries, go in as many rounds as needed.
PARTS_BYTES = 512 << 20
# Queries whose parts one program combines.
MERGE_M = 16
# Variants of the forward that continuous integration compiles again.
IN_CI = {("sm_80", "bf16 D128"), ("sm_90", "bf16 D128 valid"), ("sm_120", "bf16 D128 valid")}
# Arguments of the part kernels whose values would compile them anew, and gain nothing by it.
PLAIN = [*(f"s_{x}{axis}" for x in "rembd" for axis in "bhq"), *"HKEW"]
PLAIN += ["H_FIRST", "LEAD_B", "LEAD_H", "SQ", "SK", "BITS", "BK"]


@triton.jit
def _queries(p_first, p_start, p_size, p_column, i_k, i_lead, K, E, SQ, BQ, TILE_M: tl.constexpr):
    """Tokens of one tile of the queries that list key block ``i_k``, and which of the tile exist."""
    i_at = i_lead * K + i_k
    i_tile = tl.program_id(0) - tl.load(p_first + i_at)
    o_e = i_tile * TILE_M + tl.arange(0, TILE_M)
    m_q = o_e < tl.load(p_size + i_at) * BQ
    o_row = tl.load(p_column + i_lead * E + tl.load(p_start + i_at) + o_e // BQ, mask=m_q, other=0)
    o_q = o_row * BQ + o_e % BQ
    return o_q, m_q & (o_q < SQ)


@triton.jit
def _slots(p_row, i_k, o_q, m_q, s_rq, BQ, W, BITS):
    """Where in the list of each query ``i_k`` is."""
    p_row += (o_q // BQ).to(tl.int64) * s_rq
    # Lists ascend: the last entry up to i_k. Past their end they are 0, as only slot 0 may be otherwise.
    o_slot = tl.zeros_like(o_q)
    for i in range(0, BITS):
        o_try = o_slot + (1 << (BITS - 1 - i))
        b_listed = tl.load(p_row + o_try, mask=m_q & (o_try < W), other=0)
        o_slot = tl.where((b_listed > 0) & (b_listed <= i_k), o_try, o_slot)
    return o_slot


@triton.jit
def _extent(p_even, i_k, SK, BK, TILE_N: tl.constexpr, HAS_VALID: tl.constexpr):
    """The first token of a key block, how many it has, and how many of them fill tiles that need no mask."""
    i_first = i_k.to(tl.int64) * BK
    n = tl.minimum(BK, SK - i_first).to(tl.int32)
    n_even = tl.load(p_even + i_k) if HAS_VALID else n
    return i_first, n, n_even // TILE_N * TILE_N


@triton.jit
def _keys(
    p_k,
    p_v,
    p_valid,
    i,
    n,
    s_ks,
    s_vs,
    D: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    HAS_VALID: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys and values [N, D] from token ``i`` of a block of ``n``, and which count; unless MASKED all do."""
    o_n = tl.arange(0, TILE_N)
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < D
    p_k += tl.cast(i, tl.int64) * s_ks + (o_n[:, None] * s_ks + o_d[None, :])
    p_v += tl.cast(i, tl.int64) * s_vs + (o_n[:, None] * s_vs + o_d[None, :])
    if MASKED:
        m_n = i + o_n < n
        m_nd = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_k, mask=m_nd, other=0.0)
        b_v = tl.load(p_v, mask=m_nd, other=0.0)
        if HAS_VALID:
            m_n = tl.load(p_valid + i + o_n, mask=m_n, other=0) != 0
        return b_k, b_v, m_n
    else:
        return _load_rows(p_k, m_d, D == TILE_D), _load_rows(p_v, m_d, D == TILE_D), None


@triton.jit(do_not_specialize=PLAIN)
def part_kernel(
    p_part,
    p_base,
    p_q,
    p_k,
    p_v,
    p_tile,
    p_first,
    p_start,
    p_size,
    p_column,
    p_row,
    p_even,
    p_valid,
    s_qb,
    s_qh,
    s_qs,
    s_kb,
    s_kh,
    s_ks,
    s_vb,
    s_vh,
    s_vs,
    s_rb,
    s_rh,
    s_rq,
    s_eb,
    s_eh,
    s_mb,
    s_mh,
    H,
    H_FIRST,
    GROUP,
    LEAD_B,
    LEAD_H,
    SQ,
    SK,
    K,
    E,
    W,
    BITS,
    BQ,
    BK,
    SCALE_LOG2,
    D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one tile of gathered queries over the block they list, and its log-sum-exp, base two."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_kv = (H_FIRST + i_h) // GROUP
    i_lead = (i_b % LEAD_B) * LEAD_H + i_h % LEAD_H
    i_k = tl.load(p_tile + i_lead * tl.num_programs(0) + tl.program_id(0))
    if i_k == K:  # as many programs as there could be tiles
        return
    o_q, m_q = _queries(p_first, p_start, p_size, p_column, i_k, i_lead, K, E, SQ, BQ, TILE_M)
    o_64 = o_q.to(tl.int64)[:, None]
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < D
    m_qd = m_q[:, None] & m_d[None, :]
    b_q = tl.load(p_q + i_b * s_qb + i_h * s_qh + o_64 * s_qs + o_d[None, :], mask=m_qd, other=0.0)
    b_m = tl.full((TILE_M,), -float("inf"), tl.float32)
    b_l = tl.zeros((TILE_M,), tl.float32)
    b_acc = tl.zeros((TILE_M, TILE_D), tl.float32)

    i_first, n, n_even = _extent(p_even + i_b * s_eb + i_h * s_eh, i_k, SK, BK, TILE_N, HAS_VALID)
    p_k += i_b * s_kb + i_kv * s_kh + i_first * s_ks
    p_v += i_b * s_vb + i_kv * s_vh + i_first * s_vs
    p_valid += i_b * s_mb + i_h * s_mh + i_first
    for MASKED in tl.static_range(2):
        for i in range(n_even if MASKED else 0, n if MASKED else n_even, TILE_N):
            b_k, b_v, m_n = _keys(p_k, p_v, p_valid, i, n, s_ks, s_vs, D, TILE_N, TILE_D, HAS_VALID, MASKED)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            if MASKED:
                b_s = tl.where(m_n[None, :], b_s, -float("inf"))
            b_p, b_decay, b_m, b_l = _weights(b_s, b_m, b_l, SCALE_LOG2, MASKED)
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)

    m_some = b_l > 0
    b_sum = tl.where(m_some, b_l, 1.0)
    o_slot = _slots(p_row + i_b * s_rb + i_h * s_rh, i_k, o_q, m_q, s_rq, BQ, W, BITS)
    o_part = (i_bh * SQ + o_q) * W + o_slot
    tl.store(p_base + o_part, tl.where(m_some, b_m + tl.log2(b_sum), -float("inf")), mask=m_q)
    b_out = (b_acc / b_sum[:, None]).to(p_part.dtype.element_ty)
    tl.store(p_part + o_part[:, None] * D + o_d[None, :], b_out, mask=m_qd)


@triton.jit(do_not_specialize=["s_cb", "s_ch", "s_yb", "s_yh", "H", "SQ", "W"])
def merge_kernel(
    p_part,
    p_base,
    p_count,
    p_out,
    p_lse,
    s_cb,
    s_ch,
    s_ob,
    s_oh,
    s_yb,
    s_yh,
    H,
    SQ,
    W,
    BQ,
    D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Combine the parts in the slots of each query by their log-sum-exp."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_q = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    o_d = tl.arange(0, TILE_D)
    m_q = o_q < SQ
    m_d = o_d < D
    n = tl.load(p_count + i_b * s_cb + i_h * s_ch + o_q // BQ, mask=m_q, other=0)
    o_part = (i_bh * SQ + o_q) * W
    b_m = tl.full((TILE_M,), -float("inf"), tl.float32)
    b_l = tl.zeros((TILE_M,), tl.float32)
    b_acc = tl.zeros((TILE_M, TILE_D), tl.float32)
    for i in range(0, tl.max(n, 0)):
        m = i < n
        b_base = tl.load(p_base + o_part + i, mask=m, other=-float("inf"))
        b_part = tl.load(
            p_part + (o_part + i)[:, None] * D + o_d[None, :], mask=m[:, None] & m_d[None, :], other=0.0
        )
        b_peak = tl.maximum(b_m, b_base)
        b_zero = tl.where(b_peak == -float("inf"), 0.0, b_peak)
        b_old = tl.exp2(b_m - b_zero)
        b_new = tl.exp2(b_base - b_zero)
        b_l = b_l * b_old + b_new
        b_acc = b_acc * b_old[:, None] + b_part.to(tl.float32) * b_new[:, None]
        b_m = b_peak
    m_some = b_l > 0
    b_sum = tl.where(m_some, b_l, 1.0)
    b_lse = tl.where(m_some, (b_m + tl.log2(b_sum)) * LN2, -float("inf"))
    tl.store(p_lse + i_b * s_yb + i_h * s_yh + o_q, b_lse, mask=m_q)
    p_out += i_b * s_ob + i_h * s_oh
    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + o_q.to(tl.int64)[:, None] * D + o_d[None, :], b_out, mask=m_q[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=PLAIN)
def part_dq_kernel(
    p_part,
    p_grad,
    p_base,
    p_delta,
    s_gb,
    s_gh,
    s_gs,
    s_bb,
    s_bh,
    s_db,
    s_dh,
    p_q,
    p_k,
    p_v,
    p_tile,
    p_first,
    p_start,
    p_size,
    p_column,
    p_row,
    p_even,
    p_valid,
    s_qb,
    s_qh,
    s_qs,
    s_kb,
    s_kh,
    s_ks,
    s_vb,
    s_vh,
    s_vs,
    s_rb,
    s_rh,
    s_rq,
    s_eb,
    s_eh,
    s_mb,
    s_mh,
    H,
    H_FIRST,
    GROUP,
    LEAD_B,
    LEAD_H,
    SQ,
    SK,
    K,
    E,
    W,
    BITS,
    BQ,
    BK,
    SCALE_LOG2,
    D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The share of dq, over scale, that one tile of gathered queries gets from the block they list."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_kv = (H_FIRST + i_h) // GROUP
    i_lead = (i_b % LEAD_B) * LEAD_H + i_h % LEAD_H
    i_k = tl.load(p_tile + i_lead * tl.num_programs(0) + tl.program_id(0))
    if i_k == K:  # as many programs as there could be tiles
        return
    o_q, m_q = _queries(p_first, p_start, p_size, p_column, i_k, i_lead, K, E, SQ, BQ, TILE_M)
    o_64 = o_q.to(tl.int64)[:, None]
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < D
    m_qd = m_q[:, None] & m_d[None, :]
    b_q = tl.load(p_q + i_b * s_qb + i_h * s_qh + o_64 * s_qs + o_d[None, :], mask=m_qd, other=0.0)
    b_grad = tl.load(p_grad + i_b * s_gb + i_h * s_gh + o_64 * s_gs + o_d[None, :], mask=m_qd, other=0.0)
    b_base = tl.load(p_base + i_b * s_bb + i_h * s_bh + o_q, mask=m_q, other=float("inf"))
    b_delta = tl.load(p_delta + i_b * s_db + i_h * s_dh + o_q, mask=m_q, other=0.0)
    b_dq = tl.zeros((TILE_M, TILE_D), tl.float32)

    i_first, n, n_even = _extent(p_even + i_b * s_eb + i_h * s_eh, i_k, SK, BK, TILE_N, HAS_VALID)
    p_k += i_b * s_kb + i_kv * s_kh + i_first * s_ks
    p_v += i_b * s_vb + i_kv * s_vh + i_first * s_vs
    p_valid += i_b * s_mb + i_h * s_mh + i_first
    for MASKED in tl.static_range(2):
        for i in range(n_even if MASKED else 0, n if MASKED else n_even, TILE_N):
            b_k, b_v, m_n = _keys(p_k, p_v, p_valid, i, n, s_ks, s_vs, D, TILE_N, TILE_D, HAS_VALID, MASKED)
            b_dq = _dq_step(b_q, b_k, b_v, b_grad, b_base, b_delta, b_dq, m_n, SCALE_LOG2, PRECISION)

    o_slot = _slots(p_row + i_b * s_rb + i_h * s_rh, i_k, o_q, m_q, s_rq, BQ, W, BITS)
    o_part = (i_bh * SQ + o_q) * W + o_slot
    tl.store(p_part + o_part[:, None] * D + o_d[None, :], b_dq.to(p_part.dtype.element_ty), mask=m_qd)


@triton.jit(do_not_specialize=["s_cb", "s_ch", "H", "SQ", "W"])
def sum_kernel(
    p_part,
    p_count,
    p_dq,
    s_cb,
    s_ch,
    s_ob,
    s_oh,
    H,
    SQ,
    W,
    BQ,
    SCALE,
    D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Add the shares in the slots of each query, and scale."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_q = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    o_d = tl.arange(0, TILE_D)
    m_q = o_q < SQ
    m_d = o_d < D
    n = tl.load(p_count + i_b * s_cb + i_h * s_ch + o_q // BQ, mask=m_q, other=0)
    p_part += ((i_bh * SQ + o_q) * W)[:, None] * D + o_d[None, :]
    b_dq = tl.zeros((TILE_M, TILE_D), tl.float32)
    for i in range(0, tl.max(n, 0)):
        b_dq += tl.load(p_part + i * D, mask=(i < n)[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    p_dq += i_b * s_ob + i_h * s_oh + o_q.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_dq, (b_dq * SCALE).to(p_dq.dtype.element_ty), mask=m_q[:, None] & m_d[None, :])


# Tiles of part_kernel and of part_dq_kernel for 16-bit operands, by padded head dim, 64 standing for less as
# well: the largest that spill nothing (RESOURCES.md); no GPU has timed them.
_SM_80 = {
    64: (Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3)),
    128: (Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3)),
    256: (Tiles(64, 32, 8, 3), Tiles(64, 16, 8, 3)),
}
# Less shared memory.
_SM_89 = _SM_80 | {
    128: (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2)),
    256: (Tiles(64, 16, 8, 3), Tiles(64, 16, 8, 2)),
}
# Operands stay in shared memory, which leaves registers for a second product of scores.
_SM_90 = {
    64: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
    128: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
    256: (Tiles(64, 32, 8, 3), Tiles(64, 32, 8, 3)),
}
TILES = {
    "sm_80": _SM_80,
    "sm_89": _SM_89,
    "sm_90": _SM_90,
    "sm_100": _SM_90 | {64: (Tiles(128, 64, 4, 2), Tiles(128, 64, 8, 3))},
    "sm_120": _SM_89,
    "gfx942": {
        64: (Tiles(128, 64, 4, 3), Tiles(128, 32, 4, 3)),
        128: (Tiles(128, 32, 8, 2), Tiles(128, 16, 8, 2)),
        256: (Tiles(64, 16, 8, 1), Tiles(64, 16, 8, 1)),
    },
}
# For float32, whose products are made of several (see `precision`), on every target.
FLOAT32 = {
    64: (Tiles(32, 32, 4, 1), Tiles(32, 16, 4, 1)),
    128: (Tiles(32, 16, 4, 1), Tiles(16, 16, 4, 1)),
    256: (Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
}


def tiles(target: Target, head_dim: int, itemsize: int, block_k: int) -> tuple[Tiles, Tiles]:
    """Tiles of part_kernel and of part_dq_kernel."""
    table = FLOAT32 if itemsize == 4 else TILES[target.name]
    forward, backward = (
        t._replace(keys=min(t.keys, _padded(block_k))) for t in table[max(64, _padded(head_dim))]
    )
    return forward, backward


class _Problem(NamedTuple):
    """The arguments of an op, or one round of them, as the kernels take them."""

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    counts: Tensor
    valid: Tensor | None
    """int32 [B or 1, H or 1, SK]."""
    even: Tensor | None
    """int32 [B or 1, H or 1, K]: how many tokens of each block come before one that is not valid."""
    block: tuple[int, int]
    scale: float
    group: int
    """Query heads of a KV head."""
    first_head: int
    """Which query head of all ``q`` starts with; ``k`` and ``v`` have all heads."""
    cut: Tiles


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block: tuple[int, int],
    valid: Tensor | None,
    scale: float,
    cut: Tiles,
) -> _Problem:
    even = None
    if valid is not None:
        # As wide as floats: a mask of bytes makes the compiler lay out the products as for operands of bytes.
        valid = broadcast_heads(valid, q.shape[1]).int().contiguous()
        padded = torch.nn.functional.pad(valid, (0, -valid.shape[-1] % block[1]))
        even = padded.unflatten(-1, (-1, block[1])).cumprod(-1, dtype=torch.int32).sum(-1, dtype=torch.int32)
    indices, counts = unit_stride(indices), unit_stride(counts)
    q, k, v = (_rows(x) for x in (q, k, v))
    return _Problem(q, k, v, indices, counts, valid, even, block, scale, q.shape[1] // k.shape[1], 0, cut)


def _rounds(x: _Problem) -> Iterator[tuple[_Problem, tuple[slice, slice, slice]]]:
    """The problem in rounds whose parts fit into PARTS_BYTES, and the queries [B, H, S] of each."""
    batch, heads, _, head_dim = x.q.shape
    rows, width = x.indices.shape[2:]
    fit = max(1, PARTS_BYTES // max(1, width * x.block[0] * (head_dim * x.q.element_size() + 4)))
    steps = max(1, fit // (heads * rows)), max(1, fit // rows), fit
    starts = (range(0, n, step) for n, step in zip((batch, heads, rows), steps, strict=True))
    for first in product(*starts):
        b, h, r = (slice(i, i + step) for i, step in zip(first, steps, strict=True))
        where = b, h, slice(r.start * x.block[0], r.stop * x.block[0])
        part = x._replace(
            q=x.q[where],
            k=x.k[b],
            v=x.v[b],
            indices=_of(x.indices, b, h)[:, :, r],
            counts=_of(x.counts, b, h)[:, :, r],
            valid=None if x.valid is None else _of(x.valid, b, h),
            even=None if x.even is None else _of(x.even, b, h),
            first_head=h.start,
        )
        yield part, where


def _of(x: Tensor, b: slice, h: slice) -> Tensor:
    """Part of [B or 1, H or 1, ...]."""
    return x[b if x.shape[0] > 1 else slice(1), h if x.shape[1] > 1 else slice(1)]


class _Work(NamedTuple):
    """Which program takes which of the gathered queries."""

    block: Tensor
    """int32 [B or 1, H or 1, T]: the key block of each tile; K where there is none."""
    first: Tensor
    """int32 [B or 1, H or 1, K]: the first tile of each key block."""
    columns: Columns


def _work(x: _Problem) -> _Work:
    keys = triton.cdiv(x.k.shape[2], x.block[1])
    columns = transpose(x.indices, x.counts, keys)
    tile_m = x.cut.queries
    sizes = (columns.counts * x.block[0] + (tile_m - 1)) // tile_m
    ends = sizes.cumsum(-1, dtype=torch.int32)
    # How many there are is known on the device only; here, how many there are at most.
    most = columns.indices.shape[-1] * x.block[0] // tile_m + keys
    each = torch.arange(most, dtype=torch.int32, device=ends.device).expand(*ends.shape[:2], -1)
    block = torch.searchsorted(ends, each.contiguous(), right=True, out_int32=True)
    return _Work(block, ends - sizes, columns)


def _launch_parts(kernel: Any, own: tuple[Any, ...], x: _Problem) -> None:
    """Launch one of the two part kernels, whose first arguments are its ``own``."""
    batch, heads, queries, head_dim = x.q.shape
    width, keys = x.indices.shape[-1], x.k.shape[2]
    work = _work(x)
    kernel[work.block.shape[-1], batch * heads](
        *own,
        x.q,
        x.k,
        x.v,
        work.block,
        work.first,
        work.columns.starts,
        work.columns.counts,
        work.columns.indices,
        x.indices,
        x.counts if x.even is None else x.even,
        x.counts if x.valid is None else x.valid,
        *x.q.stride()[:3],
        *x.k.stride()[:3],
        *x.v.stride()[:3],
        *lead_strides(x.indices),
        x.indices.stride(2),
        *lead_strides(x.even),
        *lead_strides(x.valid),
        heads,
        x.first_head,
        x.group,
        *x.indices.shape[:2],
        queries,
        keys,
        work.first.shape[-1],
        work.columns.indices.shape[-1],
        width,
        max(0, width - 1).bit_length(),
        *x.block,
        x.scale * math.log2(math.e),
        D=head_dim,
        TILE_M=x.cut.queries,
        TILE_N=x.cut.keys,
        TILE_D=_padded(head_dim),
        HAS_VALID=x.valid is not None,
        PRECISION=precision(x.q.dtype),
        num_warps=x.cut.num_warps,
        num_stages=x.cut.num_stages,
    )


def _forward_round(x: _Problem, out: Tensor, lse: Tensor) -> None:
    batch, heads, queries, head_dim = x.q.shape
    width = x.indices.shape[-1]
    part = torch.empty((*x.q.shape[:3], width, head_dim), dtype=x.q.dtype, device=x.q.device)
    base = torch.empty(part.shape[:-1], dtype=torch.float32, device=x.q.device)
    _launch_parts(part_kernel, (part, base), x)
    merge_kernel[triton.cdiv(queries, MERGE_M), batch * heads](
        part,
        base,
        x.counts,
        out,
        lse,
        *lead_strides(x.counts),
        *out.stride()[:2],
        *lse.stride()[:2],
        heads,
        queries,
        width,
        x.block[0],
        D=head_dim,
        TILE_M=MERGE_M,
        TILE_D=_padded(head_dim),
    )


def _dq_round(x: _Problem, grad_out: Tensor, base: Tensor, delta: Tensor, dq: Tensor) -> None:
    batch, heads, queries, head_dim = x.q.shape
    width = x.indices.shape[-1]
    part = torch.empty((*x.q.shape[:3], width, head_dim), dtype=x.q.dtype, device=x.q.device)
    strides = (*grad_out.stride()[:3], *base.stride()[:2], *delta.stride()[:2])
    _launch_parts(part_dq_kernel, (part, grad_out, base, delta, *strides), x)
    sum_kernel[triton.cdiv(queries, MERGE_M), batch * heads](
        part,
        x.counts,
        dq,
        *lead_strides(x.counts),
        *dq.stride()[:2],
        heads,
        queries,
        width,
        x.block[0],
        x.scale,
        D=head_dim,
        TILE_M=MERGE_M,
        TILE_D=_padded(head_dim),
    )


@torch.library.custom_op("dit_sparse::routed_attention_triton", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = empty_results(q)
    cut, _ = tiles(target_of(q.device), q.shape[3], q.element_size(), block_k)
    with torch.cuda.device_of(q):
        x = _problem(q, k, v, indices, counts, (block_q, block_k), valid, scale, cut)
        for part, where in _rounds(x):
            _forward_round(part, out[where], lse[where])
    return out, lse


@_attention.register_fake
def _(q, *rest):
    return empty_results(q)


@torch.library.custom_op("dit_sparse::routed_attention_triton_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (dq,) = empty_as(q)
    _, cut = tiles(target_of(q.device), q.shape[3], q.element_size(), block_k)
    with torch.cuda.device_of(q):
        x = _problem(q, k, v, indices, counts, (block_q, block_k), valid, scale, cut)
        grad_out = _rows(grad_out)
        base, delta = prepare(out, lse, grad_out, grad_lse)
        for part, where in _rounds(x):
            _dq_round(part, grad_out[where], base[where], delta[where], dq[where])
        columns = transpose(x.indices, x.counts, triton.cdiv(k.shape[2], block_k))
        dk, dv = key_gradients(x.q, x.k, x.v, grad_out, base, delta, columns, x.block, x.valid, scale)
    return dq, dk, dv


@_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *rest):
    return empty_as(q, k, v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, counts, block_q, block_k, valid, scale = inputs
    ctx.save_for_backward(q, k, v, *output, indices, counts, valid)
    ctx.sizes = block_q, block_k
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, indices, counts, valid = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    tensors = grad_out, grad_lse, q, k, v, out, lse, indices, counts
    return *_backward(*tensors, *ctx.sizes, valid, ctx.scale), *(None,) * 6


_attention.register_autograd(_gradients, setup_context=_setup_context)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block: tuple[int, int],
    *,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention for plans of few query tokens a block; see :func:`dit_sparse.kernels.block_sparse_attention`.

    Differentiable. What each listed block gives a query waits, in the dtype of ``q``, until it is combined:
    S * W * (D + 2) numbers of 16 bits a head, W the widest list. Rounds over heads, and over the queries of
    one, keep this within PARTS_BYTES, 512 MiB; only that of a single query block may be more.

    Args:
        indices, counts, block: Those of the plan; its lists ascend.
    """
    return _attention(q, k, v, indices, counts, *block, valid, scale)


def variants(target: Target) -> list[Variant]:
    """What ahead-of-time compilation records: blocks of one query and 64 or more key tokens."""
    out = []
    for dtype, head_dim in (("bf16", 128), ("bf16", 64), ("fp16", 128)):
        # A size of one is a constant to the compiler at run time too.
        sizes = {"D": head_dim, "TILE_D": _padded(head_dim), "BQ": 1}
        for kernel, cut in zip((part_kernel, part_dq_kernel), tiles(target, head_dim, 2, 64), strict=True):
            tile = {"TILE_M": cut.queries, "TILE_N": cut.keys, "PRECISION": "ieee"}
            for valid in (False, True):
                label = f"{dtype} D{head_dim}{' valid' if valid else ''}"
                options: dict[str, Any] = {
                    "num_warps": cut.num_warps,
                    "num_stages": cut.num_stages,
                    "in_ci": kernel is part_kernel and (target.name, label) in IN_CI,
                }
                out.append(_variant(kernel, label, dtype, sizes | tile | {"HAS_VALID": valid}, options))
        for kernel in (merge_kernel, sum_kernel):
            constants = sizes | {"TILE_M": MERGE_M}
            out.append(_variant(kernel, f"{dtype} D{head_dim}", dtype, constants, {"tensor_cores": False}))
    return out


def _variant(
    kernel: Any, label: str, dtype: str, constants: dict[str, Any], options: dict[str, Any]
) -> Variant:
    data = dict.fromkeys(("p_q", "p_k", "p_v", "p_part", "p_out", "p_grad", "p_dq"), f"*{dtype}")
    data |= dict.fromkeys(("p_base", "p_delta", "p_lse"), "*fp32")
    data |= dict.fromkeys(("SCALE", "SCALE_LOG2"), "fp32")
    names = [n for n in kernel.arg_names if n not in constants]
    types = {n: data.get(n, "*i32" if n.startswith("p_") else "i32") for n in names}
    aligned = frozenset(n for n in names if n.startswith(("p_", "s_q", "s_k", "s_v", "s_g")))
    return Variant(kernel, label, types, constants, aligned, **options)
