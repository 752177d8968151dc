"""Kandinsky 5: text and image to video. Text enters by cross-attention; its own self-attention stays dense.
Where a model is configured for NABLA, the sparse attention it was trained with, tokens stand in squares of
8x8, frame by frame. A method then takes NABLA's place in its layers: what the schedule leaves dense is full
attention there, and layers without a method keep NABLA.
"""

from __future__ import annotations

import ast
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, patches, scaled, stacks

TINY: Config = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (4, 4, 4),
}


def layers(model: Any) -> list[Layer]:
    """``self_attention`` of the blocks that tokens of the video pass."""
    width, head_dim = model.config.model_dim, sum(model.config.axes_dims)
    shape = {"heads": width // head_dim, "head_dim": head_dim, "dim": width}
    return stacks(model, ("visual_transformer_blocks", "self_attention"), **shape)


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, F, H, W, C]."""
    return TokenLayout(patches(args["hidden_states"].shape[1:4], model.config.patch_size))


def positions(model: Any, args: Arguments) -> Tensor | None:
    """NABLA's squares, with which ``sparse_params`` come."""
    given = args.get("sparse_params")
    return in_squares(layout(model, args).grid) if given is not None and given["to_fractal"] else None


@cache
def in_squares(grid: tuple[int, int, int], side: int = 8) -> Tensor:
    """Where tokens in raster order stand when frames are cut into squares: int64 [N]."""
    frames, height, width = grid
    squares = torch.arange(prod(grid)).view(frames, height // side, side, width // side, side)
    return squares.transpose(2, 3).flatten().argsort()


def without_nabla(definition: ast.FunctionDef) -> None:
    """Let the mask of the processor's attention call be None: a method chooses blocks by itself."""
    for node in ast.walk(definition):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            callee = node.value.func
            if isinstance(callee, ast.Name) and callee.id == "nablaT_v2":
                node.value = ast.copy_location(ast.Constant(None), node.value)


def anchors(model: Any, args: Arguments) -> int:
    """Models with channels for an image are given it as the first frame.

    Those for text have these channels too, and zeros in them; reading the first frame does no harm there.
    """
    return int(model.config.visual_cond and args["hidden_states"].shape[1] > 1)


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; the first frame is a token frame of its own."""
    scale = vae.get("temporal_compression_ratio", 4), *[vae.get("spatial_compression_ratio", 8)] * 2
    return scaled(scale, transformer["patch_size"])


def multiples(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """NABLA needs whole squares of 8x8 tokens."""
    frames, height, width = pixels(transformer, vae)
    side = 8 if transformer["attention_type"] == "nabla" else 1
    return frames, side * height, side * width


# Calls: examples in diffusers 0.42. Configurations: configs of kandinskylab/kandinsky-5.
_CALL = {"height": 512, "width": 768, "num_frames": 121, "num_inference_steps": 50, "guidance_scale": 5.0}
_CALL |= {"fps": 24}
_LITE: Config = {
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "model_dim": 1792,
    "ff_dim": 7168,
    "visual_cond": True,
}
_PRO: Config = {
    **_LITE,
    "time_dim": 1024,
    "model_dim": 4096,
    "ff_dim": 16384,
    "num_text_blocks": 4,
    "num_visual_blocks": 60,
    "axes_dims": (32, 48, 48),
}
_NABLA: Config = {
    "attention_type": "nabla",
    "attention_method": "topcdf",
    "attention_P": 0.9,
    "attention_add_sta": True,
    "attention_wT": 11,
    "attention_wH": 3,
    "attention_wW": 3,
}
_CLASS = "Kandinsky5Transformer3DModel"

CHECKPOINTS: dict[str, Checkpoint] = {
    "kandinsky-5-lite": Checkpoint(
        "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
        "2b",
        "text to video, 5 seconds; on a 24 GB card with --offload model",
        _CALL,
        _CLASS,
        _LITE,
        (32, 28, 64),
        TokenLayout((31, 32, 48)),
    ),
    "kandinsky-5-lite-10s": Checkpoint(
        "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-10s-Diffusers",
        "2b-nabla",
        "text to video, 10 seconds, trained with NABLA; on a 24 GB card with --offload model",
        {**_CALL, "num_frames": 241},
        _CLASS,
        {**_LITE, **_NABLA},
        (32, 28, 64),
        TokenLayout((61, 32, 48)),
    ),
    "kandinsky-5-pro": Checkpoint(
        "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers",
        "19b",
        "text to video, 5 seconds; on a 24 GB card with --offload group",
        _CALL,
        _CLASS,
        _PRO,
        (60, 32, 128),
        TokenLayout((31, 32, 48)),
    ),
    "kandinsky-5-pro-i2v": Checkpoint(
        "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers",
        "19b",
        "image to video, 5 seconds; on a 24 GB card with --offload group",
        _CALL,
        _CLASS,
        _PRO,
        (60, 32, 128),
        TokenLayout((31, 32, 48)),
    ),
}

FAMILY = Family(
    name="kandinsky5",
    transformers={_CLASS: TINY},
    layers=layers,
    layout=layout,
    pixels=pixels,
    positions=positions,
    edit=without_nabla,
    anchors=anchors,
    checkpoints=CHECKPOINTS,
    multiples=multiples,
)
