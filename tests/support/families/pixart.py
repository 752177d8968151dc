"""PixArt."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    size = [n * config.patch_size for n in grid[1:]]
    shape: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        shape = {
            "resolution": torch.tensor([[8.0 * n for n in size]] * batch),
            "aspect_ratio": torch.tensor([[size[0] / size[1]]] * batch),
        }
    return {
        "hidden_states": items(first, batch, config.in_channels, *size),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": items(first, batch, 12, config.caption_channels, seed=1),
        "encoder_attention_mask": (torch.arange(12) < 9).float().expand(batch, 12),
        "added_cond_kwargs": shape,
        "return_dict": False,
    }


CASES = {"pixart": Case("PixArtTransformer2DModel", inputs, grid=(1, 10, 12))}
