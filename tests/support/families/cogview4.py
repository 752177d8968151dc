"""CogView4: text, and control, to image."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    height, width = (n * config.patch_size for n in grid[1:])
    size = torch.tensor([[8.0 * height, 8.0 * width]]).expand(batch, 2)
    return {
        "hidden_states": items(first, batch, config.in_channels, height, width),
        "encoder_hidden_states": items(first, batch, 12, config.text_embed_dim, seed=1),
        "timestep": torch.full((batch,), 500),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2),
        "return_dict": False,
    }


IMAGE = (1, 10, 12)

CASES = {
    "cogview4": Case("CogView4Transformer2DModel", inputs, grid=IMAGE),
    "cogview4-control": Case("CogView4Transformer2DModel", inputs, {"in_channels": 8}, IMAGE),
}
