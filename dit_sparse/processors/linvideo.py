"""LinVideo, https://arxiv.org/abs/2510.08318 (Y. Huang et al., 2025).

Some attention layers of a video model can become linear, O(n), at no loss, but nobody knows which. So while
the model is trained to follow its former self, each layer mixes both kinds of attention and learns its share
of softmax, driven to 0 or 1 and to a given count of linear layers. What comes out has layers of either kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_sparse.layout import Layer
from dit_sparse.method import Call, SparseProcessor
from dit_sparse.order import Order
from dit_sparse.plan import Plan, blocks_of

EPS = 1e-6
"""Added to the denominator of linear attention, which is positive anyhow."""


class HedgehogMixture(nn.Module):
    """The trainable parts of one layer: W of queries and keys [H, D, D], and r where that is not settled."""

    def __init__(self, heads: int, head_dim: int, r: float | None) -> None:
        super().__init__()
        self.query, self.key = (nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1)) for _ in range(2))
        self.register_parameter("r", None if r is None else nn.Parameter(torch.tensor(r)))

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """They are asked for by a call, as offloading brings a module's weights for the time of one."""
        return self.query, self.key, self.r  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class LinVideoProcessor(SparseProcessor):
    """r * softmax attention + (1 - r) * linear attention, r a number per layer. It needs training.

    The linear part is phi(q) (sum phi(k)^T v) / (phi(q) . sum phi(k)) over all keys, in float32, with the
    features phi(x) = [softmax(x W), softmax(-x W)] (Hedgehog, https://arxiv.org/abs/2402.04347), W one
    [D, D] matrix per layer, head, and query or key.

    Args:
        linear_layers: Indices, from 0, of the layers that have become linear. The others are then left to
            the model: they have no parameters, and linear ones have no r. None while r is being trained. The
            paper's 16 of the 30 layers of Wan2.1 1.3B are 1-7, 9-12, 14, 15, 22, 24 and 29.
        r: What each layer's r starts as, without ``linear_layers``. 1 is the unchanged model, 0 all linear.

    There is no public code. Deviations from the paper, or choices where it is silent: W starts as the
    identity; r starts at 0.95, since the regulariser holds a layer at 1 (slope -40) that the count of linear
    layers (slope 32 for 16 of 30) is to move; scores of softmax attention are divided by sqrt(D), where the
    paper prints D. A branch is skipped where r is exactly 0 or 1, read once per run, unless r is trained.
    No setting follows a density: a linear layer computes no pairs, all others compute every one.

    Raises:
        ValueError: A parameter out of range; when attaching, a layer that the model does not have.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"layout", "layer"})
    needs_training: ClassVar[bool] = True

    linear_layers: tuple[int, ...] | None = None
    r: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.r <= 1:
            raise ValueError(f"r must lie in [0, 1], got {self.r}")
        if self.linear_layers is None:
            return
        if any(i < 0 for i in self.linear_layers):
            raise ValueError(f"linear_layers must be indices from 0, got {self.linear_layers}")
        object.__setattr__(self, "linear_layers", tuple(sorted(set(self.linear_layers))))

    def module(self, layer: Layer) -> HedgehogMixture | None:
        if self.linear_layers is None:
            return HedgehogMixture(layer.heads, layer.head_dim, self.r)
        if self.linear_layers and self.linear_layers[-1] >= layer.count:
            raise ValueError(f"linear_layers are {self.linear_layers}, the model has {layer.count} layers")
        if layer.index not in self.linear_layers:
            return None
        return HedgehogMixture(layer.heads, layer.head_dim, None)

    def order(self, call: Call) -> Order:
        return Order.raster(call.layout)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        blocks = blocks_of(q.shape[2], 128)
        return Plan.from_blocks(torch.full((blocks, blocks), self._settled(call) != 0, device=q.device), 128)

    def is_dense(self, call: Call) -> bool:
        return self._settled(call) == 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        settled = self._settled(call)
        if settled == 1:
            return call.run_dense(q, k, v)[0]
        part: Any = call.part or HedgehogMixture(call.layer_heads, q.shape[-1], self.r).to(q.device)
        query, key, share = part()
        weights = call.own(query), call.own(key)
        linear = call.run_linear(q, k, v, feature_map="hedgehog", weights=weights, eps=EPS)
        if settled == 0:
            return linear
        return share * call.run_dense(q, k, v)[0] + (1 - share) * linear

    def _settled(self, call: Call) -> float | None:
        """r as a number, where it does not change; None while it is trained."""
        if self.linear_layers is not None:
            return float(call.layer not in self.linear_layers)
        if call.part is None:
            return self.r
        r: Any = call.part()[2]
        if torch.is_grad_enabled() and r.requires_grad:
            return None
        return call.cached("r", lambda: float(r), renew=False)
