"""Block lists as the Triton attention kernels read them, made on the device without waiting for it.

Letters: B batch, H heads, Q and K query and key blocks, W slots of a row, S key tokens. ``[B, H, ...]`` of a
result is 1 on every axis where plan and validity are: readers give such an axis stride 0.
In kernels: i_ index, o_ offsets, b_ block of values, p_ pointer, s_ stride, m_ mask, n_ count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.operands import unit_stride
from dit_sparse.kernels.targets import Target, Variant
from dit_sparse.plan import PackedPlan, Plan


class Lists(NamedTuple):
    """Key blocks per query block: those whose every token exists, then the others, each ascending."""

    indices: Tensor
    """int32 [B or 1, H or 1, Q, W], W >= 1; unused slots are 0."""
    full: Tensor
    """int32 [B or 1, H or 1, Q]: how many are whole and need no mask of tokens."""
    counts: Tensor
    """int32 [B or 1, H or 1, Q]: how many there are."""


class Columns(NamedTuple):
    """Query blocks per key block, ascending: the transposed lists, that of block j at ``starts[..., j]``.

    They lie one after another because a row's width says nothing about a column's: as [K, Q] those of a plan
    with one query token a block would take gigabytes.
    """

    indices: Tensor
    """int32 [B or 1, H or 1, E], E >= the plan's entries; what lies beyond the last list is arbitrary."""
    starts: Tensor
    """int32 [B or 1, H or 1, K]."""
    counts: Tensor
    """int32 [B or 1, H or 1, K]."""


# Arguments whose values would compile a kernel anew, and gain nothing by it.
PLAIN = [*(f"s_{x}{axis}" for x in "ruwb" for axis in "bhq"), *"HQKNWE", "WHOLE", "WORDS", "SEGMENTS"]


@triton.jit
def _kept_bits(p_bits, o_q, o_k, s_bq, m):
    """Bits [rows, key blocks] of a packed plan, most significant first, as 0 or 1."""
    p_byte = p_bits + o_q.to(tl.int64)[:, None] * s_bq + o_k[None, :] // 8
    b_byte = tl.load(p_byte, mask=m, other=0).to(tl.int32)
    return (b_byte >> (7 - o_k[None, :] % 8)) & 1


@triton.jit
def _entries(
    p_row, p_whole, o_q, o_n, n_used, s_q, Q, N, WHOLE, PACKED: tl.constexpr, HAS_VALID: tl.constexpr
):
    """Slots ``o_n`` of some rows: the key block in each, and whether it is a whole, partial or unused one."""
    m_in = (o_q < Q)[:, None] & (o_n < N)[None, :]
    if PACKED:
        b_used = _kept_bits(p_row, o_q, o_n, s_q, m_in)
        b_k = tl.broadcast_to(o_n[None, :], b_used.shape)
    else:
        b_used = (m_in & (o_n[None, :] < n_used[:, None])).to(tl.int32)
        b_k = tl.load(p_row + o_q.to(tl.int64)[:, None] * s_q + o_n[None, :], mask=b_used != 0, other=0)
    b_whole = b_used & (b_k < WHOLE).to(tl.int32)
    if HAS_VALID:
        b_whole = b_whole & tl.load(p_whole + b_k, mask=b_used != 0, other=0).to(tl.int32)
    return b_k, b_whole, b_used - b_whole, m_in.to(tl.int32) - b_used


