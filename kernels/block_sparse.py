"""The Triton backend: one program computes one tile of queries over the key blocks its plan lists.

A first loop goes over the blocks whose every key exists and has no masks, a second one over the others.
Importing this module imports triton. Letters: B batch, H query heads, KV key/value heads, S tokens (SQ, SK),
D head dim, Q and K blocks.
In kernels: i_ index, o_ offsets, b_ block of values, p_ pointer, d_ descriptor, s_ stride, m_ mask, n_ count.

    python -m dit_sparse.kernels.block_sparse --head-dim 128 --block 128 64 --dtype bfloat16

times tile sizes on the GPU that is there and keeps the fastest for it: see :func:`tune`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.build import cache_folder
from dit_sparse.kernels.lists import Lists, row_lists, split
from dit_sparse.kernels.operands import empty_results, lead_strides
from dit_sparse.kernels.targets import Target, Variant, target_of
from dit_sparse.order import broadcast_heads
from dit_sparse.plan import PackedPlan, Plan, blocks_of

LN2 = tl.constexpr(math.log(2.0))
# As it was when the kernels below were defined, which is when Triton looks at it.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _weights(b_s, b_m, b_l, SCALE_LOG2, MASKED: tl.constexpr):
    """Weights of a tile of scores [M, N], the factor of all before it, and the new peak and sum, base two."""
    b_peak = tl.maximum(b_m, tl.max(b_s, 1) * SCALE_LOG2)
    b_base = b_peak
    if MASKED:  # a row that has seen no key yet: -inf minus -inf would be NaN
        b_base = tl.where(b_peak == -float("inf"), 0.0, b_peak)
    b_p = tl.exp2(b_s * SCALE_LOG2 - b_base[:, None])
    b_decay = tl.exp2(b_m - b_base)
    return b_p, b_decay, b_peak, b_l * b_decay + tl.sum(b_p, 1)


@triton.jit
def _part(p_x, o_row, s_row, m_row, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns START to START + WIDTH of rows; zeros from D on, and outside of ``m_row`` if it is not None."""
    o_d = START + tl.arange(0, WIDTH)
    p = p_x + (o_row[:, None] * s_row + o_d[None, :])
    if m_row is not None:
        return tl.load(p, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    elif START + WIDTH <= D:
        return tl.load(p)
    else:
        return tl.load(p, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def _parts(x, i_slot, o_row, s_row, m_row, D: tl.constexpr, PARTS: tl.constexpr, SOURCE: tl.constexpr):
    """The parts of a tile of keys or values, from pointer or descriptors ``x``."""
    if SOURCE == "tma":
        return [x[part[0]].load([i_slot, part[1]]) for part in PARTS]
    else:
        if SOURCE == "rows":
            x += i_slot.to(tl.int64) * s_row
        return [_part(x, o_row, s_row, m_row, part[1], part[2], D) for part in PARTS]


@triton.jit
def _step(
    i,
    b_q,
    b_m,
    b_l,
    b_acc,
    k,
    v,
    s_ks,
    s_vs,
    p_list,
    p_valid,
    p_index,
    SK,
    SCALE_LOG2,
    D: tl.constexpr,
    BK: tl.constexpr,
    TILE_N: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SOURCE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold tile ``i`` of the listed key blocks into the running peak, sum and output."""
    PER_K: tl.constexpr = (BK + TILE_N - 1) // TILE_N
    i_col = i % PER_K * TILE_N
    i_slot = tl.load(p_list + i // PER_K) * BK + i_col
    o_n = tl.arange(0, TILE_N)
    o_row = o_n
    if MASKED:
        m_k = tl.load(p_valid + i_slot + o_n) != 0 if HAS_VALID else i_slot + o_n < SK
        if BK % TILE_N != 0:
            m_k = m_k & (i_col + o_n < BK)
    m_row = m_k if MASKED else None
    if SOURCE == "gather":
        o_row = tl.load(p_index + i_slot + o_n, mask=m_row, other=0 if MASKED else None).to(tl.int64)
    b_k = _parts(k, i_slot, o_row, s_ks, m_row, D, PARTS, SOURCE)
    b_v = _parts(v, i_slot, o_row, s_vs, m_row, D, PARTS, SOURCE)

    b_s = tl.dot(b_q[0], tl.trans(b_k[0]), input_precision=PRECISION)
    for j in tl.static_range(1, len(PARTS)):
        b_s = tl.dot(b_q[j], tl.trans(b_k[j]), b_s, input_precision=PRECISION)
    if MASKED:
        b_s = tl.where(m_k[None, :], b_s, -float("inf"))
    b_p, b_decay, b_m, b_l = _weights(b_s, b_m, b_l, SCALE_LOG2, MASKED)
    b_p = b_p.to(b_q[0].dtype)
    b_acc = [b * b_decay[:, None] for b in b_acc]
    b_acc = [tl.dot(b_p, b_v[part[0]], b_acc[part[0]], input_precision=PRECISION) for part in PARTS]
    return b_m, b_l, b_acc


# Unlike the strides of tensors these differ from call to call, and a multiple of 16 would compile it again.
# fmt: off
SIZES = (
    "s_lb", "s_lh", "s_lq", "s_fb", "s_fh", "s_cb", "s_ch", "s_mb", "s_mh", "s_ih",
    "H", "KV", "Q", "SQ", "SK", "T",
)
# fmt: on


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_order,
    p_list,
    p_full,
    p_count,
    p_valid,
    p_index,
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
    s_ih,
    H,
    KV,
    Q,
    SQ,
    SK,
    T,
    SCALE_LOG2,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SOURCE: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries. T counts the tokens of q and of the results: SQ, unless slots are gathered."""
    PER_Q: tl.constexpr = (BQ + TILE_M - 1) // TILE_M
    PER_K: tl.constexpr = (BK + TILE_N - 1) // TILE_N
    i_tile = tl.program_id(0)
    i_row = tl.load(p_order + i_tile // PER_Q)
    i_q = i_row % Q
    i_b = (i_row // Q // H).to(tl.int64)
    i_h = (i_row // Q % H).to(tl.int64)
    i_kv = i_h * KV // H

    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_kv * s_kh
    p_v += i_b * s_vb + i_kv * s_vh
    p_list += i_b * s_lb + i_h * s_lh + i_q.to(tl.int64) * s_lq
    p_valid += i_b * s_mb + i_h * s_mh
    p_index += i_kv * s_ih
    n_full = tl.load(p_full + i_b * s_fb + i_h * s_fh + i_q)
    n_all = tl.load(p_count + i_b * s_cb + i_h * s_ch + i_q)
    if BK % TILE_N != 0:  # the last tile of every block reaches beyond it
        n_full = 0

    o_m = i_tile % PER_Q * TILE_M + tl.arange(0, TILE_M)
    o_q = i_q * BQ + o_m
    m_q = (o_m < BQ) & (o_q < SQ)
    if SOURCE == "gather":
        o_q = tl.load(p_index + o_q, mask=m_q, other=-1)
        m_q = o_q >= 0
        o_row = tl.maximum(o_q, 0).to(tl.int64)
    else:
        o_row = tl.minimum(o_q, SQ - 1).to(tl.int64)
    b_q = [_part(p_q, o_row, s_qs, None, part[1], part[2], D) for part in PARTS]
    b_m = tl.full((TILE_M,), -float("inf"), tl.float32)
    b_l = tl.zeros((TILE_M,), tl.float32)
    b_acc = [tl.zeros((TILE_M, part[2]), tl.float32) for part in PARTS]

    if SOURCE == "tma":
        d_k = [tl.make_tensor_descriptor(p_k, [SK, D], [s_ks, 1], [TILE_N, part[2]]) for part in PARTS]
        d_v = [tl.make_tensor_descriptor(p_v, [SK, D], [s_vs, 1], [TILE_N, part[2]]) for part in PARTS]
    # Masked is the pass that is not SPECIALIZE: the second, or the first where warps specialize, because such
    # a loop cannot pass the output on.
    for i_pass in tl.static_range(2):
        for i in tl.range(
            n_full * PER_K if i_pass != SPECIALIZE else 0,
            n_all * PER_K if i_pass != SPECIALIZE else n_full * PER_K,
            # Few blocks are partial: a second pipeline as deep would only take registers from the first.
            num_stages=2 if i_pass != SPECIALIZE else None,
            warp_specialize=SPECIALIZE and i_pass == 1,
        ):
            b_m, b_l, b_acc = _step(
                i,
                b_q,
                b_m,
                b_l,
                b_acc,
                d_k if SOURCE == "tma" and i_pass == SPECIALIZE else p_k,
                d_v if SOURCE == "tma" and i_pass == SPECIALIZE else p_v,
                s_ks,
                s_vs,
                p_list,
                p_valid,
                p_index,
                SK,
                SCALE_LOG2,
                D,
                BK,
                TILE_N,
                PARTS,
                HAS_VALID,
                "rows" if SOURCE == "tma" and i_pass != SPECIALIZE else SOURCE,
                i_pass != SPECIALIZE,
                PRECISION,
            )

    m_some = b_l > 0
    b_sum = tl.where(m_some, b_l, 1.0)
    b_lse = tl.where(m_some, (b_m + tl.log2(b_sum)) * LN2, -float("inf"))
    o_out = (i_b * H + i_h) * T + o_q
    tl.store(p_lse + o_out, b_lse, mask=m_q)
    b_share = 1.0 / b_sum
    for j in tl.static_range(len(PARTS)):
        o_d = PARTS[j][1] + tl.arange(0, PARTS[j][2])
        b_out = (b_acc[j] * b_share[:, None]).to(p_out.dtype.element_ty)
        tl.store(p_out + o_out[:, None] * D + o_d[None, :], b_out, mask=m_q[:, None] & (o_d < D)[None, :])


class Tiles(NamedTuple):
    """How the kernel is cut and launched for one shape."""

    queries: int
    """Of a tile; larger blocks are cut into several tiles."""
    keys: int
    num_warps: int
    ahead: int
    """Tiles of keys and values whose loads are under way while one is computed."""
    tma: bool = False
    """Whether whole blocks are loaded through descriptors (sm_90 and newer)."""
    specialize: bool = False
    """Whether loads, products and softmax get warps of their own (sm_100, with ``tma``)."""


# By target and D, rounded up to one of these. No GPU has timed them: up to D 128 they are the largest tried
# that spill nothing (RESOURCES.md), and no warps share a row; `tune` finds what is fastest.
SYNCHRONOUS = {64: Tiles(128, 128, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(128, 32, 8, 2)}
TILES = {
    "sm_80": SYNCHRONOUS,
    "sm_89": SYNCHRONOUS,
    "sm_90": {64: Tiles(128, 128, 8, 2), 128: Tiles(128, 128, 8, 2), 256: Tiles(128, 32, 8, 2)},
    "sm_100": {64: Tiles(128, 128, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(128, 32, 8, 2)},
    "sm_120": SYNCHRONOUS,
    "gfx942": {64: Tiles(128, 64, 4, 1), 128: Tiles(128, 64, 4, 1), 256: Tiles(64, 32, 2, 1)},
}
WITH_TMA = ("sm_90", "sm_100")
# A float32 product is made of three of the halves of its operands (see `precision`), which takes registers.
# Up to D 128 these need the fewest instructions for a product of the tiles tried that spill nothing.
SYNCHRONOUS_FLOAT32 = {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 1, 1)}
FLOAT32 = {
    "sm_90": {64: Tiles(128, 32, 8, 1), 128: Tiles(128, 16, 8, 1), 256: Tiles(16, 16, 1, 1)},
    "sm_100": {64: Tiles(64, 64, 8, 1), 128: Tiles(64, 32, 8, 1), 256: Tiles(16, 16, 1, 1)},
    "gfx942": {64: Tiles(64, 32, 4, 1), 128: Tiles(64, 16, 4, 1), 256: Tiles(16, 16, 1, 1)},
}


def tiles(target: Target, head_dim: int, itemsize: int, block: tuple[int, int]) -> Tiles:
    """What is launched where nothing has been tuned.

    Args:
        target: Its shared memory limits how far loads are ahead.
        head_dim: D.
        itemsize: Bytes of one element of q, k and v.
        block: Tokens of a query and of a key block.
    """
    columns = max(16, triton.next_power_of_2(head_dim))
    table = TILES[target.name]
    if itemsize == 4:
        table = SYNCHRONOUS_FLOAT32 if _synchronous(target, block[0]) else FLOAT32[target.name]
    most = table[max(64, columns)]
    queries = max(16, min(most.queries, triton.next_power_of_2(block[0])))
    # Few rows a warp with many keys would leave registers for neither.
    keys = max(16, min(most.keys, max(64, queries), triton.next_power_of_2(block[1])))
    room = target.shared // (columns * itemsize) - queries
    ahead = max(1, min(most.ahead, room // (2 * keys)))
    return Tiles(queries, keys, max(1, most.num_warps * queries // most.queries), ahead)


def parts(target: Target, head_dim: int, itemsize: int, queries: int) -> tuple[tuple[int, int, int], ...]:
    """Powers of two, from 16 on, that together hold D columns: (index, start, width) of each.

    One rounded-up power of two would waste up to half of every product (D 72, 80, 96, 160).
    """
    widest = 128
    whole = itemsize == 4 and _synchronous(target, queries)
    if itemsize == 4:
        # Found by trial: in others the tiles of FLOAT32 spill.
        widest = 128 if whole or target.is_amd else 64
    elif TILES[target.name] is SYNCHRONOUS and queries < 128:
        # A product with more columns than rows is divided among warps by columns there, which takes the
        # weights through shared memory and sums across warps.
        widest = 64
    widths, left = [widest] * (head_dim // widest), -(-(head_dim % widest) // 16) * 16
    if whole and left:  # a second part would take twice the instructions of a wider one
        left = triton.next_power_of_2(left)
    if left:
        large = 1 << (left.bit_length() - 1)
        small = triton.next_power_of_2(left - large)
        widths += [2 * large] if small == large else [large, small] if small else [large]
    return tuple((i, sum(widths[:i]), width) for i, width in enumerate(widths))


def _synchronous(target: Target, queries: int) -> bool:
    """Whether products of so few rows are made by mma.sync, whose operands are registers."""
    return TILES[target.name] is SYNCHRONOUS or (target.name in WITH_TMA and queries < 64)


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made: three TF32 products on NVIDIA's tensor cores, directly elsewhere."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def schedule(counts: Tensor, batch: int, heads: int) -> Tensor:
    """In which order programs take the query blocks of all heads: int32 [B * H * Q], (b * H + h) * Q + q.

    Those with the longest lists start first, so that none is left for the end. They are told apart by powers
    of two only: among equals head follows head, whose keys and values then stay in the cache.

    Args:
        counts: int32 [B or 1, H or 1, Q].
    """
    size = torch.frexp(counts.float()).exponent
    return size.expand(batch, heads, -1).flatten().argsort(descending=True, stable=True).int()


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    block: tuple[int, int],
    valid: Tensor | None,
    scale: float,
    *,
    index: Tensor | None = None,
    own: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel.

    Args:
        q, k, v: As in the public op; where ``index`` is given, in model order.
        lists: Made with ``valid``.
        valid: bool [B or 1, H or 1, slots].
        index: int32 [1 or KV, slots]: the token in each slot, -1 in holes, which are not ``valid``.
        own: The tiles, instead of those chosen here.
    """
    batch, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    queries, keys = (tokens, k.shape[2]) if index is None else (index.shape[1], index.shape[1])
    q, k, v = (_rows(x) for x in (q, k, v))
    cut = own or tiles_for(q, block)
    if cut.tma and not (index is None and _describable(k) and _describable(v)):
        cut = cut._replace(tma=False, specialize=False)
    blocks = triton.cdiv(keys, block[1])
    if valid is not None:
        # As wide as a float: bytes would make the compiler lay out the products as if for one-byte operands.
        last = triton.cdiv(block[1], cut.keys) * cut.keys
        valid = torch.nn.functional.pad(valid.int(), (0, (blocks - 1) * block[1] + last - keys))
    out, lse = empty_results(q)
    order = schedule(lists.counts, batch, heads)
    if cut.tma:
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=q.device)
        )
    forward_kernel[(order.numel() * triton.cdiv(block[0], cut.queries),)](
        q,
        k,
        v,
        out,
        lse,
        order,
        *lists,
        order if valid is None else valid,
        order if index is None else index,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *lead_strides(lists.indices),
        lists.indices.stride(2),
        *lead_strides(lists.full),
        *lead_strides(lists.counts),
        *lead_strides(valid),
        index.stride(0) if index is not None and index.shape[0] > 1 else 0,
        heads,
        kv_heads,
        lists.counts.shape[2],
        queries,
        keys,
        tokens,
        scale * math.log2(math.e),
        D=head_dim,
        BQ=block[0],
        BK=block[1],
        TILE_M=cut.queries,
        TILE_N=cut.keys,
        PARTS=parts(target_of(q.device), head_dim, q.element_size(), cut.queries),
        HAS_VALID=valid is not None,
        SOURCE="gather" if index is not None else "tma" if cut.tma else "rows",
        SPECIALIZE=cut.specialize,
        PRECISION=precision(q.dtype),
        num_warps=cut.num_warps,
        num_stages=_stages(cut, index is not None),
    )
    return out, lse


def _stages(cut: Tiles, gather: bool) -> int:
    """Of the software pipeline: what says where keys are is loaded as far ahead of them as they are."""
    return 1 + cut.ahead * (3 if gather else 2)


def _describable(x: Tensor) -> bool:
    """A descriptor wants rows that start at multiples of 16 bytes."""
    steps = (x.data_ptr(), *(n * x.element_size() for n in x.stride()[:3]))
    return all(step % 16 == 0 for step in steps)


def _rows(x: Tensor) -> Tensor:
    """Offsets within a tile of up to 128 rows are 32 bits wide."""
    return x if x.stride(3) == 1 and x.stride(2) < 1 << 24 else x.contiguous()


@torch.library.custom_op("dit_sparse::block_sparse_attention_triton", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    keys: int,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if valid is not None:
        valid = broadcast_heads(valid, q.shape[1])
    with torch.cuda.device_of(q):
        lists = split(indices, counts, block_k, k.shape[2], valid)
        return _launch(q, k, v, lists, (block_q, block_k), valid, scale)


@_attention.register_fake
def _(q, k, v, indices, counts, block_q, block_k, keys, valid, scale):
    return empty_results(q)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, counts, ctx.block_q, ctx.block_k, ctx.keys, valid, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, indices, counts, valid)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    from dit_sparse.kernels.block_sparse_backward import backward  # which imports this module

    q, k, v, out, lse, indices, counts, valid = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    sizes = (ctx.block_q, ctx.block_k, ctx.keys, valid, ctx.scale)
    grads = backward(grad_out, grad_lse, q, k, v, out, lse, indices, counts, *sizes)
    return *grads, *(None,) * 7


_attention.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("dit_sparse::gathered_triton", mutates_args=())
def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    here = broadcast_heads((index >= 0)[None], q.shape[1])
    valid = here if valid is None else here & broadcast_heads(valid, q.shape[1])
    with torch.cuda.device_of(q):
        lists = split(indices, counts, block_k, index.shape[1], valid)
        return _launch(q, k, v, lists, (block_q, block_k), valid, scale, index=index.int())


@_gathered.register_fake
def _(q, k, v, index, indices, counts, block_q, block_k, valid, scale):
    return empty_results(q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | PackedPlan,
    *,
    valid: Tensor | None,
    scale: float,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`dit_sparse.kernels.block_sparse_attention`. Differentiable; fp32, bf16 and fp16.

    Raises:
        ValueError: float64 tensors, or tensors not on a GPU (the Triton interpreter takes the CPU's).
    """
    assert positions is None, "rules are refused before a kernel is chosen"
    _check(q)
    if isinstance(plan, PackedPlan):
        with torch.cuda.device_of(q):
            lists = row_lists(plan, k.shape[2])
        indices, counts = lists.indices, lists.counts
    else:
        indices, counts = plan.indices, plan.counts
    if plan.block[0] < 16:  # tensor cores take no fewer rows
        from dit_sparse.kernels.routing import routed_attention  # which imports this module

        return routed_attention(q, k, v, indices, counts, plan.block, valid=valid, scale=scale)
    return _attention(q, k, v, indices, counts, *plan.block, plan.keys, valid, scale)


def gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    index: Tensor,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention of tensors in model order, blocks being formed in another; no gradient.

    The same as attention between ``Order.apply`` and ``Order.undo``, without their copies: the kernel looks
    up where the tokens of a block are.

    Args:
        q: [B, H, S, D] in model order.
        k, v: [B, KV, S, D] in model order.
        plan: Over blocks of slots.
        index: ``Order.index``, int32 or int64 [1 or KV, S']: the token in each slot, -1 in holes. A row has
            every token once.
        valid: Which slots may be keys, bool [B or 1, H or KV or 1, S'] (``Order.valid``); holes never are.
        scale: Of the scores; default D ** -0.5.

    Returns:
        out [B, H, S, D] and lse [B, H, S] in model order, as of the public op.

    Raises:
        ValueError: As :func:`attention`; or S' slots that are not what the plan's blocks hold.
    """
    _check(q)
    for name, got, block in (
        ("query", plan.counts.shape[-1], plan.block[0]),
        ("key", plan.keys, plan.block[1]),
    ):
        if got != blocks_of(index.shape[1], block):
            raise ValueError(
                f"the plan has {got} {name} blocks of {block}, "
                f"but {index.shape[1]} slots fill {blocks_of(index.shape[1], block)}"
            )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _gathered(q, k, v, index, plan.indices, plan.counts, *plan.block, valid, scale)


def _check(q: Tensor) -> None:
    if q.dtype == torch.float64:
        raise ValueError("the triton backend takes float32, bfloat16 or float16, got float64")
    if not q.is_cuda:
        if not INTERPRETED:
            raise ValueError(
                f"the triton backend needs tensors on a GPU, got {q.device}; "
                "use 'cpu', or set TRITON_INTERPRET=1 to debug the kernel"
            )
        if q.dtype == torch.bfloat16:
            raise ValueError("the Triton interpreter cannot multiply bfloat16; use float32 or float16 there")


def tiles_for(q: Tensor, block: tuple[int, int]) -> Tiles:
    """What :func:`tune` has found for this GPU, or else :func:`tiles`."""
    own = _tuned(_tuned_file()).get(_gpu(q.device), {}).get(_shape(q.shape[-1], q.dtype, block))
    return own or tiles(target_of(q.device), q.shape[-1], q.element_size(), block)


def tune(
    head_dim: int,
    block: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    tokens: int = 32_768,
    heads: int = 8,
    density: float = 0.2,
    device: torch.device | str = "cuda",
) -> Tiles:
    """Time the kernel with all tiles that may make sense, on random blocks, and use the fastest from now on.

    It is kept in :func:`_tuned_file` for later processes on a GPU of the same name.

    Raises:
        RuntimeError: No tiles work.
    """
    q, k, v = (torch.randn(1, heads, tokens, head_dim, dtype=dtype, device=device) for _ in range(3))
    rows, columns = (blocks_of(tokens, b) for b in block)
    plan = Plan.from_blocks(torch.rand(heads, rows, columns, device=device) < density, block)
    lists = row_lists(plan, tokens)
    times = {}
    for cut in _candidates(target_of(q.device), head_dim, q.element_size(), block):
        try:
            run = partial(_launch, q, k, v, lists, block, None, head_dim**-0.5, own=cut)
            times[cut] = triton.testing.do_bench(run)
        except (triton.runtime.OutOfResources, triton.CompilationError, RuntimeError):
            continue
    if not times:
        raise RuntimeError(f"no tiles work for {_shape(head_dim, dtype, block)} on {_gpu(q.device)}")
    best = min(times, key=times.__getitem__)
    path = _tuned_file()
    table = _tuned(path)
    table.setdefault(_gpu(q.device), {})[_shape(head_dim, dtype, block)] = best
    text = {gpu: {shape: cut._asdict() for shape, cut in shapes.items()} for gpu, shapes in table.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as part:
        json.dump(text, part, indent=1)
    Path(part.name).replace(path)
    return best


def _candidates(target: Target, head_dim: int, itemsize: int, block: tuple[int, int]) -> list[Tiles]:
    default = tiles(target, head_dim, itemsize, block)
    sizes = product({default.queries, 64, 128}, {default.keys, 32, 64, 128}, (4, 8), (1, 2, 3))
    cuts = [default, *(Tiles(*size) for size in sizes if size[0] <= block[0] and size[1] <= block[1])]
    if target.name in WITH_TMA and head_dim * itemsize % 16 == 0:
        cuts += [cut._replace(tma=True) for cut in cuts]
    if target.name == "sm_100":
        cuts += [cut._replace(specialize=True) for cut in cuts if cut.tma]
    return list(dict.fromkeys(cuts))


def _tuned_file() -> Path:
    return cache_folder() / "block_sparse.json"


@cache
def _tuned(path: Path) -> dict[str, dict[str, Tiles]]:
    """Tiles by GPU and shape."""
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())
        return {gpu: {shape: Tiles(**cut) for shape, cut in shapes.items()} for gpu, shapes in table.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold tiles as `tune` writes them ({error}): delete it") from error


def _shape(head_dim: int, dtype: torch.dtype, block: tuple[int, int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} D{head_dim} {block[0]}x{block[1]}"


@cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def variants(target: Target) -> list[Variant]:
    """What ahead-of-time compilation records: the blocks that methods use, then less common cases."""
    common = product((128, 64), ((128, 64), (64, 64), (128, 128)))
    out = [_variant(target, "bf16", *shape) for shape in common]
    out += [_variant(target, "fp16", 128, (128, 64)), _variant(target, "bf16", 128, (128, 64), valid=False)]
    out += [_variant(target, "bf16", head_dim, (128, 64)) for head_dim in (80, 96, 256)]
    out += [_variant(target, "fp32", *shape) for shape in product((128, 64), ((64, 64), (128, 128)))]
    out += [_variant(target, "bf16", 128, (128, 64), source="gather")]
    if target.name in WITH_TMA:
        out += [_variant(target, "bf16", 128, (128, 64), source="tma")]
    if target.name == "sm_100":
        out += [_variant(target, "bf16", 128, (64, 64), source="tma", specialize=True)]
    return out


def _variant(
    target: Target,
    dtype: str,
    head_dim: int,
    block: tuple[int, int],
    *,
    valid: bool = True,
    source: str = "rows",
    specialize: bool = False,
) -> Variant:
    itemsize = 4 if dtype == "fp32" else 2
    plain = (dtype, head_dim, block, valid, source) == ("bf16", 128, (128, 64), True, "rows")
    cut = tiles(target, head_dim, itemsize, block)
    constants = {
        "D": head_dim,
        "BQ": block[0],
        "BK": block[1],
        "TILE_M": cut.queries,
        "TILE_N": cut.keys,
        "PARTS": parts(target, head_dim, itemsize, cut.queries),
        "HAS_VALID": valid,
        "SOURCE": source,
        "SPECIALIZE": specialize,
        "PRECISION": "tf32x3" if dtype == "fp32" and not target.is_amd else "ieee",
    }
    floats = {"p_lse": "*fp32", "SCALE_LOG2": "fp32"} | {
        f"p_{x}": f"*{dtype}" for x in ("q", "k", "v", "out")
    }
    names = [n for n in forward_kernel.arg_names if n not in constants]
    types = {n: floats.get(n, "*i32" if n.startswith("p_") else "i32") for n in names}
    label = f"{dtype} D{head_dim} {block[0]}x{block[1]}"
    said = ((" all valid", not valid), (f" {source}", source != "rows"), (" specialized", specialize))
    return Variant(
        forward_kernel,
        label + "".join(word for word, unusual in said if unusual),
        types,
        constants,
        frozenset(types) - {*SIZES, "SCALE_LOG2"},
        num_warps=cut.num_warps,
        num_stages=_stages(cut, source == "gather"),
        may_spill=head_dim > 128,
        in_ci=plain,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time tile sizes of the Triton forward kernel, keep the fastest."
    )
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--block", type=int, nargs=2, required=True, metavar=("QUERIES", "KEYS"))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    a = parser.parse_args()
    best = tune(a.head_dim, tuple(a.block), getattr(torch, a.dtype))
    print(f"{best}, kept in {_tuned_file()}")


if __name__ == "__main__":
    main()
