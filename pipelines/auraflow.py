"""AuraFlow: joint blocks and then single blocks attend over [registers and text, image] alike. The padding of
a prompt is zeroed, not masked: it stays part of the attention. Guidance is one batched call.
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
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pos_embed_max_size": 400,
}


def layers(model: Any) -> list[Layer]:
    """Joint blocks, then single blocks."""
    return stacks(model, ("joint_transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, C, H, W]. The registers count as text."""
    patch = model.config.patch_size
    grid = patches((1, *args["hidden_states"].shape[2:]), (1, patch, patch))
    return TokenLayout(grid, text_first=True)


CHECKPOINTS: dict[str, Checkpoint] = {
    # The class's defaults are the released model's, but for its table of positions: 96 x 96 of them.
    # 8 registers and 256 tokens of text.
    "auraflow": Checkpoint(
        "fal/AuraFlow-v0.3",
        "6.8b",
        "text to image, to 1536 pixels a side; on a 24 GB card with --offload model",
        {"height": 1024, "width": 1024, "num_inference_steps": 50, "guidance_scale": 3.5},
        "AuraFlowTransformer2DModel",
        {"pos_embed_max_size": 9216},
        (36, 12, 256),
        TokenLayout((1, 64, 64), text=264, text_first=True),
    ),
}

FAMILY = Family(
    name="auraflow",
    transformers={"AuraFlowTransformer2DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=square_patches,
    joint=True,
    video=False,
    branches=("cond_uncond",),
    checkpoints=CHECKPOINTS,
)
