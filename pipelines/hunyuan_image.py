"""HunyuanImage 2.1: text to image at 2048x2048, and its refiner. Dual-stream and then single-stream blocks
attend over [image, text], where text is glyph and prompt tokens with all padding at the end, hidden by a mask
of keys; the attention of the text refiner stays dense. The refiner's latents have a frame axis of length 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.pipelines import hunyuan_video
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, own_pipeline, patches

TINY: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "text_embed_2_dim": 8,
    "rope_axes_dim": (4, 8),
}


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, C, H, W], or [B, C, F, H, W] where the patch has a frame axis too."""
    size, patch = args["hidden_states"].shape[2:], model.config.patch_size
    if len(patch) == 2:
        size, patch = (1, *size), (1, *patch)
    return TokenLayout(patches(size, patch))


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token."""
    height, width = transformer["patch_size"][-2:]
    return 1, vae["spatial_compression_ratio"] * height, vae["spatial_compression_ratio"] * width


# Calls: the examples of diffusers 0.42. Configurations: its scripts/convert_hunyuan_image_to_diffusers.py.
_2K = {"height": 2048, "width": 2048}

CHECKPOINTS: dict[str, Checkpoint] = {
    "hunyuanimage-2.1": Checkpoint(
        "hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
        "17b",
        "text to image, 2048x2048; on a 24 GB card with --offload group",
        {**_2K, "num_inference_steps": 50},
        "HunyuanImageTransformer2DModel",
        {"text_embed_2_dim": 1472},
        (60, 28, 128),
        TokenLayout((1, 64, 64), text=1128),
    ),
    "hunyuanimage-2.1-distilled": Checkpoint(
        "hunyuanvideo-community/HunyuanImage-2.1-Distilled-Diffusers",
        "17b",
        "text to image in 8 steps, 2048x2048; on a 24 GB card with --offload group",
        {**_2K, "num_inference_steps": 8, "distilled_guidance_scale": 3.25},
        "HunyuanImageTransformer2DModel",
        {"text_embed_2_dim": 1472, "guidance_embeds": True, "use_meanflow": True},
        (60, 28, 128),
        TokenLayout((1, 64, 64), text=1128),
    ),
    "hunyuanimage-2.1-refiner": Checkpoint(
        "hunyuanvideo-community/HunyuanImage-2.1-Refiner-Diffusers",
        "refiner",
        "image to refined image in 4 steps, 2048x2048; on a 24 GB card with --offload group",
        {**_2K, "num_inference_steps": 4, "distilled_guidance_scale": 3.25},
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 128,
            "num_attention_heads": 26,
            "patch_size": (1, 1, 1),
            "rope_axes_dim": (16, 56, 56),
            "guidance_embeds": True,
        },
        (60, 26, 128),
        TokenLayout((1, 128, 128), text=256),
    ),
}

FAMILY = Family(
    name="hunyuan_image",
    transformers={"HunyuanImageTransformer2DModel": TINY},
    layers=hunyuan_video.layers,
    layout=layout,
    pixels=pixels,
    joint=True,
    video=False,
    branches=("pred_cond", "pred_uncond"),
    checkpoints=CHECKPOINTS,
    lone_first_frame=False,
    pipeline_class=partial(own_pipeline, starts_from_image="Refiner"),
)
