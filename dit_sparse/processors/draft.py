"""DraftAttention, https://arxiv.org/abs/2505.14708 (X. Shen et al., 2025).

Every frame is cut into regions, and the mean query and the mean key of a region stand for its tokens: their
small attention map, the draft, says which regions matter to which. Tokens are reordered so that a region is
one block, and only the best cells of the draft are computed at full resolution. The draft is made anew in
every call; nothing is remembered between steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels import pooled_scores
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor, nearest_setting
from dit_sparse.order import Order
from dit_sparse.plan import Plan, blocks_of, top_k, with_text


@dataclass(frozen=True, kw_only=True)
class DraftProcessor(SparseProcessor):
    """The best cells of a low-resolution attention map, each computed as one block.

    Args:
        density: Share of a head's draft that is kept, in (0, 1]. The released scripts keep 0.25 (Wan2.1) and
            0.1 (HunyuanVideo); the paper's tables also have 0.45, and 0.4 and 0.2.
        pool: (height, width) of a region in tokens; their product is the block. Paper and code: (8, 16), of
            landscape videos; for portrait ones (16, 8), as LightX2V does.
        variant: ``"row"`` keeps as many best cells for every query region, the nearest whole number and at
            least one. The two published rules rank all cells of a head together, so that query regions with
            flat attention get few or none; one that gets none, and has no text to read, returns zeros.
            ``"official"`` is the released code (shawnricecake/draft-attention at f3c81d5): of n cells those
            whose softmax probability is not below the k-th smallest, k = int((1 - density) n); that is n - k
            + 1 cells and any that tie. ``"paper"`` is its text: the ceil(density n) largest logits.
        sink: Every query reads the first frame. LightX2V does; paper and code do not.
        same_frame: Every query reads its own frame. Likewise.

    Cells that ``sink`` and ``same_frame`` ask for come first and count towards ``density``; LightX2V adds
    them to it. The released code needs frames of whole regions; here a region that sticks out of its frame
    has fewer tokens, and its mean is over those. Means and scores are float32, in bfloat16 cells would tie.
    Tokens that may not be read are in no mean. Text, history and reference tokens are outside the draft and
    dense both ways.

    Raises:
        ValueError: A parameter out of range.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"layout", "qk"})

    density: float = 0.25
    pool: tuple[int, int] = (8, 16)
    variant: str = "row"
    sink: bool = False
    same_frame: bool = False

    def __post_init__(self) -> None:
        if self.variant not in ("row", "official", "paper"):
            raise ValueError(f"variant must be 'row', 'official' or 'paper', got {self.variant!r}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")
        if not (isinstance(self.pool, tuple) and len(self.pool) == 2 and min(self.pool) >= 1):
            raise ValueError(f"pool must be two positive sizes (height, width), got {self.pool!r}")

    @property
    def block(self) -> int:
        """Tokens per block: those of a whole region."""
        return prod(self.pool)

    def order(self, call: Call) -> Order:
        return Order.tiles(call.layout, (1, *self.pool))

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        valid, eligible, regions = call.slots_valid(), call.eligible(self.block), call.grid_blocks(self.block)
        scores = pooled_scores(q, k, self.block, valid=valid, query_valid=valid, scale=call.scale)
        always = self._always(call.layout, q.device)
        keep = self.choose(scores[..., :regions, :regions], eligible[..., :regions], always)
        return Plan.from_blocks(with_text(keep, *scores.shape[-2:]) & eligible, self.block)

    def choose(self, scores: Tensor, eligible: Tensor, always: Tensor) -> Tensor:
        """The cells to compute, bool [B, H, regions, regions].

        Args:
            scores: Logits of the draft, [B, H, regions, regions].
            eligible: Which key regions have a token to read, bool [B or 1, H or 1, 1, regions].
            always: Cells that come first, bool [regions, regions].
        """
        always = always & eligible
        if self.variant == "row":
            count = (self.density * eligible.sum(-1).double()).round().long()
            return top_k(scores.masked_fill(always, torch.inf), count.maximum(always.sum(-1)), eligible)
        official = self.variant == "official"
        ranked = scores.masked_fill(~eligible, -torch.inf)
        ranked = (ranked.softmax(-1) if official else ranked).masked_fill(always, torch.inf)
        cells = ranked.flatten(-2).sort(-1).values  # those that are no cells come first
        n = scores.shape[-2] * eligible.sum((-2, -1))
        k = ((1 - self.density) * n.double()).long()  # n - k = ceil(density n)
        place = (cells.shape[-1] - n + k - int(official)).clamp(0, cells.shape[-1] - 1)
        least = cells.gather(-1, place.expand(cells.shape[:2])[..., None])
        return (ranked >= least[..., None]) & eligible

    def at_density(self, density: float, layout: TokenLayout) -> DraftProcessor:
        """The ``density`` of the draft that makes ``density`` of all tokens; all else stays.

        ValueError below the floor: one cell a row (``"row"``), or what ``sink`` and ``same_frame`` ask for.
        """
        always = self._always(layout)
        official, by_head = self.variant == "official", self.variant != "row"
        first = always.sum()[None] if by_head else always.sum(-1)
        grid, everything, least = layout.tokens**2, layout.sequence**2, 1 + int(official)

        def reached(more: int) -> float:
            share = float(first.clamp(min=least + more).sum()) / always.numel()
            return (share * grid + everything - grid) / everything

        most = always.numel() // len(first)
        wanted = nearest_setting(
            self, layout, density, reached, most - least, "smaller pool, or no sink", "density up to 1"
        )
        # Between two counts, so that rounding cannot change it: by head the count is rounded up.
        count = wanted + least - official - 0.5 * by_head
        return replace(self, density=count / most)

    def _always(self, layout: TokenLayout, device: torch.device | None = None) -> Tensor:
        """The cells of ``sink`` and ``same_frame``, bool [regions, regions]."""
        frames, *size = layout.grid
        per_frame = prod(blocks_of(n, p) for n, p in zip(size, self.pool, strict=True))
        frame = torch.arange(frames, device=device).repeat_interleave(per_frame)
        return (frame == 0) & self.sink | (frame[:, None] == frame) & self.same_frame
