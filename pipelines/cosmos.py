"""Cosmos 1, Predict2, Predict2.5 and Transfer2.5: text, image and video to world, one transformer class for
all. Text, and the image context of 2.5, enter by cross-attention, so self-attention has the grid alone.
Given frames come in their places of the grid, with a mask as one more channel that tells them.
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
    scaled,
    stacks,
    wan_scale,
)

TINY: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (16, 32, 32),
}


def layers(model: Any) -> list[Layer]:
    """``transformer_blocks.*.attn1``."""
    return stacks(model, ("transformer_blocks", "attn1"))


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, C, F, H, W]."""
    return TokenLayout(patches(args["hidden_states"].shape[2:], model.config.patch_size))


def anchors(model: Any, args: Arguments) -> int:
    """The first frame, where frames are given: how many are is known to the device only.

    Predict2.5 has a mask also without given frames; reading the first frame does no harm there.
    """
    return int(args.get("condition_mask") is not None)


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; later models have Wan's autoencoder."""
    scale = wan_scale(vae)
    if "temporal_compression_ratio" in vae:
        side = vae["spatial_compression_ratio"]
        scale = vae["temporal_compression_ratio"], side, side
    return scaled(scale, transformer["patch_size"])


def pipeline_class(index: Config, image: bool) -> str:
    """As ``model_index.json`` says: models that continue frames need them, the others take none."""
    name: str = index["_class_name"]
    if name in ("CosmosTextToWorldPipeline", "Cosmos2TextToImagePipeline") and image:
        raise ValueError("a text-to-world model takes no image; video-to-world models are listed as such")
    if name in ("CosmosVideoToWorldPipeline", "Cosmos2VideoToWorldPipeline") and not image:
        raise ValueError("a video-to-world model needs an image")
    return name


_GNA = "arXiv 2504.16922, Cosmos-7B at 720p on a B200: "
_TILES = {"tile": (4, 4, 8), "stride": (1, 8, 16), "exact": False}
_WIDE, _NARROW = {**_TILES, "window": (-1, 32, 48)}, {**_TILES, "window": (-1, 24, 16)}
PRESETS = {
    ("neighborhood", "7b"): {
        "quality": Preset(_WIDE, "dense 0-33%", f"{_GNA}56 % sparse, 12 of 35 steps dense, 1.26x"),
        "balanced": Preset(_WIDE, "always", f"{_GNA}56 % sparse, 1.46x"),
        "fast": Preset(_NARROW, "dense 0-33%", f"{_GNA}89 % sparse, 12 of 35 steps dense, 1.50x"),
    },
}

# Configurations: diffusers, scripts/convert_cosmos_to_diffusers.py; calls: defaults of the pipelines in
# diffusers 0.42. Predict2.5 and Transfer2.5 are revisions of their repositories, so a name cannot tell them.
_WORLD = {"height": 704, "width": 1280, "num_frames": 121, "num_inference_steps": 36, "guidance_scale": 7.0}
_PREDICT2 = {**_WORLD, "num_frames": 93, "num_inference_steps": 35, "fps": 16}
_IMAGE = {"height": 768, "width": 1360, "num_inference_steps": 35, "guidance_scale": 7.0}
_7B, _14B, _2B = (28, 32, 128), (36, 40, 128), (28, 16, 128)
_LARGE: Config = {"num_attention_heads": 40, "num_layers": 36}
_SMALL: Config = {"num_attention_heads": 16}
_GIVEN: Config = {"in_channels": 17}  # the mask of given frames is the last


def _named(
    repo: str,
    size: str,
    about: str,
    call: dict[str, Any],
    config: Config,
    attention: tuple[int, int, int],
    grid: tuple[int, int, int],
) -> Checkpoint:
    transformer = "CosmosTransformer3DModel"
    return Checkpoint(f"nvidia/{repo}", size, about, call, transformer, config, attention, TokenLayout(grid))


_FPS30 = {**_WORLD, "fps": 30}
CHECKPOINTS = {
    "cosmos": _named(
        "Cosmos-1.0-Diffusion-7B-Text2World", "7b", "text to video, 720p", _FPS30, {}, _7B, (16, 44, 80)
    ),
    "cosmos-v2w": _named(
        "Cosmos-1.0-Diffusion-7B-Video2World",
        "7b",
        "image or video to video, 720p",
        _FPS30,
        _GIVEN,
        _7B,
        (16, 44, 80),
    ),
    "cosmos-14b": _named(
        "Cosmos-1.0-Diffusion-14B-Text2World",
        "14b",
        "text to video, 720p",
        _FPS30,
        {**_LARGE, "rope_scale": (2.0, 2.0, 2.0)},
        _14B,
        (16, 44, 80),
    ),
    "cosmos-14b-v2w": _named(
        "Cosmos-1.0-Diffusion-14B-Video2World",
        "14b",
        "image or video to video, 720p",
        _FPS30,
        {**_LARGE, **_GIVEN, "rope_scale": (2.0, 2.0, 2.0)},
        _14B,
        (16, 44, 80),
    ),
    "cosmos-predict2": _named(
        "Cosmos-Predict2-2B-Video2World",
        "predict2-2b",
        "image or video to video, 720p at 16 frames a second",
        _PREDICT2,
        {**_SMALL, **_GIVEN, "rope_scale": (1.0, 3.0, 3.0), "extra_pos_embed_type": None},
        _2B,
        (24, 44, 80),
    ),
    "cosmos-predict2-14b": _named(
        "Cosmos-Predict2-14B-Video2World",
        "predict2-14b",
        "image or video to video, 720p at 16 frames a second",
        _PREDICT2,
        {**_LARGE, **_GIVEN, "rope_scale": (20 / 24, 2.0, 2.0), "extra_pos_embed_type": None},
        _14B,
        (24, 44, 80),
    ),
    "cosmos-predict2-t2i": _named(
        "Cosmos-Predict2-2B-Text2Image",
        "predict2-2b",
        "text to image",
        _IMAGE,
        {**_SMALL, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None},
        _2B,
        (1, 48, 85),
    ),
    "cosmos-predict2-14b-t2i": _named(
        "Cosmos-Predict2-14B-Text2Image",
        "predict2-14b",
        "text to image",
        _IMAGE,
        {**_LARGE, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None},
        _14B,
        (1, 48, 85),
    ),
}

FAMILY = Family(
    name="cosmos",
    transformers={"CosmosTransformer3DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=pixels,
    anchors=anchors,
    presets=PRESETS,
    checkpoints=CHECKPOINTS,
    pipeline_class=pipeline_class,
)
