"""Parts and calls that offline image pipelines share: a token is 4 x 4 pixels, an image 10 x 12 tokens."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

SIZE = {"height": 40, "width": 48}


def vae(channels: int = 4, blocks: int = 2) -> Any:
    """A latent is 2 x 2 pixels; each block above two doubles its sides."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4,) * blocks,
        latent_channels=channels,
        norm_num_groups=1,
        shift_factor=0.06,
    ).eval()


def pipeline(name: str, transformer: Any, **parts: Any) -> Any:
    """With a flow-matching scheduler unless ``parts`` bring another."""
    import diffusers

    shared = {"vae": vae(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    pipe = getattr(diffusers, name)(transformer=transformer, **{**shared, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, **changes: Any) -> Tensor:
    """Latents of a run of 4 steps with guidance."""
    settings: dict[str, Any] = {
        "prompt": "a cat runs",
        "negative_prompt": "a dog",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        "output_type": "latent",
        **SIZE,
    }
    return pipe(**{**settings, **changes})[0]


def picture(width: int = 48, height: int = 40) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 80, 20))
