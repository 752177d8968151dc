"""Tiny random models and offline pipelines, and methods that exist for tests only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import tiny_text
import torch
from torch import Tensor

from dit_sparse.method import Call, SparseProcessor
from dit_sparse.order import broadcast_heads
from dit_sparse.pipelines.wan import FAMILY
from dit_sparse.plan import Plan, blocks_of, pool, top_k

WAN = FAMILY.transformers["WanTransformer3DModel"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan_inputs(
    batch: int = 1, frames: int = 5, height: int = 8, width: int = 12, channels: int = 4
) -> dict[str, Any]:
    """Inputs of a forward pass; grid (frames, height / 2, width / 2), 120 tokens by default."""
    return {
        "hidden_states": randn(batch, channels, frames, height, width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 12, 16, seed=1),
        "return_dict": False,
    }


def wan(**changes: Any) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(**{**WAN, **changes}).eval()


def wan_i2v() -> Any:
    """As Wan2.2's image to video: image latents and mask as 6 more input channels."""
    return wan(in_channels=10)


def wan_i2v_inputs(batch: int = 1, **size: int) -> dict[str, Any]:
    return wan_inputs(batch, channels=10, **size)


def wan_vace() -> Any:
    from diffusers import WanVACETransformer3DModel

    torch.manual_seed(0)
    return WanVACETransformer3DModel(**{**WAN, "vace_layers": [0, 2], "vace_in_channels": 8}).eval()


def wan_vace_inputs(batch: int = 1, **size: int) -> dict[str, Any]:
    inputs = wan_inputs(batch, **size)
    return {
        **inputs,
        "control_hidden_states": randn(batch, 8, *inputs["hidden_states"].shape[2:], seed=2),
        "control_hidden_states_scale": torch.ones(2),
    }


def wan_pipeline(two: bool = False, layers: int = 3) -> Any:
    """A whole WanPipeline with random weights; ``two`` gives it Wan2.2's second expert."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        , latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=tiny_text.tokenizer(),
        text_encoder=tiny_text.t5(16, umt5=True),
        transformer=wan(num_layers=layers),
        transformer_2=wan(num_layers=layers) if two else None,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **({"boundary_ratio": 0.875} if two else {}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_wan(
    pipe: Any, steps: int = 4, height: int = 64, width: int = 96, num_frames: int = 17, **changes: Any
) -> Any:
    """Latents of one run; grid (5, 4, 6) by default."""
    settings: dict[str, Any] = {
        "prompt": "a cat runs",
        "negative_prompt": "a dog",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


@dataclass(frozen=True, kw_only=True)
class TopK(SparseProcessor):
    """Per call: the key blocks with the highest pooled scores. Stands for every data-dependent method."""

    reads: ClassVar[frozenset[str]] = frozenset({"layout", "qk"})

    block: int = 16
    keep: int = 3

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        valid = call.slots_valid()
        keys = broadcast_heads(pool(k, self.block, valid), call.heads)
        scores = pool(q, self.block, valid) @ keys.transpose(-1, -2)
        return Plan.from_blocks(
            top_k(scores, self.keep, (call.filled(self.block) > 0)[..., None, :]), self.block
        )


@dataclass(frozen=True, kw_only=True)
class Cached(TopK):
    """TopK chosen at REFRESH and kept. Stands for every step-cached method."""

    reads: ClassVar[frozenset[str]] = frozenset({"layout", "step", "layer", "qk"})

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        return call.cached("plan", lambda: TopK.plan(self, q, k, call))


@dataclass(frozen=True, kw_only=True)
class Diagonal(SparseProcessor):
    """Static: every query block reads itself and the first block."""

    reads: ClassVar[frozenset[str]] = frozenset({"layout"})

    block: int = 16

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        keep = torch.eye(blocks_of(k.shape[2], self.block), dtype=torch.bool)
        keep[:, 0] = True
        return Plan.from_blocks(keep, self.block)
