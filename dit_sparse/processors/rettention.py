"""Re-ttention, https://arxiv.org/abs/2505.22918 (R. Chen et al., NeurIPS 2025).

A sparse softmax gives its keys all of the attention, so its output is too large and lacks what the other keys
held. Both are measured at a dense step: rho, the share of each query's softmax that falls on the keys it
keeps, and R, what the other keys add to its output. The steps that follow compute the kept keys only, scale
their output by rho, which grows a little each step, and add R.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor
from dit_sparse.order import Order
from dit_sparse.plan import Plan
from dit_sparse.processors.spatial_window import SpatialWindowProcessor
from dit_sparse.schedule import Phase

_WINDOW = SpatialWindowProcessor()
_BYTES = {"float32": (4, 0), "bfloat16": (2, 0), "float8": (1, 2), "cpu": (2, 0)}  # a channel; a query


@dataclass(frozen=True, eq=False)
class Measured:
    """What a refresh leaves behind: rho [B, H, S'] in float32 and R [B, H, S', D] as it is kept."""

    rho: Tensor
    stored: Tensor
    scale: Tensor | None = None

    def residual(self) -> Tensor:
        stored = self.stored.to(self.rho.device, non_blocking=True)
        return stored if self.scale is None else stored.to(self.scale.dtype) * self.scale


@dataclass(frozen=True, kw_only=True)
class ReTtentionProcessor(SparseProcessor):
    """Another method, with its output completed by what dense steps measured.

    At a refresh the output is dense. With the log-sum-exps l of the dense attention and of the inner
    method's, rho = exp(l_inner - l_dense) and R = O_dense - rho O_inner. At the a-th step after it the output
    is min(1, rho + ramp (a - 1)) O_inner + R. The first sparse step of a run is a refresh. Each layer and
    branch has its rho and R; to gradients they are constants.

    Args:
        inner: The method that chooses blocks, anew at each refresh only, as R is the rest of just what it
            chose. Default: the paper's window.
        period: Refresh at every ``period``-th step of the run, counted from its first. Paper: 5.
        ramp: What rho grows by from one step to the next, >= 0. Paper: 0.04 (lambda).
        clamp: rho is a share and stops at 1. In the released code (bbec1f5) it goes on: to 1.12 for text.
        use_ratio: False leaves rho out (it is 1), as DiTFastAttn does, the paper's baseline.
        residual: How R is kept: "float32", "bfloat16", "float8" (E4M3 with a scale for each query: off by at
            most 1/15 of a channel's value or 1/450,000 of the query's largest), or as bfloat16 in the memory
            of the "cpu". A warning before the first is kept says what that takes, :meth:`memory` at any time.

    The released code keeps R after the output projection; before it is the same, as the projection is linear.

    Raises:
        ValueError: A parameter out of range, or an inner method that does more than choose blocks.
    """

    inner: SparseProcessor = _WINDOW
    period: int = 5
    ramp: float = 0.04
    clamp: bool = True
    use_ratio: bool = True
    residual: str = "bfloat16"

    def __post_init__(self) -> None:
        inner = self.inner
        if not isinstance(inner, SparseProcessor) or not inner.only_plans or inner.orders_by_qk:
            raise ValueError(f"inner must be a method that only chooses blocks, got {inner!r}")
        if self.period < 1 or not 0 <= self.ramp < torch.inf:
            raise ValueError(f"period must be >= 1 and ramp finite and >= 0, got {self}")
        if self.residual not in _BYTES:
            raise ValueError(f"residual must be one of {', '.join(_BYTES)}, got {self.residual!r}")

    @property
    def refresh(self) -> str:
        return f"every {self.period}"

    @property
    def needs_frames(self) -> str:
        return self.inner.needs_frames

    def order(self, call: Call) -> Order:
        return self.inner.order(call)

    @property
    def needs_all_heads(self) -> str:
        return self.inner.needs_all_heads

    def head_costs(self, call: Call) -> Tensor | None:
        return self.inner.head_costs(call)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        if self._is_constant:
            return self.inner.plan(q, k, call)
        return call.cached("rettention plan", lambda: self.inner.plan(q, k, call))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        made = call.made_at("rettention")
        # The second is true when a backward replays a refresh, the third when a run changes its batch.
        if made is None or made == call.step or call.cache["rettention"][0].rho.shape != q.shape[:3]:
            call = call.at(phase=Phase.REFRESH)
        plan = (self.inner if self._is_constant else self).planned(q, k, call)
        if call.phase is Phase.REFRESH:
            if made is None:
                self._announce(q, call)
            dense, total = call.run_dense(q, k, v)
            call.cached("rettention", lambda: self._measured(*call.run(q, k, v, plan), dense, total))
            return dense
        (out, _), residual = call.run(q, k, v, plan), call.cache["rettention"][0].residual()
        return torch.addcmul(residual, self.ratio(call)[..., None], out).to(out.dtype)

    def ratio(self, call: Call) -> Tensor:
        """What the output of the inner method is scaled by at the step of ``call``, float32 [B, H, S']."""
        measured, made = call.cache["rettention"]
        assert call.step is not None, "without steps every call is a refresh"
        assert made is not None
        rho = measured.rho + self.use_ratio * self.ramp * (call.step - made - 1)
        return rho.clamp(max=1) if self.clamp else rho

    def memory(self, layout: TokenLayout, heads: int, head_dim: int, calls: int = 1) -> int:
        """Bytes that rho and R take; ``calls`` is sparse layers x forward passes of a step x their batch."""
        channel, query = _BYTES[self.residual]
        slots = self.order(Call.standalone(layout)).slots
        return calls * heads * slots * (4 + query + channel * head_dim)

    def at_density(self, density: float, layout: TokenLayout) -> ReTtentionProcessor:
        """The inner method's nearest setting: the density between refreshes."""
        return replace(self, inner=self.inner.at_density(density, layout))

    @property
    def _is_constant(self) -> bool:
        """Whether the inner method chooses the same at every step."""
        return self.inner.reads.isdisjoint({"step", "qk"})

    def _measured(self, out: Tensor, lse: Tensor, dense: Tensor, total: Tensor) -> Measured:
        rho = (lse - total).exp() if self.use_ratio else torch.ones_like(lse)
        rho = rho.masked_fill(lse == -torch.inf, 0).float()  # also where no key at all may be read
        residual = torch.addcmul(dense, rho[..., None], out, value=-1)
        if self.residual == "float8":
            scale = (residual.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-30).bfloat16()
            return Measured(rho, (residual / scale).to(torch.float8_e4m3fn), scale)
        kept = residual.to(torch.float32 if self.residual == "float32" else torch.bfloat16)
        if self.residual == "cpu":
            host = torch.empty_like(kept, device="cpu", pin_memory=kept.is_cuda)
            kept = host.copy_(kept, non_blocking=True)
        return Measured(rho, kept)

    def _announce(self, q: Tensor, call: Call) -> None:
        size = self.memory(call.layout, call.heads, q.shape[3], q.shape[0] * call.layers) / 2**20
        amount = f"{size:.1f} MiB" if size < 1024 else f"{size / 1024:.1f} GiB"
        much = f"{amount} in {call.layers} layers for each branch of guidance"
        _warn_once(f"{much} (residual={self.residual!r}; 'float8' is the smallest, 'cpu' off the device)")


@lru_cache
def _warn_once(much: str) -> None:
    warnings.warn(f"Re-ttention keeps {much}", stacklevel=2)
