"""Whole pipelines of CogVideoX and ConsisID with random weights."""

from __future__ import annotations

from typing import Any

import tiny_text
import torch
from families.cogvideox import CASES


def autoencoder() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def pipeline(case: str = "cogvideox", cls: str = "CogVideoXPipeline", scheduler: str = "DDIM") -> Any:
    import diffusers

    pipe = getattr(diffusers, cls)(
        tokenizer=tiny_text.tokenizer(),
        text_encoder=tiny_text.t5(16),
        vae=autoencoder(),
        transformer=CASES[case].model(),
        scheduler=getattr(diffusers, f"CogVideoX{scheduler}Scheduler")(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
