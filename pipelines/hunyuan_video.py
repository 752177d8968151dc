"""HunyuanVideo: text and image to video, and SkyReels V1. Dual-stream and then single-stream blocks attend
over [video, text] alike. Text is always padded and the mask always there, bool [B, 1, 1, S], hiding the tail;
the attention of the text refiner stays dense. What each method does is in ``hunyuan_video_presets.py``.
"""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, patches, stacks
from dit_sparse.pipelines.hunyuan_video_presets import PRESETS

TINY: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 4, 4),
}


def layers(model: Any) -> list[Layer]:
    """Dual-stream blocks, then single-stream blocks."""
    return stacks(model, ("transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))


def grid(model: Any, args: Arguments) -> tuple[int, int, int]:
    """``hidden_states`` is [B, C, F, H, W]."""
    config = model.config
    return patches(
        args["hidden_states"].shape[2:], (config.patch_size_t, config.patch_size, config.patch_size)
    )


def layout(model: Any, args: Arguments) -> TokenLayout:
    """Text follows the grid."""
    return TokenLayout(grid(model, args))


def anchors(model: Any, args: Arguments) -> int:
    """The given image is the first frame: in its place, or as further channels (SkyReels, 33 channels)."""
    config = model.config
    return int(config.image_condition_type is not None or config.in_channels > config.out_channels)


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; the first frame is a token frame of its own."""
    side = vae.get("spatial_compression_ratio", 8) * transformer["patch_size"]
    return vae.get("temporal_compression_ratio", 4) * transformer["patch_size_t"], side, side


# Call and flow shift: Tencent-Hunyuan/HunyuanVideo, sample_video.py; of image to video the examples of
# diffusers 0.42. Configurations: diffusers, scripts/convert_hunyuan_video_to_diffusers.py.
_720P = {"height": 720, "width": 1280, "num_frames": 129, "fps": 24, "flow_shift": 7.0}
_CALL = {**_720P, "num_inference_steps": 50, "guidance_scale": 6.0}
_SHAPE = (60, 24, 128)
_GRID = (33, 45, 80)

CHECKPOINTS: dict[str, Checkpoint] = {
    "hunyuanvideo": Checkpoint(
        "hunyuanvideo-community/HunyuanVideo",
        "13b",
        "text to video, 720p; on a 24 GB card with --offload group",
        _CALL,
        "HunyuanVideoTransformer3DModel",
        {},
        _SHAPE,
        TokenLayout(_GRID, text=256),
    ),
    "hunyuanvideo-i2v": Checkpoint(
        "hunyuanvideo-community/HunyuanVideo-I2V",
        "13b",
        "image to video, 720p, the image is the first frame; on a 24 GB card with --offload group",
        _CALL,
        "HunyuanVideoTransformer3DModel",
        {"image_condition_type": "token_replace"},
        _SHAPE,
        TokenLayout(_GRID, text=396),  # every 4th of 576 image tokens and 252 of text
    ),
    "hunyuanvideo-i2v-33ch": Checkpoint(
        "hunyuanvideo-community/HunyuanVideo-I2V-33ch",
        "13b",
        "image to video, 720p, its first release; on a 24 GB card with --offload group",
        {**_CALL, "guidance_scale": 1.0},
        "HunyuanVideoTransformer3DModel",
        {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
        _SHAPE,
        TokenLayout(_GRID, text=540),  # every 2nd of 576 image tokens and 252 of text
    ),
}

FAMILY = Family(
    name="hunyuan_video",
    transformers={"HunyuanVideoTransformer3DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=pixels,
    joint=True,
    anchors=anchors,
    presets=PRESETS,
    checkpoints=CHECKPOINTS,
)
