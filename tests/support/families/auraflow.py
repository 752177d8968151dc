"""AuraFlow."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    size = [n * config.patch_size for n in grid[1:]]
    return {
        # Small, lest what a random model's attention adds to them be lost beside them.
        "hidden_states": 0.05 * items(first, batch, config.in_channels, *size),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": items(first, batch, 12, config.joint_attention_dim, seed=1),
        "return_dict": False,
    }


CASES = {"auraflow": Case("AuraFlowTransformer2DModel", inputs, grid=(1, 10, 12))}
