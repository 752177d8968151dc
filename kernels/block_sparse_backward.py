"""The Triton backward of block-sparse attention: no atomics, so equal inputs give equal bits.

One kernel walks the forward's lists and makes dq. Another walks the transposed lists (which query blocks read
a key block) and makes dk and dv. Both recompute the weights from scores and lse, base two like the forward.

Importing this module imports triton. Letters: B batch, H query heads, KV key/value heads, S tokens (SQ, SK),
D head dim, Q and K blocks of BQ and BK tokens.
In kernels: i_ index, o_ offsets, b_ block of values, p_ pointer, s_ stride, m_ mask, n_ count.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.block_sparse import _rows, precision, schedule
from dit_sparse.kernels.lists import Columns, Lists, split, transpose
from dit_sparse.kernels.operands import empty_as, lead_strides
from dit_sparse.kernels.targets import Target, Variant, target_of
from dit_sparse.order import broadcast_heads

LOG2E = tl.constexpr(math.log2(math.e))
# Arguments whose values would compile a kernel anew, and gain nothing by it.
PLAIN = [
    "s_lb",
    "s_lh",
    "s_lq",
    "s_fb",
    "s_fh",
    "s_cb",
    "s_ch",
    "s_mb",
    "s_mh",
    "H",
    "KV",
    "Q",
    "K",
    "SQ",
    "SK",
]
# Queries of a program of `prepare_kernel`.
PREPARE_M = 32


@triton.jit
def _tokens(p_list, i, n, o, END, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Tokens of tile ``i`` of the ``n`` listed blocks laid end to end; END and beyond are none."""
    if BLOCK % TILE == 0:
        PER: tl.constexpr = BLOCK // TILE
        return tl.load(p_list + i // PER) * BLOCK + i % PER * TILE + o
    else:
        o_slot = i * TILE + o
        m_slot = o_slot < n * BLOCK
        i_block = tl.load(p_list + o_slot // BLOCK, mask=m_slot, other=0)
        return tl.where(m_slot, i_block * BLOCK + o_slot % BLOCK, END)


@triton.jit
def _load_rows(p_rows, m_d, EVEN: tl.constexpr):
    """Rows that all exist; EVEN says that their columns do too."""
    if EVEN:
        return tl.load(p_rows)
    else:
        return tl.load(p_rows, mask=m_d[None, :], other=0.0)


@triton.jit
def _dq_step(b_q, b_k, b_v, b_grad, b_base, b_delta, b_dq, m_k, SCALE_LOG2, PRECISION: tl.constexpr):
    """Add what one tile of keys and values gives to dq / scale; without ``m_k`` every key counts."""
    # Both products first: the second one runs while the exponentials of the first are taken.
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
    b_p = tl.exp2(b_s * SCALE_LOG2 - b_base[:, None])
    if m_k is not None:
        b_p = tl.where(m_k[None, :], b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["H", "SQ"])
def prepare_kernel(
    p_out,
    p_grad,
    p_lse,
    p_dlse,
    p_base,
    p_delta,
    s_gb,
    s_gh,
    s_gs,
    H,
    SQ,
    D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """What the gradients need of each query: its lse, base two, and delta = grad_out . out - grad_lse."""
    i_bh = tl.program_id(1).to(tl.int64)
    o_q = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    o_d = tl.arange(0, TILE_D)
    o_out = i_bh * SQ + o_q
    m_q = o_q < SQ
    m_qd = m_q[:, None] & (o_d < D)[None, :]
    p_grad += i_bh // H * s_gb + i_bh % H * s_gh
    b_grad = tl.load(p_grad + o_q[:, None] * s_gs + o_d[None, :], mask=m_qd, other=0.0)
    b_out = tl.load(p_out + o_out[:, None] * D + o_d[None, :], mask=m_qd, other=0.0)
    b_lse = tl.load(p_lse + o_out, mask=m_q, other=-float("inf"))
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    if HAS_DLSE:
        b_delta -= tl.load(p_dlse + o_out, mask=m_q, other=0.0)
    # A query that reads no key, and the slot after the last query: a base of +inf makes every weight 0.
    m_some = b_lse > -float("inf")
    b_base = tl.where(m_some, b_lse * LOG2E, float("inf"))
    tl.store(p_base + i_bh * (SQ + 1) + o_q, b_base, mask=o_q <= SQ)
    tl.store(p_delta + o_out, tl.where(m_some, b_delta, 0.0), mask=m_q)


@triton.jit(do_not_specialize=PLAIN)
def dq_kernel(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_base,
    p_delta,
    p_dq,
    p_order,
    p_list,
    p_full,
    p_count,
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
    s_gb,
    s_gh,
    s_gs,
    s_lb,
    s_lh,
    s_lq,
    s_fb,
    s_fh,
    s_cb,
    s_ch,
    s_mb,
    s_mh,
    H,
    KV,
    Q,
    SQ,
    SK,
    SCALE,
    SCALE_LOG2,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per tile of queries and head: dq over the key blocks listed, whole ones first."""
    PER_Q: tl.constexpr = (BQ + TILE_M - 1) // TILE_M
    i_row = tl.load(p_order + tl.program_id(0) // PER_Q)
    i_b = (i_row // Q // H).to(tl.int64)
    i_h = (i_row // Q % H).to(tl.int64)
    i_kv = i_h * KV // H
    i_q = (i_row % Q).to(tl.int64)

    o_row = tl.program_id(0) % PER_Q * TILE_M + tl.arange(0, TILE_M)
    o_q = i_q * BQ + o_row
    o_n = tl.arange(0, TILE_N)
    o_d = tl.arange(0, TILE_D)
    m_q = (o_row < BQ) & (o_q < SQ)
    m_d = o_d < D
    m_qd = m_q[:, None] & m_d[None, :]

    p_k += i_b * s_kb + i_kv * s_kh
    p_v += i_b * s_vb + i_kv * s_vh
    p_list += i_b * s_lb + i_h * s_lh + i_q * s_lq
    p_valid += i_b * s_mb + i_h * s_mh
    n = tl.load(p_count + i_b * s_cb + i_h * s_ch + i_q)
    n_full = 0
    if BK % TILE_N == 0:
        n_full = tl.load(p_full + i_b * s_fb + i_h * s_fh + i_q)

    o_out = (i_b * H + i_h) * SQ + o_q
    b_q = tl.load(p_q + i_b * s_qb + i_h * s_qh + o_q[:, None] * s_qs + o_d[None, :], mask=m_qd, other=0.0)
    p_grad += i_b * s_gb + i_h * s_gh
    b_grad = tl.load(p_grad + o_q[:, None] * s_gs + o_d[None, :], mask=m_qd, other=0.0)
    b_base = tl.load(p_base + o_out + i_b * H + i_h, mask=m_q, other=float("inf"))
    b_delta = tl.load(p_delta + o_out, mask=m_q, other=0.0)
    b_dq = tl.zeros((TILE_M, TILE_D), tl.float32)

    o_kd = o_n[:, None] * s_ks + o_d[None, :]
    o_vd = o_n[:, None] * s_vs + o_d[None, :]
    for i in range(0, n_full * (BK // TILE_N)):
        i_k = _tokens(p_list, i, n, 0, SK, BK, TILE_N).to(tl.int64)
        b_k = _load_rows(p_k + i_k * s_ks + o_kd, m_d, D == TILE_D)
        b_v = _load_rows(p_v + i_k * s_vs + o_vd, m_d, D == TILE_D)
        b_dq = _dq_step(b_q, b_k, b_v, b_grad, b_base, b_delta, b_dq, None, SCALE_LOG2, PRECISION)

    # Masks in flight for more stages would take the registers of the loop above.
    for i in tl.range(n_full * (BK // TILE_N), tl.cdiv(n * BK, TILE_N), num_stages=2):
        o_k = _tokens(p_list, i, n, o_n, SK, BK, TILE_N).to(tl.int64)
        m_k = o_k < SK
        if HAS_VALID:
            m_k = m_k & (tl.load(p_valid + o_k, mask=m_k, other=0) != 0)
        m_kd = m_k[:, None] & m_d[None, :]
        b_k = tl.load(p_k + o_k[:, None] * s_ks + o_d[None, :], mask=m_kd, other=0.0)
        b_v = tl.load(p_v + o_k[:, None] * s_vs + o_d[None, :], mask=m_kd, other=0.0)
        b_dq = _dq_step(b_q, b_k, b_v, b_grad, b_base, b_delta, b_dq, m_k, SCALE_LOG2, PRECISION)

    tl.store(p_dq + o_out[:, None] * D + o_d[None, :], (b_dq * SCALE).to(p_dq.dtype.element_ty), mask=m_qd)


@triton.jit(do_not_specialize=PLAIN)
def dkdv_kernel(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_base,
    p_delta,
    p_dk,
    p_dv,
    p_order,
    p_list,
    p_start,
    p_count,
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
    s_gb,
    s_gh,
    s_gs,
    s_lb,
    s_lh,
    s_cb,
    s_ch,
    s_mb,
    s_mh,
    KV,
    K,
    SQ,
    SK,
    SCALE,
    SCALE_LOG2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    HAS_VALID: tl.constexpr,
    PER_HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per tile of keys and KV head: dk and dv over the query blocks listed of each query head.

    No key needs a mask: a row of scores has one key alone, and rows that do not count are dropped at the end.
    PER_HEAD says that it depends on the query head which count.
    """
    PER_K: tl.constexpr = (BK + TILE_N - 1) // TILE_N
    i_column = tl.load(p_order + tl.program_id(0) // PER_K)
    i_b = (i_column // K // KV).to(tl.int64)
    i_kv = (i_column // K % KV).to(tl.int64)
    i_k = (i_column % K).to(tl.int64)

    o_col = tl.program_id(0) % PER_K * TILE_N + tl.arange(0, TILE_N)
    o_k = i_k * BK + o_col
    o_m = tl.arange(0, TILE_M)
    o_d = tl.arange(0, TILE_D)
    m_k = (o_col < BK) & (o_k < SK)
    m_d = o_d < D
    m_kd = m_k[:, None] & m_d[None, :]

    b_k = tl.load(p_k + i_b * s_kb + i_kv * s_kh + o_k[:, None] * s_ks + o_d[None, :], mask=m_kd, other=0.0)
    b_v = tl.load(p_v + i_b * s_vb + i_kv * s_vh + o_k[:, None] * s_vs + o_d[None, :], mask=m_kd, other=0.0)
    b_dk = tl.zeros((TILE_N, TILE_D), tl.float32)
    b_dv = tl.zeros((TILE_N, TILE_D), tl.float32)

    for i_g in range(GROUP):
        i_h = i_kv * GROUP + i_g
        i_bh = i_b * KV * GROUP + i_h
        p_qh = p_q + i_b * s_qb + i_h * s_qh
        p_gradh = p_grad + i_b * s_gb + i_h * s_gh
        o_c = i_b * s_cb + i_h * s_ch + i_k
        n = tl.load(p_count + o_c)
        p_listh = p_list + i_b * s_lb + i_h * s_lh + tl.load(p_start + o_c)
        if PER_HEAD:
            m_live = tl.load(p_valid + i_b * s_mb + i_h * s_mh + o_k, mask=m_k, other=0) != 0
        for i in range(0, tl.cdiv(n * BQ, TILE_M)):
            o_s = _tokens(p_listh, i, n, o_m, SQ, BQ, TILE_M)
            # Beyond the queries: the values of the last one, with the base of the slot after it: weight 0.
            o_q = tl.minimum(o_s, SQ - 1).to(tl.int64)
            b_q = _load_rows(p_qh + o_q[:, None] * s_qs + o_d[None, :], m_d, D == TILE_D)
            b_base = tl.load(p_base + i_bh * (SQ + 1) + tl.minimum(o_s, SQ))
            b_grad = _load_rows(p_gradh + o_q[:, None] * s_gs + o_d[None, :], m_d, D == TILE_D)
            b_delta = tl.load(p_delta + i_bh * SQ + o_q)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)
            b_p = tl.exp2(b_s * SCALE_LOG2 - b_base[None, :])
            if PER_HEAD:
                b_p = tl.where(m_live[:, None], b_p, 0.0)
            b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    b_dk *= SCALE
    if HAS_VALID and not PER_HEAD:
        m_live = tl.load(p_valid + i_b * s_mb + i_kv * GROUP * s_mh + o_k, mask=m_k, other=0) != 0
        b_dk = tl.where(m_live[:, None], b_dk, 0.0)
        b_dv = tl.where(m_live[:, None], b_dv, 0.0)
    o_out = (i_b * KV + i_kv) * SK + o_k
    tl.store(p_dk + o_out[:, None] * D + o_d[None, :], b_dk.to(p_dk.dtype.element_ty), mask=m_kd)
    tl.store(p_dv + o_out[:, None] * D + o_d[None, :], b_dv.to(p_dv.dtype.element_ty), mask=m_kd)


class Tiles(NamedTuple):
    """Queries and keys of a tile, and launch options."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Choice(NamedTuple):
    """Tiles of both kernels, each also for blocks below 128 tokens on the side it is split over."""

    dq: Tiles
    dq_small: Tiles
    dkdv: Tiles
    dkdv_small: Tiles


# For 16-bit operands by padded head dim, 64 standing for less as well. Chosen by instructions per score among
# tiles that compile with few or no spills; no GPU has timed them. A load whose address was itself loaded is
# two stages, so on GPUs without wgmma a second buffer takes five.
_SM_80 = {
    64: Choice(Tiles(128, 64, 8, 5), Tiles(64, 64, 4, 5), Tiles(64, 128, 8, 5), Tiles(64, 64, 4, 5)),
    128: Choice(Tiles(64, 32, 4, 5), Tiles(64, 32, 4, 5), Tiles(64, 64, 8, 5), Tiles(64, 64, 8, 5)),
    256: Choice(*[Tiles(32, 32, 4, 2)] * 4),
}
# Less shared memory.
_SM_89 = _SM_80 | {
    128: Choice(Tiles(128, 32, 8, 5), Tiles(64, 32, 4, 5), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
}
TILES = {
    "sm_80": _SM_80,
    "sm_89": _SM_89,
    "sm_90": {
        64: Choice(Tiles(128, 64, 8, 5), Tiles(64, 64, 4, 5), Tiles(64, 128, 8, 5), Tiles(64, 64, 4, 5)),
        128: Choice(Tiles(128, 64, 8, 5), Tiles(64, 64, 4, 5), Tiles(64, 128, 8, 5), Tiles(32, 64, 4, 5)),
        256: Choice(Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 5), Tiles(32, 64, 8, 5)),
    },
    "sm_100": {
        64: Choice(Tiles(128, 64, 4, 5), Tiles(64, 64, 4, 5), Tiles(128, 128, 8, 5), Tiles(64, 64, 4, 5)),
        128: Choice(Tiles(128, 64, 8, 5), Tiles(64, 64, 8, 5), Tiles(64, 128, 8, 5), Tiles(64, 64, 4, 5)),
        256: Choice(Tiles(64, 32, 4, 5), Tiles(64, 32, 4, 5), Tiles(32, 64, 8, 5), Tiles(32, 64, 8, 5)),
    },
    "sm_120": _SM_89,
    "gfx942": {
        64: Choice(Tiles(128, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 128, 4, 2), Tiles(32, 64, 4, 2)),
        128: Choice(Tiles(128, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 128, 4, 2), Tiles(32, 64, 4, 2)),
        256: Choice(*[Tiles(32, 32, 4, 2)] * 4),
    },
}
# For float32, whose products are made of several (see `precision`), on every target.
FLOAT32 = {
    64: Choice(*[Tiles(32, 32, 4, 2)] * 4),
    128: Choice(*[Tiles(32, 32, 4, 2)] * 4),
    256: Choice(*[Tiles(16, 16, 4, 2)] * 4),
}


def tiles(target: Target, head_dim: int, itemsize: int, block: tuple[int, int]) -> tuple[Tiles, Tiles]:
    """Tiles of the dq and of the dk and dv kernel.

    Args:
        head_dim: D.
        itemsize: Bytes of one element of q, k and v.
        block: Tokens of a query and of a key block.
    """
    table = FLOAT32 if itemsize == 4 else TILES[target.name]
    choice = table[max(64, _padded(head_dim))]
    dq = choice.dq if block[0] >= 128 else choice.dq_small
    dkdv = choice.dkdv if block[1] >= 128 else choice.dkdv_small
    return (
        dq._replace(queries=min(dq.queries, _padded(block[0])), keys=_divisor(block[1], dq.keys)),
        dkdv._replace(queries=_divisor(block[0], dkdv.queries), keys=min(dkdv.keys, _padded(block[1]))),
    )


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _divisor(block: int, tile: int) -> int:
    """The largest tile that cuts blocks evenly, or the tile itself: then blocks are laid end to end."""
    even = math.gcd(block, tile)
    return even if even >= 16 else tile


def prepare(out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """What both kernels need of each query.

    Returns:
        base [B, H, SQ + 1], the lse, base two, and +inf for queries that read no key and in the last slot;
        and delta [B, H, SQ], grad_out . out - grad_lse; both float32.
    """
    batch, heads, queries, head_dim = out.shape
    base = torch.empty((batch, heads, queries + 1), dtype=torch.float32, device=out.device)
    delta = torch.empty((batch, heads, queries), dtype=torch.float32, device=out.device)
    prepare_kernel[triton.cdiv(queries + 1, PREPARE_M), batch * heads](
        out.contiguous(),
        grad_out,
        lse.contiguous(),
        lse if grad_lse is None else grad_lse.contiguous(),
        base,
        delta,
        *grad_out.stride()[:3],
        heads,
        queries,
        D=head_dim,
        TILE_M=PREPARE_M,
        TILE_D=_padded(head_dim),
        HAS_DLSE=grad_lse is not None,
    )
    return base, delta


def query_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    base: Tensor,
    delta: Tensor,
    lists: Lists,
    block: tuple[int, int],
    valid: Tensor | None,
    scale: float,
) -> Tensor:
    """dq.

    Args:
        q, k, v, grad_out: [B, H or KV, S, D] with unit stride in D.
        base, delta: From :func:`prepare`.
        valid: int32 [B or 1, H or 1, SK], or None.
    """
    batch, heads, queries, head_dim = q.shape
    cut, _ = tiles(target_of(q.device), head_dim, q.element_size(), block)
    (dq,) = empty_as(q)
    order = schedule(lists.counts, batch, heads)
    dq_kernel[(order.numel() * triton.cdiv(block[0], cut.queries),)](
        q,
        k,
        v,
        grad_out,
        base,
        delta,
        dq,
        order,
        *lists,
        lists.counts if valid is None else valid,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *grad_out.stride()[:3],
        *lead_strides(lists.indices),
        lists.indices.stride(2),
        *lead_strides(lists.full),
        *lead_strides(lists.counts),
        *lead_strides(valid),
        heads,
        k.shape[1],
        lists.counts.shape[2],
        queries,
        k.shape[2],
        scale,
        scale * math.log2(math.e),
        HAS_VALID=valid is not None,
        **_constants(cut, q, block),
    )
    return dq


def key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    base: Tensor,
    delta: Tensor,
    columns: Columns,
    block: tuple[int, int],
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dk and dv; arguments as those of :func:`query_gradients`."""
    batch, kv_heads, keys, head_dim = k.shape
    group = q.shape[1] // kv_heads
    _, cut = tiles(target_of(q.device), head_dim, q.element_size(), block)
    dk, dv = empty_as(k, v)
    work = columns.counts
    if work.shape[1] > 1:
        work = work.unflatten(1, (kv_heads, group)).sum(2)
    order = schedule(work, batch, kv_heads)
    dkdv_kernel[(order.numel() * triton.cdiv(block[1], cut.keys),)](
        q,
        k,
        v,
        grad_out,
        base,
        delta,
        dk,
        dv,
        order,
        *columns,
        columns.counts if valid is None else valid,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *grad_out.stride()[:3],
        *lead_strides(columns.indices),
        *lead_strides(columns.counts),
        *lead_strides(valid),
        kv_heads,
        columns.counts.shape[2],
        q.shape[2],
        keys,
        scale,
        scale * math.log2(math.e),
        GROUP=group,
        HAS_VALID=valid is not None,
        PER_HEAD=valid is not None and group > 1 and valid.shape[1] > 1,
        **_constants(cut, q, block),
    )
    return dk, dv


def _constants(cut: Tiles, q: Tensor, block: tuple[int, int]) -> dict[str, Any]:
    return {
        "D": q.shape[3],
        "BQ": block[0],
        "BK": block[1],
        "TILE_M": cut.queries,
        "TILE_N": cut.keys,
        "TILE_D": _padded(q.shape[3]),
        "PRECISION": precision(q.dtype),
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
    }


@torch.library.custom_op("dit_sparse::block_sparse_attention_triton_backward", mutates_args=())
def backward(
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
    keys: int,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of block-sparse attention, contiguous and in their dtype.

    Args:
        grad_out: Gradient of out; zeros where it took no part.
        grad_lse: Gradient of lse, or None where it took no part.
        out, lse: What the forward returned.
        indices, counts, block_q, block_k, keys: Those of the plan.
        valid: Which keys exist, bool [B or 1, H or KV or 1, SK]; None means all.
    """
    block = block_q, block_k
    q, k, v, grad_out = (_rows(x) for x in (q, k, v, grad_out))
    if valid is not None:
        valid = broadcast_heads(valid, q.shape[1])
    with torch.cuda.device_of(q):
        lists = split(indices, counts, block_k, k.shape[2], valid)
        columns = transpose(indices, counts, keys)
        # As wide as a float: bytes would make the compiler lay out the products as if for one-byte operands.
        mask = None if valid is None else valid.int()
        base, delta = prepare(out, lse, grad_out, grad_lse)
        dq = query_gradients(q, k, v, grad_out, base, delta, lists, block, mask, scale)
        dk, dv = key_gradients(q, k, v, grad_out, base, delta, columns, block, mask, scale)
    return dq, dk, dv


@backward.register_fake
def _(grad_out, grad_lse, q, k, v, *rest):
    return empty_as(q, k, v)


# Variants that continuous integration compiles again.
IN_CI = {
    ("sm_80", "dq_kernel", "bf16 D64 64x64"),
    ("sm_90", "dkdv_kernel", "bf16 D128 128x128"),
    ("sm_100", "dkdv_kernel", "bf16 D64 128x128"),
    ("sm_120", "dq_kernel", "bf16 D128 128x128"),
}


def variants(target: Target) -> list[Variant]:
    """What ahead-of-time compilation records: the blocks methods use, with key validity."""
    blocks = ((64, 64), (128, 64), (128, 128))
    shapes = [("bf16", head_dim, block) for head_dim in (64, 128) for block in blocks]
    shapes += [("fp16", 128, (128, 128)), ("fp32", 64, (128, 128)), ("bf16", 128, (1, 64))]
    out = []
    for dtype, head_dim, block in shapes:
        label = f"{dtype} D{head_dim} {block[0]}x{block[1]}"
        # A query block of one token has kernels of its own for all but dk and dv.
        first = 1 if block[0] == 1 else 0
        cuts = tiles(target, head_dim, 4 if dtype == "fp32" else 2, block)
        for kernel, cut in list(zip((dq_kernel, dkdv_kernel), cuts, strict=True))[first:]:
            constants = {
                "GROUP": 1,
                "D": head_dim,
                "BQ": block[0],
                "BK": block[1],
                "TILE_M": cut.queries,
                "TILE_N": cut.keys,
                "TILE_D": _padded(head_dim),
                "HAS_VALID": True,
                "PER_HEAD": False,
                "PRECISION": "tf32x3" if dtype == "fp32" and not target.is_amd else "ieee",
            }
            out.append(_variant(target, kernel, label, dtype, constants, cut.num_warps, cut.num_stages))
    for head_dim in (64, 128):
        constants = {"D": head_dim, "TILE_M": PREPARE_M, "TILE_D": head_dim, "HAS_DLSE": True}
        out.append(_variant(target, prepare_kernel, f"bf16 D{head_dim}", "bf16", constants, 4, 3))
    return out


def _variant(
    target: Target,
    kernel: Any,
    label: str,
    dtype: str,
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> Variant:
    kinds = dict.fromkeys(("p_lse", "p_dlse", "p_base", "p_delta"), "*fp32")
    kinds |= dict.fromkeys(("p_order", "p_list", "p_start", "p_full", "p_count", "p_valid"), "*i32")
    kinds |= dict.fromkeys(("SCALE", "SCALE_LOG2"), "fp32")
    constants = {n: constants[n] for n in kernel.arg_names if n in constants}
    names = [n for n in kernel.arg_names if n not in constants]
    return Variant(
        kernel,
        label,
        {n: kinds.get(n, f"*{dtype}" if n.startswith("p_") else "i32") for n in names},
        constants,
        frozenset(n for n in names if n.startswith(("p_", "s_q", "s_k", "s_v", "s_g"))),
        num_warps,
        num_stages,
        tensor_cores=kernel is not prepare_kernel,
        may_spill=True,
        in_ci=(target.name, kernel.__name__, label) in IN_CI,
    )
