"""Helios: endless video, chunk after chunk, from text, an image or a video. Blocks attend over [long, mid,
short history, chunk], the history in patches of 4, 2 and 1 times the side; it is a prefix that every query
reads. Text enters by cross-attention. Each chunk, and each stage of one that grows from small to large,
counts its steps anew: schedules speak of these, nothing is remembered from one to the next, and the report
adds up all.
"""

from __future__ import annotations

from math import ceil, prod
from typing import Any

from torch import Tensor

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import (
    Arguments,
    Checkpoint,
    Config,
    Family,
    patches,
    scaled,
    stacks,
    wan_scale,
)

TINY: Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_dim": (4, 4, 4),
    "is_amplify_history": True,
}


def layers(model: Any) -> list[Layer]:
    """``blocks.*.attn1``."""
    return stacks(model, ("blocks", "attn1"))


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, C, F, H, W]; histories are padded to whole patches."""
    patch = model.config.patch_size
    grid = patches(args["hidden_states"].shape[2:], patch)

    def history(name: str, times: int) -> int:
        latents: Tensor | None = args.get(f"latents_history_{name}")
        if latents is None or args.get(f"indices_latents_history_{name}") is None:
            return 0
        return prod(ceil(n / (times * p)) for n, p in zip(latents.shape[2:], patch, strict=True))

    return TokenLayout(grid, prefix=history("long", 4) + history("mid", 2) + history("short", 1))


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token."""
    return scaled(wan_scale(vae), transformer["patch_size"])


def multiples(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """A video has whole chunks, of 9 latent frames by the pipelines' default."""
    frames, height, width = pixels(transformer, vae)
    return 1 + 8 * frames // transformer["patch_size"][0], height, width


def pipeline_class(index: Config, image: bool) -> str:
    """Its pipelines make a video with and without an image."""
    return index["_class_name"]


# Call: documentation of HeliosPipeline in diffusers. Configuration: the class's defaults.
CHECKPOINTS: dict[str, Checkpoint] = {
    "helios": Checkpoint(
        "BestWishYsh/Helios-Base",
        "14b",
        "text or image to video in chunks of 33 frames; on a 24 GB card with --offload group",
        {
            "height": 384,
            "width": 640,
            "num_frames": 99,
            "num_inference_steps": 50,
            "guidance_scale": 5.0,
            "fps": 24,
        },
        "HeliosTransformer3DModel",
        {},
        (40, 40, 128),
        TokenLayout((9, 24, 40), prefix=240 + 240 + 1920),
    ),
}

FAMILY = Family(
    name="helios",
    transformers={"HeliosTransformer3DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=pixels,
    lone_first_frame=False,
    multiples=multiples,
    checkpoints=CHECKPOINTS,
    pipeline_class=pipeline_class,
)
