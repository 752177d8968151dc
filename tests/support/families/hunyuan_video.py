"""HunyuanVideo: text and image to video."""

from typing import Any

import torch
from torch import Tensor

from families import Case, Grid, items

TEXT = 12


def lengths(first: int, batch: int, tokens: int) -> Tensor:
    """Mask [batch, tokens] of prompts, padded at the end, of which the first is longer than the others."""
    valid = torch.tensor([tokens - 3 * (item > 0) for item in range(first, first + batch)])
    return (torch.arange(tokens) < valid[:, None]).float()


def latents(model: Any, batch: int, grid: Grid, first: int) -> Tensor:
    config = model.config
    patch = config.patch_size_t, config.patch_size, config.patch_size
    return items(first, batch, config.in_channels, *[n * p for n, p in zip(grid, patch, strict=True)])


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": latents(model, batch, grid, first),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": items(first, batch, TEXT, config.text_embed_dim, seed=1),
        "encoder_attention_mask": lengths(first, batch, TEXT),
        "pooled_projections": items(first, batch, config.pooled_projection_dim, seed=2),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


def padded(
    call: dict[str, Any], states: str = "encoder_hidden_states", mask: str = "encoder_attention_mask"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same prompts of 8 tokens, padded to 12 and not."""
    valid = torch.ones_like(call[mask])
    valid[:, 8:] = 0
    return {**call, mask: valid}, {**call, states: call[states][:, :8], mask: valid[:, :8]}


def padded_prompts(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return padded(inputs(model, 2, (5, 4, 6), 0))


CASES = {
    "hunyuan": Case("HunyuanVideoTransformer3DModel", inputs, padded=padded_prompts),
    "hunyuan-i2v": Case(
        "HunyuanVideoTransformer3DModel",
        inputs,
        {"image_condition_type": "token_replace"},
        padded=padded_prompts,
    ),
}
