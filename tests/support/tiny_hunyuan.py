"""Parts that the pipelines of HunyuanVideo and Framepack share, with random weights."""

from __future__ import annotations

from typing import Any

import tiny_text
import torch
from families import Case, items
from tiny_images import picture
from torch import Tensor

PICTURE = picture(96, 64)


def transformer(cls: str, **changes: Any) -> Any:
    """As the contract's."""
    return Case(cls, lambda *_: {}, changes).model()


def vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def parts() -> dict[str, Any]:
    """All but the transformer of a text-to-video pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "vae": vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": tiny_text.llama(16),
        "tokenizer": tiny_text.tokenizer(),
        "text_encoder_2": tiny_text.clip(8),
        "tokenizer_2": tiny_text.tokenizer(start=True),
    }


def vision() -> dict[str, Any]:
    """An image encoder that makes 4 tokens."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "image_encoder": SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8)).eval(),
        "feature_extractor": SiglipImageProcessor(size={"height": 16, "width": 16}),
    }


def embeddings(count: int = 1) -> dict[str, Tensor]:
    """What text encoders give for a prompt, the image's tokens included, and for a shorter negative one."""
    found = {}
    for name, first, valid in (("", 0, 12), ("negative_", 10, 9)):
        found[f"{name}prompt_embeds"] = items(first, count, 12, 16)
        found[f"{name}pooled_prompt_embeds"] = items(first, count, 8)
        found[f"{name}prompt_attention_mask"] = (torch.arange(12) < valid).float().expand(count, -1)
    return found
