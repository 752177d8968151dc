"""Whole pipelines of EasyAnimate with random weights."""

from __future__ import annotations

from typing import Any

import tiny_text
import torch
from families.easyanimate import CASES


def pipeline(cls: str = "EasyAnimatePipeline", **config: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    tokenizer = tiny_text.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    ).eval()
    vae.register_to_config(
        cache_mag_vae=True
    )  # the inpainting pipeline asks for it, the class has no such keyword
    pipe = getattr(diffusers, cls)(
        tokenizer=tokenizer,
        text_encoder=tiny_text.llama(16),
        vae=vae,
        transformer=CASES["easyanimate"]._replace(changes=config).model(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
