"""Whole pipeline of Allegro with random weights."""

from __future__ import annotations

from typing import Any

import tiny_text
import torch
from families.allegro import CASES


def pipeline(scheduler: str) -> Any:
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
    vae.enable_tiling()
    pipe = diffusers.AllegroPipeline(
        tokenizer=tiny_text.tokenizer(),
        text_encoder=tiny_text.t5(16),
        vae=vae,
        transformer=CASES["allegro"].model(),
        scheduler=getattr(diffusers, scheduler)(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
