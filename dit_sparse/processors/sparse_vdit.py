"""Sparse-vDiT, https://arxiv.org/abs/2506.03065 (P. Chen et al., 2025; no code released).

What an attention head looks at depends on its layer and hardly on the prompt: everything, tokens nearby, the
same place in all frames, or a few tokens that all look at; some heads do not matter at all. So each head is
given one of five fixed modes, the one whose output is nearest to the dense one for its cost, found offline by
trying them all. The heads of a layer run as one call, and skipped heads cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_sparse.calibration import METRICS, CalibratedProcessor, error, layer_key, under, within
from dit_sparse.kernels import block_mass
from dit_sparse.layout import TokenLayout
from dit_sparse.method import READS, Call, nearest_setting
from dit_sparse.order import Order
from dit_sparse.plan import Plan, blocks_of, top_k, with_text
from dit_sparse.schedule import Phase

MODES = ("dense", "skip", "diagonal", "multi_diagonal", "stripe")
DENSE, SKIP, DIAGONAL, MULTI_DIAGONAL, STRIPE = range(5)


@dataclass(frozen=True, kw_only=True)
class SparseVDiTProcessor(CalibratedProcessor):
    """One of five modes for each head.

    ``dense``: every block. ``skip``: the head's output is 0. ``diagonal``: a band of blocks |i - j| <= w in
    raster order. ``multi_diagonal``: the same band with the frames of each position put together, in raster
    order diagonals one frame apart. ``stripe``: the key blocks with the most softmax mass, the same for all
    queries. Text, history and reference tokens are dense both ways, except in skipped heads. A head's loss in
    a mode is its error + ``lam`` * cost; the mode with the least is taken, or ``dense`` if all exceed
    ``eps``. Heads that share keys share a mode.

    With a calibration the modes are fixed. Without one, each layer and branch chooses at the method's first
    step, for each batch item by its own q, k and v; that step is dense, and with the modes it tries it
    computes 1 + 3 * ``share`` of the token pairs.

    What the paper leaves open: band and stripe counts, block and metric; one table for all steps and
    branches (the text searches per step, then calls modes fixed); dense activations during the search.

    Args:
        block: Tokens per block.
        share: Of the grid's block pairs, what a band keeps, to the nearest w; ``stripe`` keeps as many or
            fewer. The paper's totals come to 0.15 to 0.3 on average over heads at sparse steps.
        lam: Weight of the cost (paper: 0.5, and hardly any effect between 0 and 1).
        eps: Largest loss of a sparse mode (paper: 1, and 0.5 to 10 to trade quality for speed, with "mse").
        budget: Instead of ``lam`` and ``eps``: the mean cost of a layer's heads, for the smallest sum of
            errors.
        metric: "relative": squared error over the mean square of the layer's dense output, the same scale in
            any model; "mse": the paper's.
        cost: "flops": the density of the mode, the paper's 1 - S. "latency": its time over that of ``dense``,
            measured by ``dit-sparse calibrate``.

    Raises:
        ValueError: A parameter out of range; a calibration that does not fit; latency without a calibration.
    """

    calibrates: ClassVar[str] = "sparse_vdit"
    searched: ClassVar[tuple[str, ...]] = ("block", "share", "lam", "eps", "budget", "metric", "cost")

    block: int = 128
    share: float = 0.2
    lam: float = 0.5
    eps: float = 0.2
    budget: float | None = None
    metric: str = "relative"
    cost: str = "flops"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or not 0 < self.share <= 1:
            raise ValueError(f"block must be >= 1 and share in (0, 1], got {self.block} and {self.share}")
        if not all(isfinite(x) and x >= 0 for x in (self.lam, self.eps)):
            raise ValueError(f"lam and eps must be finite and >= 0, got {self.lam} and {self.eps}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget must be None or lie in (0, 1], got {self.budget}")
        if self.metric not in METRICS or self.cost not in ("flops", "latency"):
            raise ValueError(
                f"metric must be one of {', '.join(METRICS)} and cost 'flops' or 'latency', "
                f"got {self.metric!r} and {self.cost!r}"
            )

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return READS if self.calibrated is None else frozenset({"layout", "layer"})

    @property
    def only_plans(self) -> bool:
        return self.is_static

    def order(self, call: Call) -> Order:
        if self.calibrated is None:
            return Order.raster(call.layout)
        return self._order(self._decided(call)[0], call.layout)

    def head_costs(self, call: Call) -> Tensor | None:
        """Densities of the modes of a calibration."""
        if self.calibrated is None:
            return None
        costs = self._densities(call.layout)[self._decided(call)[0]]
        return costs.repeat_interleave(call.heads // len(costs))

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        modes, stripes = self._decided(call)
        keep = self._keep(torch.tensor(modes, device=stripes.device), stripes, call)
        return Plan.from_blocks(keep.to(q.device), self.block)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if self.is_static:
            return super().attend(q, k, v, call)
        if call.phase is Phase.REFRESH or call.made_at("decided") is None:
            out, lse = call.run_dense(q, k, v)
            call.cached("decided", lambda: self._decide_here(q, k, v, out, lse, call))
            return out
        there, (queries, keys, values) = self._by_item(call, q, k, v)
        out, _ = there.run(queries, keys, values, self.planned(queries, keys, there))
        return under(call.order, there, out)[1][0].view(q.shape)

    def select(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """As for any method; without a calibration after a step was seen, and with items as further heads."""
        if self.is_static:
            return super().select(q, k, call)
        order = self.order(call).to(q.device)
        there, (q, k) = self._by_item(call.at(order=order), order.apply(q), order.apply(k))
        return self.plan(q, k, there)

    def at_density(self, density: float, layout: TokenLayout) -> SparseVDiTProcessor:
        """The ``share`` at which ``diagonal`` has nearly ``density``, and that as the ``budget``.

        Modes are chosen by data: a run comes to the budget, or below it by less than one head's step.
        ValueError below the floor (a band of one block), and where a calibration has decided already.
        """
        if self.calibrated is not None:
            raise ValueError(f"{self.calibrated} fixes the density: calibrate with budget={density}")
        n = blocks_of(layout.tokens, self.block)

        def setting(w: int) -> SparseVDiTProcessor:
            return replace(self, share=((2 * w + 1) * n - w * (w + 1)) / n**2)

        def reached(w: int) -> float:
            return float(setting(w)._densities(layout)[DIAGONAL])

        found = setting(nearest_setting(self, layout, density, reached, n - 1, "smaller block", "full band"))
        return replace(found, budget=float(found._densities(layout)[DIAGONAL:].max()))

    def search(self) -> _Search:
        return _Search(self)

    def _decided(self, call: Call) -> tuple[list[int], Tensor]:
        """The mode of each head of k (of each item), and its stripes: bool [rows, blocks of the grid]."""
        if self.calibrated is None:
            return call.cached("decided", _undecided, renew=False)
        name, found = layer_key(call), self.calibrated.layer(call)
        stripes = self.calibrated.tensors.get(f"{name}/stripes")
        shape = call.layer_heads * call.kv_heads // call.heads, blocks_of(call.layout.tokens, self.block)
        modes = found.get("modes")
        if not isinstance(modes, list) or len(modes) != shape[0] or not set(modes) <= set(MODES):
            raise ValueError(
                f"{self.calibrated} needs {shape[0]} modes out of {MODES} for {name}, got {modes}"
            )
        if stripes is None or stripes.shape != shape or stripes.dtype != torch.bool:
            raise ValueError(f"{self.calibrated} has no tensor {name}/stripes, bool {shape}")
        own = call.own(torch.tensor([MODES.index(mode) for mode in modes]))
        return own.tolist(), call.own(stripes)

    def _order(self, modes: list[int], layout: TokenLayout, device: torch.device | None = None) -> Order:
        raster, by_position = _orders(layout, self.block, device)
        moved = [mode == MULTI_DIAGONAL for mode in modes]
        if len(set(moved)) == 1:
            return by_position if moved[0] else raster
        return Order.stack([by_position if move else raster for move in moved])

    def _band(self, n: int) -> Tensor:
        """bool [n, n]: |i - j| <= w, of the w that keeps the share nearest to ``share``."""
        i = torch.arange(n)
        shares = ((2 * i + 1) * n - i * (i + 1)).double() / n**2
        return (i[:, None] - i).abs() <= (shares - self.share).abs().argmin()

    def _stripes(self, mass: Tensor) -> Tensor:
        """bool [..., n]: the key blocks with the most mass, as many as a row of the band has on average."""
        n = mass.shape[-1]
        return top_k(mass, int(self._band(n).sum()) // n) & (mass > 0)

    def _keep(self, modes: Tensor, stripes: Tensor, call: Call) -> Tensor:
        """bool [..., H, Q, K] out of modes, int64 [..., KV], and stripes, bool [..., KV, n]."""
        assert call.order is not None
        n, blocks = stripes.shape[-1], blocks_of(call.order.slots, self.block)
        band, everything = self._band(n), torch.ones(n, n, dtype=torch.bool)
        shapes = torch.stack([everything, ~everything, band, band, ~everything]).to(stripes.device)
        keep = shapes[modes] | (stripes & (modes == STRIPE)[..., None])[..., None, :]
        keep = with_text(keep, blocks, blocks) & (modes != SKIP)[..., None, None]
        return keep.repeat_interleave(call.heads // call.kv_heads, -3)

    def _densities(self, layout: TokenLayout, valid: Tensor | None = None) -> Tensor:
        """Of the five modes: float64 [5]. Given key validity [B, S], of the tokens of each item: [B, 5]."""
        order = Order.raster(layout, self.block)
        call = Call.standalone(layout, heads=len(MODES)).at(order=order)
        n = call.grid_blocks(self.block)
        stripes = self._stripes(torch.arange(n, 0, -1)).expand(len(MODES), n)
        filled = order.filled(self.block, valid)[:, 0].double()
        keep = self._keep(torch.arange(len(MODES)), stripes, call).double()
        shares = torch.einsum("bq,mqk,bk->bm", filled, keep, filled) / filled.sum(-1, keepdim=True) ** 2
        return shares[0] if valid is None else shares

    def _by_item(self, call: Call, *tensors: Tensor) -> tuple[Call, list[Tensor]]:
        """Under the order of the modes: one for each head and item, so that items become further heads."""
        order = self._order(self._decided(call)[0], call.layout, tensors[0].device)
        items, valid, on_run = len(tensors[0]), call.valid, call.on_run
        if valid is not None and len(valid) > 1:
            valid = valid.repeat_interleave(call.kv_heads, 0)[None]

        def report(plan: Plan, pairs: Callable[[], Tensor], *rest: Any) -> str:
            assert on_run is not None
            return on_run(plan, lambda: pairs().view(items, -1), *rest)

        call = call.at(
            heads=items * call.heads,
            kv_heads=items * call.kv_heads,
            valid=valid,
            on_run=None if on_run is None else report,
        )
        return under(order, call, *(x.reshape(1, -1, *x.shape[2:]) for x in tensors))

    def _decide_here(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[list[int], Tensor]:
        if self.cost == "latency":
            raise ValueError("cost='latency' is measured by `dit-sparse calibrate`, got no calibration")
        stripes = self._stripes(self._mass(q, k, lse, call))
        errors = call.all_heads(self._errors(q, k, v, out, stripes, call))  # a budget is the layer's
        costs = self._densities(call.layout, None if call.valid is None else call.valid.cpu())
        chosen = [self._choose(*each) for each in zip(errors, costs.expand(len(errors), -1), strict=True)]
        modes = call.own(torch.stack(chosen), 1)
        return modes.flatten().tolist(), stripes.flatten(0, 1)

    def _mass(self, q: Tensor, k: Tensor, lse: Tensor, call: Call) -> Tensor:
        """The grid's softmax mass in each of its key blocks: [B, KV, n]."""
        assert call.order is not None
        call = call.at(lse=call.order.undo(lse[..., None])[..., 0])
        there, (q, k) = under(self._order([STRIPE], call.layout, q.device), call, q, k)
        at_last, n = there.ordered_lse(), there.grid_blocks(self.block)
        assert at_last is not None
        mass = block_mass(q, k, at_last, self.block, valid=there.slots_valid(), scale=call.scale)
        return mass[..., :n, :n].sum(2).unflatten(1, (call.kv_heads, -1)).sum(2)

    def _errors(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stripes: Tensor, call: Call) -> Tensor:
        """Of the five modes: [B, KV, 5]."""
        outs = [out, torch.zeros_like(out)]
        outs += [self._run(mode, q, k, v, stripes, call) for mode in (DIAGONAL, MULTI_DIAGONAL, STRIPE)]
        errors = torch.stack([error(x, out, self.metric, call) for x in outs], -1)
        return errors.unflatten(1, (call.kv_heads, -1)).mean(2)

    def _run(self, mode: int, q: Tensor, k: Tensor, v: Tensor, stripes: Tensor, call: Call) -> Tensor:
        """The output with every head in one mode."""
        there, (q, k, v) = under(self._order([mode], call.layout, q.device), call, q, k, v)
        keep = self._keep(torch.full(stripes.shape[:-1], mode, device=q.device), stripes, there)
        out, _ = there.run(q, k, v, Plan.from_blocks(keep, self.block))
        return under(call.order, there, out)[1][0]

    def _choose(self, errors: Tensor, costs: Tensor) -> Tensor:
        """errors [..., KV, 5], costs [5] -> modes int64 [..., KV]."""
        errors = errors.double().cpu()
        if self.budget is not None:
            return within(errors, costs, self.budget)
        least, mode = (errors + self.lam * costs)[..., SKIP:].min(-1)
        return torch.where(least > self.eps, DENSE, mode + SKIP)


