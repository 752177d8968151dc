"""Lumina-Image 2.0: the noise refiner attends over the image, then the layers over [text, image]; the context
refiner sees text alone and stays dense. Padding of a prompt is cut off, so in a batch of prompts of different
lengths each image begins at its own place. Guidance is two calls, the one with the prompt first.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import (
    Arguments,
    Checkpoint,
    Config,
    Family,
    patches,
    square_patches,
    stacks,
)

TINY: Config = {
    "sample_size": 32,
    "in_channels": 4,
    "hidden_size": 48,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 16,
    "axes_dim_rope": (4, 4, 4),
    "axes_lens": (64, 32, 32),
    "cap_feat_dim": 16,
}


def layers(model: Any) -> list[Layer]:
    """The noise refiner, then ``layers``."""
    return stacks(model, ("noise_refiner", "attn"), ("layers", "attn"))


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, C, H, W]."""
    patch = model.config.patch_size
    grid = patches((1, *args["hidden_states"].shape[2:]), (1, patch, patch))
    return TokenLayout(grid, text_first=True)


def positions(model: Any, args: Arguments) -> Tensor | None:
    """Prompts of different lengths: an image begins behind its own. The model waits for these lengths too."""
    lengths = args["encoder_attention_mask"].sum(dim=1)
    if len(lengths) == 1 or bool((lengths == lengths[0]).all()):
        return None
    tokens = torch.arange(prod(layout(model, args).grid), device=lengths.device)
    return lengths[:, None] + tokens


CHECKPOINTS: dict[str, Checkpoint] = {
    # The class's defaults are the released model's, but for the width of its text encoder, Gemma 2 2B.
    "lumina-image-2.0": Checkpoint(
        "Alpha-VLLM/Lumina-Image-2.0",
        "2b",
        "text to image, 1024x1024; fits a 24 GB card in bfloat16",
        {"height": 1024, "width": 1024, "num_inference_steps": 50, "guidance_scale": 4.0},
        "Lumina2Transformer2DModel",
        {"cap_feat_dim": 2304},
        (28, 24, 96),
        TokenLayout((1, 64, 64), text=256, text_first=True),
    ),
}

FAMILY = Family(
    name="lumina2",
    transformers={"Lumina2Transformer2DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=square_patches,
    joint=True,
    video=False,
    positions=positions,
    checkpoints=CHECKPOINTS,
)
