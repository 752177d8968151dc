"""CogView4: text, and a control image, to image. Text stands before the grid in one sequence. The pipelines
pad it to a multiple of 16 and give no mask; one that is given, diffusers adds to the scores as 0 and 1.
"""

from __future__ import annotations

from typing import Any

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
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "rope_axes_dim": (32, 32),
}


def layers(model: Any) -> list[Layer]:
    """``transformer_blocks.*.attn1``."""
    return stacks(model, ("transformer_blocks", "attn1"))


def layout(model: Any, args: Arguments) -> TokenLayout | str:
    """``hidden_states`` is [B, C, H, W]."""
    if args.get("attention_mask") is not None:
        return "diffusers adds CogView4's attention_mask to the scores as 0 and 1, which hides no token"
    patch = model.config.patch_size
    return TokenLayout(patches((1, *args["hidden_states"].shape[2:]), (1, patch, patch)), text_first=True)


# Calls: the pipeline's defaults. Configuration: diffusers, scripts/convert_cogview4_to_diffusers_megatron.py.
_CALL = {"height": 1024, "width": 1024, "num_inference_steps": 50, "guidance_scale": 5.0}
_CONFIG: Config = {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128}
_CLASS = "CogView4Transformer2DModel"
_SHAPE = (28, 32, 128)
_TOKENS = TokenLayout((1, 64, 64), text=64, text_first=True)  # text as long as the prompt, up to 1024

CHECKPOINTS: dict[str, Checkpoint] = {
    "cogview4": Checkpoint(
        "zai-org/CogView4-6B",
        "6b",
        "text to image, 512 to 2048 pixels a side; 32 GB of weights in bfloat16",
        _CALL,
        _CLASS,
        _CONFIG,
        _SHAPE,
        _TOKENS,
    ),
    "cogview4-control": Checkpoint(
        "zai-org/CogView4-6B-Control",
        "6b",
        "text and, from Python, a control image to image; 32 GB of weights in bfloat16",
        _CALL,
        _CLASS,
        {**_CONFIG, "in_channels": 32},
        _SHAPE,
        _TOKENS,
    ),
}

FAMILY = Family(
    name="cogview4",
    transformers={_CLASS: TINY},
    layers=layers,
    layout=layout,
    pixels=square_patches,
    joint=True,
    video=False,
    checkpoints=CHECKPOINTS,
)
