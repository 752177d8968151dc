"""PixArt-Alpha and PixArt-Sigma: self-attention over the image (``attn1``); text enters by cross-attention,
which stays dense. Guidance is one batched call.
"""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import (
    Arguments,
    Checkpoint,
    Config,
    Family,
    Preset,
    patches,
    square_patches,
    stacks,
)
from dit_sparse.processors.spatial_window import SpatialWindowProcessor

TINY: Config = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 16,
}


def layers(model: Any) -> list[Layer]:
    """``transformer_blocks.*.attn1``."""
    return stacks(model, ("transformer_blocks", "attn1"))


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, C, H, W]."""
    patch = model.config.patch_size
    return TokenLayout(patches((1, *args["hidden_states"].shape[2:]), (1, patch, patch)))


def _window(keep: float, results: str) -> Preset:
    """Dense to the 5th of 20 steps, then a refresh at every 5th."""
    source = f"arXiv 2505.22918, 1024x1024, 20 steps, {results}"
    return Preset({"inner": SpatialWindowProcessor(keep=keep)}, "dense 0-25%", source)


PRESETS = {
    ("rettention", "xl"): {
        "quality": _window(0.0625, "93.8 % sparse: GenEval 0.456 of 0.480 (Alpha), 0.513 of 0.544 (Sigma)"),
        "balanced": _window(0.03125, "96.9 % sparse: GenEval 0.448 of 0.480 (Alpha), 0.512 of 0.544 (Sigma)"),
        "fast": _window(0.03125, "the sparsest published, as balanced"),
    }
}

# Configurations: scripts/convert_pixart_sigma_to_diffusers.py of diffusers; Alpha's has the micro-conditions
# that the class adds for latents of 128 x 128. Steps and guidance: the defaults of the pipelines.
_XL: Config = {"caption_channels": 4096}
_CALL = {"height": 1024, "width": 1024, "num_inference_steps": 20, "guidance_scale": 4.5}

CHECKPOINTS: dict[str, Checkpoint] = {
    "pixart-alpha": Checkpoint(
        "PixArt-alpha/PixArt-XL-2-1024-MS",
        "xl",
        "text to image, 1024x1024; 0.6B and a T5 of 4.7B, fits a 24 GB card in bfloat16",
        _CALL,
        "PixArtTransformer2DModel",
        _XL,
        (28, 16, 72),
        TokenLayout((1, 64, 64)),
    ),
    "pixart-sigma": Checkpoint(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "xl",
        "text to image, 1024x1024; 0.6B and a T5 of 4.7B, fits a 24 GB card in bfloat16",
        _CALL,
        "PixArtTransformer2DModel",
        {**_XL, "use_additional_conditions": False},
        (28, 16, 72),
        TokenLayout((1, 64, 64)),
    ),
}

FAMILY = Family(
    name="pixart",
    transformers={"PixArtTransformer2DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=square_patches,
    video=False,
    branches=("cond_uncond",),
    presets=PRESETS,
    checkpoints=CHECKPOINTS,
    call={"use_resolution_binning": False},  # which makes another size than was asked for, and scales it
)
