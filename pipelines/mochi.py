"""Mochi 1: text to video. A sequence is [video, text] of one batch item, without the padding of its text: the
processor cuts it off and calls attention once for every item, so that each has a length and a memory of its
own. Classifier-free guidance is one batch, [uncond, cond].
"""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, patches, stacks

TINY: Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "pooled_projection_dim": 16,
    "in_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 4,
    "max_sequence_length": 12,
}


def layers(model: Any) -> list[Layer]:
    """``transformer_blocks.*.attn1``."""
    return stacks(model, ("transformer_blocks", "attn1"))


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, C, F, H, W]; text follows the grid."""
    patch = model.config.patch_size
    return TokenLayout(patches(args["hidden_states"].shape[2:], (1, patch, patch)))


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; the autoencoder's scales are those of the pipeline."""
    side = 8 * transformer["patch_size"]
    return 6, side, side


CHECKPOINTS: dict[str, Checkpoint] = {
    "mochi": Checkpoint(
        "genmo/mochi-1-preview",
        "10b",
        "text to video, 480x848; 30 GB of weights in bfloat16",
        # As genmo's own code, which the documentation of diffusers repeats.
        {
            "height": 480,
            "width": 848,
            "num_frames": 163,
            "fps": 30,
            "num_inference_steps": 64,
            "guidance_scale": 6.0,
        },
        "MochiTransformer3DModel",
        {},
        (48, 24, 128),
        TokenLayout((28, 30, 53), text=256),
    ),
}

FAMILY = Family(
    name="mochi",
    transformers={"MochiTransformer3DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=pixels,
    joint=True,
    items=lambda model, args: len(args["hidden_states"]),
    branches=("cond_uncond",),
    checkpoints=CHECKPOINTS,
)
