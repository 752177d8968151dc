"""TokenLayout, what each token of one transformer call is, and Layer, one of its attention layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class TokenLayout:
    """The token grid of one transformer call and the tokens that share its sequence.

    The model's own sequence is ``[text, prefix, grid, suffix]`` when ``text_first`` and
    ``[prefix, grid, suffix, text]`` otherwise.

    Args:
        grid: (frames, height, width) in tokens, after patching, row-major. Images have ``frames == 1``.
        text: Text tokens in the same sequence; 0 where text enters by cross-attention.
        text_first: Text stands before the grid (CogVideoX, Flux) instead of after it (HunyuanVideo, SD3).
        prefix: History tokens before the grid (Framepack).
        suffix: Reference tokens after it (Kontext, Qwen-Edit).

    Raises:
        ValueError: A size is not an integer, an axis of the grid is below 1, or another count is negative.
    """

    grid: tuple[int, int, int]
    text: int = 0
    text_first: bool = False
    prefix: int = 0
    suffix: int = 0

    def __post_init__(self) -> None:
        grid = tuple(self.grid) if isinstance(self.grid, Iterable) else ()
        if len(grid) != 3 or not all(type(n) is int and n >= 1 for n in grid):
            raise ValueError(
                f"grid must be three positive integers (frames, height, width), got {self.grid!r}"
            )
        object.__setattr__(self, "grid", grid)
        for name in ("text", "prefix", "suffix"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be a token count >= 0, got {value!r}")

    @property
    def tokens(self) -> int:
        """N, the tokens of the grid."""
        return prod(self.grid)

    @property
    def frame(self) -> int:
        """Tokens of one frame."""
        return self.grid[1] * self.grid[2]

    @property
    def sequence(self) -> int:
        """S, all tokens: grid, text, prefix and suffix."""
        return self.tokens + self.extra

    @property
    def extra(self) -> int:
        """Tokens outside the grid: text, prefix and suffix."""
        return self.text + self.prefix + self.suffix

    @property
    def grid_start(self) -> int:
        """Position of the first grid token in the model's sequence."""
        return self.prefix + (self.text if self.text_first else 0)

    @property
    def text_start(self) -> int:
        """Position of the first text token in the model's sequence."""
        return 0 if self.text_first else self.prefix + self.tokens + self.suffix


@dataclass(frozen=True)
class Layer:
    """One self-attention layer over the token grid.

    Args:
        index: 0-based place among ``count``, in the order in which tokens pass them.
        name: Path of the attention module in the transformer.
        count: Layers of the model; schedules speak of shares of it.
        heads: Query heads.
        head_dim: Channels of a head.
        dim: Channels of the hidden states it projects q, k and v from.
    """

    index: int
    name: str
    count: int
    heads: int
    head_dim: int
    dim: int
    """Channels of the hidden states it projects q, k and v from."""
