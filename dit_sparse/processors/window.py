"""Sliding window in raster order, the baseline of Longformer, https://arxiv.org/abs/2004.05150 (I. Beltagy et
al., 2020).

Every query block reads the key blocks nearest to it in the sequence: the rest of its frame first, then the
frames before and after. It knows nothing of height and width, which is what the other methods add.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor, nearest_setting
from dit_sparse.plan import Plan, blocks_of, top_k, with_text


@dataclass(frozen=True, kw_only=True)
class WindowProcessor(SparseProcessor):
    """The nearest blocks; at the ends of the grid the window moves inward.

    Text, history and reference tokens are dense both ways.

    Args:
        density: Share of the grid's block pairs that is kept, in (0, 1]. Rows get equally many, give or take
            one, and at least their own.
        block: Tokens per block.

    Raises:
        ValueError: A parameter out of range.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"layout"})

    density: float = 0.25
    block: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or self.block < 1:
            raise ValueError(f"density must lie in (0, 1] and block be >= 1, got {self}")

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        blocks = call.grid_blocks(self.block)
        keep = top_k(self.scores(blocks, call), blocks_per_row(self.density, blocks))
        keep = with_text(keep, *(blocks_of(x.shape[2], self.block) for x in (q, k)))
        return Plan.from_blocks(keep.to(q.device), self.block)

    def scores(self, blocks: int, call: Call) -> Tensor:
        """Which key blocks of the grid a query block takes first: [blocks, blocks], the highest ones."""
        i = torch.arange(blocks)
        return -(i[:, None] - i).abs()

    def at_density(self, density: float, layout: TokenLayout) -> Self:
        """The ``density`` that, with everything outside the grid dense, comes nearest to ``density`` in all.

        ValueError below the floor (every query block its own).
        """
        call = Call.standalone(layout)
        filled = self.order(call).filled(self.block)[0, 0]
        blocks = blocks_of(layout.tokens, self.block)
        first = self.scores(blocks, call).argsort(descending=True, stable=True)
        tokens = filled[first].cumsum(-1)  # in the first 1, 2, ... blocks of each row

        def reached(more: int) -> float:
            rows = blocks_per_row((blocks + more) / blocks**2, blocks)
            grid = filled[:blocks] * tokens.gather(1, rows[:, None] - 1)[:, 0]
            return 1 - (layout.tokens**2 - int(grid.sum())) / layout.sequence**2

        most = blocks**2 - blocks
        more = nearest_setting(self, layout, density, reached, most, "smaller block", "density up to 1")
        return replace(self, density=(blocks + more) / blocks**2)


def blocks_per_row(density: float, blocks: int) -> Tensor:
    """How many of its ``blocks`` key blocks each query block keeps, at least one: int64 [blocks].

    Their sum is as near as can be to ``density``; rows that get one more lie evenly among the others.
    """
    kept = max(blocks, round(density * blocks**2))
    return (torch.arange(blocks + 1) * kept // blocks).diff()
