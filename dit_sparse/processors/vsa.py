"""VSA, video sparse attention, https://arxiv.org/abs/2505.13389 (P. Zhang et al., 2025).

Tokens that are near in space and time lie in one tile of 4x4x4. Attention between the means of tiles, which
costs next to nothing, gives a coarse result and says which key tiles matter to a query tile; those are then
read token by token. A gate, learned with the model, adds the coarse result to the fine one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from dit_sparse.kernels import pooled_scores
from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.method import Call, SparseProcessor, ZeroLinear, share_of_grid
from dit_sparse.order import Order
from dit_sparse.plan import Plan, blocks_of, pool, top_k, with_text


@dataclass(frozen=True, kw_only=True)
class VSAProcessor(SparseProcessor):
    """Top key tiles by their means, and optionally a gated coarse branch.

    Args:
        keep: Share of the key tiles that each query tile reads, rounded up. The published recipes train with
            0.2 (Wan2.1 1.3B) and 0.1 (14B).
        tile: (frames, height, width) of a tile in tokens; their product is the block. Paper: (4, 4, 4).
        gate: Output = coarse * gate + fine, with the gate a linear function of the layer's hidden states, one
            number per token and channel. It needs training: it starts as zero, where the published code
            takes it from a checkpoint. Without, the fine part alone: nothing to train.

    Tiles that stick out of the grid have fewer tokens and the mean of those. Text, history and reference
    tokens, which the published code (hao-ai-lab/FastVideo) does not know, have no part in the coarse branch
    and are dense both ways. What the coarse branch computes is not in the density: it is the square of the
    number of tiles.

    Raises:
        ValueError: A parameter out of range.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"layout", "qk"})
    needs_training: ClassVar[bool] = True  # where there is a module

    keep: float = 0.2
    tile: tuple[int, int, int] = (4, 4, 4)
    gate: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {self.keep}")
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"tile must be three positive sizes (frames, height, width), got {self.tile!r}")

    @property
    def block(self) -> int:
        """Tokens per block: those of a tile."""
        return prod(self.tile)

    @property
    def reads_hidden(self) -> bool:
        return self.gate

    def module(self, layer: Layer) -> ZeroLinear | None:
        return ZeroLinear(layer.dim, layer.heads * layer.head_dim) if self.gate else None

    def order(self, call: Call) -> Order:
        return Order.tiles(call.layout, self.tile, packed=True)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        valid, eligible = call.slots_valid(), call.eligible(self.block)
        scores = pooled_scores(q, k, self.block, valid=valid, query_valid=valid, scale=call.scale)
        n = call.grid_blocks(self.block)
        share = Fraction(self.keep).limit_denominator(10**6)  # 0.1 of 30 tiles are 3, whatever floats say
        there = eligible[..., :n]
        wanted = -(-there.sum(-1) * share.numerator // share.denominator)
        keep = top_k(scores[..., :n, :n], wanted, there)
        return Plan.from_blocks(with_text(keep, *scores.shape[-2:]) & eligible, self.block)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        fine = super().attend(q, k, v, call)
        if call.part is None:
            return fine
        assert call.order is not None
        assert call.hidden is not None
        gate = call.to_heads(call.part(call.hidden).unflatten(-1, (call.layer_heads, -1)).transpose(1, 2))
        return self.coarse(q, k, v, call) * call.order.apply(gate) + fine

    def coarse(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention between tile means, each result in all slots of its tile: [B, H, S', D], text 0."""
        everything, slots = q.shape[2], call.grid_blocks(self.block) * self.block
        valid = call.slots_valid()[..., :slots]
        q, k, v = (pool(x[:, :, :slots], self.block, valid) for x in (q, k, v))
        there = call.eligible(self.block)[..., : k.shape[2]]
        out = F.scaled_dot_product_attention(
            q, k, v, there, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return F.pad(out.repeat_interleave(self.block, 2), (0, 0, 0, everything - slots))

    def at_density(self, density: float, layout: TokenLayout) -> VSAProcessor:
        tiles = prod(blocks_of(n, t) for n, t in zip(layout.grid, self.tile, strict=True))
        return replace(self, keep=round(share_of_grid(self, density, layout, 1 / tiles) * tiles) / tiles)
