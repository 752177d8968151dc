"""Cosmos 3: text to image, video, sound and action, from one packed sequence without batch:
``[text, grid, sound, action]``. Text reads itself alone, causally, and stays dense; all that is generated
reads itself and text, so that queries are fewer than keys. Keys have fewer heads than queries.
"""

from __future__ import annotations

from math import prod
from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, numbered

TINY: Config = {
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "latent_channel": 4,
    "patch_latent_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 16,
    "rope_axes_dim": (4, 2, 2),
    "sound_dim": 4,
    "sound_gen": True,
}


def layers(model: Any) -> list[Layer]:
    """``layers.*.self_attn``."""
    config = model.config
    return numbered(
        model,
        [f"layers.{i}.self_attn" for i in range(config.num_hidden_layers)],
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        dim=config.hidden_size,
    )


def layout(model: Any, args: Arguments) -> TokenLayout | str:
    """Grids are given as such; what follows the grid is sound and action, as the pipeline packs them."""
    grids = args["vision_token_shapes"]
    if len(grids) != 1:
        return f"{len(grids)} images or videos share the sequence"
    generated = args["sequence_length"] - args["und_len"]
    return TokenLayout(tuple(grids[0]), text_first=True, suffix=generated - prod(grids[0]))


def anchors(model: Any, args: Arguments) -> int:
    """The frames that are given: those without noise."""
    return int(args["vision_token_shapes"][0][0]) - len(args["vision_noisy_frame_indexes"][0])


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; Wan2.2's autoencoder."""
    side = vae["scale_factor_spatial"] * transformer["latent_patch_size"]
    return vae["scale_factor_temporal"], side, side


def multiples(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """As the pipeline asks: the model fills patches that stick out."""
    return vae["scale_factor_temporal"], vae["scale_factor_spatial"], vae["scale_factor_spatial"]


CHECKPOINTS = {
    "cosmos3": Checkpoint(
        "nvidia/Cosmos3-Nano",
        "nano",
        "text or image to video with sound, 720p at 24 frames a second; 8B for text and 8B beside for video",
        {
            "height": 720,
            "width": 1280,
            "num_frames": 189,
            "num_inference_steps": 35,
            "guidance_scale": 6.0,
            "fps": 24,
        },
        "Cosmos3OmniTransformer",
        {},
        (36, 32, 128),
        TokenLayout((48, 23, 40), text=256, text_first=True),
    ),
}

FAMILY = Family(
    name="cosmos3",
    transformers={"Cosmos3OmniTransformer": TINY},
    layers=layers,
    layout=layout,
    pixels=pixels,
    joint=True,
    anchors=anchors,
    text_asks=False,
    hidden=("gen_seq", "und_seq"),
    timestep="vision_timesteps",
    checkpoints=CHECKPOINTS,
    multiples=multiples,
    pipeline_class=lambda index, image: index["_class_name"],
)
