"""HiDream-I1: double and then single blocks attend over [image, text]; the part of the text that comes from
Llama is another one in every block. The pipeline makes any image about as large as a square one of 1024
pixels, and one that is not square is filled up to its 4096 tokens: keys of what is added are zero but not
masked, so it stays part of the attention. Guidance is one batched call.
"""

from __future__ import annotations

from math import prod
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
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "caption_channels": [16, 16],
    "text_emb_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "max_resolution": (34, 34),
    "llama_layers": [0, 1, 1, 1],
}


def layers(model: Any) -> list[Layer]:
    """Double blocks, then single blocks."""
    return stacks(model, ("double_stream_blocks", "block.attn1"), ("single_stream_blocks", "block.attn1"))


def layout(model: Any, args: Arguments) -> TokenLayout | str:
    """``hidden_states`` is [B, C, H, W], or [B, tokens, C] with ``img_sizes`` in tokens."""
    hidden = args["hidden_states"]
    if hidden.ndim == 4:
        patch = model.config.patch_size
        grid = patches((1, *hidden.shape[2:]), (1, patch, patch))
        tokens = prod(grid) if hidden.shape[2] == hidden.shape[3] else model.max_seq
        return TokenLayout(grid, suffix=tokens - prod(grid))
    sizes = {(int(height), int(width)) for height, width in args["img_sizes"]}
    if len(sizes) > 1:
        return "a batch of images of different sizes"
    grid = 1, *sizes.pop()
    return TokenLayout(grid, suffix=hidden.shape[1] - prod(grid))


# configs of HiDream-ai/HiDream-I1 on the Hub, repeated in conversion scripts of others: the last of Llama's
# 32 layers serves the last 17 blocks.
_I1: Config = {
    "patch_size": 2,
    "in_channels": 16,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": [*range(32), *[31] * 16],
}


def _hidream(repo: str, about: str, steps: int, guidance: float) -> Checkpoint:
    """Of the text 128 tokens are T5's and twice 128 Llama's."""
    return Checkpoint(
        f"HiDream-ai/{repo}",
        "17b",
        f"{about}; from Python, which must give the pipeline Llama 3.1 8B Instruct as text_encoder_4",
        {"height": 1024, "width": 1024, "num_inference_steps": steps, "guidance_scale": guidance},
        "HiDreamImageTransformer2DModel",
        _I1,
        (48, 20, 128),
        TokenLayout((1, 64, 64), text=384),
    )


CHECKPOINTS: dict[str, Checkpoint] = {
    "hidream-i1-full": _hidream("HiDream-I1-Full", "text to image, 1024x1024", 50, 5.0),
    "hidream-i1-dev": _hidream("HiDream-I1-Dev", "text to image in 28 steps, 1024x1024", 28, 0.0),
    "hidream-i1-fast": _hidream("HiDream-I1-Fast", "text to image in 16 steps, 1024x1024", 16, 0.0),
}

FAMILY = Family(
    name="hidream",
    transformers={"HiDreamImageTransformer2DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=square_patches,
    joint=True,
    video=False,
    timestep="timesteps",
    branches=("cond_uncond",),
    checkpoints=CHECKPOINTS,
)
