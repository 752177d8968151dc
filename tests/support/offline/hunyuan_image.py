"""Whole pipelines of HunyuanImage 2.1 with random weights."""

from __future__ import annotations

from typing import Any

import tiny_hunyuan as tiny
import tiny_text
import torch


def pipeline(guider: Any = None, **changes: Any) -> Any:
    from diffusers import AutoencoderKLHunyuanImage, FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline

    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=32,
        scaling_factor=0.75,
    )
    pipe = HunyuanImagePipeline(
        transformer=tiny.transformer("HunyuanImageTransformer2DModel", **changes),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=tiny_text.llama(16),
        tokenizer=tiny_text.tokenizer(),
        text_encoder_2=tiny_text.t5(8),
        tokenizer_2=tiny_text.tokenizer(),
        guider=guider,
    )
    return shortened(pipe)


def shortened(pipe: Any) -> Any:
    """Without the prompt's template, and with less room for text."""
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 12, 8
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guider() -> Any:
    from diffusers import AdaptiveProjectedMixGuidance

    return AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2)
