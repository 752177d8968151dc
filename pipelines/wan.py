"""Wan 2.1 and 2.2: text, image and VACE to video. Text and image enter by cross-attention, which stays
dense. What each method does at each size is in ``wan_presets.py``.
"""

from __future__ import annotations

from math import lcm
from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, numbered, patches
from dit_sparse.pipelines.wan_presets import PRESETS

TINY: Config = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 3,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}


def layers(model: Any) -> list[Layer]:
    """``blocks.*.attn1``, and VACE's control blocks under the index of the block they feed."""
    count = len(model.blocks)
    own = [f"blocks.{i}.attn1" for i in range(count)]
    fed = list(model.config.vace_layers) if hasattr(model, "vace_blocks") else []
    control = [f"vace_blocks.{i}.attn1" for i in range(len(fed))]
    return numbered(model, own + control, index=[*range(count), *fed], count=count)


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, C, F, H, W]."""
    return TokenLayout(patches(args["hidden_states"].shape[2:], model.config.patch_size))


def anchors(model: Any, args: Arguments) -> int:
    """The given image is the first frame. It comes as extra input channels, or (TI2V) with a timestep of its
    own.

    TI2V has timesteps per token also without an image; reading the first frame does no harm there.
    """
    is_vace = hasattr(model, "vace_blocks")
    extra_channels = model.config.in_channels > model.config.out_channels and not is_vace
    return int(extra_channels or args["timestep"].ndim == 2)


def size_of(transformer: Config, experts: int) -> str | None:
    """The key of the presets, read off a transformer's config for fine-tuned copies; None where unknown.

    Args:
        transformer: The transformer's ``config.json``.
        experts: Transformers of the pipeline, 2 for the A14B models of Wan2.2.
    """
    sizes = {(12, 30): "1.3b", (40, 40): "14b", (24, 30): "5b"}
    size = sizes.get((transformer["num_attention_heads"], transformer["num_layers"]))
    return "a14b" if size == "14b" and experts == 2 else size


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; the first frame is a token frame of its own.

    Older configs of the autoencoder do not name its scales; they are the class's defaults, 4 and 8.
    """
    scale = vae.get("scale_factor_temporal", 4), *[vae.get("scale_factor_spatial", 8)] * 2
    frames, height, width = (s * p for s, p in zip(scale, transformer["patch_size"], strict=True))
    return frames, height, width


def multiples(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(t, h, w): frames are one above a multiple of t, height and width are multiples of h and w.

    The pipelines ask for multiples of 16 in any case.
    """
    frames, height, width = pixels(transformer, vae)
    return frames, lcm(16, height), lcm(16, width)


def pipeline_class(index: Config, image: bool) -> str:
    """The pipeline in diffusers for a ``model_index.json``: Wan2.2 TI2V has two.

    Raises:
        ValueError: An image for a model that takes none, or none for one that needs it.
    """
    name, both = index["_class_name"], index.get("expand_timesteps", False)
    if both:
        return "WanImageToVideoPipeline" if image else "WanPipeline"
    if name == "WanPipeline" and image:
        raise ValueError("a text-to-video model takes no image; image-to-video models are listed as such")
    if name == "WanImageToVideoPipeline" and not image:
        raise ValueError("an image-to-video model needs an image")
    return name


# `fps` and `flow_shift` are no keywords of the pipeline's call: whoever calls it takes them out. Sources:
# examples in diffusers 0.42 (Wan2.1: flow shift 3 for 480p, 5 for 720p); wan/configs of Wan-Video/Wan2.2.
_480P = {"height": 480, "width": 832, "num_frames": 81, "fps": 16, "flow_shift": 3.0}
_720P = {"height": 720, "width": 1280, "num_frames": 81, "fps": 16, "flow_shift": 5.0}
_WAN21 = {"num_inference_steps": 50, "guidance_scale": 5.0}

CHECKPOINTS: dict[str, Checkpoint] = {
    "wan2.1": Checkpoint(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "1.3b",
        "text to video, 480p; about 29 GB on disk; fits a 24 GB card in bfloat16",
        {**_480P, **_WAN21},
    ),
    "wan2.1-14b": Checkpoint(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "14b",
        "text to video, 480p and 720p; on a 24 GB card with --offload group",
        {**_720P, **_WAN21},
        "WanTransformer3DModel",
        {},
        (40, 40, 128),
        TokenLayout((21, 45, 80)),
    ),
    "wan2.1-i2v": Checkpoint(
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "14b",
        "image to video, 480p; on a 24 GB card with --offload group",
        {**_480P, **_WAN21},
    ),
    "wan2.1-i2v-720p": Checkpoint(
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        "14b",
        "image to video, 720p; on a 24 GB card with --offload group",
        {**_720P, **_WAN21},
    ),
    "wan2.1-vace": Checkpoint(
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        "1.3b",
        "text and reference image to video, 480p; fits a 24 GB card in bfloat16",
        {**_480P, **_WAN21},
    ),
    "wan2.1-vace-14b": Checkpoint(
        "Wan-AI/Wan2.1-VACE-14B-diffusers",
        "14b",
        "text and reference image to video, 480p and 720p; on a 24 GB card with --offload group",
        {**_720P, **_WAN21},
    ),
    "wan2.2": Checkpoint(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "a14b",
        "text to video, two experts, 480p and 720p; on a 24 GB card with --offload group",
        {
            **_720P,
            "num_inference_steps": 40,
            "guidance_scale": 4.0,
            "guidance_scale_2": 3.0,
            "flow_shift": 12.0,
        },
    ),
    "wan2.2-i2v": Checkpoint(
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "a14b",
        "image to video, two experts, 480p and 720p; on a 24 GB card with --offload group",
        {**_720P, "num_inference_steps": 40, "guidance_scale": 3.5, "guidance_scale_2": 3.5},
    ),
    "wan2.2-5b": Checkpoint(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "5b",
        "text or image to video, 720p at 24 frames a second; on a 24 GB card with --offload model",
        {**_720P, **_WAN21, "height": 704, "num_frames": 121, "fps": 24},
    ),
}

FAMILY = Family(
    name="wan",
    transformers={
        "WanTransformer3DModel": TINY,
        "WanVACETransformer3DModel": {**TINY, "vace_layers": [0, 2], "vace_in_channels": 8},
    },
    layers=layers,
    layout=layout,
    pixels=pixels,
    anchors=anchors,
    schedule="dense 0-25%; layers 0",
    presets=PRESETS,
    float32=("vae", "image_encoder"),  # as the diffusers documentation recommends
    checkpoints=CHECKPOINTS,
    multiples=multiples,
    pipeline_class=pipeline_class,
    size_of=size_of,
)
