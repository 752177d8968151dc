"""HunyuanVideo 1.5: dual-stream blocks over [video, text], where text is image, glyph and prompt tokens with
all padding at the end. Its processor builds a mask of all queries and keys in every call, gigabytes at 720p,
which here is never made: hiding the keys suffices, as nothing that is used reads what padded queries give.
"""

from __future__ import annotations

import ast
from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines import hunyuan_video
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, stacks

TINY: Config = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "text_embed_2_dim": 8,
    "image_embed_dim": 6,
    "rope_axes_dim": (4, 4, 4),
    "task_type": "t2v",
}


def layers(model: Any) -> list[Layer]:
    """``transformer_blocks.*.attn``."""
    return stacks(model, ("transformer_blocks", "attn"))


def anchors(model: Any, args: Arguments) -> int:
    """The given image is the first frame. Whether there is one is in values; a text-to-video model that is
    said to be for images reads its first frame, which does no harm.
    """
    return int(model.config.task_type == "i2v")


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; the first frame is a token frame of its own."""
    side = vae.get("spatial_compression_ratio", 16) * transformer["patch_size"]
    return vae.get("temporal_compression_ratio", 4) * transformer["patch_size_t"], side, side


_KEYS_ONLY = {
    "self_attn_mask_1 = attention_mask.view(batch_size, 1, 1, seq_len).repeat(1, 1, seq_len, 1)": (
        "attention_mask.view(batch_size, 1, 1, seq_len)"
    ),
    "attention_mask = (self_attn_mask_1 & self_attn_mask_2).bool()": "self_attn_mask_1",
}


def keys_only(call: ast.FunctionDef) -> None:
    """Leave the mask [B, 1, 1, S], of keys, instead of [B, 1, S, S].

    Raises:
        ValueError: The processor builds its mask in another way than the one known here.
    """
    known = dict(_KEYS_ONLY)
    for statement in call.body:
        value = known.pop(ast.unparse(statement), None)
        if value is not None and isinstance(statement, ast.Assign):
            statement.value = ast.parse(value, mode="eval").body
            for node in ast.walk(statement.value):
                ast.copy_location(node, statement)
    if known:
        raise ValueError(f"HunyuanVideo 1.5's processor was expected to have the lines {list(known)}")


# Configurations and flow shifts: diffusers, scripts/convert_hunyuan_video1_5_to_diffusers.py. The scale of
# guidance belongs to the guider in the model's folder; image to video takes its size from the image.
_CALL = {"num_frames": 121, "num_inference_steps": 50, "fps": 24}
_480P = {"height": 480, "width": 848}
_720P = {"height": 720, "width": 1280}
_TEXT = 1000 + 256 + 729  # prompt, glyphs, image


def _checkpoint(name: str, about: str, call: Config, config: Config, height: int, width: int) -> Checkpoint:
    return Checkpoint(
        f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{name}",
        "8b",
        f"{about}; on a 24 GB card with --offload model",
        {**_CALL, **call},
        "HunyuanVideo15Transformer3DModel",
        config,
        (54, 16, 128),
        TokenLayout((31, height, width), text=_TEXT),
    )


CHECKPOINTS: dict[str, Checkpoint] = {
    "hunyuanvideo-1.5": _checkpoint(
        "480p_t2v", "text to video, 480p", {**_480P, "flow_shift": 5.0}, {"task_type": "t2v"}, 30, 53
    ),
    "hunyuanvideo-1.5-720p": _checkpoint(
        "720p_t2v",
        "text to video, 720p",
        {**_720P, "flow_shift": 9.0},
        {"task_type": "t2v", "target_size": 960},
        45,
        80,
    ),
    "hunyuanvideo-1.5-i2v": _checkpoint("480p_i2v", "image to video, 480p", {"flow_shift": 5.0}, {}, 30, 53),
    "hunyuanvideo-1.5-i2v-720p": _checkpoint(
        "720p_i2v", "image to video, 720p", {"flow_shift": 7.0}, {"target_size": 960}, 45, 80
    ),
}

FAMILY = Family(
    name="hunyuan_video15",
    transformers={"HunyuanVideo15Transformer3DModel": TINY},
    layers=layers,
    layout=hunyuan_video.layout,
    pixels=pixels,
    joint=True,
    anchors=anchors,
    edit=keys_only,
    branches=("pred_cond", "pred_uncond"),
    checkpoints=CHECKPOINTS,
)