@triton.jit(do_not_specialize=PLAIN)
def rows_kernel(
    p_row,
    p_used,
    p_whole,
    p_out,
    p_full,
    p_count,
    s_rb,
    s_rh,
    s_rq,
    s_ub,
    s_uh,
    s_uq,
    s_wb,
    s_wh,
    H,
    Q,
    N,
    W,
    WHOLE,
    PACKED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Stable partition of rows of N slots into whole, partial and unused ones; the first W are kept."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_q = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_q = o_q < Q
    p_row += i_b * s_rb + i_h * s_rh
    p_whole += i_b * s_wb + i_h * s_wh
    n_used = tl.zeros((ROWS,), tl.int32)
    if not PACKED:
        n_used = tl.load(p_used + i_b * s_ub + i_h * s_uh + o_q.to(tl.int64) * s_uq, mask=m_q, other=0)

    n_whole = tl.zeros((ROWS,), tl.int32)
    n_part = tl.zeros((ROWS,), tl.int32)
    for i_n in range(0, N, SLOTS):
        o_n = i_n + tl.arange(0, SLOTS)
        _, b_whole, b_part, _ = _entries(
            p_row, p_whole, o_q, o_n, n_used, s_rq, Q, N, WHOLE, PACKED, HAS_VALID
        )
        n_whole += tl.sum(b_whole, 1)
        n_part += tl.sum(b_part, 1)
    o_row = i_bh * Q + o_q
    tl.store(p_full + o_row, n_whole, mask=m_q)
    tl.store(p_count + o_row, n_whole + n_part, mask=m_q)

    i_whole = tl.zeros((ROWS,), tl.int32)
    i_part = n_whole
    i_rest = n_whole + n_part
    for i_n in range(0, N, SLOTS):
        o_n = i_n + tl.arange(0, SLOTS)
        b_k, b_whole, b_part, b_rest = _entries(
            p_row, p_whole, o_q, o_n, n_used, s_rq, Q, N, WHOLE, PACKED, HAS_VALID
        )
        o_whole = i_whole[:, None] + tl.cumsum(b_whole, 1)
        o_part = i_part[:, None] + tl.cumsum(b_part, 1)
        o_rest = i_rest[:, None] + tl.cumsum(b_rest, 1)
        o_slot = tl.where(b_whole != 0, o_whole, tl.where(b_part != 0, o_part, o_rest)) - 1
        m_out = m_q[:, None] & (o_n < N)[None, :] & (o_slot < W)
        tl.store(p_out + o_row[:, None] * W + o_slot, tl.where(b_rest != 0, 0, b_k), mask=m_out)
        i_whole += tl.sum(b_whole, 1)
        i_part += tl.sum(b_part, 1)
        i_rest += tl.sum(b_rest, 1)


@triton.jit(do_not_specialize=PLAIN)
def pack_kernel(
    p_row,
    p_used,
    p_words,
    s_rb,
    s_rh,
    s_rq,
    s_ub,
    s_uh,
    s_uq,
    H,
    Q,
    WORDS,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Set the bits of listed key blocks in zeroed 32-bit words: the bytes of a packed plan, rows padded."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_q = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_q = o_q < Q
    p_row += i_b * s_rb + i_h * s_rh
    n_used = tl.load(p_used + i_b * s_ub + i_h * s_uh + o_q.to(tl.int64) * s_uq, mask=m_q, other=0)
    o_word = (i_bh * Q + o_q)[:, None] * WORDS
    for i_n in range(0, tl.max(n_used, 0), SLOTS):
        o_n = i_n + tl.arange(0, SLOTS)
        m = o_n[None, :] < n_used[:, None]
        b_k = tl.load(p_row + o_q.to(tl.int64)[:, None] * s_rq + o_n[None, :], mask=m, other=0)
        # Words are little endian; within a byte the first block is the highest bit.
        b_bit = tl.full((ROWS, SLOTS), 1, tl.int32) << (b_k % 32 ^ 7)
        tl.atomic_or(p_words + o_word + b_k // 32, b_bit, mask=m, sem="relaxed")


@triton.jit(do_not_specialize=PLAIN)
def columns_kernel(
    p_bits,
    p_part,
    p_out,
    s_bb,
    s_bh,
    s_bq,
    H,
    Q,
    K,
    SEGMENTS,
    E,
    FILL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One segment of the rows of some columns: write to ``p_part`` how many blocks each column has there, or,
    with FILL, read from it where they go and write them."""
    i_bh = tl.program_id(2).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_q = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_k = o_k < K
    m = (o_q < Q)[:, None] & m_k[None, :]
    b_keep = _kept_bits(p_bits + i_b * s_bb + i_h * s_bh, o_q, o_k, s_bq, m)
    p_part += (i_bh * K + o_k) * SEGMENTS + tl.program_id(0)
    if FILL:
        o_slot = tl.load(p_part, mask=m_k, other=0)[None, :] + tl.cumsum(b_keep, 0) - 1
        b_q = tl.broadcast_to(o_q[:, None], b_keep.shape)
        tl.store(p_out + i_bh * E + o_slot, b_q, mask=b_keep != 0)
    else:
        tl.store(p_part, tl.sum(b_keep, 0), mask=m_k)


# Tiles of the kernels: slots of the row kernels, (rows, columns) of the column kernel.
SLOTS = 1024
SEGMENT, COLUMNS = 128, 32


def _rows(
    source: Tensor, used: Tensor | None, width: int, block: int, keys: int, valid: Tensor | None
) -> Lists:
    """Lists out of indices, ``used`` of them in each row, or out of bits where ``used`` is None."""
    whole, lead = None, source.shape[:2]
    if valid is not None:
        whole = torch.nn.functional.pad(valid, (0, -keys % block)).unflatten(-1, (-1, block)).all(-1)
        lead = torch.broadcast_shapes(lead, whole.shape[:2])
        whole = whole.expand(*lead, -1)
    source = unit_stride(source).expand(*lead, -1, -1)
    used = used if used is None else used.expand(*lead, -1)
    rows = source.shape[2]
    n = triton.cdiv(keys, block) if used is None else source.shape[3]
    per, slots = _tile(n)
    out = torch.empty((*lead, rows, width), dtype=torch.int32, device=source.device)
    full, counts = (torch.empty((*lead, rows), dtype=torch.int32, device=source.device) for _ in range(2))
    rows_kernel[triton.cdiv(rows, per), lead.numel()](
        source,
        source if used is None else used,
        source if whole is None else whole,
        out,
        full,
        counts,
        *source.stride()[:3],
        *((0, 0, 0) if used is None else used.stride()),
        *((0, 0) if whole is None else whole.stride()[:2]),
        lead[1],
        rows,
        n,
        width,
        keys // block,
        PACKED=used is None,
        HAS_VALID=whole is not None,
        ROWS=per,
        SLOTS=slots,
    )
    return Lists(out, full, counts)


def _pack(indices: Tensor, counts: Tensor, keys: int) -> Tensor:
    """Bits of lists, uint8 [B or 1, H or 1, Q, K / 8 or a little more]."""
    indices = unit_stride(indices)
    batch, heads, rows, width = indices.shape
    words = torch.zeros((batch, heads, rows, triton.cdiv(keys, 32)), dtype=torch.int32, device=indices.device)
    per, slots = _tile(width)
    pack_kernel[triton.cdiv(rows, per), batch * heads](
        indices,
        counts,
        words,
        *indices.stride()[:3],
        *counts.stride(),
        heads,
        rows,
        words.shape[3],
        ROWS=per,
        SLOTS=slots,
    )
    return words.view(torch.uint8)


def _columns(bits: Tensor, keys: int, part: Tensor, out: Tensor, fill: bool) -> None:
    """Run the column kernel: ``part`` int32 [B, H, K, segments], ``out`` int32 [B, H, E]."""
    batch, heads, rows = bits.shape[:3]
    columns_kernel[part.shape[3], triton.cdiv(keys, COLUMNS), batch * heads](
        bits,
        part,
        out,
        *bits.stride()[:3],
        heads,
        rows,
        keys,
        part.shape[3],
        out.shape[2],
        FILL=fill,
        ROWS=SEGMENT,
        COLUMNS=COLUMNS,
    )


def _tile(width: int) -> tuple[int, int]:
    """(rows, slots) a program takes at a time of rows of ``width`` slots."""
    slots = min(256, max(16, triton.next_power_of_2(width)))
    return SLOTS // slots, slots


def split(indices: Tensor, counts: Tensor, block: int, keys: int, valid: Tensor | None) -> Lists:
    """:func:`row_lists` of a plan's ``indices`` and ``counts``; ``block`` is that of the keys."""
    if indices.shape[-1] == 0:  # a plan that keeps nothing still needs an address to point at
        return Lists(indices.new_zeros((*counts.shape, 1)), counts, counts)
    if valid is not None:
        return _rows(indices, counts, indices.shape[-1], block, keys, valid)
    if keys % block == 0:
        return Lists(indices, counts, counts)
    # Lists ascend and unused slots are 0, so the one block that is partial, the last, is the largest entry.
    ragged = (indices.amax(-1) == keys // block) & (counts > 0)
    return Lists(indices, counts - ragged.int(), counts)


def expand(bits: Tensor, width: int, block: int, keys: int, valid: Tensor | None) -> Lists:
    """:func:`row_lists` of packed bits, ``width`` slots a row: no row may keep more blocks than that."""
    return _rows(bits, None, max(1, width), block, keys, valid)


def transpose(indices: Tensor, counts: Tensor, keys: int) -> Columns:
    """:func:`column_lists` of a plan's lists over ``keys`` key blocks, in whatever order they are."""
    return transpose_bits(_pack(indices, counts, keys), keys, indices.shape[2] * indices.shape[3])


def transpose_bits(bits: Tensor, keys: int, entries: int) -> Columns:
    """:func:`column_lists` of packed bits over ``keys`` key blocks; no head keeps more than ``entries``."""
    bits = unit_stride(bits)
    lead, segments = bits.shape[:2], triton.cdiv(bits.shape[2], SEGMENT)
    part = torch.empty((*lead, keys, segments), dtype=torch.int32, device=bits.device)
    out = torch.empty((*lead, max(1, entries)), dtype=torch.int32, device=bits.device)
    _columns(bits, keys, part, out, fill=False)
    ends = part.flatten(2).cumsum(-1, dtype=torch.int32).view(part.shape)
    begins = ends - part
    _columns(bits, keys, begins, out, fill=True)
    starts = begins[..., 0].contiguous()
    return Columns(out, starts, ends[..., -1] - starts)


def row_lists(plan: Plan | PackedPlan, keys: int, valid: Tensor | None = None) -> Lists:
    """What the attention kernels read of a plan.

    Args:
        plan: With lists, or packed; of a packed one the lists are as wide as there are key blocks.
        keys: Key tokens S.
        valid: Which of them exist, bool [B or 1, H or 1, S]; None means all.

    Returns:
        The lists. Where every block is whole or only the last is not, a plan's own, not a copy.
    """
    if isinstance(plan, PackedPlan):
        return expand(plan.bits, plan.keys, plan.block[1], keys, valid)
    return split(plan.indices, plan.counts, plan.block[1], keys, valid)


def column_lists(plan: Plan | PackedPlan) -> Columns:
    """Which query blocks read each key block, for gradients of keys and values and for key-major kernels."""
    if isinstance(plan, PackedPlan):
        return transpose_bits(plan.bits, plan.keys, plan.bits.shape[2] * plan.keys)
    return transpose(plan.indices, plan.counts, plan.keys)


def variants(target: Target) -> list[Variant]:
    """What ahead-of-time compilation records: each kernel for long rows of 64 or more blocks."""
    rows = {"ROWS": 4, "SLOTS": 256}
    cases: list[tuple[Any, str, dict[str, Any]]] = [
        (rows_kernel, "lists", {"PACKED": False, "HAS_VALID": True, **rows}),
        (rows_kernel, "bits", {"PACKED": True, "HAS_VALID": False, **rows}),
        (pack_kernel, "lists", rows),
        (columns_kernel, "count", {"FILL": False, "ROWS": SEGMENT, "COLUMNS": COLUMNS}),
        (columns_kernel, "fill", {"FILL": True, "ROWS": SEGMENT, "COLUMNS": COLUMNS}),
    ]
    pointers = {"p_bits": "*u8", "p_whole": "*i1"}
    out = []
    for kernel, label, constants in cases:
        names = [n for n in kernel.arg_names if n not in constants]
        types = {n: pointers.get(n, "*i32" if n.startswith("p_") else "i32") for n in names}
        if constants.get("PACKED"):
            types["p_row"] = "*u8"
        aligned = frozenset(n for n in names if n.startswith("p_"))
        ci = target.name == "sm_90" and (kernel, label) in ((rows_kernel, "lists"), (columns_kernel, "fill"))
        out.append(
            Variant(kernel, label, types, constants, aligned, num_warps=4, tensor_cores=False, in_ci=ci)
        )
    return out
