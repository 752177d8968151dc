"""VMoBA, https://arxiv.org/abs/2506.23858 (J. Wu et al., ICLR 2026).

Every query token reads its own chunk of the video and the few others whose mean key is most similar to it.
What a chunk is cycles with the layer: frames (1-D), a patch through all frames (2-D), a box (3-D). For
training, the pairs of a query and a chunk compete within a head for a share of its similarity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels import pooled_scores
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor, nearest_setting
from dit_sparse.order import Order
from dit_sparse.plan import Plan, blocks_of, with_text

# The axes of [B, H, S, C], S queries and C chunks, over which pairs compete.
COMPETITIONS = {"query_head": (3,), "block": (1, 2), "head_global": (2, 3), "overall": (1, 2, 3)}


@dataclass(frozen=True, kw_only=True)
class VMoBAProcessor(SparseProcessor):
    """Chunks chosen by every single query token: a plan with blocks of (1, tokens of a chunk).

    The defaults are the paper's training-free setting, in which each query takes its own best chunks. Batch
    items are apart (those of the released code compete), chunks may be ragged (it refuses them), and where
    only own chunks are left they are read (it falls back to dense). Text, history and reference tokens are
    dense both ways. Selecting takes about 22 bytes for each (head, query, chunk), 42 with a threshold, the
    plan 4 for each that is kept: 4.8 GB and 0.2 GB in the 3-D layers of Wan2.1-14B at 720p.

    Args:
        share: Chunks a query reads, its own among them, of all; rounded up. The published top 2, 6, 18 of 7,
            24, 72 (480p) and 2, 10, 9 of 7, 40, 36 (720p) are all a quarter.
        threshold: Replaces ``share``: of a group's similarity, min-max normalised, this share is kept, own
            chunks included and at least one pair beyond them. 0.25 in the paper's trainings.
        competition: The group whose best pairs are taken: ``"query_head"``, the chunks of one query;
            ``"head_global"``, all pairs of a head (the paper's trainings; untrained, its videos jitter);
            ``"overall"``, of all heads; with a threshold also ``"block"``, all queries and heads of a chunk.
        temporal, spatial, volume: Frames of a 1-D chunk, may be a fraction; (height, width) of a 2-D one and
            (frames, height, width) of a 3-D one, in tokens. None makes about 7, 6 x 4 and 3 x 6 x 4 chunks,
            as for the published 21 x 30 x 52 tokens: 3, (5, 13) and (7, 5, 13).

    Raises:
        ValueError: A parameter out of range.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"layout", "layer", "qk"})

    share: float = 0.25
    threshold: float | None = None
    competition: str = "query_head"
    temporal: float | None = None
    spatial: tuple[int, int] | None = None
    volume: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        known = [name for name in COMPETITIONS if name != "block" or self.threshold is not None]
        if self.competition not in known:
            raise ValueError(f"competition must be one of {known}, got {self}")
        if not 0 < self.share <= 1 or not 0 <= (self.threshold or 0) <= 1:
            raise ValueError(f"share must lie in (0, 1] and threshold in [0, 1], got {self}")
        temporal = 1 if self.temporal is None else self.temporal
        sizes = [(temporal,), self.spatial or (1, 1), self.volume or (1, 1, 1)]
        if [len(x) for x in sizes] != [1, 2, 3] or not all(0 < n < torch.inf for x in sizes for n in x):
            raise ValueError(f"temporal, spatial and volume must be 1, 2 and 3 sizes above 0, got {self}")

    @property
    def needs_all_heads(self) -> str:
        if 1 not in COMPETITIONS[self.competition]:
            return ""
        return f"with the competition {self.competition!r} all heads of a layer share what is kept"

    def order(self, call: Call) -> Order:
        chunk = self.chunk(call.layout, call.layer)
        return Order.tiles(call.layout, chunk) if len(chunk) == 3 else Order.raster(call.layout, chunk[0])

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        c = prod(self.chunk(call.layout, call.layer))
        eligible, chunks = call.eligible(c), call.grid_blocks(c)
        slots = min(q.shape[2], chunks * c)
        gate = pooled_scores(q[:, :, :slots], k, (1, c), valid=call.slots_valid(), scale=1.0)[..., :chunks]
        own = torch.arange(slots, device=q.device)[:, None] // c == torch.arange(chunks, device=q.device)
        # Where queries compete, padding must not; alone, it may choose as any other.
        rivals = call.at(valid=None) if self.competition == "query_head" else call
        pairs = rivals.slots_valid()[..., :slots, None] & eligible[..., :chunks]
        count = ceil(round(self.share * chunks, 6))
        keep = select_chunks(gate, own, pairs, self.competition, count, self.threshold)
        return Plan.from_blocks(with_text(keep, q.shape[2], eligible.shape[-1]) & eligible, (1, c))

    def at_density(self, density: float, layout: TokenLayout) -> VMoBAProcessor:
        """The ``share`` whose mean density over three layers is nearest, for chunks of equal size.

        ValueError below the floor (own chunks only), and for a threshold, whose density is up to the data.
        """
        if self.threshold is not None:
            raise ValueError(f"what a threshold keeps depends on q and k, at_density needs None, got {self}")
        grid, everything, rounds = layout.tokens**2, layout.sequence**2, []
        for layer in range(3):
            order, c = self.order(Call.standalone(layout, layer=layer)), prod(self.chunk(layout, layer))
            filled = order.filled(c)[0, 0, : blocks_of(order.slots - layout.extra, c)]
            rounds.append((len(filled), int((filled**2).sum())))  # chunks, and pairs within them
        shares = sorted({(i + 1) / chunks for chunks, _ in rounds for i in range(chunks)})

        def reached(setting: int) -> float:
            others = [(ceil(round(shares[setting] * n, 6)) - 1) / max(1, n - 1) for n, _ in rounds]
            left = [(grid - own) * (1 - share) for (_, own), share in zip(rounds, others, strict=True)]
            return 1 - sum(left) / len(rounds) / everything

        less = "smaller temporal, spatial or volume"
        best = nearest_setting(self, layout, density, reached, len(shares) - 1, less, "larger share")
        return replace(self, share=shares[best])

    def chunk(self, layout: TokenLayout, layer: int) -> tuple[int] | tuple[int, int, int]:
        """Sizes in tokens: (run of the raster order,) in 1-D, (frames, height, width) in 2-D and 3-D."""
        frames, kind = layout.grid[0], layer % 3
        if kind == 0:
            usual_run = layout.frame * round(frames / 7) or ceil(layout.tokens / 7)
            run = int(self.temporal * layout.frame) if self.temporal else usual_run
            return (min(max(1, run), layout.tokens),)
        usual = [round(n / m) for n, m in zip(layout.grid, (1 if kind == 1 else 3, 6, 4), strict=True)]
        sizes = (frames, *(self.spatial or usual[1:])) if kind == 1 else self.volume or usual
        f, h, w = (min(max(1, size), n) for size, n in zip(sizes, layout.grid, strict=True))
        return f, h, w


