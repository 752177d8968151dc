"""Order: where tokens sit while blocks are formed.

An ordered sequence is ``[grid, holes to a block boundary, prefix, suffix, text]``: padding of the text, at
its end, moves no other token into another block. Only the arrangement of the grid differs between orders; a
method therefore never looks at where the model puts its text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout


def broadcast_heads(x: Tensor, heads: int) -> Tensor:
    """Expand ``x`` [B, H', ...] to ``heads``; H' is 1, ``heads``, or a divisor of it (GQA groups)."""
    if x.shape[1] in (1, heads):
        return x
    if heads % x.shape[1]:
        raise ValueError(f"{heads} heads cannot share {x.shape[1]} per-head orders: not a multiple")
    return x.repeat_interleave(heads // x.shape[1], dim=1)


@dataclass(frozen=True, eq=False)
class Order:
    """A permutation with holes.

    Args:
        index: int64 [1 or KV heads, S'], the model-order position in each slot; -1 marks a hole.
            Every token 0..S-1 appears exactly once in each row. With an axis more, [B, 1 or KV heads, S'],
            batch items have orders of their own.
        tokens: S, so that ``undo`` needs no synchronisation.
        identity: True when ``index`` is 0..S-1; then ``apply`` and ``undo`` return their argument.
    """

    index: Tensor
    tokens: int
    identity: bool = False

    @property
    def slots(self) -> int:
        """S', the length of the ordered sequence."""
        return self.index.shape[-1]

    def to(self, device: torch.device | str) -> Order:
        """The same order with its index on ``device``."""
        if self.index.device == torch.device(device):
            return self
        return Order(self.index.to(device), self.tokens, self.identity)

    def apply(self, x: Tensor) -> Tensor:
        """[B, H, S, D] in model order -> [B, H, S', D] in block order; holes are zeros."""
        if x.shape[2] != self.tokens:
            raise ValueError(f"this order is for sequences of {self.tokens} tokens, got {x.shape[2]}")
        if self.identity:
            return x
        index = self.rows
        if index.shape[:2] == (1, 1):
            out = x.index_select(2, index[0, 0].clamp(min=0))
        else:
            slots = broadcast_heads(index.clamp(min=0), x.shape[1])
            out = x.gather(2, slots[..., None].expand(x.shape[0], x.shape[1], -1, x.shape[3]))
        if self.slots == self.tokens:
            return out
        return out.masked_fill(broadcast_heads(index < 0, x.shape[1])[..., None], 0)

    def undo(self, x: Tensor) -> Tensor:
        """[B, H, S', D] in block order -> [B, H, S, D] in model order; holes are dropped."""
        if x.shape[2] != self.slots:
            raise ValueError(f"this order has {self.slots} slots, got a sequence of {x.shape[2]}")
        if self.identity:
            return x
        places = self._places
        if places.shape[:2] == (1, 1):
            return x.index_select(2, places[0, 0])
        slots = broadcast_heads(places, x.shape[1])
        return x.gather(2, slots[..., None].expand(x.shape[0], x.shape[1], -1, x.shape[3]))

    @property
    def rows(self) -> Tensor:
        """``index`` with its batch axis: int64 [1 or B, 1 or KV heads, S']."""
        return self.index if self.index.ndim == 3 else self.index[None]

    @cached_property
    def _places(self) -> Tensor:
        """int64 [1 or B, 1 or KV heads, S]: the slot of each token."""
        # Holes sort first, so the last S entries of the stable argsort are the slots of tokens 0..S-1.
        return self.rows.argsort(dim=-1, stable=True)[..., self.slots - self.tokens :]

    @cached_property
    def _here(self) -> Tensor:
        """bool [1 or B, 1 or KV heads, S']: slots with a token. One tensor: kernels cache by it."""
        return self.rows >= 0

    def valid(self, valid: Tensor | None = None) -> Tensor:
        """Which slots hold a token that may be a key.

        Args:
            valid: Key validity in model order, bool [S], [B, S] or [B, H, S]; None means all.

        Returns:
            bool [B or 1, H or 1, S'].
        """
        here = self._here
        if valid is None:
            return here
        if valid.dtype != torch.bool or valid.shape[-1] != self.tokens or valid.ndim > 3:
            raise ValueError(
                f"key validity must be bool [..., {self.tokens}] with at most 3 axes, "
                f"got {valid.dtype} {tuple(valid.shape)}"
            )
        if valid.ndim < 3:
            valid = valid.reshape(-1, 1, self.tokens)
        slots = self.rows.clamp(min=0)
        if valid.shape[1] > 1:
            slots = broadcast_heads(slots, valid.shape[1])
        batch, heads = max(slots.shape[0], valid.shape[0]), max(slots.shape[1], valid.shape[1])
        valid = valid.expand(batch, heads, -1).gather(2, slots.expand(batch, heads, -1))
        return valid & here if here.shape[1] in (1, heads) else valid & broadcast_heads(here, heads)

    def filled(self, block: int, valid: Tensor | None = None) -> Tensor:
        """Valid tokens per block of ``block`` slots: int64 [B or 1, H or 1, blocks]. See :meth:`valid`."""
        return fill_counts(self.valid(valid), block)

    @classmethod
    def raster(cls, layout: TokenLayout, block: int = 1) -> Order:
        """The grid as the model has it. Holes only where text needs a block boundary."""
        return cls._build(torch.arange(layout.tokens), layout, block)

    @classmethod
    def frames(cls, layout: TokenLayout, block: int) -> Order:
        """Raster order with every frame starting on a block boundary: frame edges share no block."""
        slots = -(-layout.frame // block) * block
        index = torch.full((layout.grid[0], slots), -1)
        index[:, : layout.frame] = torch.arange(layout.tokens).view(layout.grid[0], layout.frame)
        return cls._build(index.flatten(), layout, block)

    @classmethod
    def tiles(
        cls,
        layout: TokenLayout,
        tile: tuple[int, int, int],
        block: int | None = None,
        dilation: tuple[int, int, int] = (1, 1, 1),
        packed: bool = False,
    ) -> Order:
        """Tile after tile of ``tile`` (frames, height, width) tokens, each raster inside.

        Tiles that stick out of the grid are completed with holes, so every tile is one run of
        ``prod(tile)`` slots. ``block`` (default ``prod(tile)``) is where text starts. With ``dilation`` a
        tile takes every ``dilation``-th token along an axis: first come the tiles of those that start at 0,
        then of those at 1, ... ``packed`` puts the holes of a tile behind its tokens; smaller tiles then no
        longer nest in it.
        """
        for name, sizes in (("tile", tile), ("dilation", dilation)):
            if len(sizes) != 3 or min(sizes) < 1:
                raise ValueError(
                    f"{name} must be three positive sizes (frames, height, width), got {sizes!r}"
                )
        parts = [(-(-n // (t * d)), t, d) for n, t, d in zip(layout.grid, tile, dilation, strict=True)]
        padded = torch.full([prod(part) for part in parts], -1)
        f, h, w = layout.grid
        padded[:f, :h, :w] = torch.arange(layout.tokens).view(f, h, w)
        split = padded.view([size for part in parts for size in part])
        tiles = split.permute(2, 5, 8, 0, 3, 6, 1, 4, 7).reshape(-1, prod(tile))
        if packed:
            tiles = tiles.gather(1, (tiles < 0).byte().argsort(dim=1, stable=True))
        return cls._build(tiles.flatten(), layout, block or prod(tile))

    @classmethod
    def axes(cls, layout: TokenLayout, order: str, block: int = 1) -> Order:
        """The grid with its axes permuted: "fhw" is raster, "hwf" puts a position's frames together."""
        if sorted(order) != ["f", "h", "w"]:
            raise ValueError(f"axes must be a permutation of 'fhw', got {order!r}")
        index = torch.arange(layout.tokens).view(layout.grid)
        return cls._build(index.permute(["fhw".index(a) for a in order]).flatten(), layout, block)

    @classmethod
    def curve(cls, layout: TokenLayout, block: int = 1) -> Order:
        """The grid along a generalised Hilbert curve (see :func:`gilbert`)."""
        return cls._build(gilbert(layout.grid), layout, block)

    @classmethod
    def stack(cls, orders: list[Order]) -> Order:
        """One order per head out of single-head orders of equal length."""
        if len({(o.slots, o.tokens) for o in orders}) != 1 or any(o.index.shape[0] != 1 for o in orders):
            sizes = [tuple(o.index.shape) for o in orders]
            raise ValueError(
                f"orders to stack must be single-head and equally long, got index shapes {sizes}"
            )
        return cls(torch.cat([o.index for o in orders]), orders[0].tokens, all(o.identity for o in orders))

    @classmethod
    def _build(cls, grid: Tensor, layout: TokenLayout, block: int) -> Order:
        """Complete an arrangement of the grid (int64 [slots], grid positions or -1) to a whole order."""
        if block < 1:
            raise ValueError(f"block must be a positive number of tokens, got {block}")
        parts = [torch.where(grid < 0, grid, grid + layout.grid_start)]
        if layout.extra:
            parts.append(torch.full((-len(grid) % block,), -1))
            everything = torch.arange(layout.sequence)
            start, end = layout.grid_start, layout.grid_start + layout.tokens
            parts.append(everything[start - layout.prefix : start])
            parts.append(everything[end : end + layout.suffix])
            parts.append(everything[layout.text_start : layout.text_start + layout.text])
        index = torch.cat(parts)
        identity = len(index) == layout.sequence and bool((index == torch.arange(len(index))).all())
        return cls(index[None], layout.sequence, identity)


def fill_counts(valid: Tensor, block: int) -> Tensor:
    """Valid tokens per block: bool [..., S'] -> int64 [..., ceil(S'/block)]."""
    pad = -valid.shape[-1] % block
    return torch.nn.functional.pad(valid, (0, pad)).unflatten(-1, (-1, block)).sum(-1)


@lru_cache(maxsize=32)
def gilbert(grid: tuple[int, int, int]) -> Tensor:
    """The generalised Hilbert ("Gilbert") curve through a box of any size (J. Cerveny's construction).

    Args:
        grid: (frames, height, width) in tokens.

    Returns:
        int64 [frames * height * width]: the raster index (width fastest) of the i-th visited token.
        Consecutive tokens are neighbours in boxes of even sizes; odd sizes force a few short jumps.
    """
    f, h, w = grid
    sizes = (w, h, f)
    longest = max(range(3), key=lambda axis: sizes[axis])
    axes = [longest, *(axis for axis in range(3) if axis != longest)]
    a, b, c = (tuple(sizes[axis] if axis == i else 0 for i in range(3)) for axis in axes)
    return torch.tensor([x + w * (y + h * z) for x, y, z in _gilbert((0, 0, 0), a, b, c)])


Vector = tuple[int, ...]


def _add(*vectors: Vector) -> Vector:
    return tuple(map(sum, zip(*vectors, strict=True)))


def _scale(vector: Vector, factor: int) -> Vector:
    return tuple(factor * v for v in vector)


def _unit(vector: Vector) -> Vector:
    return tuple((v > 0) - (v < 0) for v in vector)


def _half(vector: Vector, unit: Vector, size: int) -> Vector:
    """Half of an axis vector, made even in length where the whole is longer than 2."""
    half = tuple(v // 2 for v in vector)
    length = abs(sum(half))
    return _add(half, unit) if length % 2 and size > 2 else half


def _gilbert(p: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """Visit the box with corner ``p`` and edges a (the way to go), b, c (each along one axis, signed)."""
    w, h, d = (abs(sum(v)) for v in (a, b, c))
    da, db, dc = _unit(a), _unit(b), _unit(c)
    for size, others, step in ((w, (h, d), da), (h, (w, d), db), (d, (w, h), dc)):
        if others == (1, 1):
            for i in range(size):
                yield _add(p, _scale(step, i))
            return
    a2, b2, c2 = _half(a, da, w), _half(b, db, h), _half(c, dc, d)
    neg = -1
    if 2 * w > 3 * h and 2 * w > 3 * d:  # wide: split along a only
        yield from _gilbert(p, a2, b, c)
        yield from _gilbert(_add(p, a2), _add(a, _scale(a2, neg)), b, c)
    elif 3 * h > 4 * d:  # do not split along c
        yield from _gilbert(p, b2, c, a2)
        yield from _gilbert(_add(p, b2), a, _add(b, _scale(b2, neg)), c)
        corner = _add(p, a, _scale(da, neg), b2, _scale(db, neg))
        yield from _gilbert(corner, _scale(b2, neg), c, _scale(_add(a, _scale(a2, neg)), neg))
    elif 3 * d > 4 * h:  # do not split along b
        yield from _gilbert(p, c2, a2, b)
        yield from _gilbert(_add(p, c2), a, b, _add(c, _scale(c2, neg)))
        corner = _add(p, a, _scale(da, neg), c2, _scale(dc, neg))
        yield from _gilbert(corner, _scale(c2, neg), _scale(_add(a, _scale(a2, neg)), neg), b)
    else:
        rest_a, rest_b, rest_c = (_add(v, _scale(v2, neg)) for v, v2 in ((a, a2), (b, b2), (c, c2)))
        yield from _gilbert(p, b2, c2, a2)
        yield from _gilbert(_add(p, b2), c, a2, rest_b)
        corner = _add(p, b2, _scale(db, neg), c, _scale(dc, neg))
        yield from _gilbert(corner, a, _scale(b2, neg), _scale(rest_c, neg))
        corner = _add(p, a, _scale(da, neg), b2, c, _scale(dc, neg))
        yield from _gilbert(corner, _scale(c, neg), _scale(rest_a, neg), rest_b)
        corner = _add(p, a, _scale(da, neg), b2, _scale(db, neg))
        yield from _gilbert(corner, _scale(b2, neg), c2, _scale(rest_a, neg))
