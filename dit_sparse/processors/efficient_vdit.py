"""Efficient-vDiT, https://arxiv.org/abs/2502.06155 (H. Ding et al., 2025; no code released).

Frame by frame the attention map of a video repeats itself: tiles on the diagonal are heavy, all others alike.
So every frame attends to itself and to k global reference frames, which attend to and are read by all: linear
in the number of frames. A search gives each layer the smallest k whose error stays below a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_sparse.calibration import METRICS, CalibratedProcessor, error, layer_key, under, within
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, nearest_setting
from dit_sparse.order import Order
from dit_sparse.plan import Plan, blocks_of, with_text


def global_frames(frames: int, k: int) -> range:
    """About ``k`` evenly spaced frames from the first on: every ceil(frames / k)-th."""
    return range(0, frames, -(-frames // k))


@dataclass(frozen=True, kw_only=True)
class EfficientVDiTProcessor(CalibratedProcessor):
    """The masks k : F - k, of F frames k global; one k for all layers, or one for each from a calibration.

    A block is kept when any two of its tokens lie in one frame, or any lies in a global one: whole blocks are
    computed where they straddle frames, which gives the block counts of the paper's Table 1 exactly. Text,
    history and reference tokens are dense both ways. Of the paper this is masks and search; its
    distillations (100 to 20 steps, then into the masks) are training, so use it with few-step checkpoints for
    the published speed.

    What the paper leaves open: global frames are every ceil(F / k)-th from the first, which the block counts
    pin down up to mirroring, and which is fewer than k where F is not near a multiple (F = 13, k = 6: 5).
    The search runs on the activations of the dense model, averages over prompts, steps and branches, and
    tries every k that differs.

    Args:
        frames: k, without a calibration (paper: 1 to 4 of 8 latent frames, 3 to 12 of 24). A shorter video
            has only global ones: images are dense.
        block: Tokens per block (128, inferred from the paper's counts).
        threshold: The search takes the smallest k with an error up to this, and full attention where no k has
            it. The paper's r: 0.025 to 0.4 in Open-Sora-Plan, 4 to 5 in CogVideoX, in its own "mse".
        budget: Instead of the threshold: the mean density of all layers that the search may spend, for the
            smallest sum of errors.
        metric: "relative": squared error over the square of the dense output, the same scale in any model;
            "mse": the mean squared error of the attention output.

    Raises:
        ValueError: A parameter out of range; a calibration that does not fit (its token grid must be the
            run's).
    """

    calibrates: ClassVar[str] = "efficient_vdit"
    searched: ClassVar[tuple[str, ...]] = ("block", "threshold", "budget", "metric")
    reads: ClassVar[frozenset[str]] = frozenset({"layout", "layer"})

    frames: int = 4
    block: int = 128
    threshold: float = 0.1
    budget: float | None = None
    metric: str = "relative"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 1 or self.block < 1:
            raise ValueError(f"frames and block must be >= 1, got {self.frames} and {self.block}")
        if not (isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold must be finite and >= 0, got {self.threshold}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget must be None or lie in (0, 1], got {self.budget}")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")

    @property
    def needs_frames(self) -> str:
        return "its tiles lie between frames"

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        frames = self.frames
        if self.calibrated is not None:
            frames = self.calibrated.layer(call).get("frames")  # type: ignore[assignment]
            if type(frames) is not int or frames < 1:
                raise ValueError(f"{self.calibrated} has {frames!r} frames for layer {layer_key(call)}")
        keep = self._grid_blocks(call.layout, frames)
        keep = with_text(keep, *(blocks_of(x.shape[2], self.block) for x in (q, k)))
        return Plan.from_blocks(keep.to(q.device), self.block)

    def at_density(self, density: float, layout: TokenLayout) -> EfficientVDiTProcessor:
        """The ``frames`` whose density is nearest to ``density``; all else stays.

        ValueError below the floor (one global frame), and where a calibration has decided already.
        """
        if self.calibrated is not None:
            raise ValueError(f"{self.calibrated} fixes the density: calibrate with budget={density}")
        density_of = {k: self._density(layout, k) for k in self._candidates(layout)}
        # Where frames are far smaller than blocks, more global frames may fall into fewer blocks.
        ranked = sorted(density_of, key=lambda k: density_of[k])
        best = nearest_setting(
            self,
            layout,
            density,
            lambda i: density_of[ranked[i]],
            len(ranked) - 1,
            "smaller block",
            "full plan",
        )
        return replace(self, frames=ranked[best])

    def search(self) -> _Search:
        return _Search(self)

    def _candidates(self, layout: TokenLayout) -> list[int]:
        """Every k that differs, the last one full attention; each as the count of frames it comes to."""
        frames = layout.grid[0]
        return sorted({len(global_frames(frames, k)) for k in range(1, frames + 1)})

    def _density(self, layout: TokenLayout, k: int) -> float:
        filled = Order.raster(layout, self.block).filled(self.block)[0, 0].double()
        keep = with_text(self._grid_blocks(layout, k), len(filled), len(filled))
        return float(filled @ keep.double() @ filled / filled.sum() ** 2)

    def _grid_blocks(self, layout: TokenLayout, k: int) -> Tensor:
        """bool [blocks, blocks] over the grid."""
        count, size = layout.grid[0], layout.frame
        first = torch.arange(blocks_of(layout.tokens, self.block)) * self.block
        last = (first + self.block).clamp(max=layout.tokens) - 1
        first, last = first // size, last // size  # frames
        same = (first[:, None] <= last) & (first <= last[:, None])
        step = global_frames(count, min(k, count)).step
        # The first global frame that is not before the block's first frame lies within the block.
        has_global = (first + step - 1) // step * step <= last
        return same | has_global[:, None] | has_global


class _Search:
    """The mean error of every candidate, for each layer."""

    def __init__(self, method: EfficientVDiTProcessor) -> None:
        self.method = method
        self.errors: dict[str, list[Tensor]] = {}
        self.densities: dict[int, float] = {}

    def observe(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> None:
        method = self.method
        if not self.densities:
            self.densities = {n: method._density(call.layout, n) for n in method._candidates(call.layout)}
        here, (q, k, v) = under(Order.raster(call.layout, method.block), call, q, k, v)
        losses = []
        for frames in self.densities:
            sparse, _ = here.run(q, k, v, replace(method, frames=frames).plan(q, k, here))
            _, (sparse,) = under(call.order, here, sparse)
            losses.append(error(sparse, out, method.metric, call).mean())
        self.errors.setdefault(layer_key(call), []).append(torch.stack(losses).cpu())

    def result(self) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        method, candidates = self.method, list(self.densities)
        errors = torch.stack([torch.stack(found).mean(0) for found in self.errors.values()])
        if method.budget is not None:
            chosen = within(errors, torch.tensor(list(self.densities.values())), method.budget)
        else:
            # Full attention, the last one, is always good enough.
            enough = (errors <= method.threshold).index_fill(1, torch.tensor(len(candidates) - 1), True)
            chosen = enough.int().argmax(-1)
        layers = {
            name: {
                "frames": candidates[best],
                "density": self.densities[candidates[best]],
                "errors": {str(n): float(e) for n, e in zip(candidates, losses, strict=True)},
            }
            for name, best, losses in zip(self.errors, chosen.tolist(), errors, strict=True)
        }
        return layers, {}
