"""Whole pipeline of HunyuanVideo 1.5 with random weights."""

from __future__ import annotations

from typing import Any

import tiny_hunyuan as tiny
import tiny_text
import torch


def pipeline(image: bool = False, guider: Any = None) -> Any:
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    tokenizer = tiny_text.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    pipe = getattr(diffusers, f"HunyuanVideo15{'ImageToVideo' * image}Pipeline")(
        transformer=tiny.transformer(
            "HunyuanVideo15Transformer3DModel", task_type="i2v" if image else "t2v", target_size=16
        ),
        vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=tiny_text.llama(16),
        tokenizer=tokenizer,
        text_encoder_2=tiny_text.t5(8),
        tokenizer_2=tiny_text.tokenizer(),
        guider=guider or diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
        **(tiny.vision() if image else {}),
    )
    # Their lengths and the crop are of the real templates.
    pipe.system_message, pipe.prompt_template_encode_start_idx = "", 0
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 12, 8, 4
    pipe.set_progress_bar_config(disable=True)
    return pipe
