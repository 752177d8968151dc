"""Radial Attention, https://arxiv.org/abs/2506.19852 (X. Li et al., NeurIPS 2025).

Attention between two video frames decays with their distance, so a query reads near frames whole and
farther ones only along a band around its own position, half as wide whenever the distance doubles. Once the
band would be thinner than a block, only every 2nd, 4th, ... frame is read. The mask depends on shapes alone
and is shared by all heads, layers and steps: O(n log n) pairs for n frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor, nearest_setting
from dit_sparse.order import Order
from dit_sparse.plan import Plan, blocks_of, with_text


@dataclass(frozen=True, kw_only=True)
class RadialProcessor(SparseProcessor):
    """Bands that narrow with the distance between frames, shrunk to blocks.

    Take frames i (queries) and j (keys) of s tokens, d = |i - j|, P the first power of two above s, and r =
    P / 2^(floor(log2 d) + 1). Query position k of the one may see key position l of the other if |k - l| <=
    w, with w = s, the whole frame, for d <= 1 and, given ``sink``, for j = 0; otherwise w = max(r * decay,
    block). Pairs with r < decimate_below are left out unless floor(decimate_below / r) divides d (the sink
    never is). A block of the pair is kept when, among its key columns that see any query, more than
    ``column_share`` see more than ``column_density`` of the block's rows. Text, history and reference
    tokens are dense both ways.

    Args:
        decay: Scales the band. 1.0 is the default of the released command line and gives the paper's
            long-video sparsities; the released scripts set 0.2 (Wan2.1), 0.8 (Wan2.2) and 0.95
            (HunyuanVideo).
        block: Tokens per block (released: 128, and 64 for Wan2.2).
        sink: Every query reads the first frame (the paper for all models, the released code for Wan only).
        variant: ``"aligned"`` starts every frame on a block boundary and judges a frame's ragged last block
            by the rows it has: any resolution works, and a frame that is read is read at the query's own
            position. ``"head"`` and ``"v1"`` are the released rules bit for bit: frames follow without a
            gap, a block is judged by ``block`` rows for each of its frames, and of a frame only the first
            ceil(s / block) blocks it meets count, so keys at frame edges are lost unless ``block`` divides
            s. ``"head"`` is the last release (72788d4); in ``"v1"``, those before it, w = s // 2 at d = 1
            where the sink is on. The released code needs whole blocks; here a ragged last block of the grid
            is dense.
        column_density, column_share: The two thresholds, read as fractions with denominators up to 1000.
        decimate_below: In tokens, whatever ``block`` and ``decay`` are; 0 reads every frame.

    Raises:
        ValueError: A parameter out of range; when planning, a released rule that leaves queries without keys.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"layout"})

    decay: float = 1.0
    block: int = 128
    sink: bool = True
    variant: str = "aligned"
    column_density: float = 1 / 3
    column_share: float = 3 / 5
    decimate_below: int = 128

    def __post_init__(self) -> None:
        if self.variant not in ("aligned", "head", "v1"):
            raise ValueError(f"variant must be 'aligned', 'head' or 'v1', got {self.variant!r}")
        if self.block < 1 or self.decimate_below < 0 or not (isfinite(self.decay) and self.decay >= 0):
            raise ValueError(f"block must be >= 1, decimate_below >= 0 and decay finite and >= 0, got {self}")
        if not (0 <= self.column_density < 1 and 0 <= self.column_share < 1):
            raise ValueError(f"column_density and column_share must lie in [0, 1), got {self}")

    @property
    def needs_frames(self) -> str:
        return "its bands lie between frames"

    def order(self, call: Call) -> Order:
        return (Order.frames if self.variant == "aligned" else Order.raster)(call.layout, self.block)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        keep = with_text(self._grid_blocks(call.layout), *(blocks_of(x.shape[2], self.block) for x in (q, k)))
        return Plan.from_blocks(keep.to(q.device), self.block)

    def at_density(self, density: float, layout: TokenLayout) -> RadialProcessor:
        """The ``decay`` whose density is nearest to ``density``; all else stays.

        ValueError below the floor (every band one block) and above the ceiling (every frame read whole).
        """
        # A half width is floor(decay * P / 2^level) with level >= 2: multiples of 4 / P suffice.
        unit = 4 / (1 << layout.frame.bit_length())
        filled = self.order(Call.standalone(layout)).filled(self.block)[0, 0].double()

        def reached(units: int) -> float:
            keep = with_text(replace(self, decay=units * unit)._grid_blocks(layout), *2 * filled.shape)
            return float(filled @ keep.double() @ filled / filled.sum() ** 2)

        most = layout.frame << layout.grid[0].bit_length()
        name = f"decimate_below (now {self.decimate_below})"
        less, more = f"smaller block, sink=False or a larger {name}", f"smaller {name}"
        return replace(self, decay=unit * nearest_setting(self, layout, density, reached, most, less, more))

    def _half_width(self, d: int, s: int) -> int:
        """floor(w) at distance d; -1 where the frame is not read."""
        above, level = 1 << s.bit_length(), d.bit_length()
        if above < self.decimate_below << level and d % ((self.decimate_below << level) // above):
            return -1
        if d <= 1:
            return s // 2 if d == 1 and self.sink and self.variant == "v1" else s
        return min(max(int(self.decay * above / (1 << level)), self.block), s)

    def _grid_blocks(self, layout: TokenLayout) -> Tensor:
        """bool [blocks, blocks] over the whole blocks of the ordered grid, from intervals of tokens."""
        frames, s, block, aligned = layout.grid[0], layout.frame, self.block, self.variant == "aligned"
        n = blocks_of(s, block)
        starts = torch.arange(frames) * (n * block if aligned else s)
        widths = torch.tensor([self._half_width(d, s) for d in range(frames)])
        widths = widths[(torch.arange(frames)[:, None] - torch.arange(frames)).abs()]
        if self.sink:
            widths[:, 0] = s
        # Frame pairs of equal width and equal offsets of the two frames in their first blocks are one case.
        pairs = torch.stack(torch.broadcast_tensors(widths, starts[:, None] % block, starts % block), -1)
        cases, case = pairs.flatten(0, 1).unique(dim=0, return_inverse=True)
        w, q_offset, k_offset = cases.T[..., None, None]
        edges = torch.arange(n + 1) * block
        # Block a holds the positions lo <= p < hi of its frame: [cases, n queries, 1] and [cases, 1, n keys].
        q_lo, q_hi = (edges[:-1, None] - q_offset).clamp(min=0), (edges[1:, None] - q_offset).clamp(max=s)
        k_lo, k_hi = (edges[:-1] - k_offset).clamp(min=0), (edges[1:] - k_offset).clamp(max=s)

        def columns(rows: Tensor) -> Tensor:
            """Key columns that see at least ``rows`` queries: one run, as 2w + 1 is never below that."""
            run = torch.minimum(k_hi, q_hi - rows + 1 + w) - torch.maximum(k_lo, q_lo + rows - 1 - w)
            return run.clamp(min=0) * (rows <= q_hi - q_lo)

        least = Fraction(self.column_density).limit_denominator(1000)
        share = Fraction(self.column_share).limit_denominator(1000)
        rows = q_hi - q_lo if aligned else torch.full_like(q_lo, block)
        dense, some = columns(rows * least.numerator // least.denominator + 1), columns(torch.ones_like(rows))
        kept = (share.denominator * dense > share.numerator * some) & (w >= 0)
        kept = kept[case].view(frames, frames, n, n).transpose(1, 2).reshape(frames * n, frames * n)
        # Frames may share a block: it is kept when any of them keeps it.
        place = ((starts // block)[:, None] + torch.arange(n)).flatten()
        keep = torch.zeros(int(place[-1]) + 1, int(place[-1]) + 1, dtype=torch.bool)
        q_block, k_block = kept.nonzero().T
        keep[place[q_block], place[k_block]] = True
        whole = frames * n if aligned else layout.tokens // block
        if not (keep := keep[:whole, :whole]).any(-1).all():
            raise ValueError(
                f"variant {self.variant!r} leaves queries without keys at {s} tokens per frame in blocks of "
                f"{block}; 'aligned' works at any size"
            )
        return keep
