"""Wan 2.1 and 2.2, and what was made of them: VACE, Animate, ChronoEdit and SkyReels-V2. Text, image and face
enter by cross-attention, which stays dense, so self-attention has the grid alone. Animate's reference image
is the first frame of the grid. SkyReels-V2 with diffusion forcing gives each frame a timestep of its own, and
may let blocks of frames read only those before them: such a call stays dense. The released models are in
``wan_checkpoints.py``, what each method does at each size is in ``wan_presets.py``.
"""

from __future__ import annotations

from math import lcm
from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Config, Family, numbered, patches, scaled, wan_scale
from dit_sparse.pipelines.wan_checkpoints import CHECKPOINTS
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
TINY_ANIMATE: Config = {
    **TINY,
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": None,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 4},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 8,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 3,
}


def layers(model: Any) -> list[Layer]:
    """``blocks.*.attn1``, and VACE's control blocks under the index of the block they feed."""
    count = len(model.blocks)
    own = [f"blocks.{i}.attn1" for i in range(count)]
    fed = list(model.config.vace_layers) if hasattr(model, "vace_blocks") else []
    control = [f"vace_blocks.{i}.attn1" for i in range(len(fed))]
    return numbered(model, own + control, index=[*range(count), *fed], count=count)


def layout(model: Any, args: Arguments) -> TokenLayout | str:
    """``hidden_states`` is [B, C, F, H, W]; Animate's begin with the frame of the reference."""
    causal = model.config.get("num_frame_per_block", 1)
    if causal > 1:
        return f"blocks of {causal} frames read only themselves and those before them"
    return TokenLayout(patches(args["hidden_states"].shape[2:], model.config.patch_size))


def anchors(model: Any, args: Arguments) -> int:
    """The given image is the first frame. It comes as extra input channels, or with a timestep of its own.

    TI2V has timesteps per token, and diffusion forcing per frame, also without an image; reading the first
    frame does no harm there.
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
    if transformer["_class_name"] not in ("WanTransformer3DModel", "WanVACETransformer3DModel"):
        return None  # nothing was published for what was made of Wan
    sizes = {(12, 30): "1.3b", (40, 40): "14b", (24, 30): "5b"}
    size = sizes.get((transformer["num_attention_heads"], transformer["num_layers"]))
    return "a14b" if size == "14b" and experts == 2 else size


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; the first frame is a token frame of its own."""
    return scaled(wan_scale(vae), transformer["patch_size"])


def multiples(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(t, h, w): frames are one above a multiple of t, height and width are multiples of h and w.

    The pipelines ask for multiples of 16 in any case.
    """
    frames, height, width = pixels(transformer, vae)
    return frames, lcm(16, height), lcm(16, width)


def pipeline_class(index: Config, image: bool) -> str:
    """The pipeline in diffusers for a ``model_index.json``: some models have two.

    Raises:
        ValueError: An image for a model that takes none, or none for one that needs it.
    """
    name = index["_class_name"]
    if index.get("expand_timesteps", False):  # Wan2.2 TI2V
        return "WanImageToVideoPipeline" if image else "WanPipeline"
    if name == "SkyReelsV2DiffusionForcingPipeline":
        return "SkyReelsV2DiffusionForcingImageToVideoPipeline" if image else name
    if name in ("WanPipeline", "SkyReelsV2Pipeline") and image:
        raise ValueError("a text-to-video model takes no image; image-to-video models are listed as such")
    if name in FROM_IMAGE and not image:
        raise ValueError("an image-to-video model needs an image")
    return name


FROM_IMAGE = (
    "WanImageToVideoPipeline",
    "WanAnimatePipeline",
    "ChronoEditPipeline",
    "SkyReelsV2ImageToVideoPipeline",
)

FAMILY = Family(
    name="wan",
    transformers={
        "WanTransformer3DModel": TINY,
        "WanVACETransformer3DModel": {**TINY, "vace_layers": [0, 2], "vace_in_channels": 8},
        "WanAnimateTransformer3DModel": TINY_ANIMATE,
        "ChronoEditTransformer3DModel": {**TINY, "in_channels": 12},
        "SkyReelsV2Transformer3DModel": TINY,
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
