"""Wan: text, image and VACE to video."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    size = [n * p for n, p in zip(grid, config.patch_size, strict=True)]
    return {
        "hidden_states": items(first, batch, config.in_channels, *size),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": items(first, batch, 12, config.text_dim, seed=1),
        "return_dict": False,
    }


def vace_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    common = inputs(model, batch, grid, first)
    size = common["hidden_states"].shape[2:]
    return {
        **common,
        "control_hidden_states": items(first, batch, model.config.vace_in_channels, *size, seed=2),
        "control_hidden_states_scale": torch.ones(len(model.config.vace_layers)),
    }


CASES = {
    "wan": Case("WanTransformer3DModel", inputs),
    # As Wan2.2's image to video: image latents and mask as 6 more input channels.
    "wan-i2v": Case("WanTransformer3DModel", inputs, {"in_channels": 10}),
    "wan-vace": Case("WanVACETransformer3DModel", vace_inputs),
}
