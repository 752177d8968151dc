"""The CPU backend of the probes: tiles of scores that stay in the cache, each reduced to its blocks at once.

Letters: B batch, H query heads, KV key heads, S tokens (Sq, Sk), D head dim, Q and K blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, product

import torch
from torch import Tensor

from dit_sparse.kernels.mass_ops import define
from dit_sparse.kernels.operands import exact_dtype
from dit_sparse.order import broadcast_heads
from dit_sparse.plan import blocks_of, pool

# A tile of scores: so many queries for each thread, and keys. In float32 a thread's share of it is 1 MiB.
QUERIES_PER_THREAD = 512
KEYS = 512
LOG2E = math.log2(math.e)


def _probe(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    valid: Tensor | None,
    block: Sequence[int],
    scale: float,
    small: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q)
    exact = exact_dtype(q.dtype)
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    mass = torch.zeros(batch, heads, blocks_of(queries, block[0]), blocks_of(keys, block[1]), dtype=exact)
    peak, count = (mass, mass) if small is None else (torch.zeros_like(mass), mass.int())
    missing = None if valid is None else broadcast_heads(~valid, heads).expand(batch, heads, -1)
    known = lse.isfinite()[..., None]
    # PyTorch's exp2 takes a quarter of the time of its exp.
    shift = torch.where(known, lse.to(exact)[..., None] * -LOG2E, -math.inf)
    rows = _cuts(queries, block[0], QUERIES_PER_THREAD * torch.get_num_threads())
    columns = _cuts(keys, block[1], KEYS)
    room = torch.empty(_longest(rows) * _longest(columns), dtype=exact)
    for b, h in product(range(batch), range(heads)):
        key = k[b, h * kv_heads // heads].to(exact)
        for r, i in rows:
            there = known[b, h, r]
            query = q[b, h, r].to(exact).masked_fill(~there, 0)
            for c, j in columns:
                gone = None if missing is None else missing[b, h, c]
                tile = room[: len(query) * (c.stop - c.start)].view(len(query), -1)
                torch.addmm(shift[b, h, r], query, key[c].mT, alpha=scale * LOG2E, out=tile).exp2_()
                mass[b, h, i, j] += _per_block(tile, gone, i, j, torch.sum)
                if small is not None:
                    most = _per_block(tile, gone, i, j, torch.amax)
                    peak[b, h, i, j] = torch.maximum(peak[b, h, i, j], most)
                    # A query without LSE has only zeros, none of which is below zero.
                    tile.lt_(there * small)
                    count[b, h, i, j] += _per_block(tile, gone, i, j, torch.sum).int()
    return mass, peak, count


def _cuts(tokens: int, block: int, most: int) -> list[tuple[slice, slice]]:
    """Cut a sequence: slices of tokens, each whole blocks or a part of one, and the blocks they belong to."""
    step = max(block, most // block * block)
    starts = {i + j for i in range(0, tokens, step) for j in range(0, step, most) if i + j < tokens}
    ends = pairwise(sorted(starts | {tokens - tokens % block, tokens}))
    return [(slice(a, b), slice(a // block, blocks_of(b, block))) for a, b in ends]


def _longest(cuts: list[tuple[slice, slice]]) -> int:
    return max(tokens.stop - tokens.start for tokens, _ in cuts)


def _per_block(tile: Tensor, gone: Tensor | None, rows: slice, columns: slice, reduce: Callable) -> Tensor:
    """[M, N] -> [rows, columns]; rows first, which leaves few columns to take those out that are gone."""
    x = reduce(tile.view(rows.stop - rows.start, -1, tile.shape[1]), 1)
    if gone is not None:
        x = x.masked_fill(gone, 0)
    return reduce(x.view(len(x), columns.stop - columns.start, -1), 2)


block_mass, block_statistics = define("cpu", _probe)


def block_means(x: Tensor, block: int, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Means of the tokens that exist in each block, see :func:`dit_sparse.plan.pool`.

    Raises:
        ValueError: Tensors that are not on the CPU.
    """
    _check(x)
    return pool(x.to(dtype), block, valid)


def _check(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"the cpu backend needs tensors on the CPU, got {x.device}")
