"""Allegro: text to video, text by cross-attention. A mask over the pixels, for videos of several sizes in a
batch, reaches self-attention as an additive [B, H, 1, N] made anew in every layer; the pipeline has none.
Classifier-free guidance is one batch, [uncond, cond].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, kl_scale, patches, stacks

TINY: Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "cross_attention_dim": 24,
    "caption_channels": 16,
}


def layers(model: Any) -> list[Layer]:
    """``transformer_blocks.*.attn1``."""
    return stacks(model, ("transformer_blocks", "attn1"))


def layout(model: Any, args: Arguments) -> TokenLayout | str:
    """``hidden_states`` is [B, C, F, H, W]."""
    mask = args.get("attention_mask")
    if mask is not None and mask.ndim != 4:
        return f"attention_mask is [B, F, H, W] where it hides pixels, got shape {tuple(mask.shape)}"
    config = model.config
    patch = config.patch_size_t, config.patch_size, config.patch_size
    return TokenLayout(patches(args["hidden_states"].shape[2:], patch))


def validity(mask: Tensor) -> Tensor:
    """[B, H, 1, N], the same for all heads, 0 or -10000."""
    return mask[:, 0, 0] == 0


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; the first frames are no exception."""
    side = kl_scale(vae) * transformer["patch_size"]
    return vae["temporal_compression_ratio"] * transformer["patch_size_t"], side, side


CHECKPOINTS: dict[str, Checkpoint] = {
    "allegro": Checkpoint(
        "rhymes-ai/Allegro",
        "2.8b",
        "text to video, 720x1280; 15 GB of weights in bfloat16",
        {
            "height": 720,
            "width": 1280,
            "num_frames": 88,
            "fps": 15,
            "num_inference_steps": 100,
            "guidance_scale": 7.5,
        },
        "AllegroTransformer3DModel",
        {},
        (32, 24, 96),
        TokenLayout((22, 45, 80)),
    ),
}

FAMILY = Family(
    name="allegro",
    transformers={"AllegroTransformer3DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=pixels,
    validity=validity,
    branches=("cond_uncond",),
    checkpoints=CHECKPOINTS,
    lone_first_frame=False,
    tiled=True,
)
