"""Stable Diffusion 3: with one and with two attentions in a block."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    size = [n * config.patch_size for n in grid[1:]]
    return {
        "hidden_states": items(first, batch, config.in_channels, *size),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": items(first, batch, 12, config.joint_attention_dim, seed=1),
        "pooled_projections": items(first, batch, config.pooled_projection_dim, seed=2),
        "return_dict": False,
    }


IMAGE = (1, 10, 12)

CASES = {
    "sd3": Case("SD3Transformer2DModel", inputs, grid=IMAGE),
    "sd3.5-medium": Case(
        "SD3Transformer2DModel", inputs, {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}, IMAGE
    ),
}
