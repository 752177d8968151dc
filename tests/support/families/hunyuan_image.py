"""HunyuanImage 2.1 and its refiner."""

from typing import Any

import torch

from families import Case, Grid, hunyuan_video, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """Arguments that a variant has no use for are left out."""
    config = model.config
    size = [n * p for n, p in zip(grid[-len(config.patch_size) :], config.patch_size, strict=True)]
    call = {
        "hidden_states": items(first, batch, config.in_channels, *size),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": items(first, batch, 12, config.text_embed_dim, seed=1),
        "encoder_attention_mask": hunyuan_video.lengths(first, batch, 12),
        "return_dict": False,
    }
    if config.text_embed_2_dim is not None:
        call["encoder_hidden_states_2"] = items(first, batch, 7, config.text_embed_2_dim, seed=2)
        call["encoder_attention_mask_2"] = hunyuan_video.lengths(first, batch, 7)
    if config.use_meanflow:
        call["timestep_r"] = torch.full((batch,), 250.0)
    if config.guidance_embeds:
        call["guidance"] = torch.full((batch,), 3250.0)
    return call


def padded_prompts(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return hunyuan_video.padded(inputs(model, 2, GRID, 0))


GRID = (1, 10, 12)
CASES = {
    "hunyuanimage": Case("HunyuanImageTransformer2DModel", inputs, grid=GRID, padded=padded_prompts),
    "hunyuanimage-refiner": Case(
        "HunyuanImageTransformer2DModel",
        inputs,
        {
            "in_channels": 8,
            "patch_size": (1, 1, 1),
            "rope_axes_dim": (4, 4, 4),
            "text_embed_2_dim": None,
            "guidance_embeds": True,
        },
        grid=GRID,
        padded=padded_prompts,
    ),
}
