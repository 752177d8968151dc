"""PAROAttention, https://arxiv.org/abs/2506.16054 (T. Zhao et al., NeurIPS 2025).

The attention maps of visual models look different, but most are one pattern, local aggregation, seen through
the flattening of (frames, height, width) into a sequence. So each head gets the one of the six axis orders in
which its weights gather in few square blocks. In that order a block mask found once serves every prompt and
many steps, and 8 bits suffice for both products, as the weights of a block are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_sparse.calibration import CalibratedProcessor, layer_key, under
from dit_sparse.kernels import block_statistics
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, share_of_grid
from dit_sparse.order import Order, broadcast_heads
from dit_sparse.plan import PackedPlan, Plan, pair_of, top_k, top_mass, with_text
from dit_sparse.schedule import Phase

# Axes from slowest to fastest, numbered as in the released kernels.
ORDERS = ("fhw", "fwh", "hwf", "hfw", "whf", "wfh")
# Formats of QK^T and PV.
QUANTIZED = {"int8": ("int8", "int8"), "int8-qk": ("int8", "fp16")}


@dataclass(frozen=True, kw_only=True)
class PAROProcessor(CalibratedProcessor):
    """An axis order and a few block masks per head, from a calibration or from dense steps of the run itself.

    Without a calibration, the first sparse step is computed dense and decides order and mask for each layer,
    branch and batch item, in the time of about 13 such steps on a CPU; each further mask takes another dense
    step, and the time of two. Text, history and reference tokens stand in blocks of their own, dense both
    ways.

    For each order take the softmax P of the grid's N tokens in blocks. M_sparse is the share of blocks with
    at least ``sigma`` of their entries below ``small`` / N, M_quant the mean of max P / mean P. The order
    with the least alpha (1 - M_sparse) / sum(1 - M_sparse) + (1 - alpha) M_quant / sum(M_quant) is taken,
    sums over orders. (The paper minimises a term in M_sparse itself, although more of it is better.) Then the
    blocks with the largest sums of P are kept, among them the largest of each row.

    The paper was read in summaries, and its search is not public. The kernels are, as jamescsq47/PAROAtten
    (3ac854f): they fill text's last block with grid tokens, and keep the last block row and column, which
    ragged blocks do not need here. As in them, and not in the authors' emulation, kept weights add up to 1.

    Args:
        calibration: See :class:`~dit_sparse.calibration.CalibratedProcessor`; the paper used 1 or 2 prompts.
        density: Share of the grid's token pairs to keep, over all heads of a layer (paper: 0.5, 0.3, 0.2).
        mass: Keep the fewest blocks with this share of a head's weights instead; None goes by ``density``.
        block: Tokens per block (paper).
        masks: Equal parts of a run with a mask each (released: 10 or 30 for CogVideoX, 4 for Wan). None is
            the paper's rule: each step of the first half has its own, the second half shares one.
        alpha: Weight of sparsity against quantisation, in [0, 1]; unpublished.
        small: What is small, over the mean weight 1 / N. The paper's 1e-3 is 17.5 at its N of 17,550: so few
            weights exceed that that blocks count as sparse wherever the large ones are spread evenly. On the
            bundled model, blocks of 64 and density 0.2, it finds orders that keep 57 % of the weights; raster
            keeps 59 %, 1 keeps 68 % and the best orders 69 %.
        sigma: Share of a block's entries that must be small (paper).
        quantize: "int8" computes QK^T and PV in INT8, "int8-qk" PV in float16, None neither; dense steps are
            left alone. RMS error over RMS of the output, against float64: 2.5 % and 1.3 % for normal q, k, v
            (``kernels/QUANTIZATION.md``), at most 3.1 % and 2.8 % for q and k of the bundled model.

    Raises:
        ValueError: A parameter out of range, or a calibration that does not fit.
    """

    calibrates: ClassVar[str] = "paro"
    searched: ClassVar[tuple[str, ...]] = ("density", "mass", "block", "masks", "alpha", "small", "sigma")
    orders_by_qk: ClassVar[bool] = True

    density: float = 0.3
    mass: float | None = None
    block: int = 64
    masks: int | None = 2
    alpha: float = 0.5
    small: float = 1.0
    sigma: float = 0.9
    quantize: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1 or not (self.mass is None or 0 < self.mass <= 1):
            raise ValueError(f"density and mass must lie in (0, 1], got {self.density} and {self.mass}")
        if self.block < 1 or not (self.masks is None or self.masks >= 1):
            raise ValueError(f"block and masks must be >= 1, got {self.block} and {self.masks}")
        if not (0 <= self.alpha <= 1 and 0 <= self.sigma <= 1 and self.small > 0):
            raise ValueError(f"alpha and sigma must lie in [0, 1] and small above 0, got {self}")
        if self.quantize not in (None, *QUANTIZED):
            raise ValueError(f"quantize must be None or one of {', '.join(QUANTIZED)}, got {self.quantize!r}")

    @property
    def refresh(self) -> str:
        """The steps at which another mask begins, see :meth:`part`."""
        if self.masks is None:
            return "0-50%, 50%"
        return ", ".join(f"{ceil(1e6 * i / self.masks) / 1e4:g}%" for i in range(1, self.masks))

    def part(self, step: int, steps: int) -> int:
        """Which mask a step has, counted from 0."""
        if self.masks is not None:
            return ((step + 1) * self.masks - 1) // steps
        # Counted in steps of the run that was calibrated.
        own = self.calibrated.steps if self.calibrated is not None else steps
        return own // 2 if step >= steps // 2 else step * own // steps

    def order(self, call: Call) -> Order:
        if self._searches(call):
            return Order.raster(call.layout, self.block)
        known = call.cache["orders"][0] if "orders" in call.cache else self._stored_orders(call)
        return axis_orders(call.layout, self.block, known)

    def head_costs(self, call: Call) -> Tensor | None:
        """Blocks of a calibration's masks."""
        if self.calibrated is None:
            return None
        keep = self._stored_mask(call.at(order=Order.raster(call.layout, self.block)))
        return keep[0].sum((-2, -1)).double()

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        if self._searches(call):
            self._renew(q, k, call.run_dense(q, k, k)[1], call)
            return Plan.full(q.shape[2], k.shape[2], self.block, q.device)
        if self.calibrated is not None:
            call.cached("orders", lambda: self._stored_orders(call).to(q.device), renew=False)
            return call.cached("plan", lambda: self._whole(self._stored_mask(call).to(q.device), call))
        plan: Plan = call.cache["plan"][0].unpack()
        return plan

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if self._searches(call):
            out, lse = call.run_dense(q, k, v)
            self._renew(q, k, lse, call)
            return out
        if self.quantize is None:
            return super().attend(q, k, v, call)
        return call.run_quantized(q, k, v, self.planned(q, k, call), *QUANTIZED[self.quantize])[0]

    def at_density(self, density: float, layout: TokenLayout) -> PAROProcessor:
        """The share of the grid's pairs that makes ``density`` of all, to half a block of a layer."""
        if self.calibrated is not None:
            raise ValueError(f"a calibration has one density, here {self.density} of the grid, got {density}")
        floor = min(1.0, self.block / layout.tokens)
        return replace(self, density=share_of_grid(self, density, layout, floor), mass=None)

    def search(self) -> PAROSearch:
        return PAROSearch(replace(self, calibration=None))

    def measure(self, q: Tensor, k: Tensor, lse: Tensor, order: Order, call: Call) -> tuple[Tensor, ...]:
        """The softmax P of the grid in the blocks of ``order``, which need not be the call's.

        Returns:
            mass: Sum of P in each block, [B, H, Q, K].
            pairs: Token pairs of each block, int64 of the same shape.
            metrics: (1 - M_sparse, M_quant), float64 [2, B, KV]: means over the heads that share keys.
        """
        n = call.layout.tokens
        there, (q, k, lse) = under(order, call, q, k, lse[..., None])
        q, k, lse, valid = q[:, :, :n], k[:, :, :n], lse[:, :, :n, 0], there.slots_valid()[..., :n]
        mass, peak, few = block_statistics(
            q, k, lse, self.block, self.small / n, valid=valid, scale=call.scale
        )
        fq, fk = (broadcast_heads(x.filled(self.block), call.heads) for x in (order, there))
        pairs = fq[..., : mass.shape[2], None] * fk[..., None, : mass.shape[3]]
        # A block whose weights all vanish is as even as one can be.
        incoherence = torch.where(mass > 0, peak * pairs / mass, 1)
        dense = few < self.sigma * pairs.double()
        sums = (torch.stack([dense, incoherence, torch.ones_like(mass)]) * (pairs > 0)).double().sum((-2, -1))
        sums = sums.unflatten(-1, (call.kv_heads, -1)).sum(-1)
        return mass, pairs.expand_as(mass), sums[:2] / sums[2].clamp(min=1)

    def measured(self, q: Tensor, k: Tensor, lse: Tensor, call: Call) -> Iterator[tuple[Tensor, ...]]:
        """:meth:`measure` in each of the six orders."""
        for one in torch.arange(len(ORDERS), device=q.device)[:, None]:
            yield self.measure(q, k, lse, axis_orders(call.layout, self.block, one), call)

    def best(self, metrics: Tensor) -> Tensor:
        """Which of the six orders: metrics [6, 2, ...] -> int64 [...]. Ties go to the first."""
        share = metrics / metrics.sum(0).clamp(min=1e-30)
        score = self.alpha * share[:, 0] + (1 - self.alpha) * share[:, 1]
        return score.sort(dim=0, stable=True).indices[0]

    def keep(self, mass: Tensor, pairs: Tensor) -> Tensor:
        """Which blocks are kept, bool [B, H, Q, K]: see :meth:`measure`."""
        first = top_k(mass, 1, pairs > 0)
        if self.mass is not None:
            kept = top_mass(mass.flatten(2), self.mass)
        else:
            rank = mass.masked_fill(first, torch.inf).flatten(1).argsort(dim=1, descending=True, stable=True)
            cost = pairs.flatten(1).gather(1, rank).double()
            fits = cost.cumsum(1) - cost / 2 <= self.density * cost.sum(1, keepdim=True)
            kept = torch.zeros_like(fits).scatter(1, rank, fits)
        return (kept.view_as(mass) | first) & (pairs > 0)

    def _searches(self, call: Call) -> bool:
        return self.calibrated is None and (call.phase is Phase.REFRESH or "plan" not in call.cache)

    def _renew(self, q: Tensor, k: Tensor, lse: Tensor, call: Call) -> None:
        """Decide the orders, unless they are known, and a new mask."""

        def orders() -> Tensor:
            return self.best(torch.stack([x[2] for x in self.measured(q, k, lse, call)])).squeeze(0)

        order = axis_orders(call.layout, self.block, call.cached("orders", orders, renew=False))

        def mask() -> Plan:
            # A density is that of the layer: its heads compete.
            mass, pairs = (call.all_heads(x) for x in self.measure(q, k, lse, order, call)[:2])
            return self._whole(call.own(self.keep(mass, pairs), 1), call)

        call.cached("plan", mask)

    def _whole(self, keep: Tensor, call: Call) -> Plan:
        blocks = call.filled(self.block).shape[-1]
        return Plan.from_blocks(with_text(keep, blocks, blocks), self.block)

    def _stored_orders(self, call: Call) -> Tensor:
        assert self.calibrated is not None
        return call.own(torch.tensor([ORDERS.index(name) for name in self.calibrated.layer(call)["orders"]]))

    def _stored_mask(self, call: Call) -> Tensor:
        """The mask of this part of the run, or of the nearest that the calibration saw: [1, H, Q, K]."""
        assert self.calibrated is not None
        parts, part = self.calibrated.layer(call)["parts"], self.part(call.step or 0, call.steps or 1)
        nearest = min(range(len(parts)), key=lambda i: abs(parts[i] - part))
        bits = self.calibrated.tensors[f"{layer_key(call)}/masks"][None, nearest]
        keep = PackedPlan(bits, pair_of(self.block), call.grid_blocks(self.block)).unpack().to_blocks()
        return call.own(keep, 1)