class _Search:
    """Means of the errors and of the mass that stripes go by, for each layer."""

    def __init__(self, method: SparseVDiTProcessor) -> None:
        self.method = method
        self.mass: dict[str, Tensor] = {}
        self.errors: dict[str, list[Tensor]] = {}
        self.densities = self.costs = torch.tensor([])

    def observe(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> None:
        method, name = self.method, layer_key(call)
        # The final stripes come of all mass; a call is judged by those that the mass until now would give.
        self.mass[name] = self.mass.get(name, 0) + method._mass(q, k, lse, call).sum(0)
        stripes = method._stripes(self.mass[name])
        self.errors.setdefault(name, []).append(method._errors(q, k, v, out, stripes, call).mean(0).cpu())
        if not len(self.costs):
            self.densities = self.costs = method._densities(call.layout)
            if method.cost == "latency":
                self.costs = self._latencies(q, k, v, stripes, call)

    def _latencies(self, *arguments: Any) -> Tensor:
        """Best of three seconds of every mode, over those of ``dense``."""

        def seconds(mode: int) -> float:
            if q.is_cuda:
                torch.cuda.synchronize(q.device)
            start = time.perf_counter()
            self.method._run(mode, *arguments)
            if q.is_cuda:
                torch.cuda.synchronize(q.device)
            return time.perf_counter() - start

        q = arguments[0]
        best = [0.0 if m == SKIP else min(seconds(m) for _ in range(3)) for m in range(len(MODES))]
        return torch.tensor(best, dtype=torch.float64) / best[DENSE]

    def result(self) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        layers, tensors = {}, {}
        for name, found in self.errors.items():
            errors = torch.stack(found).mean(0)
            modes = self.method._choose(errors, self.costs)
            layers[name] = {
                "modes": [MODES[m] for m in modes],
                "density": float(self.densities[modes].mean()),
                "errors": dict(zip(MODES, errors.T.tolist(), strict=True)),
            }
            tensors[f"{name}/stripes"] = self.method._stripes(self.mass[name])
        return layers, tensors


def _undecided() -> Any:
    raise ValueError(
        "there are no modes yet: they are chosen by attend at the method's first step, "
        "or by `dit-sparse calibrate` for SparseVDiTProcessor(calibration=...)"
    )


@lru_cache(maxsize=8)
def _orders(layout: TokenLayout, block: int, device: torch.device | None) -> tuple[Order, Order]:
    """Raster order, and all frames of a position together: one set for all heads and layers."""
    raster, by_position = Order.raster(layout, block), Order.axes(layout, "hwf", block)
    return (raster, by_position) if device is None else (raster.to(device), by_position.to(device))
