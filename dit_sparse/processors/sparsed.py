"""SparseD, https://arxiv.org/abs/2509.24014 (Z. Wang et al., ICLR 2026).

Which keys a head reads differs between heads but hardly between denoising steps, and the first steps decide
most. So those stay dense; the last of them measures how much softmax mass each block of the attention map
holds, and every row of blocks keeps its heaviest for the rest of the run. Given tokens and generated ones are
chosen separately, as one side would otherwise crowd out the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, inf

from dit_sparse.kernels import block_mass
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor, nearest_setting
from dit_sparse.plan import Plan, blocks_of, top_k
from dit_sparse.schedule import Phase


@dataclass(frozen=True, kw_only=True)
class SparseDProcessor(SparseProcessor):
    """The heaviest blocks of each row at the first sparse step, kept for the run.

    The first sparse step is the paper's last dense one: its output is dense and it makes the plan. So does a
    step that the schedule names as a refresh; the paper has none. Each head, batch item, layer and branch of
    guidance has a plan. In a diffusion transformer the grid is generated; text, history and reference tokens
    are given. Neither side is dense.

    Args:
        density: Share of a row's key blocks that is kept, in (0, 1]. Paper: 0.3, and 0.5 for short texts.
        block: Tokens per block. Paper: 128, and 32 for short texts.
        variant: ``"paper"`` keeps ``density`` of the blocks of either side, rounded to the nearest number, at
            least one. ``"code"`` is the release (52155b4) for n blocks: of the int(n density) + 1 heaviest of
            all it keeps those that are given, be there none or many, and of the g generated ones int(g
            density) + 1, by a softmax over them alone.
        logit_scale: Of the softmax that measures: ``"head_dim"``, the model's own, or ``"heads"``, 1 /
            sqrt(heads), as released for LLaDA.
        generated: How many tokens at the end of the grid are generated, in a sequence that has its prompt
            before them, as in a language model: a grid (1, 1, S). The block they begin in is given, but one
            block is always generated. None: the whole grid.

    Both rank by mass, so that a ragged block counts for the tokens it has, as it does in the release. Tokens
    that may not be read neither give nor take mass; the release ignores padding.

    Raises:
        ValueError: A parameter out of range; ``generated`` with text or beyond the grid.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"layout", "step", "qk"})

    density: float = 0.3
    block: int = 128
    variant: str = "paper"
    logit_scale: str = "head_dim"
    generated: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or self.block < 1:
            raise ValueError(f"density must lie in (0, 1] and block be >= 1, got {self}")
        if self.variant not in ("paper", "code"):
            raise ValueError(f"variant must be 'paper' or 'code', got {self.variant!r}")
        if self.logit_scale not in ("head_dim", "heads"):
            raise ValueError(f"logit_scale must be 'head_dim' or 'heads', got {self.logit_scale!r}")
        if self.generated is not None and self.generated < 1:
            raise ValueError(f"generated must be a positive number of tokens, got {self.generated}")

    def schedule(self, steps: int, skip: float = 0.2) -> str:
        """The schedule that leaves ``skip`` of a run dense, counting the step that makes the plan.

        The paper: int(skip steps) + 1 steps in all; the release: one more. "dense 0-20%" is between them.
        """
        head = int(steps * skip) + (self.variant == "code")
        return f"dense 0-{head - 1}" if head else "always"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        # The first is true when the plan is renewed, the last when a backward replays the step it was made.
        if call.phase is Phase.REFRESH or call.made_at("sparsed") in (None, call.step):
            out, lse = call.run_dense(q, k, v)
            assert call.order is not None
            known = call.order.undo(lse.detach()[..., None])[..., 0]
            self.planned(q, k, call.at(lse=known))
            return out
        return call.run(q, k, v, self.planned(q, k, call))[0]

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        return call.cached("sparsed", lambda: self._choose(q, k, call))

    def _choose(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        eligible = call.eligible(self.block)
        generated = self._generated(call.layout, eligible.shape[-1]).to(q.device)
        ours, given = eligible & generated, eligible & ~generated
        if self.logit_scale == "heads":
            call = call.at(scale=call.layer_heads**-0.5, lse=None)
        lse = call.ordered_lse()
        mass = self._mass(q, k, call, call.run_dense(q, k, k)[1] if lse is None else lse)
        if self.variant == "paper":
            keep = top_k(mass, self._count(given.sum(-1)), given)
        else:
            keep = top_k(mass, self._count(eligible.sum(-1)), eligible) & given
            only = Plan.from_blocks(generated.expand(mass.shape[-2], -1), self.block)
            mass = self._mass(q, k, call, call.run(q, k, k, only)[1])
        return Plan.from_blocks(keep | top_k(mass, self._count(ours.sum(-1)), ours), self.block)

    def _mass(self, q: Tensor, k: Tensor, call: Call, lse: Tensor) -> Tensor:
        """Softmax mass of each pair of blocks, [B, H, Q, K], of the softmax whose log-sum-exp is given."""
        valid = call.slots_valid()
        return block_mass(q, k, lse.masked_fill(~valid, inf), self.block, valid=valid, scale=call.scale)

    def _count(self, blocks: Tensor) -> Tensor:
        """How many of so many blocks are kept; :func:`top_k` keeps at least one and at most all."""
        share = self.density * blocks.double()
        return (share.round() if self.variant == "paper" else share.floor() + 1).long()

    def _generated(self, layout: TokenLayout, blocks: int) -> Tensor:
        """Which blocks are generated: bool [blocks]."""
        place = torch.arange(blocks)
        if self.generated is None:
            return place < blocks_of(layout.tokens, self.block)
        if self.generated > layout.tokens or layout.extra:
            raise ValueError(
                f"generated must be some of a grid without text, got {self.generated} of {layout}"
            )
        return place >= min(blocks_of(layout.tokens - self.generated, self.block), blocks - 1)

    def at_density(self, density: float, layout: TokenLayout) -> SparseDProcessor:
        """The ``density`` of blocks that makes ``density`` of token pairs, in steps of 0.0001.

        Exact where all blocks are full: which ones are chosen depends on the data. ValueError below one block
        of either side, and for the released rule with two sides, where the numbers depend on it too.
        """
        filled = self.order(Call.standalone(layout)).filled(self.block)[0, 0]
        generated = self._generated(layout, len(filled))
        sides = [side for side in (filled[generated], filled[~generated]) if len(side)]
        if self.variant == "code" and len(sides) > 1:
            raise ValueError("how many given blocks the released rule keeps depends on the data; use 'paper'")

        def reached(setting: int) -> float:
            method = replace(self, density=max(setting, 1) / 10_000)
            kept = (s.double().mean() * method._count(torch.tensor(len(s))).clamp(1, len(s)) for s in sides)
            return float(sum(kept)) / layout.sequence

        found = nearest_setting(self, layout, density, reached, 10_000, "smaller block", "density of 1")
        return replace(self, density=max(found, 1) / 10_000)
