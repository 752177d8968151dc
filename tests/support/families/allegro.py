"""Allegro: text to video, with and without a mask over the pixels."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    config = model.config
    frames, height, width = grid
    size = frames, height * config.patch_size, width * config.patch_size
    *frequencies, t, h, w = get_3d_rotary_pos_embed_allegro(
        config.attention_head_dim, ((0, 0), (height, width)), (height, width), frames
    )
    positions = torch.cartesian_prod(t.long(), h.long(), w.long()).T[:, None]
    return {
        "hidden_states": items(first, batch, config.in_channels, *size),
        "encoder_hidden_states": items(first, batch, 12, config.caption_channels, seed=1),
        "encoder_attention_mask": torch.ones(batch, 12),
        "timestep": torch.full((batch,), 500),
        "image_rotary_emb": (tuple(frequencies), tuple(positions)),
        "return_dict": False,
    }


def masked_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """Item 0 has a frame less than the others, and all lack the right edge."""
    found = inputs(model, batch, grid, first)
    mask = torch.ones(batch, *found["hidden_states"].shape[2:])
    mask[..., -model.config.patch_size :] = 0
    if first == 0:
        mask[0, -1] = 0
    return {**found, "attention_mask": mask}


CASES = {
    "allegro": Case("AllegroTransformer3DModel", inputs),
    "allegro-masked": Case("AllegroTransformer3DModel", masked_inputs),
}
