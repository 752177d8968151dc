"""Helios: a chunk of a video and three histories of it."""

from typing import Any

import torch

from families import Case, Grid, items

HISTORY = {"long": 16, "mid": 2, "short": 2}
"""Frames of latents: the last 16 before the last 2 before the last one, and the first of all."""


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    frames, *size = (n * p for n, p in zip(grid, config.patch_size, strict=True))
    call = {
        "hidden_states": items(first, batch, config.in_channels, frames, *size),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": items(first, batch, 12, config.text_dim, seed=1),
        "indices_hidden_states": sum(HISTORY.values()) + torch.arange(frames)[None],
        "return_dict": False,
    }
    start = 0
    for seed, (name, count) in enumerate(HISTORY.items(), 2):
        latents = items(first, batch, config.in_channels, count, *size, seed=seed)
        call[f"latents_history_{name}"] = latents
        call[f"indices_latents_history_{name}"] = start + torch.arange(count)[None]
        start += count
    return call


CASES = {"helios": Case("HeliosTransformer3DModel", inputs)}
