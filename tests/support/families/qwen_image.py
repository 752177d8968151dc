"""Qwen-Image: text, and images to be edited, to an image or layers of one."""

from __future__ import annotations

from functools import partial
from inspect import signature
from math import prod
from typing import Any

import torch

from families import Case, Grid, items


def inputs(
    model: Any, batch: int, grid: Grid, first: int, references: tuple[Grid, ...] = (), text: int = 12
) -> dict[str, Any]:
    """Each frame is an image of its own, as the layers of Qwen-Image-Layered are."""
    config, (frames, height, width) = model.config, grid
    images = [(1, height, width)] * frames + list(references)
    layered = {"additional_t_cond": torch.zeros(batch, dtype=torch.long)}
    asks_lengths = "txt_seq_lens" in signature(type(model).forward).parameters  # diffusers before 0.40
    return {
        "hidden_states": items(first, batch, sum(map(prod, images)), config.in_channels),
        "encoder_hidden_states": items(first, batch, text, config.joint_attention_dim, seed=1),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [images] * batch,
        "return_dict": False,
        **({"txt_seq_lens": [text] * batch} if asks_lengths else {}),
        **(layered if config.get("use_additional_t_cond") else {}),
    }


def masked(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """Every other prompt is shorter by four tokens."""
    lengths = torch.tensor([[12 - 4 * (item % 2)] for item in range(first, first + batch)])
    return {
        **inputs(model, batch, grid, first),
        "encoder_hidden_states_mask": torch.arange(12) < lengths,
    }


def padded(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    long, short = (inputs(model, 2, (1, 10, 12), 0, text=text) for text in (12, 7))
    long["encoder_hidden_states_mask"] = torch.arange(12).expand(2, -1) < 7
    short["encoder_hidden_states"] = long["encoder_hidden_states"][:, :7]
    return long, short


CASES = {
    "qwen-image": Case("QwenImageTransformer2DModel", masked, grid=(1, 10, 12), padded=padded),
    # As Qwen-Image-Edit-2511, with two images.
    "qwen-image-edit": Case(
        "QwenImageTransformer2DModel",
        partial(inputs, references=((1, 3, 5), (1, 4, 4))),
        {"zero_cond_t": True},
        (1, 10, 12),
    ),
    "qwen-image-layered": Case(
        "QwenImageTransformer2DModel",
        partial(inputs, references=((1, 4, 6),)),
        {"use_additional_t_cond": True, "use_layer3d_rope": True},
    ),
}
