"""SLA, sparse-linear attention, https://arxiv.org/abs/2509.24006 (J. Zhang et al., 2025).

A few key blocks are critical to a query block and get exact softmax attention. What the many others add is of
low rank, so linear attention sums it up at a cost that does not grow with their number. A small projection,
learned in a short fine-tuning of the model, adds the one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels import pooled_scores
from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.method import Call, SparseProcessor, ZeroLinear, share_of_grid
from dit_sparse.plan import Plan, blocks_of, pair_of, top_k, with_text


@dataclass(frozen=True, kw_only=True)
class SLAProcessor(SparseProcessor):
    """Top key blocks by pooled scores, and a projected linear branch. It needs training.

    Output = sparse + linear W^T + b. W [D, D] and b [D], one of each per layer for all its heads, start as
    zero: an untrained model has the sparse part alone, without what it leaves out.

    Args:
        ratio: Share of the key blocks that is critical, rounded down, at least one. The paper has 0.05, the
            released code (thu-ml/SLA) and TurboDiffusion (https://arxiv.org/abs/2512.16093) 0.1, for quality
            0.15.
        block: Tokens per block, or (query block, key block), one a multiple of the other. Paper and training
            code: 64; TurboDiffusion infers with (128, 64).
        linear: Keys of the linear branch. ``"all"``, also the critical ones: the released code, and what
            TurboDiffusion's weights were trained with. ``"rest"``, those that are not critical: the paper and
            the code's branch SLA-1. Weights trained with one do not fit the other.
        skip: With ``"rest"``, the share of key blocks, those with the lowest scores, that is in neither part;
            the int((1 - skip) K) best of K are in one. The paper has 0.1, the code no such thing.
        feature_map: phi of the linear branch: "softmax" (over the head dim), "elu" or "relu".

    The paper ranks by softmax probabilities and the code by scores with centred keys: both orders are that of
    the plain scores, which are float32 here. The code keeps no block at all where ``ratio`` asks for less
    than one, and divides 0 by 0. Text, history and reference tokens, which the code does not know, are
    critical to all and read everything. W and b have the dtype of the model, not always float32.

    Raises:
        ValueError: A parameter out of range.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"layout", "qk"})
    needs_training: ClassVar[bool] = True
    trained_with: ClassVar[tuple[str, ...]] = ("linear", "feature_map")

    ratio: float = 0.1
    block: int | tuple[int, int] = 64
    linear: str = "all"
    skip: float = 0.0
    feature_map: str = "softmax"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {self.ratio}")
        small, large = sorted(pair_of(self.block))
        if large % small:
            raise ValueError(f"one block size must be a multiple of the other, got {self.block}")
        if self.linear not in ("all", "rest"):
            raise ValueError(f"linear must be 'all' or 'rest', got {self.linear!r}")
        if not 0 <= self.skip < 1 or (self.skip and self.linear == "all"):
            raise ValueError(
                f"skip must lie in [0, 1), and above 0 only with linear='rest', got {self.skip} "
                f"with {self.linear!r}"
            )
        if self.feature_map not in ("softmax", "elu", "relu"):
            raise ValueError(f"feature_map must be 'softmax', 'elu' or 'relu', got {self.feature_map!r}")

    def module(self, layer: Layer) -> ZeroLinear:
        return ZeroLinear(layer.head_dim, layer.head_dim)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        return Plan.from_blocks(self._best(q, k, call, self.ratio), self.block)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        plan = self.planned(q, k, call)
        sparse, _ = call.run(q, k, v, plan)
        if call.part is None:  # without a model the projection is what it starts as
            return sparse
        left_out = plan if self.linear == "rest" else None
        if self.skip:
            skipped = ~self._best(q, k, call, 1 - self.skip)
            left_out = Plan.from_blocks(plan.to_blocks() | skipped, self.block)
        return sparse + call.part(call.run_linear(q, k, v, left_out, feature_map=self.feature_map))

    def at_density(self, density: float, layout: TokenLayout) -> SLAProcessor:
        blocks = blocks_of(layout.tokens, pair_of(self.block)[1])
        share = share_of_grid(self, density, layout, 1 / blocks)
        # Half a block more than wanted, which rounding down takes off again.
        return replace(self, ratio=min(1.0, (round(share * blocks) + 0.5) / blocks))

    @torch.no_grad()
    def _best(self, q: Tensor, k: Tensor, call: Call, share: float) -> Tensor:
        """The int(share * K) key blocks of the grid with the highest scores, and text: bool [B, H, Q, K]."""
        bq, bk = pair_of(self.block)
        valid, eligible = call.slots_valid(), call.eligible(bk)
        scores = pooled_scores(q, k, self.block, valid=valid, query_valid=valid, scale=call.scale)
        rows, columns = call.grid_blocks(bq), call.grid_blocks(bk)
        there = eligible[..., :columns]
        count = (share * there.sum(-1).double()).long()
        keep = top_k(scores[..., :rows, :columns], count, there)
        return with_text(keep, *scores.shape[-2:]) & eligible
