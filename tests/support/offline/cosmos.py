"""Whole pipelines of Cosmos with random weights."""

from __future__ import annotations

from typing import Any

import tiny_text
import torch
from families import cases


def built(case: str) -> Any:
    return cases()[case].model()


def approves() -> Any:
    """A safety checker that finds nothing."""
    from diffusers import ModelMixin

    class Approves(ModelMixin):
        def __init__(self) -> None:
            super().__init__()
            self.device_and_dtype = torch.nn.Parameter(torch.zeros(1))  # pipelines ask for these

        def check_text_safety(self, prompt: str) -> bool:
            return True

        def check_video_safety(self, video: Any) -> Any:
            return video

    return Approves()


def pipeline(cls: Any, transformer: Any, vae: Any, scheduler: Any) -> Any:
    pipe = cls(
        text_encoder=tiny_text.t5(16),
        tokenizer=tiny_text.tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        safety_checker=approves(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cosmos1(cls: Any, case: str) -> Any:
    from diffusers import AutoencoderKLCosmos, EDMEulerScheduler

    torch.manual_seed(0)
    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ).eval()
    scheduler = EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    return pipeline(cls, built(case), vae, scheduler)
