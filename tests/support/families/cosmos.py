"""Cosmos 1, 2 and 2.5: with and without given frames, and with an image context."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    frames, *sides = (n * p for n, p in zip(grid, config.patch_size, strict=True))
    projected = config.get("use_crossattn_projection")
    text = config.crossattn_proj_in_channels if projected else config.text_embed_dim
    call = {
        # Like the tokens of a video these have much in common: else no method could leave out any.
        "hidden_states": 1 + items(first, batch, config.out_channels, frames, *sides),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": items(first, batch, 12, text, seed=1),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, *(8 * side for side in sides)),
        "return_dict": False,
    }
    if config.in_channels > config.out_channels:
        given = torch.zeros(batch, 1, frames, *sides)
        given[:, :, 0] = 1
        call |= {"condition_mask": given, "timestep": torch.full((batch, 1, frames, 1, 1), 0.5)}
    if config.get("img_context_dim_in"):
        context = items(first, batch, config.img_context_num_tokens, config.img_context_dim_in, seed=2)
        call["encoder_hidden_states"] = call["encoder_hidden_states"], context
    return call


_GIVEN = {"in_channels": 5, "extra_pos_embed_type": None}
_PROJECTED = {
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 24,
    "encoder_hidden_states_channels": 16,
}
_CONTEXT = {"img_context_dim_in": 8, "img_context_num_tokens": 4, "img_context_dim_out": 32}

CASES = {
    "cosmos": Case("CosmosTransformer3DModel", inputs),
    "cosmos-given": Case("CosmosTransformer3DModel", inputs, _GIVEN),
    "cosmos-transfer2.5": Case("CosmosTransformer3DModel", inputs, {**_GIVEN, **_PROJECTED, **_CONTEXT}),
}