def select_chunks(
    gate: Tensor, own: Tensor, valid: Tensor, competition: str, count: int, threshold: float | None = None
) -> Tensor:
    """Which pairs of a query and a chunk to keep: the best ``count`` a query, or those up to ``threshold``.

    ``gate`` are their similarities [B, H, S, C]; ``own`` (kept always) and ``valid`` (kept at most) are masks
    that broadcast to it.
    """
    axes = COMPETITIONS[competition]
    moved = [axis for axis in range(4) if axis not in axes] + list(axes)
    parts = gate, own, valid, own & valid.any(-1, keepdim=True)
    score, mine, there, one = (x.expand(gate.shape).permute(moved).flatten(-len(axes)) for x in parts)
    if threshold is None:
        wanted = count * one.sum(-1, keepdim=True)
        score = score.masked_fill(mine, torch.inf).masked_fill(~there, -torch.inf)
        places = score.argsort(dim=-1, descending=True, stable=True)
    else:
        lowest = score.masked_fill(~there, torch.inf).amin(-1, keepdim=True)
        span = score.masked_fill(~there, -torch.inf).amax(-1, keepdim=True) - lowest
        mass = ((score - lowest) / span.where(span > 1e-6, 1)).masked_fill(~there, 0)
        # Millions of pairs may compete: their sums need float64.
        total = mass.sum(-1, keepdim=True, dtype=torch.float64) + 1e-6
        missing = threshold - (mass * mine).sum(-1, keepdim=True, dtype=torch.float64) / total
        best, places = mass.masked_fill(mine, 0).sort(dim=-1, descending=True, stable=True)
        upto = best.cumsum(-1, dtype=torch.float64) / total
        wanted = (upto < missing.clamp(min=0)).sum(-1, keepdim=True) + 1
    kept = torch.arange(places.shape[-1], device=gate.device) < wanted
    kept = torch.zeros_like(kept).scatter_(-1, places, kept).view([gate.shape[axis] for axis in moved])
    return kept.permute([moved.index(axis) for axis in range(4)]) & valid | own
