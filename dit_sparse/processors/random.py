"""Random blocks: the control. A method is worth its name if it does better than this at equal density.

Every query block keeps its own block and otherwise reads blocks drawn at random, anew at every layer and
step, so that what one call misses another may read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor, share_of_grid
from dit_sparse.order import Order, broadcast_heads
from dit_sparse.plan import Plan, blocks_of, top_k
from dit_sparse.processors.window import WindowProcessor


@dataclass(frozen=True, kw_only=True)
class RandomProcessor(WindowProcessor):
    """As many blocks as a window has or as another method reads, but random ones.

    All heads, batch items and branches of a call share the draw: it depends on the session's seed, the layer
    and the step alone. A session keeps them all: 1.6 GB for 900 blocks at density 0.25, 40 layers, 50 steps.
    Text, history and reference tokens are dense both ways.

    Args:
        density, block: As for :class:`WindowProcessor`; not read with ``like``.
        like: A static method to be the control of, such as ``RadialProcessor()``. Tokens are ordered as it
            orders them, and every row has as many blocks as in its plan: the row's own, then text, then
            random ones. A method that chooses by q and k is controlled by ``density``.

    Raises:
        ValueError: A parameter out of range, ``like`` not static; when planning, a plan that hides single
            tokens by a rule, which no number of blocks equals.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"layout", "layer", "step"})

    like: SparseProcessor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.like is not None and not self.like.is_static:
            raise ValueError(f"like must be a method whose plan does not depend on q and k, got {self.like}")

    def order(self, call: Call) -> Order:
        return super().order(call) if self.like is None else self.like.order(call)

    def head_costs(self, call: Call) -> Tensor | None:
        return None if self.like is None else self.like.head_costs(call)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        if self.like is None:
            return super().plan(q, k, call)
        plan = self.like.plan(q, k, call)
        if plan.rule is not None:
            raise ValueError(f"{self.like} reads blocks in part ({plan.rule}): ask for a density instead")
        (bq, bk), queries = plan.block, plan.counts.shape[-1]
        start, key = torch.arange(queries)[:, None] * bq, torch.arange(plan.keys)
        own = (key * bk < start + bq) & (start < (key + 1) * bk)
        outside = key >= call.grid_blocks(bk)
        draw = torch.rand(queries, plan.keys, generator=call.at(branch="").generator())
        scores = (draw + own * 2.0 + outside * 1.0).to(q.device)
        # Blocks of holes hold nothing; which keys are padding is not a static method's to know.
        eligible = call.at(valid=None).eligible(bk)
        heads = call.heads if max(eligible.shape[1], plan.counts.shape[1]) > 1 else 1
        scores = scores.expand(1, heads, -1, -1)
        keep = top_k(scores, plan.counts, broadcast_heads(eligible, heads)) & (plan.counts > 0)[..., None]
        return Plan.from_blocks(keep, plan.block)

    def scores(self, blocks: int, call: Call) -> Tensor:
        draw = torch.rand(blocks, blocks, generator=call.at(branch="").generator())
        return draw + torch.eye(blocks)

    def at_density(self, density: float, layout: TokenLayout) -> Self:
        """As :class:`WindowProcessor`, for the mean over all draws; or the setting of ``like``."""
        if self.like is not None:
            return replace(self, like=self.like.at_density(density, layout))
        filled = self.order(Call.standalone(layout)).filled(self.block)[0, 0]
        blocks = blocks_of(layout.tokens, self.block)
        own, tokens = int(filled[:blocks].square().sum()), layout.tokens**2
        kept = share_of_grid(self, density, layout, own / tokens) * tokens
        others = (blocks - 1) * (kept - own) / max(1, tokens - own)
        return replace(self, density=min(1.0, (1 + others) / blocks))