class PAROSearch:
    """One order for all prompts, branches and steps, by sums of both metrics; masks by sums of P.

    Until the orders are known P is kept in all six, on the host: 24 bytes for each mask, head and block.
    """

    def __init__(self, method: PAROProcessor) -> None:
        self.method = method
        self.metrics: dict[str, Tensor] = {}
        self.pairs: dict[str, Tensor] = {}
        self.masses: dict[str, dict[int, Tensor]] = {}

    def observe(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> None:
        key, part = layer_key(call), self.method.part(call.step or 0, call.steps or 1)
        found = self.method.measured(q, k, lse, call)
        mass, metrics, pairs = zip(
            *((m.sum(0).cpu(), x.sum(1).cpu(), p[:1].cpu()) for m, p, x in found), strict=True
        )
        masses = self.masses.setdefault(key, {})
        masses[part] = masses.get(part, 0) + torch.stack(mass)
        self.metrics[key] = self.metrics.get(key, 0) + torch.stack(metrics)
        self.pairs[key] = pairs[0]

    def result(self) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        layers, tensors = {}, {}
        for key, metrics in self.metrics.items():
            orders, masses = self.method.best(metrics), sorted(self.masses[key].items())
            heads = torch.arange(self.pairs[key].shape[1])
            own = orders.repeat_interleave(len(heads) // len(orders))
            keep = [self.method.keep(mass[own, heads][None], self.pairs[key])[0] for _, mass in masses]
            layers[key] = {"orders": [ORDERS[i] for i in orders], "parts": [part for part, _ in masses]}
            tensors[f"{key}/masks"] = Plan.from_blocks(torch.stack(keep), self.method.block).pack().bits
        return layers, tensors


def axis_orders(layout: TokenLayout, block: int, chosen: Tensor) -> Order:
    """Heads in the axis orders ``ORDERS[chosen]``, chosen int64 [KV] or [B, KV]."""
    return Order(_index(layout, block, chosen.device)[chosen], layout.sequence)


@lru_cache(maxsize=8)
def _index(layout: TokenLayout, block: int, device: torch.device) -> Tensor:
    return torch.cat([Order.axes(layout, axes, block).index for axes in ORDERS]).to(device)
