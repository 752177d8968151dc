"""EasyAnimate: text to video, and with further channels."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    frames, height, width = grid
    size = frames, height * config.patch_size, width * config.patch_size
    found = {
        "hidden_states": items(first, batch, config.out_channels, *size),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": items(first, batch, 12, config.text_embed_dim, seed=1),
        "return_dict": False,
    }
    more = config.in_channels - config.out_channels
    if more:
        found["inpaint_latents"] = items(first, batch, more, *size, seed=2)
    if config.text_embed_dim_t5 is not None:
        found["encoder_hidden_states_t5"] = items(first, batch, 5, config.text_embed_dim_t5, seed=3)
    return found


CASES = {
    "easyanimate": Case("EasyAnimateTransformer3DModel", inputs, {"text_embed_dim_t5": 8}),
    "easyanimate-inp": Case("EasyAnimateTransformer3DModel", inputs, {"in_channels": 9}),
}
