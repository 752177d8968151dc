"""The Triton backend of quantised block-sparse attention: 8-bit tensors are made first, then attended.

Quantising takes three kernels: sums of k and peaks of v over tokens, then q and k by rows, then v by
channels. What these write is padded to whole groups of tokens, so the attention loop loads without masks:

    q, k   [B, heads, blocks, padded block, TILE_D]  one scale per group of at most 128 tokens of a block
    v      [B, KV, blocks, TILE_D, padded block]     one scale per channel; 8-bit products sum along the
                                                     last axis of both operands, here tokens

Importing this module imports triton. Letters: B batch, H query heads, KV key/value heads, S tokens (SQ, SK),
D head dim, BQ and BK tokens of a query and a key block, NQ and NK how many there are, G tokens of a group.
In kernels: i_ index, o_ offsets, b_ block of values, c_ scalar, p_ pointer, s_ stride, m_ mask, n_ count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels import quant_ops
from dit_sparse.kernels.lists import Lists, split
from dit_sparse.kernels.operands import empty_results, lead_strides, unit_stride
from dit_sparse.kernels.quant_ops import GROUP, LIMITS, PV, QK, STORED, WEIGHT_OF_ONE, per_kv_head
from dit_sparse.kernels.targets import Target, Variant, target_of
from dit_sparse.order import broadcast_heads
from dit_sparse.plan import Plan

# Of the kernels that quantise: a product fused with a sum would round once, but the definition rounds twice.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
# Elements of k that one program sums up.
STATISTICS_TILE = 1 << 14

LN2 = tl.constexpr(math.log(2.0))
# Added to a number below 2 ** 22 it rounds it to an integer, ties to even, which are then the lowest bits.
ROUNDER = tl.constexpr(1.5 * 2**23)
FLOOR = tl.constexpr(quant_ops.FLOOR)


@triton.jit
def _cast(b_x, TYPE: tl.constexpr):
    """Round to nearest even."""
    IS_INT: tl.constexpr = TYPE == tl.int8  # noqa: SIM300
    return (b_x + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8) if IS_INT else b_x.to(TYPE)


@triton.jit
def _shuffle(b_x):
    """Order tokens, columns of [R, N], such that weights go from one 8-bit product to the next in registers.

    Of 16 columns that a product makes, a thread holds 2t, 2t + 1, 8 + 2t and 9 + 2t; of those that one takes,
    it must hold 4t to 4t + 3. A sum over tokens does not mind their order if both its operands share it.
    """
    R: tl.constexpr = b_x.shape[0]
    N: tl.constexpr = b_x.shape[1]
    if b_x.dtype.primitive_bitwidth == 8:
        b_x = b_x.reshape(R, N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(R, N)
    return b_x


@triton.jit
def _load_group(
    p_x,
    p_valid,
    i_group,
    s_xs,
    S,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    TILE_D: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """One group of tokens of a head in float32, 0 where there is none; where they are, and which exist."""
    GROUPS: tl.constexpr = (BLOCK + G - 1) // G
    o_row = i_group % GROUPS * G + tl.arange(0, G)
    o_s = i_group // GROUPS * BLOCK + o_row
    o_d = tl.arange(0, TILE_D)
    m_s = (o_row < BLOCK) & (o_s < S)
    if HAS_VALID:
        m_s = m_s & (tl.load(p_valid + o_s, mask=m_s, other=0) != 0)
    m = m_s[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_s[:, None] * s_xs + o_d[None, :], mask=m, other=0.0)
    return b_x.to(tl.float32), o_s, m_s


@triton.jit
def statistics_kernel(
    p_k,
    p_v,
    p_valid,
    p_sum,
    p_peak,
    s_kb,
    s_kh,
    s_ks,
    s_vb,
    s_vh,
    s_vs,
    s_mb,
    s_mh,
    KV,
    SK,
    D: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_D: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Per channel, over TILE_S valid tokens: the sum of k, with SMOOTH, and the peak of v."""
    i_b = (tl.program_id(1) // KV).to(tl.int64)
    i_kv = (tl.program_id(1) % KV).to(tl.int64)
    o_s = tl.program_id(0).to(tl.int64) * TILE_S + tl.arange(0, TILE_S)
    o_d = tl.arange(0, TILE_D)
    m_s = o_s < SK
    if HAS_VALID:
        m_s = m_s & (tl.load(p_valid + i_b * s_mb + i_kv * s_mh + o_s, mask=m_s, other=0) != 0)
    m = m_s[:, None] & (o_d < D)[None, :]
    o_out = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D + o_d
    b_v = tl.load(p_v + i_b * s_vb + i_kv * s_vh + o_s[:, None] * s_vs + o_d[None, :], mask=m, other=0.0)
    tl.store(p_peak + o_out, tl.max(tl.abs(b_v.to(tl.float32)), 0), mask=o_d < D)
    if SMOOTH:
        b_k = tl.load(p_k + i_b * s_kb + i_kv * s_kh + o_s[:, None] * s_ks + o_d[None, :], mask=m, other=0.0)
        tl.store(p_sum + o_out, tl.sum(b_k.to(tl.float32), 0), mask=o_d < D)


@triton.jit
def quantize_rows_kernel(
    p_x,
    p_mean,
    p_valid,
    p_out,
    p_scale,
    p_shift,
    s_xb,
    s_xh,
    s_xs,
    s_mb,
    s_mh,
    H,
    KV,
    S,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    TILE_D: tl.constexpr,
    IS_KEY: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """One group of tokens of q, or of k less its mean; of q also its products with that mean."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_group = tl.program_id(0).to(tl.int64)
    p_x += i_b * s_xb + i_h * s_xh
    p_valid += i_b * s_mb + i_h * s_mh
    b_x, o_s, m_s = _load_group(p_x, p_valid, i_group, s_xs, S, BLOCK, G, D, TILE_D, HAS_VALID)
    o_d = tl.arange(0, TILE_D)
    if SMOOTH:
        o_mean = (i_b * KV + i_h * KV // H) * D + o_d
        b_mean = tl.load(p_mean + o_mean, mask=o_d < D, other=0.0)
        if IS_KEY:
            b_x = tl.where(m_s[:, None], b_x - b_mean[None, :], 0.0)
        else:
            tl.store(p_shift + i_bh * S + o_s, tl.sum(b_x * b_mean[None, :], 1), mask=m_s)
    b_peak = tl.maximum(tl.max(tl.abs(b_x)), FLOOR)
    i_out = i_bh * tl.num_programs(0) + i_group
    tl.store(p_scale + i_out, tl.div_rn(b_peak, LIMIT))
    b_out = _cast(b_x * tl.div_rn(LIMIT, b_peak), p_out.dtype.element_ty)
    tl.store(p_out + (i_out * G + tl.arange(0, G))[:, None] * TILE_D + o_d[None, :], b_out)


@triton.jit
def quantize_channels_kernel(
    p_v,
    p_peak,
    p_valid,
    p_out,
    s_vb,
    s_vh,
    s_vs,
    s_mb,
    s_mh,
    KV,
    S,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    TILE_D: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """One group of tokens of v, each channel by its own scale, transposed and shuffled."""
    GROUPS: tl.constexpr = (BLOCK + G - 1) // G
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // KV
    i_h = i_bh % KV
    i_group = tl.program_id(0).to(tl.int64)
    p_v += i_b * s_vb + i_h * s_vh
    p_valid += i_b * s_mb + i_h * s_mh
    b_v, _, _ = _load_group(p_v, p_valid, i_group, s_vs, S, BLOCK, G, D, TILE_D, HAS_VALID)
    o_d = tl.arange(0, TILE_D)
    b_peak = tl.maximum(tl.load(p_peak + i_bh * D + o_d, mask=o_d < D, other=0.0), FLOOR)
    b_out = _cast(b_v * tl.div_rn(LIMIT, b_peak)[None, :], p_out.dtype.element_ty)
    b_out = _shuffle(tl.trans(b_out))
    PADDED: tl.constexpr = GROUPS * G
    i_block = i_bh * (tl.num_programs(0) // GROUPS) + i_group // GROUPS
    p_out += i_block * (TILE_D * PADDED) + i_group % GROUPS * G
    tl.store(p_out + o_d[:, None] * PADDED + tl.arange(0, G)[None, :], b_out)


@triton.jit
def _product(b_a, b_b, ADDS: tl.constexpr):
    """[M, K] by [K, N] in float32; with ADDS, integers become floats by adding, not by conversion."""
    IS_INT: tl.constexpr = b_a.dtype == tl.int8
    if IS_INT and ADDS:
        # The bits of ROUNDER: counting up from them counts up in floats, while sums stay below 2 ** 22.
        b_zero = tl.full((b_a.shape[0], b_b.shape[1]), 0x4B400000, tl.int32)
        b_y = tl.dot(b_a, b_b, b_zero, out_dtype=tl.int32).to(tl.float32, bitcast=True) - ROUNDER
    elif IS_INT:
        b_y = tl.dot(b_a, b_b).to(tl.float32)
    else:
        # Tensor cores sum float8 products in fewer bits than float32 has: only one tile of them at a time.
        b_y = tl.dot(b_a, b_b, max_num_imprecise_acc=b_a.shape[1])
    return b_y


@triton.jit
def _attend(
    b_q,
    b_m,
    b_l,
    b_acc,
    p_k,
    p_v,
    c_s,
    m_k,
    S_V: tl.constexpr,
    LOG2_P: tl.constexpr,
    ADDS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold a tile of keys [D, N] and values, parts of [D, N], into the running peak, sum and output parts.

    ``c_s`` is what one of the products is worth, in base two.
    """
    b_s = _product(b_q, tl.load(p_k), ADDS)
    if MASKED:
        # Scaled first: two groups of nothing but zeros have a product of scales that is zero too.
        b_s = tl.where(m_k[None, :], b_s * c_s, -float("inf"))
        c_s = 1.0
    b_peak = tl.maximum(b_m, tl.max(b_s, 1) * c_s)
    b_base = b_peak
    if MASKED:  # a row that has seen no key yet: -inf minus -inf would be NaN
        b_base = tl.where(b_peak == -float("inf"), 0.0, b_peak)
    b_p = tl.exp2(b_s * c_s - (b_base - LOG2_P)[:, None])
    b_decay = tl.exp2(b_m - b_base)
    b_l = b_l * b_decay + tl.sum(b_p, 1)
    b_p = _shuffle(_cast(b_p, p_v.dtype.scalar.element_ty))
    b_sums = b_acc[:0]
    for j in tl.static_range(len(b_acc)):
        b_v = tl.trans(tl.load(p_v + j * S_V))
        if b_v.dtype == tl.float16:
            b_part = tl.dot(b_p, b_v, b_acc[j] * b_decay[:, None])
        else:
            b_part = b_acc[j] * b_decay[:, None] + _product(b_p, b_v, ADDS)
        b_sums = b_sums + (b_part,)  # noqa: RUF005
    return b_peak, b_l, b_sums


@triton.jit
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_qs,
    p_ks,
    p_vs,
    p_shift,
    p_out,
    p_lse,
    p_list,
    p_full,
    p_count,
    p_valid,
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
    NQ,
    NK,
    SCALE,
    LOG2_P: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    GQ: tl.constexpr,
    GK: tl.constexpr,
    D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    ADDS: tl.constexpr,
    HOIST: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    PER_Q: tl.constexpr = (BQ + TILE_M - 1) // TILE_M
    PER_K: tl.constexpr = (BK + TILE_N - 1) // TILE_N
    GROUPS_Q: tl.constexpr = (BQ + GQ - 1) // GQ
    GROUPS_K: tl.constexpr = (BK + GK - 1) // GK
    i_tile = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = i_bh // H
    i_h = i_bh % H
    i_kv = i_b * KV + i_h * KV // H
    i_q = i_tile // PER_Q
    i_row = (i_tile % PER_Q) * TILE_M

    o_m = tl.arange(0, TILE_M)
    o_n = tl.arange(0, TILE_N)
    o_d = tl.arange(0, TILE_D)
    # Where a tile lies is a scalar, and offsets within it do not change: little is left to do for addresses.
    PADDED: tl.constexpr = GROUPS_K * GK
    i_keys = i_kv.to(tl.int64) * NK
    p_k += i_keys * (PADDED * TILE_D) + o_n[None, :] * TILE_D + o_d[:, None]
    p_v += i_keys * (PADDED * TILE_D) + tl.arange(0, TILE_V)[:, None] * PADDED + o_n[None, :]
    p_ks += i_keys * GROUPS_K
    p_list += i_b.to(tl.int64) * s_lb + i_h.to(tl.int64) * s_lh + i_q.to(tl.int64) * s_lq
    p_valid += i_b.to(tl.int64) * s_mb + i_h.to(tl.int64) * s_mh
    n_full = tl.load(p_full + i_b.to(tl.int64) * s_fb + i_h.to(tl.int64) * s_fh + i_q)
    n_all = tl.load(p_count + i_b.to(tl.int64) * s_cb + i_h.to(tl.int64) * s_ch + i_q)

    i_group = (i_bh.to(tl.int64) * NQ + i_q) * GROUPS_Q
    c_q = tl.load(p_qs + i_group + i_row // GQ) * (SCALE / LN2)
    b_q = tl.load(p_q + (i_group * GQ + i_row) * TILE_D + (o_m[:, None] * TILE_D + o_d[None, :]))
    b_m = tl.full((TILE_M,), -float("inf"), tl.float32)
    b_l = tl.zeros((TILE_M,), tl.float32)
    b_acc = (tl.zeros((TILE_M, TILE_V), tl.float32),) * (TILE_D // TILE_V)

    # Blocks whose every token exists come first in the list and need no mask of tokens.
    for i_pass in tl.static_range(2):
        for i in tl.range(
            n_full * PER_K if i_pass == 1 else 0,
            n_all * PER_K if i_pass == 1 else n_full * PER_K,
            disable_licm=not HOIST,
        ):
            i_k = tl.load(p_list + i // PER_K)
            i_col = (i % PER_K) * TILE_N
            m_k = o_n < tl.minimum(BK, SK - i_k * BK) - i_col
            if HAS_VALID and i_pass == 1:
                m_k = m_k & (tl.load(p_valid + (i_k * BK + i_col) + o_n, mask=m_k, other=0) != 0)
            b_m, b_l, b_acc = _attend(
                b_q,
                b_m,
                b_l,
                b_acc,
                p_k + (i_k.to(tl.int64) * PADDED + i_col) * TILE_D,
                p_v + (i_k.to(tl.int64) * (PADDED * TILE_D) + i_col),
                c_q * tl.load(p_ks + i_k * GROUPS_K + i_col // GK),
                m_k,
                TILE_V * PADDED,
                LOG2_P,
                ADDS,
                i_pass == 1 or BK % TILE_N != 0,
            )

    m_q = o_m < tl.minimum(BQ, SQ - i_q * BQ) - i_row
    i_out = i_bh.to(tl.int64) * SQ + (i_q * BQ + i_row)
    m_some = b_l > 0
    b_sum = tl.where(m_some, b_l, 1.0)
    b_lse = (b_m + tl.log2(b_sum) - LOG2_P) * LN2
    if SMOOTH:
        b_lse += tl.load(p_shift + i_out + o_m, mask=m_q, other=0.0) * SCALE
    tl.store(p_lse + i_out + o_m, tl.where(m_some, b_lse, -float("inf")), mask=m_q)
    for j in tl.static_range(TILE_D // TILE_V):
        o_v = j * TILE_V + tl.arange(0, TILE_V)
        b_vs = tl.load(p_vs + i_bh * D + o_v, mask=o_v < D, other=0.0)
        b_out = (b_acc[j] / b_sum[:, None] * b_vs[None, :]).to(p_out.dtype.element_ty)
        p_tile = p_out + i_out * D + (o_m[:, None] * D + o_v[None, :])
        tl.store(p_tile, b_out, mask=m_q[:, None] & (o_v < D)[None, :])


class Config(NamedTuple):
    """Tile sizes and launch options of the attention kernel."""

    tile_m: int
    tile_n: int
    tile_v: int
    num_warps: int
    num_stages: int
    hoist: bool


def config(target: Target, head_dim: int, block: tuple[int, int], pv: str) -> Config:
    """Tiles for one shape; larger blocks are cut into several, smaller ones padded.

    Args:
        block: Tokens of a query and of a key block.
        pv: What weights and values are.
    """
    tile_d = _tile_d(head_dim)
    # Where a warp makes its products by itself (mma.sync), they leave it fewer registers for anything else.
    single = target.name in ("sm_80", "sm_89", "sm_120") or target.is_amd
    tile_m = min(_power(block[0], 16), 128 if tile_d <= 128 else 64)
    tile_n = min(_power(block[1], 32), 128, (64 if single else 128) * 128 // tile_d)
    # There ptxas runs out of registers with 8-bit values: less is kept in them from one tile to the next.
    tight = target.name in ("sm_100", "sm_120") and tile_d == 128 and pv != "fp16"
    # An output wider than high would have its columns dealt out to the warps, and a row's softmax cross them.
    tile_v = min(tile_d, (32 if tight else 64) if single else max(64, tile_m))
    num_warps = min(tile_m // 16, 4 if target.is_amd else 8)
    stage = tile_n * tile_d * (1 + STORED[pv].itemsize)
    num_stages = max(1, min(3, (target.shared - tile_m * tile_d - 1024) // stage))
    return Config(tile_m, tile_n, tile_v, num_warps, num_stages, not tight)


def _power(tokens: int, smallest: int) -> int:
    return max(smallest, triton.next_power_of_2(tokens))


def _tile_d(head_dim: int) -> int:
    return _power(head_dim, 32)


def _warps(elements: int) -> int:
    """Of a kernel that quantises: 64 elements a thread."""
    return max(1, min(16, elements // 2048))


def _group(block: int) -> int:
    """Tokens of a group with padding: whole tiles of every configuration."""
    return min(GROUP, _power(block, 32))


class Quantized(NamedTuple):
    """What the attention kernel reads; the head of this file says how it is laid out."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    """float32 [B, H, NQ, groups], what one is worth, like the next two."""
    k_scale: Tensor
    """float32 [B, KV, NK, groups]."""
    v_scale: Tensor
    """float32 [B, H, D]."""
    shift: Tensor
    """float32 [B, H, SQ]: products of q with the mean that k has lost; not written where it has not."""


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    block: Sequence[int],
    *,
    qk: str,
    pv: str,
    smooth_k: bool,
) -> Quantized:
    """Make the tensors of the attention kernel; ``valid`` is bool [B or 1, KV or 1, SK]."""
    batch, kv_heads, keys, head_dim = k.shape
    tile_d = _tile_d(head_dim)
    sizes: dict[str, Any] = {"D": head_dim, "TILE_D": tile_d}
    # Where all keys exist, any address will do: it is not read.
    p_valid, s_valid = q if valid is None else valid, lead_strides(valid)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    tile_s = STATISTICS_TILE // tile_d
    total, peak = empty(2, batch, kv_heads, triton.cdiv(keys, tile_s), head_dim)
    statistics_kernel[total.shape[2], batch * kv_heads](
        *(k, v, p_valid, total, peak, *k.stride()[:3], *v.stride()[:3], *s_valid, kv_heads, keys),
        TILE_S=tile_s,
        SMOOTH=smooth_k,
        HAS_VALID=valid is not None,
        num_warps=_warps(STATISTICS_TILE),
        **sizes,
    )
    peak = peak.amax(2)
    mean = peak  # an address that is not read
    if smooth_k:
        mean = total.sum(2) / (keys if valid is None else valid.sum(-1, keepdim=True).clamp(min=1))
    shift = empty(*q.shape[:3])

    def rows(x: Tensor, tokens: int, is_key: bool) -> tuple[Tensor, Tensor]:
        heads, group = x.shape[1], _group(tokens)
        blocks, groups = triton.cdiv(x.shape[2], tokens), triton.cdiv(tokens, group)
        out = empty(batch, heads, blocks, groups * group, tile_d, dtype=STORED[qk])
        scale = empty(batch, heads, blocks, groups)
        quantize_rows_kernel[blocks * groups, batch * heads](
            *(x, mean, p_valid, out, scale, shift, *x.stride()[:3], *s_valid, heads, kv_heads, x.shape[2]),
            LIMIT=LIMITS[qk],
            BLOCK=tokens,
            G=group,
            IS_KEY=is_key,
            SMOOTH=smooth_k,
            HAS_VALID=is_key and valid is not None,
            num_warps=_warps(group * tile_d),
            **sizes,
            **EXACT,
        )
        return out, scale

    (q_out, q_scale), (k_out, k_scale) = rows(q, block[0], False), rows(k, block[1], True)
    group, (blocks, groups) = _group(block[1]), k_scale.shape[2:]
    v_out = empty(batch, kv_heads, blocks, tile_d, groups * group, dtype=STORED[pv])
    quantize_channels_kernel[blocks * groups, batch * kv_heads](
        *(v, peak, p_valid, v_out, *v.stride()[:3], *s_valid, kv_heads, keys),
        LIMIT=LIMITS[pv],
        BLOCK=block[1],
        G=group,
        HAS_VALID=valid is not None,
        num_warps=_warps(group * tile_d),
        **sizes,
        **EXACT,
    )
    v_scale = peak.clamp(min=quant_ops.FLOOR).repeat_interleave(q.shape[1] // kv_heads, 1) / LIMITS[pv]
    return Quantized(q_out, k_out, v_out, q_scale, k_scale, v_scale, shift)


@torch.library.custom_op("dit_sparse::quantized_block_sparse_attention_triton", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    valid: Tensor | None,
    block: Sequence[int],
    qk: str,
    pv: str,
    smooth_k: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``valid`` has 1, KV or H heads. Checks of the device are here, where nothing traces them."""
    target = target_of(q.device)
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"the triton backend needs tensors on a GPU, got {q.device}; use 'reference'")
    if "fp8" in (qk, pv) and not _has_fp8(target):
        raise ValueError(
            f"'fp8' needs an NVIDIA GPU of compute capability 8.9 or newer, got qk={qk!r} and pv={pv!r} "
            f"on {q.device}; use 'int8' and 'fp16'"
        )
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    q, k, v = map(unit_stride, (q, k, v))
    shared = None
    if valid is not None:
        valid = valid.contiguous()
        shared, valid = per_kv_head(valid, kv_heads), broadcast_heads(valid, heads)
    made = quantize(q, k, v, shared, block, qk=qk, pv=pv, smooth_k=smooth_k)
    lists = Lists(*(x.contiguous() for x in split(indices, counts, block[1], keys, valid)))
    out, lse = empty_results(q)
    tiles = config(target, head_dim, (block[0], block[1]), pv)
    grid = (made.q.shape[2] * triton.cdiv(block[0], tiles.tile_m), batch * heads)
    forward_kernel[grid](
        *(*made, out, lse, *lists, counts if valid is None else valid),
        *(*lead_strides(lists.indices), lists.indices.stride(2)),
        *(*lead_strides(lists.full), *lead_strides(lists.counts), *lead_strides(valid)),
        *(heads, kv_heads, queries, keys, made.q.shape[2], made.k.shape[2], scale),
        **_constants(target, tiles, head_dim, block, pv),
        SMOOTH=smooth_k,
        HAS_VALID=valid is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out, lse


@attention_op.register_fake
def _(q, k, v, *rest):
    return empty_results(q)


def _constants(target: Target, tiles: Config, head_dim: int, block: Sequence[int], pv: str) -> dict[str, Any]:
    return {
        "LOG2_P": math.log2(WEIGHT_OF_ONE[pv]),
        "BQ": block[0],
        "BK": block[1],
        "GQ": _group(block[0]),
        "GK": _group(block[1]),
        "D": head_dim,
        "TILE_M": tiles.tile_m,
        "TILE_N": tiles.tile_n,
        "TILE_D": _tile_d(head_dim),
        "TILE_V": tiles.tile_v,
        # sm_80 converts integers to floats at a quarter of the rate at which it adds.
        "ADDS": target.name == "sm_80",
        "HOIST": tiles.hoist,
    }


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
    """See :func:`dit_sparse.kernels.quantized_block_sparse_attention`.

    Raises:
        ValueError: Tensors not on a GPU (the Triton interpreter takes the CPU's), or one without float8.
    """
    return attention_op(q, k, v, plan.indices, plan.counts, valid, list(plan.block), qk, pv, smooth_k, scale)


def _has_fp8(target: Target) -> bool:
    """gfx942 has another kind of e4m3; Triton emulates this one there, at a tenth of the speed of float16."""
    return target.fp8 and not target.is_amd


KINDS = {"int8": "i8", "fp8": "fp8e4nv", "fp16": "fp16"}
# Of the attention kernel: target and label. The four use different tensor cores for q k^T.
IN_CI = {
    ("sm_80", "int8 int8 D128 64x64"),
    ("sm_89", "fp8 fp8 D64 128x128"),
    ("sm_90", "int8 fp16 D128 128x128"),
    ("sm_120", "int8 fp8 D128 128x64"),
}


def variants(target: Target) -> list[Variant]:
    """What ahead-of-time compilation records: every pair of formats that the target has."""
    out = []
    formats = [x for x in itertools.product(QK, PV) if "fp8" not in x or _has_fp8(target)]
    for (qk, pv), head_dim, block in itertools.product(formats, (128, 64), ((64, 64), (128, 64), (128, 128))):
        tiles = config(target, head_dim, block, pv)
        constants = _constants(target, tiles, head_dim, block, pv) | {"SMOOTH": True, "HAS_VALID": True}
        label = f"{qk} {pv} D{head_dim} {block[0]}x{block[1]}"
        kinds = {"p_q": KINDS[qk], "p_k": KINDS[qk], "p_v": KINDS[pv], "p_out": "bf16"}
        options: dict[str, Any] = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        in_ci = (target.name, label) in IN_CI
        out.append(_variant(forward_kernel, label, kinds, constants, **options, in_ci=in_ci))
    for kind, head_dim in itertools.product([x for x in LIMITS if x != "fp8" or _has_fp8(target)], (128, 64)):
        sizes: dict[str, Any] = {"D": head_dim, "TILE_D": head_dim, "HAS_VALID": True}
        group = {"LIMIT": LIMITS[kind], "BLOCK": 128, "G": 128}
        kinds = dict.fromkeys(("p_x", "p_k", "p_v"), "bf16") | {"p_out": KINDS[kind]}
        options = {"num_warps": _warps(128 * head_dim), "tensor_cores": False, "options": EXACT}
        label = f"{kind} D{head_dim} 128"
        out.append(_variant(quantize_channels_kernel, label, kinds, sizes | group, **options))
        if kind in QK:
            flags: dict[str, Any] = {"IS_KEY": True, "SMOOTH": True}
            out.append(_variant(quantize_rows_kernel, label, kinds, sizes | group | flags, **options))
        else:
            flags = {"TILE_S": STATISTICS_TILE // head_dim, "SMOOTH": True}
            options = {"num_warps": _warps(STATISTICS_TILE), "tensor_cores": False}
            out.append(_variant(statistics_kernel, f"D{head_dim}", kinds, sizes | flags, **options))
    return out


def _variant(
    kernel: Any, label: str, kinds: dict[str, str], constants: dict[str, Any], **options: Any
) -> Variant:
    kinds = {"p_list": "i32", "p_full": "i32", "p_count": "i32", "p_valid": "i1"} | kinds
    names = [n for n in kernel.arg_names if n not in constants]
    types = {n: f"*{kinds.get(n, 'fp32')}" if n.startswith("p_") else "i32" for n in names}
    if "SCALE" in types:
        types["SCALE"] = "fp32"
    aligned = frozenset(n for n in names if n.startswith(("p_", "s_x", "s_k", "s_v")))
    return Variant(kernel, label, types, constants, aligned, **options)
