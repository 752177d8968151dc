"""The Triton backend of the probes: softmax mass per block pair, and means of blocks of tokens.

One program takes one tile of queries over a run of key blocks. A tile holds several small blocks or a part of
a large one; each result is stored once, by one program, so equal inputs give equal bits. Nothing has a
gradient: what is computed here only selects.

Importing this module imports triton. Letters: B batch, H query heads, KV key heads, S tokens (SQ, SK),
D head dim, Q and K blocks.
In kernels: i_ index, o_ offsets, b_ block of values, p_ pointer, s_ stride, m_ mask.
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

from dit_sparse.kernels.block_sparse import _check, precision
from dit_sparse.kernels.mass_ops import define
from dit_sparse.kernels.operands import unit_stride
from dit_sparse.kernels.targets import Target, Variant, target_of
from dit_sparse.order import broadcast_heads
from dit_sparse.plan import blocks_of

LOG2E = tl.constexpr(math.log2(math.e))
# Variants that continuous integration compiles again.
IN_CI = {("sm_80", "bf16 D128 128x128"), ("sm_90", "bf16 D128 64x64"), ("sm_120", "bf16 D64 64x64 valid")}


@triton.jit
def _tokens(i_block, i_part, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Tokens in a tile's slots, and which slots are within their block.

    Slots are TILE // ROWS blocks from ``i_block`` on, and of each the ROWS tokens of part ``i_part``.
    """
    o = tl.arange(0, TILE)
    o_row = i_part * ROWS + o % ROWS
    return (i_block + o // ROWS) * BLOCK + o_row, o_row < BLOCK


@triton.jit
def _load_queries(
    p_q,
    p_lse,
    i_q,
    i_part,
    s_qs,
    SQ,
    D: tl.constexpr,
    BQ: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Queries [M, D], base two LSE [M], and which of them count: those with a finite LSE."""
    o_q, m_q = _tokens(i_q, i_part, BQ, ROWS, TILE_M)
    b_lse = tl.load(p_lse + o_q, mask=m_q & (o_q < SQ), other=float("inf"))
    m_q = tl.abs(b_lse) < float("inf")
    o_d = tl.arange(0, TILE_D)
    m_qd = m_q[:, None] & (o_d < D)[None, :]
    b_q = tl.load(p_q + o_q.to(tl.int64)[:, None] * s_qs + o_d[None, :], mask=m_qd, other=0.0)
    # With +inf every probability of a query that does not count is 0, with no mask in the loop.
    return b_q, tl.where(m_q, b_lse * LOG2E, float("inf")), m_q


@triton.jit
def _by_block(b, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[M, N] -> [query blocks, key blocks, ROWS * COLS] of the tile."""
    GROUP_M: tl.constexpr = b.shape[0] // ROWS
    GROUP_N: tl.constexpr = b.shape[1] // COLS
    b = tl.permute(tl.reshape(b, (GROUP_M, ROWS, GROUP_N, COLS)), (0, 2, 1, 3))
    return tl.reshape(b, (GROUP_M, GROUP_N, ROWS * COLS))


@triton.jit(do_not_specialize=["SQ", "SK", "Q", "K", "SPAN"])
def mass_kernel(
    p_q,
    p_k,
    p_lse,
    p_mass,
    p_peak,
    p_count,
    p_valid,
    p_order,
    p_whole,
    s_qb,
    s_qh,
    s_qs,
    s_kb,
    s_kh,
    s_ks,
    s_mb,
    s_mh,
    s_ob,
    s_oh,
    s_wb,
    s_wh,
    H,
    KV,
    SQ,
    SK,
    Q,
    K,
    SPAN,
    SCALE_LOG2,
    SMALL,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    HAS_VALID: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """SPAN: how many groups of key blocks one program takes; a group is what one tile holds, or one block."""
    GROUP_M: tl.constexpr = TILE_M // ROWS
    GROUP_N: tl.constexpr = TILE_N // COLS
    PARTS_M: tl.constexpr = (BQ + ROWS - 1) // ROWS
    PARTS_N: tl.constexpr = (BK + COLS - 1) // COLS
    PARTS: tl.constexpr = PARTS_M * PARTS_N
    i_q = tl.program_id(0) * GROUP_M
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    i_kv = i_h * KV // H
    first = tl.program_id(2) * SPAN
    last = tl.minimum(first + SPAN, tl.cdiv(K, GROUP_N))
    whole = 0
    if HAS_VALID:
        p_valid += i_b * s_mb + i_h * s_mh
        p_order += i_b * s_ob + i_h * s_oh
        whole = tl.load(p_whole + i_b * s_wb + i_h * s_wh)
    elif BK % COLS == 0:
        whole = SK // (BK * GROUP_N)
    whole = tl.maximum(first, tl.minimum(last, whole))

    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_kv * s_kh
    p_lse += (i_b * H + i_h) * SQ
    o_out = i_q + tl.arange(0, GROUP_M)
    m_out = o_out < Q
    o_out = ((i_b * H + i_h) * Q + o_out) * K
    o_n = tl.arange(0, TILE_N)
    o_g = tl.arange(0, GROUP_N)
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < D
    o_tile = o_n.to(tl.int64)[None, :] * s_ks + o_d[:, None]

    if PARTS_M == 1:
        b_q, b_lse, m_q = _load_queries(p_q, p_lse, i_q, 0, s_qs, SQ, D, BQ, ROWS, TILE_M, TILE_D)
    b_mass = tl.zeros((GROUP_M, GROUP_N), tl.float32)
    b_peak = tl.zeros((GROUP_M, GROUP_N), tl.float32)
    b_count = tl.zeros((GROUP_M, GROUP_N), tl.int32)
    for MASKED in tl.static_range(0 if BK % COLS == 0 else 1, 2):
        begin = whole if MASKED else first
        end = last if MASKED else whole
        for i in range(begin * PARTS, end * PARTS):
            i_group = i // PARTS
            if HAS_VALID:
                i_group = tl.load(p_order + i_group)
            i_part = i // PARTS_M % PARTS_N
            if PARTS_M > 1:
                b_q, b_lse, m_q = _load_queries(
                    p_q, p_lse, i_q, i % PARTS_M, s_qs, SQ, D, BQ, ROWS, TILE_M, TILE_D
                )
            if MASKED:
                o_k, m_k = _tokens(i_group * GROUP_N, i_part, BK, COLS, TILE_N)
                m_k &= o_k < SK
                m_kd = m_d[:, None] & m_k[None, :]
                b_k = tl.load(p_k + o_k.to(tl.int64)[None, :] * s_ks + o_d[:, None], mask=m_kd, other=0.0)
                if HAS_VALID:
                    # Not in the mask above: for these bytes the product would take its operands in another
                    # layout than that of the other loop, and the queries would be stored twice.
                    m_k &= tl.load(p_valid + o_k, mask=m_k, other=0) != 0
            else:
                p_tile = p_k + (i_group * PARTS_N + i_part).to(tl.int64) * TILE_N * s_ks + o_tile
                b_k = tl.load(p_tile) if TILE_D == D else tl.load(p_tile, mask=m_d[:, None], other=0.0)
            b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
            b_p = tl.exp2(b_s * SCALE_LOG2 - b_lse[:, None])
            if MASKED:
                b_p = tl.where(m_k[None, :], b_p, 0.0)
            b_mass += tl.sum(_by_block(b_p, ROWS, COLS), 2)
            if STATISTICS:
                # A query that does not count has only zeros, none of which is below zero.
                m_small = b_p < tl.where(m_q, SMALL, 0.0)[:, None]
                if MASKED:
                    m_small &= m_k[None, :]
                b_peak = tl.maximum(b_peak, tl.max(_by_block(b_p, ROWS, COLS), 2))
                # Floats count a tile exactly, in fewer instructions than integers.
                b_count += tl.sum(_by_block(m_small.to(tl.float32), ROWS, COLS), 2).to(tl.int32)
            o_j = i_group * GROUP_N + o_g
            m_store = m_out[:, None] & (o_j < K)[None, :] & ((i + 1) % PARTS == 0)
            tl.store(p_mass + o_out[:, None] + o_j[None, :], b_mass, mask=m_store)
            going = (i + 1) % PARTS != 0
            b_mass = tl.where(going, b_mass, 0.0)
            if STATISTICS:
                tl.store(p_peak + o_out[:, None] + o_j[None, :], b_peak, mask=m_store)
                tl.store(p_count + o_out[:, None] + o_j[None, :], b_count, mask=m_store)
                b_peak = tl.where(going, b_peak, 0.0)
                b_count = tl.where(going, b_count, 0)


@triton.jit(do_not_specialize=["S", "N"])
def means_kernel(
    p_x,
    p_valid,
    p_out,
    s_xb,
    s_xh,
    s_xs,
    s_mb,
    s_mh,
    H,
    S,
    N,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Means of the tokens that exist in each of N blocks; a block with none gets 0."""
    GROUP: tl.constexpr = TILE_M // ROWS
    i_n = tl.program_id(0) * GROUP
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    o_d = tl.program_id(2) * TILE_D + tl.arange(0, TILE_D)
    p_x += i_b * s_xb + i_h * s_xh
    p_valid += i_b * s_mb + i_h * s_mh
    b_sum = tl.zeros((GROUP, TILE_D), tl.float32)
    b_count = tl.zeros((GROUP,), tl.int32)
    for i in range(0, (BLOCK + ROWS - 1) // ROWS):
        o_s, m_s = _tokens(i_n, i, BLOCK, ROWS, TILE_M)
        m_s &= o_s < S
        if HAS_VALID:
            m_s &= tl.load(p_valid + o_s, mask=m_s, other=0) != 0
        m_x = m_s[:, None] & (o_d < D)[None, :]
        b_x = tl.load(p_x + o_s.to(tl.int64)[:, None] * s_xs + o_d[None, :], mask=m_x, other=0.0)
        b_sum += tl.sum(tl.reshape(b_x.to(tl.float32), (GROUP, ROWS, TILE_D)), 1)
        b_count += tl.sum(tl.reshape(m_s.to(tl.int32), (GROUP, ROWS)), 1)
    o_n = i_n + tl.arange(0, GROUP)
    b_mean = b_sum / tl.maximum(b_count, 1)[:, None]
    o_out = ((i_b * H + i_h) * N + o_n)[:, None] * D + o_d[None, :]
    tl.store(p_out + o_out, b_mean.to(p_out.dtype.element_ty), mask=(o_n < N)[:, None] & (o_d < D)[None, :])


class Config(NamedTuple):
    """Tile sizes and launch options of the mass kernel."""

    tile_m: int
    tile_n: int
    tile_d: int
    num_warps: int
    num_stages: int


def config(head_dim: int, itemsize: int, target: Target) -> Config:
    """Tiles for one shape; they do not depend on the blocks."""
    tile_d = max(16, triton.next_power_of_2(head_dim))
    row = tile_d * itemsize
    # Beyond 256 bytes a row, fewer rows.
    narrow = max(1, row // 256)
    # A float32 operand is two, its high and its low half.
    operands = 2 if itemsize == 4 else 1
    tile_m, tile_n = 128 // narrow, max(16, 64 // narrow // operands)
    # One program takes exponentials while another multiplies: two are worth more than a third stage of loads.
    stages = 3 if 2 * (tile_m + 3 * tile_n) * row <= target.shared else 2
    return Config(tile_m, tile_n, tile_d, 4 * operands, stages)


def _constants(tiles: Config, head_dim: int, block: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "D": head_dim,
        "BQ": block[0],
        "BK": block[1],
        "ROWS": _rows(block[0], tiles.tile_m),
        "COLS": _rows(block[1], tiles.tile_n),
        "TILE_M": tiles.tile_m,
        "TILE_N": tiles.tile_n,
        "TILE_D": tiles.tile_d,
        "PRECISION": precision(dtype),
    }


def _rows(block: int, tile: int) -> int:
    """Slots of a tile that one block takes; a power of two."""
    return min(triton.next_power_of_2(block), tile)


def _launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    valid: Tensor | None,
    block: Sequence[int],
    scale: float,
    small: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q)
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    q, k, lse = unit_stride(q), unit_stride(k), lse.contiguous()
    shape = (batch, heads, blocks_of(queries, block[0]), blocks_of(keys, block[1]))
    mass = torch.empty(shape, dtype=torch.float32, device=q.device)
    peak, count = mass, mass
    if small is not None:
        peak, count = torch.empty_like(mass), torch.empty(shape, dtype=torch.int32, device=q.device)
    tiles = config(head_dim, q.element_size(), target_of(q.device))
    constants = _constants(tiles, head_dim, block, q.dtype)
    group_m, group_n = tiles.tile_m // constants["ROWS"], tiles.tile_n // constants["COLS"]
    order, whole = mass, mass
    if valid is not None:
        valid = valid.contiguous()
        order, whole = _whole_first(valid, group_n * block[1], block[1] % constants["COLS"] == 0)
        valid, order, whole = (
            broadcast_heads(x, heads).expand(batch, heads, *x.shape[2:]) for x in (valid, order, whole)
        )
    rows, columns = triton.cdiv(shape[2], group_m), triton.cdiv(shape[3], group_n)
    # Few queries leave multiprocessors idle unless several programs share the keys.
    split = triton.cdiv(4 * _multiprocessors(q.device), rows * batch * heads)
    span = triton.cdiv(columns, min(split, columns))
    mass_kernel[rows, batch * heads, triton.cdiv(columns, span)](
        q,
        k,
        lse,
        mass,
        peak,
        count,
        mass if valid is None else valid,
        order,
        whole,
        *q.stride()[:3],
        *k.stride()[:3],
        *((0,) * 6 if valid is None else (*valid.stride()[:2], *order.stride()[:2], *whole.stride())),
        heads,
        k.shape[1],
        queries,
        keys,
        *shape[2:],
        span,
        scale * math.log2(math.e),
        0.0 if small is None else small,
        HAS_VALID=valid is not None,
        STATISTICS=small is not None,
        **constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return mass, peak, count


def _whole_first(valid: Tensor, tokens: int, maskless: bool) -> tuple[Tensor, Tensor]:
    """In which order to take groups of ``tokens`` keys, int32 [B, H, groups], and how many need no mask.

    Those come first. ``maskless`` says that a group whose every key exists needs none.
    """
    whole = torch.nn.functional.pad(valid, (0, -valid.shape[2] % tokens)).unflatten(-1, (-1, tokens)).all(-1)
    whole &= maskless
    order = whole.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return order.to(torch.int32), whole.sum(-1, dtype=torch.int32)


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


block_mass, block_statistics = define("triton", _launch)


@torch.library.custom_op("dit_sparse::block_means_triton", mutates_args=())
def _means(x: Tensor, valid: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
    batch, heads, tokens, head_dim = x.shape
    x = unit_stride(x)
    out = torch.empty((batch, heads, blocks_of(tokens, block), head_dim), dtype=dtype, device=x.device)
    constants = _means_constants(head_dim, block)
    grid = (
        triton.cdiv(out.shape[2], constants["TILE_M"] // constants["ROWS"]),
        batch * heads,
        triton.cdiv(head_dim, constants["TILE_D"]),
    )
    if valid is not None:
        valid = broadcast_heads(valid.contiguous(), heads).expand(batch, heads, tokens)
    means_kernel[grid](
        x,
        out if valid is None else valid,
        out,
        *x.stride()[:3],
        *((0, 0) if valid is None else valid.stride()[:2]),
        heads,
        tokens,
        out.shape[2],
        HAS_VALID=valid is not None,
        **constants,
    )
    return out


@_means.register_fake
def _(x, valid, block, dtype):
    return x.new_empty((*x.shape[:2], -(-x.shape[2] // block), x.shape[3]), dtype=dtype)


def _means_constants(head_dim: int, block: int) -> dict[str, Any]:
    tile_m = 64
    tile_d = min(128, triton.next_power_of_2(head_dim))
    return {"D": head_dim, "BLOCK": block, "ROWS": _rows(block, tile_m), "TILE_M": tile_m, "TILE_D": tile_d}


def block_means(x: Tensor, block: int, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Means of the tokens that exist in each block, see :func:`dit_sparse.plan.pool`, summed in float32.

    Raises:
        ValueError: float64 tensors, or tensors not on a GPU (the Triton interpreter takes the CPU's).
    """
    _check(x)
    return _means(x, valid, block, dtype)


def variants(target: Target) -> list[Variant]:
    """What ahead-of-time compilation records: the head dims and blocks that methods use."""
    out = []
    for dtype, head_dim in itertools.product(("bf16", "fp16"), (128, 64)):
        tiles = config(head_dim, 2, target)
        for block, words in (
            ((64, 64), ""),
            ((128, 64), ""),
            ((128, 128), ""),
            ((64, 64), " valid"),
            ((64, 64), " statistics"),
        ):
            flags = {"HAS_VALID": words == " valid", "STATISTICS": words == " statistics"}
            constants = _constants(tiles, head_dim, block, torch.bfloat16) | flags
            label = f"{dtype} D{head_dim} {block[0]}x{block[1]}{words}"
            options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
            in_ci = (target.name, label) in IN_CI
            out.append(_variant(mass_kernel, label, dtype, constants, **options, in_ci=in_ci))
    for head_dim in (128, 64):
        constants = _means_constants(head_dim, 64) | {"HAS_VALID": True}
        out.append(_variant(means_kernel, f"bf16 D{head_dim} 64", "bf16", constants, tensor_cores=False))
    return out


def _variant(kernel: Any, label: str, dtype: str, constants: dict[str, Any], **options: Any) -> Variant:
    kinds = {"p_valid": "i1", "p_count": "i32", "p_order": "i32", "p_whole": "i32"}
    kinds |= dict.fromkeys(("p_q", "p_k", "p_x", "p_out"), dtype)
    names = [n for n in kernel.arg_names if n not in constants]
    types = dict.fromkeys(names, "i32") | dict.fromkeys({"SCALE_LOG2", "SMALL"}.intersection(names), "fp32")
    types |= {n: f"*{kinds.get(n, 'fp32')}" for n in names if n.startswith("p_")}
    aligned = frozenset(n for n in names if n.startswith(("p_", "s_q", "s_k", "s_x")))
    return Variant(kernel, label, types, constants, aligned, **options)
