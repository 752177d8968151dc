"""Stable Diffusion 3 and 3.5: one joint attention over [image, text] in every block. The first blocks of
3.5 medium attend a second time, over the image alone (``attn2``): that is a layer of its own here, in the
place of its block. Guidance is one batched call; skip-layer guidance adds a call without some blocks.
"""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import (
    Arguments,
    Checkpoint,
    Config,
    Family,
    numbered,
    patches,
    square_patches,
)

TINY: Config = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 16,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 24,
}


def layers(model: Any) -> list[Layer]:
    """``transformer_blocks.*.attn``, and ``attn2`` where a block has it."""
    blocks = model.transformer_blocks
    found = [
        (i, f"transformer_blocks.{i}.{name}")
        for i, block in enumerate(blocks)
        for name, attention in (("attn", block.attn), ("attn2", block.attn2))
        if attention is not None
    ]
    index, paths = zip(*found, strict=True)
    return numbered(model, paths, index=index, count=len(blocks))


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, C, H, W]."""
    patch = model.config.patch_size
    return TokenLayout(patches((1, *args["hidden_states"].shape[2:]), (1, patch, patch)))


def pipeline_class(index: Config, image: bool) -> str:
    """Every checkpoint also goes on from an image."""
    return "StableDiffusion3Img2ImgPipeline" if image else "StableDiffusion3Pipeline"


# 77 tokens of CLIP and 256 of T5.
_1024 = TokenLayout((1, 64, 64), text=333)
_SIZE = {"height": 1024, "width": 1024}


def _config(heads: int, **own: Any) -> Config:
    """As many blocks as heads, of 64 channels each."""
    return {
        "num_layers": heads,
        "num_attention_heads": heads,
        "caption_projection_dim": 64 * heads,
        "pos_embed_max_size": 192,
        **own,
    }


# Configurations: scripts/convert_sd3_to_diffusers.py of diffusers. Steps and guidance: the model cards.
CHECKPOINTS: dict[str, Checkpoint] = {
    "sd3-medium": Checkpoint(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "medium",
        "text to image, 1024x1024; needs access granted on the Hub; 2B, fits a 24 GB card in bfloat16",
        {**_SIZE, "num_inference_steps": 28, "guidance_scale": 7.0},
        "SD3Transformer2DModel",
        _config(24),
        (24, 24, 64),
        _1024,
    ),
    "sd3.5-medium": Checkpoint(
        "stabilityai/stable-diffusion-3.5-medium",
        "3.5-medium",
        "text to image, to 1440x1440; needs access granted on the Hub; 2.5B, fits a 24 GB card in bfloat16",
        {**_SIZE, "num_inference_steps": 40, "guidance_scale": 4.5},
        "SD3Transformer2DModel",
        _config(24, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
        (24, 24, 64),
        _1024,
    ),
    "sd3.5-large": Checkpoint(
        "stabilityai/stable-diffusion-3.5-large",
        "3.5-large",
        "text to image, 1024x1024; needs access granted on the Hub; 8B, on a 24 GB card with --offload model",
        {**_SIZE, "num_inference_steps": 28, "guidance_scale": 3.5},
        "SD3Transformer2DModel",
        _config(38, qk_norm="rms_norm"),
        (38, 38, 64),
        _1024,
    ),
    "sd3.5-large-turbo": Checkpoint(
        "stabilityai/stable-diffusion-3.5-large-turbo",
        "3.5-large",
        "text to image in 4 steps, 1024x1024; otherwise as sd3.5-large",
        {**_SIZE, "num_inference_steps": 4, "guidance_scale": 0.0},
        "SD3Transformer2DModel",
        _config(38, qk_norm="rms_norm"),
        (38, 38, 64),
        _1024,
    ),
}

FAMILY = Family(
    name="sd3",
    transformers={"SD3Transformer2DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=square_patches,
    joint=True,
    video=False,
    branches=("cond_uncond", "cond_skip"),
    checkpoints=CHECKPOINTS,
    pipeline_class=pipeline_class,
)
