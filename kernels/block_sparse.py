"""The Triton backend: one program computes one tile of queries over the key blocks its plan lists.

Importing this module imports triton. Letters: B batch, H query heads, KV key/value heads, S tokens (SQ, SK),
D head dim, Q and K blocks.
In kernels: i_ index, o_ offsets, b_ block of values, p_ pointer, s_ stride, m_ mask.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.plan import Plan

LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _online_softmax(b_s, b_m, b_l, b_acc, b_v, SCALE_LOG2, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Fold a tile of scores [M, N] and values [N, D] into the running peak, sum and output, base two."""
    b_peak = tl.maximum(b_m, tl.max(b_s, 1) * SCALE_LOG2)
    b_base = b_peak
    if MASKED:  # a row that has seen no key yet: -inf minus -inf would be NaN
        b_base = tl.where(b_peak == -float("inf"), 0.0, b_peak)
    b_p = tl.exp2(b_s * SCALE_LOG2 - b_base[:, None])
    b_decay = tl.exp2(b_m - b_base)
    b_l = b_l * b_decay + tl.sum(b_p, 1)
    b_acc = b_acc * b_decay[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_peak, b_l, b_acc


@triton.jit
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
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
    SQ,
    SK,
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
    PER_Q: tl.constexpr = (BQ + TILE_M - 1) // TILE_M
    PER_K: tl.constexpr = (BK + TILE_N - 1) // TILE_N
    i_tile = tl.program_id(0)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    i_kv = i_h * KV // H
    i_q = (i_tile // PER_Q).to(tl.int64)

    o_row = (i_tile % PER_Q) * TILE_M + tl.arange(0, TILE_M)
    o_q = i_q * BQ + o_row
    o_n = tl.arange(0, TILE_N)
    o_d = tl.arange(0, TILE_D)
    m_q = (o_row < BQ) & (o_q < SQ)
    m_d = o_d < D

    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_kv * s_kh
    p_v += i_b * s_vb + i_kv * s_vh
    p_list += i_b * s_lb + i_h * s_lh + i_q * s_lq
    p_valid += i_b * s_mb + i_h * s_mh
    n_full = tl.load(p_full + i_b * s_fb + i_h * s_fh + i_q)
    n_all = tl.load(p_count + i_b * s_cb + i_h * s_ch + i_q)

    b_q = tl.load(p_q + o_q[:, None] * s_qs + o_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)
    b_m = tl.full((TILE_M,), -float("inf"), tl.float32)
    b_l = tl.zeros((TILE_M,), tl.float32)
    b_acc = tl.zeros((TILE_M, TILE_D), tl.float32)

    # Blocks whose every token exists come first in the list and need no mask of tokens.
    for i in range(0, n_full * PER_K):
        i_k = tl.load(p_list + i // PER_K).to(tl.int64)
        o_col = (i % PER_K) * TILE_N + o_n
        o_k = i_k * BK + o_col
        if BK % TILE_N == 0:
            if TILE_D == D:
                b_k = tl.load(p_k + o_k[None, :] * s_ks + o_d[:, None])
                b_v = tl.load(p_v + o_k[:, None] * s_vs + o_d[None, :])
            else:
                b_k = tl.load(p_k + o_k[None, :] * s_ks + o_d[:, None], mask=m_d[:, None], other=0.0)
                b_v = tl.load(p_v + o_k[:, None] * s_vs + o_d[None, :], mask=m_d[None, :], other=0.0)
            b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
            b_m, b_l, b_acc = _online_softmax(b_s, b_m, b_l, b_acc, b_v, SCALE_LOG2, PRECISION, False)
        else:
            m_k = o_col < BK
            b_k = tl.load(
                p_k + o_k[None, :] * s_ks + o_d[:, None], mask=m_k[None, :] & m_d[:, None], other=0.0
            )
            b_v = tl.load(
                p_v + o_k[:, None] * s_vs + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0
            )
            b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
            b_s = tl.where(m_k[None, :], b_s, -float("inf"))
            b_m, b_l, b_acc = _online_softmax(b_s, b_m, b_l, b_acc, b_v, SCALE_LOG2, PRECISION, True)

    for i in range(n_full * PER_K, n_all * PER_K):
        i_k = tl.load(p_list + i // PER_K).to(tl.int64)
        o_col = (i % PER_K) * TILE_N + o_n
        o_k = i_k * BK + o_col
        m_k = (o_col < BK) & (o_k < SK)
        if HAS_VALID:
            m_k = m_k & (tl.load(p_valid + o_k, mask=m_k, other=0) != 0)
        b_k = tl.load(p_k + o_k[None, :] * s_ks + o_d[:, None], mask=m_k[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(p_v + o_k[:, None] * s_vs + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
        b_s = tl.where(m_k[None, :], b_s, -float("inf"))
        b_m, b_l, b_acc = _online_softmax(b_s, b_m, b_l, b_acc, b_v, SCALE_LOG2, PRECISION, True)

    m_some = b_l > 0
    b_sum = tl.where(m_some, b_l, 1.0)
    b_lse = tl.where(m_some, (b_m + tl.log2(b_sum)) * LN2, -float("inf"))
    o_out = (i_b * H + i_h) * SQ + o_q
    tl.store(p_lse + o_out, b_lse, mask=m_q)
    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + o_out[:, None] * D + o_d[None, :], b_out, mask=m_q[:, None] & m_d[None, :])


class Config(NamedTuple):
    """Tile sizes and launch options of the forward kernel."""

    tile_m: int
    tile_n: int
    tile_d: int
    num_warps: int
    num_stages: int


def config(head_dim: int, itemsize: int, block: tuple[int, int], shared: int) -> Config:
    """Tiles for one shape.

    Args:
        head_dim: D.
        itemsize: Bytes of one element of q, k and v.
        block: Tokens of a query and of a key block; larger blocks are cut into several tiles.
        shared: Bytes of shared memory one program may use; decides how many stages of loads are in flight.
    """
    tile_d = max(16, triton.next_power_of_2(head_dim))
    # A float32 product is made of the halves of its operands (see `precision`): twice the room.
    row = tile_d * itemsize * (2 if itemsize == 4 else 1)
    # Beyond 256 bytes a row, fewer rows: the query tile stays at 32 KiB, a stage of keys and values likewise.
    narrow = max(1, row // 256)
    tile_m = max(16, min(128 // narrow, triton.next_power_of_2(block[0])))
    tile_n = max(16, min(64 // narrow, triton.next_power_of_2(block[1])))
    # A reduction across warps needs a little scratch where several share the rows of a narrow tile.
    scratch = 0 if narrow == 1 else 8 << 10
    room = shared - scratch - tile_m * row
    while tile_n > 16 and room < 2 * 2 * tile_n * row:
        tile_n //= 2
    stages = room // (2 * tile_n * row)
    return Config(tile_m, tile_n, tile_d, 8 if tile_m * tile_d >= 128 * 128 else 4, max(1, min(3, stages)))


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made: three TF32 products on NVIDIA's tensor cores, directly elsewhere."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def _launch(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    lists, full, counts, valid = _split(plan, batch, heads, k.shape[2], valid)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tiles = config(head_dim, q.element_size(), plan.block, _shared_memory(q.device))
    grid = (counts.shape[-1] * triton.cdiv(plan.block[0], tiles.tile_m), batch * heads)
    forward_kernel[grid](
        q,
        k,
        v,
        out,
        lse,
        lists,
        full,
        counts,
        counts if valid is None else valid,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *lists.stride()[:3],
        *full.stride()[:2],
        *counts.stride()[:2],
        *((0, 0) if valid is None else valid.stride()[:2]),
        heads,
        k.shape[1],
        queries,
        k.shape[2],
        scale * math.log2(math.e),
        D=head_dim,
        BQ=plan.block[0],
        BK=plan.block[1],
        TILE_M=tiles.tile_m,
        TILE_N=tiles.tile_n,
        TILE_D=tiles.tile_d,
        HAS_VALID=valid is not None,
        PRECISION=precision(q.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out, lse


def _split(
    plan: Plan, batch: int, heads: int, keys: int, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Lists [B, H, Q, Kmax] with whole blocks first, how many those are [B, H, Q], all counts, and validity.

    Axes that broadcast have stride 0. A block is whole when each of its tokens exists.
    """
    bk, lists, counts = plan.block[1], plan.indices, plan.counts
    if lists.shape[-1] == 0:  # a plan that keeps nothing still needs an address to point at
        lists = lists.new_zeros((*lists.shape[:3], 1))
    full = counts
    if valid is not None:
        if valid.shape[1] not in (1, heads):
            valid = valid.repeat_interleave(heads // valid.shape[1], 1)
        padded = torch.nn.functional.pad(valid, (0, -keys % bk))
        whole = padded.unflatten(-1, (-1, bk)).all(-1)
        lead = torch.broadcast_shapes(whole.shape[:2], lists.shape[:2])
        lists = lists.expand(*lead, -1, -1)
        used = torch.arange(lists.shape[-1], device=lists.device) < counts[..., None]
        first = whole.expand(*lead, -1).gather(-1, lists.long().flatten(2)).view(lists.shape) & used
        # Whole blocks, then partial ones, then unused slots, each in ascending order.
        rank = torch.where(first, 0, torch.where(used, 1, 2))
        lists = lists.gather(-1, rank.argsort(dim=-1, stable=True))
        full = first.sum(-1, dtype=torch.int32)
        valid = valid.expand(batch, heads, -1)
    elif keys % bk:
        # Lists ascend, so the only block that can be partial, the last, is the last one listed.
        last = lists.gather(-1, (counts - 1).clamp(min=0).long()[..., None]).squeeze(-1)
        full = counts - ((last == plan.keys - 1) & (counts > 0)).to(torch.int32)
    return (
        lists.contiguous().expand(batch, heads, -1, -1),
        full.contiguous().expand(batch, heads, -1),
        counts.contiguous().expand(batch, heads, -1),
        valid,
    )


def _shared_memory(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 99 << 10
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, valid, scale):
        return _launch(q, k, v, plan, valid, scale)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        raise NotImplementedError(
            "the triton backend has no backward; use backend 'flex' (on a GPU), 'cpu' or 'reference'"
        )


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
    """See :func:`dit_sparse.kernels.block_sparse_attention`. Forward only; fp32, bf16 and fp16.

    Raises:
        ValueError: float64 tensors, or tensors not on a GPU (the Triton interpreter takes the CPU's).
    """
    assert positions is None, "rules are refused before a kernel is chosen"
    if q.dtype == torch.float64:
        raise ValueError("the triton backend takes float32, bfloat16 or float16, got float64")
    if not q.is_cuda:
        if not triton.knobs.runtime.interpret:
            raise ValueError(
                f"the triton backend needs tensors on a GPU, got {q.device}; "
                "use 'cpu', or set TRITON_INTERPRET=1 to debug the kernel"
            )
        if q.dtype == torch.bfloat16:
            raise ValueError("the Triton interpreter cannot multiply bfloat16; use float32 or float16 there")
    return _Attention.apply(q, k, v, plan, valid, scale)
