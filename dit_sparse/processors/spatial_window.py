"""Spatial window: the positions around a query's own, in every frame. The mask of Re-ttention's paper.

Video tokens attend to what stands where they stand, in all frames. With the frames of each position side by
side that window is one band of blocks along the diagonal. Frame by frame, as models have it and as the
released code has its masks, it touches more than twice as many: of CogVideoX's 17,776 tokens it reads 5.6 %
of the pairs, which are 15.0 % in blocks of 64 frame by frame, and 6.4 % position by position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor, nearest_setting
from dit_sparse.order import Order
from dit_sparse.plan import Plan, blocks_of, with_text


@dataclass(frozen=True)
class SpatialWindow:
    """The mask between tokens, as a ``Plan.rule``: near positions of any two frames, and all text.

    Args:
        layout: Of the positions it is asked about.
        half: Raster positions to either side, within a frame. At its edges the window is cut.
    """

    layout: TokenLayout
    half: int

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = q - self.layout.grid_start, k - self.layout.grid_start
        near = (q % self.layout.frame - k % self.layout.frame).abs() <= self.half
        return near | (q < 0) | (k < 0) | (q >= self.layout.tokens) | (k >= self.layout.tokens)


@dataclass(frozen=True, kw_only=True)
class SpatialWindowProcessor(SparseProcessor):
    """A window along the raster positions of a frame, the same in every frame. An image is one frame.

    Text, history and reference tokens are dense both ways.

    Args:
        keep: Width of the window as a share of a frame, in [0, 2]: ``int(keep * tokens of a frame) // 2`` to
            either side, so that 2 reads all. Re-ttention: 0.0625 and 0.03125.
        block: Tokens per block. A block is read whole when the window reaches any of its tokens.
        exact: Leave out the tokens of a block that are outside of the window: the paper's mask, no faster.

    Raises:
        ValueError: A parameter out of range.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"layout"})

    keep: float = 0.0625
    block: int = 64
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 2 or self.block < 1:
            raise ValueError(f"keep must lie in [0, 2] and block be >= 1, got {self}")

    def order(self, call: Call) -> Order:
        return Order.axes(call.layout, "hwf", self.block)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        half = int(self.keep * call.layout.frame) // 2
        band = with_text(self._band(call.layout, half), *(blocks_of(x.shape[2], self.block) for x in (q, k)))
        rule = SpatialWindow(call.layout, half) if self.exact else None
        return Plan.from_blocks(band.to(q.device), self.block, rule)

    def at_density(self, density: float, layout: TokenLayout) -> SpatialWindowProcessor:
        """The ``keep`` whose blocks have the density nearest to ``density``.

        ValueError below the floor: blocks around the diagonal.
        """
        filled = self.order(Call.standalone(layout)).filled(self.block)[0, 0].double()

        def reached(half: int) -> float:
            band = with_text(self._band(layout, half), *2 * filled.shape).double()
            return float(filled @ band @ filled / filled.sum() ** 2)

        half = nearest_setting(self, layout, density, reached, layout.frame - 1, "smaller block", "keep of 2")
        return replace(self, keep=(2 * half + 1) / layout.frame)

    def _band(self, layout: TokenLayout, half: int) -> Tensor:
        """bool [blocks, blocks] of the grid: which have positions that are at most ``half`` apart."""
        slots, frames = torch.arange(0, layout.tokens, self.block), layout.grid[0]
        first, last = slots // frames, ((slots + self.block).clamp(max=layout.tokens) - 1) // frames
        apart = first[:, None] - last
        return torch.maximum(apart, apart.T) <= half
