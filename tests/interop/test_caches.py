"""Step caches of diffusers skip blocks or attention: what runs is what would run there without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import tiny_models as tiny
import torch
from diffusers.hooks import HookRegistry
from families import Pipe, at_step, cases

import dit_sparse
from dit_sparse import RadialProcessor

SPARSE = {
    "static": RadialProcessor(block=8, decay=0.3, decimate_below=32),
    "per-call": tiny.TopK(keep=2),
    "step-cached": tiny.Cached(keep=2),
}
FULL = {
    "static": RadialProcessor(block=8, decay=99.0, decimate_below=0),
    "per-call": tiny.TopK(keep=999),
    "step-cached": tiny.Cached(keep=999),
}
STEPS = 6


class Wan:
    """A pipeline that guides in two passes."""

    def __init__(self) -> None:
        self.pipe = tiny.wan_pipeline()
        self.model = self.pipe.transformer

    def run(self) -> torch.Tensor:
        return tiny.run_wan(self.pipe, steps=STEPS)


class CogVideoX:
    """The loop of a pipeline that guides in one batch, [uncond, cond]: what PAB and FasterCache are for."""

    def __init__(self) -> None:
        self.case = cases()["cogvideox"]
        self.model = self.case.model()
        self.pipe = Pipe(self.model)
        self.timestep = 0

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        inputs = self.case.inputs(self.model, 2, self.case.grid, 0)
        latents = inputs["hidden_states"][:1]
        for step in range(STEPS):
            self.timestep = 900 - 150 * step
            inputs["timestep"] = torch.full((2,), self.timestep)
            inputs["hidden_states"] = torch.cat([latents, latents])
            with at_step(self.pipe, "cond_uncond", step, STEPS):
                uncond, cond = self.model(**inputs)[0].chunk(2)
            latents = latents - 0.1 * (uncond + 3 * (cond - uncond))
        self.pipe.scheduler.step_index = STEPS
        self.model._reset_stateful_cache()
        return latents


CACHES: dict[str, tuple[type, Callable[[Any], Any], int]] = {
    "FirstBlockCache": (Wan, lambda rig: diffusers.FirstBlockCacheConfig(threshold=0.15), 4),
    "MagCache": (
        Wan,
        lambda rig: diffusers.MagCacheConfig(
            threshold=0.5,
            max_skip_steps=1,
            num_inference_steps=STEPS,
            mag_ratios=torch.linspace(1, 0.9, STEPS),
        ),
        3,
    ),
    "TaylorSeer": (
        Wan,
        lambda rig: diffusers.TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"blocks\.\d+\.attn1"],
        ),
        4,
    ),
    "PAB": (
        CogVideoX,
        lambda rig: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 990),
            current_timestep_callback=lambda: rig.timestep,
        ),
        3,
    ),
    "FasterCache": (
        CogVideoX,
        lambda rig: diffusers.FasterCacheConfig(
            unconditional_batch_skip_range=3,
            unconditional_batch_timestep_skip_range=(0, 800),
            spatial_attention_timestep_skip_range=(0, 800),
            current_timestep_callback=lambda: rig.timestep,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BFCHW",
        ),
        3,
    ),
}
"""Where it is tried, its configuration, and a step, or two, that it skips in some layer."""


HERE = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "MagCache" and not hasattr(diffusers, "MagCacheConfig"),
            reason="diffusers has no MagCache",
        ),
    )
    for name in CACHES
]


def attach(rig: Any, method: Any, refresh: int = 3) -> dit_sparse.Session:
    session = dit_sparse.apply(rig.pipe, method, schedule=f"dense 0-1; refresh {refresh}")
    session.full_plan_is_dense = False
    return session


@pytest.mark.parametrize("cache_first", [True, False], ids=["cache-first", "attach-first"])
@pytest.mark.parametrize("cache", HERE)
@pytest.mark.parametrize("kind", FULL)
def test_a_full_budget_equals_the_stock_model_with_that_cache(
    kind: str, cache: str, cache_first: bool
) -> None:
    make, config, _ = CACHES[cache]
    plain, rig = make().run(), make()
    rig.model.enable_cache(config(rig))
    wanted = rig.run()
    assert (wanted - plain).abs().max() > 1e-4  # it does skip
    rig = make()
    steps = [lambda: rig.model.enable_cache(config(rig)), lambda: attach(rig, FULL[kind])]
    for step in steps if cache_first else reversed(steps):
        step()
    for _ in range(2):  # a second run begins anew
        torch.testing.assert_close(rig.run(), wanted, atol=1e-5, rtol=1e-5)
    session = dit_sparse.session(rig.model)
    assert session is not None
    rows = session.report().rows
    assert 0 < len(rows) < STEPS * 3 * (2 if make is Wan else 1)
    assert all(row.density == 1 and row.calls == 1 for row in rows)
    session.remove()
    assert torch.equal(rig.run(), wanted)
    rig.model.disable_cache()
    assert torch.equal(rig.run(), plain)


@pytest.mark.skipif(
    hasattr(HookRegistry, "_get_child_registries")
    and not hasattr(HookRegistry, "invalidate_child_registries_cache"),
    reason="diffusers does not find hooks that are registered after a first run",
)
@pytest.mark.parametrize("cache", HERE)
@pytest.mark.parametrize("kind", SPARSE)
def test_a_cache_may_come_and_go_while_attached(kind: str, cache: str) -> None:
    make, config, _ = CACHES[cache]
    rig = make()
    attach(rig, SPARSE[kind])
    wanted = rig.run()
    rig.model.enable_cache(config(rig))
    assert (rig.run() - wanted).abs().max() > 1e-4
    rig.model.disable_cache()
    assert torch.equal(rig.run(), wanted)


@dataclass(frozen=True, kw_only=True)
class Dated(tiny.Cached):
    """Notes the step at which each plan in use was made, by (branch, layer, batch, step)."""

    made: dict[tuple[str, int, int, int], int] = field(default_factory=dict, compare=False)

    def plan(self, q: Any, k: Any, call: Any) -> Any:
        plan = super().plan(q, k, call)
        self.made[call.branch, call.layer, len(q), call.step] = call.made_at("plan")
        return plan


@pytest.mark.parametrize("cache", HERE)
def test_a_refresh_that_a_cache_has_skipped_is_made_up_for(cache: str) -> None:
    """A plan is kept over skipped steps, but renewed at the first call from the refresh step on."""
    make, config, refresh = CACHES[cache]
    rig, method = make(), Dated(keep=2)
    rig.model.enable_cache(config(rig))
    attach(rig, method, refresh)
    rig.run()
    late = 0
    for (*site, step), made in method.made.items():
        earlier = [s for *other, s in method.made if other == site and s < step]
        renewed = not earlier or (step >= refresh and earlier[-1] < refresh)
        assert made == (step if renewed else method.made[(*site, earlier[-1])])  # type: ignore[index]
        late += renewed and step > refresh and bool(earlier)
    assert late
