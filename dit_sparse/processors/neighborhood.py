"""Generalized Neighborhood Attention (GNA), https://arxiv.org/abs/2504.16922 (A. Hassani et al., 2025), and
Sliding Tile Attention (STA), https://arxiv.org/abs/2502.04507 (P. Zhang et al., ICML 2025).

A query reads a window of the token grid around itself; at a border the window moves inward, so all are of one
size. With a stride, neighbouring queries share the window of their centre: where strides and windows are made
of whole tiles no tile is read in part, and STA is just that. The pattern is the product of one small pattern
per axis and depends on shapes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor, nearest_setting
from dit_sparse.order import Order
from dit_sparse.plan import Plan, blocks_of, with_text

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Axis:
    """GNA along one axis of ``length`` tokens; the other arguments are :class:`NeighborhoodProcessor`'s.

    Raises:
        ValueError: Not 1 <= stride <= window and 1 <= window * dilation <= length.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        spread = self.window * self.dilation
        if not (1 <= self.stride <= self.window and self.dilation >= 1 and spread <= self.length):
            raise ValueError(f"need 1 <= stride <= window and window * dilation <= length, got {self}")

    def members(self, group: Tensor) -> Tensor:
        """Tokens that are ``group`` modulo dilation: the sequence a window of that group lies in."""
        return (self.length - group + self.dilation - 1) // self.dilation

    def interval(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The windows of queries at ``x``: start <= y // dilation < end, for y = x modulo dilation."""
        place, last = x // self.dilation, self.members(x % self.dilation) - 1
        run = place // self.stride * self.stride
        if self.causal:
            leader = torch.minimum(run + self.stride - 1, last)
            return (leader - self.window + 1).clamp(min=0), place + 1
        leader = torch.minimum(run + self.stride // 2, last)
        start = torch.minimum((leader - self.window // 2).clamp(min=0), last + 1 - self.window)
        return start, start + self.window

    def filled(self, tile: int) -> Tensor:
        """Tokens in each tile of each dilation group, int64 [dilation, tiles]."""
        starts = torch.arange(blocks_of(self.length, tile * self.dilation)) * tile
        return (self.members(torch.arange(self.dilation))[:, None] - starts).clamp(0, tile)

    def visited(self, query_tile: int, key_tile: int) -> tuple[Tensor, Tensor, bool]:
        """The run of key tiles that each query tile reads something of: windows only ever move on.

        Returns:
            first, stop: int64 [dilation, query tiles], half-open, counted within the dilation group.
            whole: Every query reads every visited tile from end to end.
        """
        group, queries = torch.arange(self.dilation)[:, None], self.filled(query_tile)
        head = torch.arange(queries.shape[1]) * query_tile
        start, end = self.interval(head * self.dilation + group)
        last_start, last_end = self.interval((head + queries - 1) * self.dilation + group)
        first, stop = start // key_tile, -(-last_end // key_tile)
        ends = torch.minimum(stop * key_tile, self.members(group))
        whole = (queries == 0) | ((last_start <= first * key_tile) & (ends <= end))
        return first, torch.where(queries > 0, stop, first), bool(whole.all())

    def met(self, tile: int) -> Tensor:
        """:meth:`visited` by tiles of one size as bool [dilation, tiles, dilation, tiles]."""
        first, stop, _ = self.visited(tile, tile)
        keys = torch.arange(first.shape[1])
        run = (first[..., None] <= keys) & (keys < stop[..., None])
        return run[:, :, None] & torch.eye(self.dilation, dtype=torch.bool)[:, None, :, None]

    def rungs(self, tile: int) -> list[Axis]:
        """Windows of one stride and 0, 1, 2, ... tiles on both sides of it, up to a whole dilation group."""
        most = self.length // self.dilation
        return [replace(self, window=w) for w in (*range(self.stride, most, 2 * tile), most)]


def gna_window(
    length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The window of every query of one axis: start, end, group, int64 [length].

    Query x reads the keys y with y % dilation == group[x] and start[x] <= y // dilation < end[x].
    """
    x = torch.arange(length)
    return *Axis(length, window, stride, dilation, causal).interval(x), x % dilation


@dataclass(frozen=True)
class Neighbors:
    """The rule of plans whose tiles are read in part; tokens outside the grid read and are read by all.

    Args:
        axes: Of the token grid.
        start: Position of the first grid token.
    """

    axes: tuple[Axis, ...]
    start: int

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        # A list: torch.compile, through which FlexAttention goes, takes no generator here.
        q, k, tokens = q - self.start, k - self.start, prod([axis.length for axis in self.axes])
        outside = (q < 0) | (q >= tokens) | (k < 0) | (k >= tokens)
        inside = torch.ones_like(outside)
        for axis in reversed(self.axes):
            x, y, d = q % axis.length, k % axis.length, axis.dilation
            if axis.causal or axis.window < axis.length:
                start, end = axis.interval(x)
                inside = inside & (x % d == y % d) & (start <= y // d) & (y // d < end)
            q, k = q // axis.length, k // axis.length
        return outside | inside


@dataclass(frozen=True, kw_only=True)
class _Windows(SparseProcessor):
    """What both methods share: a tile is a block, tiles are read if windows on every axis meet them."""

    reads: ClassVar[frozenset[str]] = frozenset({"layout"})

    tile: Sizes

    def axes(self, grid: Sizes) -> list[tuple[Axis, ...]]:
        """What the parameters come to on a grid: one entry, or one for each head."""
        raise NotImplementedError

    def _resized(self, heads: list[tuple[Axis, ...]]) -> _Windows:
        raise NotImplementedError

    @property
    def _by_token(self) -> bool:
        return False

    def _cut(self, grid: Sizes, axes: Sequence[Axis]) -> Sizes:
        """No tile goes beyond the first power of two that takes in all: an image has no second frame."""
        sizes = (blocks_of(n, axis.dilation) for n, axis in zip(grid, axes, strict=True))
        f, h, w = (min(t, 1 << (n - 1).bit_length()) for t, n in zip(self.tile, sizes, strict=True))
        return f, h, w

    def order(self, call: Call) -> Order:
        axes = self.axes(call.layout.grid)[0]
        f, h, w = (axis.dilation for axis in axes)
        return Order.tiles(call.layout, self._cut(call.layout.grid, axes), dilation=(f, h, w))

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        heads = self.axes(call.layout.grid)
        if len(heads) not in (1, call.layer_heads):
            raise ValueError(f"windows for {len(heads)} heads where there are {call.layer_heads}: {self}")
        tile = self._cut(call.layout.grid, heads[0])
        pairs = [list(zip(axes, tile, strict=True)) for axes in heads]
        met = torch.stack([reduce(torch.kron, (axis.met(t) for axis, t in each)) for each in pairs])
        if len(heads) > 1:
            met = call.own(met)
        keep = with_text(met.flatten(3).flatten(1, 2), *(blocks_of(x.shape[2], prod(tile)) for x in (q, k)))
        whole = all(axis.visited(t, t)[2] for axis, t in pairs[0])
        rule = Neighbors(heads[0], call.layout.grid_start) if self._by_token and not whole else None
        return Plan.from_blocks(keep.to(q.device), prod(tile), rule)

    def head_costs(self, call: Call) -> Tensor | None:
        """Token pairs."""
        if len(self.axes(call.layout.grid)) == 1:
            return None
        call = call.at(order=self.order(call))
        nothing = torch.empty(1, call.heads, call.slots_valid().shape[-1], 0)
        return call.pairs(self.plan(nothing, nothing, call))[0][0].double()

    def at_density(self, density: float, layout: TokenLayout) -> _Windows:
        """The ``window`` whose density is nearest to ``density``, all else as it comes to on this grid.

        Windows are one stride (of STA: a tile) and some tiles on both sides, so that what can be made of
        whole tiles is, or a whole axis. Axes and heads grow in turn, as the present windows are proportioned.

        ValueError below the floor (one stride) and above the ceiling (whole, less what dilation and causal
        axes leave out).
        """
        heads = self.axes(layout.grid)
        tile = self._cut(layout.grid, heads[0])
        rungs = [axis.rungs(t) for axes in heads for axis, t in zip(axes, tile, strict=True)]
        now = [axis.window for axes in heads for axis in axes]
        steps = sorted(
            (Fraction(less.window + more.window, now[i]), i)
            for i, ladder in enumerate(rungs)
            for less, more in pairwise(ladder)
        )

        def grown(taken: int) -> list[tuple[Axis, ...]]:
            height = Counter(i for _, i in steps[:taken])
            every = [ladder[height[i]] for i, ladder in enumerate(rungs)]
            return [tuple(every[i : i + 3]) for i in range(0, len(every), 3)]

        def share(axis: Axis, n: int, t: int) -> float:
            t = 1 if self._by_token else t
            tokens = Axis(n, 1, 1, axis.dilation).filled(t).double()
            return float(torch.einsum("ab,abcd,cd", tokens, axis.met(t).double(), tokens)) / n**2

        def reached(taken: int) -> float:
            each = [prod(map(share, axes, layout.grid, tile)) for axes in grown(taken)]
            return 1 - (1 - sum(each) / len(each)) * (layout.tokens / layout.sequence) ** 2

        less, more = "smaller stride", "smaller dilation, or no causal axis"
        return self._resized(grown(nearest_setting(self, layout, density, reached, len(steps), less, more)))


@dataclass(frozen=True, kw_only=True)
class NeighborhoodProcessor(_Windows):
    """GNA: windows of one size around every query. All sizes are (frames, height, width) in tokens.

    Along each axis the tokens form ``dilation`` interleaved groups, and a group runs of ``stride``. The
    queries of a run read the ``window`` tokens of their group around the run's centre (the right one of an
    even run; an even window has its longer side on the left), moved into the axis. Text, history and
    reference tokens are dense both ways (the paper: all read text; it leaves text queries open).

    Args:
        window: -1 is the whole axis, and more than the grid is cut to it (the authors' code refuses that, and
            windows and axes of 1). Default: the paper's for HunyuanVideo at 720p, 58 % sparse, its VBench
            total above dense attention's. (18, 24, 24) is the paper's 91 %.
        stride: 1 is neighborhood attention, ``window`` blocked attention; cut to the window. Default: the
            finest of whole tiles. The paper's best, (1, 32, 8) and for 91 % (16, 8, 8), read as many tiles.
        dilation: Distance of the tokens of a group, cut to where the window fits.
        causal: Per axis: a window ends at the query, and the first queries of a run read less than it.
        base: The grid that window, stride and dilation are meant for: each is multiplied by grid / base,
            rounded half to even, and cut (windows to at least 2), as Cosmos-Predict2 does
            (nvidia-cosmos/cosmos-predict2 at 661da47, which runs images dense). -1 leaves an axis as it is.
        tile: Tokens of a block; (4, 4, 8) suits Cosmos, (1, 16, 8) images. Far longer than the grid, or than
            a dilation group, it is cut to the next power of two.
        exact: Hide token by token what tiles hold outside a query's window, where they do. This takes a
            backend that honours rules: on a GPU FlexAttention, with tiles of a multiple of 16 tokens. False
            reads whole tiles: never fewer keys, and any backend.

    Raises:
        ValueError: A parameter out of range.
    """

    window: Sizes = (-1, 40, 40)
    stride: Sizes = (2, 8, 8)
    dilation: Sizes = (1, 1, 1)
    causal: tuple[bool, bool, bool] = (False, False, False)
    base: Sizes = (-1, -1, -1)
    tile: Sizes = (2, 8, 8)
    exact: bool = True

    def __post_init__(self) -> None:
        for name in ("stride", "dilation", "tile"):
            _check(name, getattr(self, name))
        for name in ("window", "base"):
            _check(name, getattr(self, name), "positive (or -1)")
        if not (isinstance(self.causal, tuple) and [type(c) for c in self.causal] == [bool] * 3):
            raise ValueError(f"causal must be a tuple of three booleans, got {self.causal!r}")

    def axes(self, grid: Sizes) -> list[tuple[Axis, ...]]:
        found = []
        each = zip(grid, self.window, self.stride, self.dilation, self.causal, self.base, strict=True)
        for length, window, stride, dilation, causal, base in each:
            scale = length / base if base > 0 else 1
            window = length if window < 0 else min(length, max(round(window * scale), min(window, 2)))
            stride = min(window, max(1, round(stride * scale)))
            dilation = min(length // window, max(1, round(dilation * scale)))
            found.append(Axis(length, window, stride, dilation, causal))
        return [tuple(found)]

    def _resized(self, heads: list[tuple[Axis, ...]]) -> NeighborhoodProcessor:
        f, h, w = heads[0]
        stride, dilation = (f.stride, h.stride, w.stride), (f.dilation, h.dilation, w.dilation)
        window, base = (f.window, h.window, w.window), (-1, -1, -1)
        return replace(self, window=window, stride=stride, dilation=dilation, base=base)

    @property
    def _by_token(self) -> bool:
        return self.exact


@dataclass(frozen=True, kw_only=True)
class SlidingTileProcessor(_Windows):
    """STA: windows of whole tiles, for each head its own. GNA with a stride of one tile.

    Args:
        window: (frames, height, width) in tiles, or a tuple of one for each head. A tile reads those at most
            window // 2 away, moved into the grid: an even window reads one more, as in the released code
            (hao-ai-lab/FastVideo). Default: the paper's (30, 40, 40) tokens for HunyuanVideo at 720p, 58 %
            sparse; (3, 3, 3) is its 91 %.
        tile: (frames, height, width) in tokens, a block. The released code refuses grids that are not made of
            whole tiles; here the last tile of an axis may have holes, and is cut as GNA's are.

    Text, history and reference tokens are dense both ways.

    Raises:
        ValueError: A parameter out of range; when planning, windows for another number of heads.
    """

    window: Sizes | tuple[Sizes, ...] = (5, 5, 5)
    tile: Sizes = (6, 8, 8)

    def __post_init__(self) -> None:
        _check("tile", self.tile)
        for window in self._windows:
            _check("window", window)

    @property
    def _windows(self) -> tuple[Sizes, ...]:
        each: Any = self.window
        return each if isinstance(each, tuple) and each and isinstance(each[0], tuple) else (each,)

    def axes(self, grid: Sizes) -> list[tuple[Axis, ...]]:
        tile = self._cut(grid, [Axis(n, 1) for n in grid])
        # On a grid made of whole tiles, where windows and strides of tiles are read whole.
        counts = [blocks_of(n, t) for n, t in zip(grid, tile, strict=True)]
        return [
            tuple(
                Axis(n * t, min(w // 2 * 2 + 1, n) * t, t)
                for n, w, t in zip(counts, window, tile, strict=True)
            )
            for window in self._windows
        ]

    def _resized(self, heads: list[tuple[Axis, ...]]) -> SlidingTileProcessor:
        windows = []
        for f, h, w in heads:
            windows.append((f.window // f.stride, h.window // h.stride, w.window // w.stride))
        return replace(self, window=tuple(windows) if len(windows) > 1 else windows[0])


def _check(name: str, sizes: object, least: str = "positive") -> None:
    fits = isinstance(sizes, tuple) and len(sizes) == 3 and all(type(n) is int for n in sizes)
    if not fits or any(n < 1 and not (n == -1 and "-1" in least) for n in sizes):  # type: ignore[attr-defined]
        raise ValueError(f"{name} must be a tuple (frames, height, width) of {least} sizes, got {sizes!r}")
