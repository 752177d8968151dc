"""AdaSpa, https://arxiv.org/abs/2502.21079 (Y. Xia et al., ICCV 2025).

How much softmax mass each block of the attention map holds is measured, not guessed: with the log-sum-exp of
a dense call at hand, one pass over queries and keys gives it exactly. Every row of blocks keeps its heaviest,
and heads that lose little so give half of their budget to heads that lose much. The measured plan serves the
steps that follow, and later searches reuse the log-sum-exp of the first, which saves them the dense call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, inf

from dit_sparse.kernels import block_mass
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor, share_of_grid
from dit_sparse.plan import Plan, blocks_of, top_k, with_text
from dit_sparse.schedule import Phase


@dataclass(frozen=True, kw_only=True)
class AdaSpaProcessor(SparseProcessor):
    """The heaviest blocks of each row by measured mass, kept for many steps.

    Step by step: calls before the first search are dense (the schedule's). At the first search the output is
    dense and its log-sum-exp is remembered; the plan made with it runs from the next step on. At a later
    search the plan is made with the old log-sum-exp and runs at once. A layer remembers, per branch, four
    bytes a query and head, and the plan as bits. No code was published with the paper.

    Args:
        density: Share of the grid's key blocks that a row keeps at the middle level, rounded to the nearest
            whole number, at least one; in (0, 1]. The paper's tables have 0.2, its sweep 0.3 and 0.1.
        block: Tokens per block. Paper: 64.
        search_at: When to search, as fractions of the run in [0, 1). Paper: steps 10 and 30 of 50. The first
            sparse step always searches.
        recall: A head is easy when its plan holds more than this share of its mass, in [0, 1]. Paper: 0.8; at
            1 no head is, and all keep the same.

    Where e of H heads of a layer are easy, n = min(e, H // 2) heads of highest recall keep half of
    ``density`` and the n of lowest recall one and a half times as much (above 2/3, where the paper's rule
    ends, less of a difference: nobody keeps more than all). The limit H // 2 keeps the two groups apart, of
    which the paper says nothing. Nor does it of the following, done here so: recall is the share of the mass
    that was measured, text included, also where an old log-sum-exp makes rows add up to something else than
    their queries; every batch item has levels and plans of its own, every branch of guidance its own memory;
    tokens that may not be read neither give nor take mass. As in the paper, text (here also history and
    reference tokens) is dense both ways and not part of ``density``.

    Raises:
        ValueError: A parameter out of range.
    """

    density: float = 0.2
    block: int = 64
    search_at: tuple[float, ...] = (0.2, 0.6)
    recall: float = 0.8

    def __post_init__(self) -> None:
        if not (0 < self.density <= 1 and 0 <= self.recall <= 1):
            raise ValueError(f"density must lie in (0, 1] and recall in [0, 1], got {self}")
        if self.block < 1:
            raise ValueError(f"block must be a positive number of tokens, got {self.block}")
        if not (isinstance(self.search_at, tuple) and all(0 <= at < 1 for at in self.search_at)):
            raise ValueError(f"search_at must be a tuple of fractions in [0, 1), got {self.search_at!r}")

    @property
    def refresh(self) -> str:
        return ", ".join(f"{100 * at:g}%" for at in self.search_at)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        # Also true when a backward replays the first search: its output must be dense again.
        first = call.made_at("lse") == call.step and call.phase is Phase.REFRESH
        if first or "lse" not in call.cache:
            out, lse = call.run_dense(q, k, v)
            call.cached("lse", lse.detach)
            self.planned(q, k, call)
            return out
        return call.run(q, k, v, self.planned(q, k, call))[0]

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        return call.cached("plan", lambda: self._search(q, k, call))

    def _search(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        mass, eligible = self.mass(q, k, call), call.eligible(self.block)
        grid = call.grid_blocks(self.block)

        def heaviest(share: float | Tensor) -> Tensor:
            """The block mask in which each row of the grid keeps ``share`` (float or [B, H, 1]) of it."""
            count = (share * eligible[..., :grid].sum(-1).double()).round().long()
            keep = top_k(mass[..., :grid, :grid], count, eligible[..., :grid])
            return with_text(keep, *mass.shape[-2:]) & eligible

        held = call.all_heads((mass * heaviest(self.density)).sum((-2, -1)) / mass.sum((-2, -1)))
        heads = held.shape[1]
        moved = (held > self.recall).sum(-1, keepdim=True).clamp(max=heads // 2)
        rank = held.argsort(dim=-1, stable=True).argsort(-1)
        level = (rank < moved).double() - (rank >= heads - moved).double()
        share = self.density + call.own(level, 1) * min(self.density / 2, 1 - self.density)
        return Plan.from_blocks(heaviest(share[..., None]), self.block)

    def mass(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """Softmax mass of each pair of blocks, float32 [B, H, Q, K], by the remembered log-sum-exp.

        It is remembered from :meth:`attend`. Where there is none, it is the call's own or that of a dense
        call.
        """

        def make() -> Tensor:
            lse = call.ordered_lse()
            return call.run_dense(q, k, k)[1] if lse is None else lse

        lse = call.cached("lse", make, renew=False).masked_fill(~call.slots_valid(), inf)
        return block_mass(q, k, lse, self.block, valid=call.slots_valid(), scale=call.scale)

    def at_density(self, density: float, layout: TokenLayout) -> AdaSpaProcessor:
        """The share of the grid that makes ``density`` of all tokens; ValueError below one block a row.

        The levels keep their mean, but for the rounding of counts.
        """
        floor = 1 / blocks_of(layout.tokens, self.block)
        return replace(self, density=share_of_grid(self, density, layout, floor))
