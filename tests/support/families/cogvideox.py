"""CogVideoX and ConsisID: text, image and portrait to video."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    config = model.config
    frames, height, width = grid
    together, patch = config.get("patch_size_t") or 1, config.patch_size
    size = frames * together, config.in_channels, height * patch, width * patch
    found: dict[str, Any] = {
        "hidden_states": items(first, batch, *size),
        "encoder_hidden_states": items(
            first, batch, config.max_text_seq_length, config.text_embed_dim, seed=1
        ),
        "timestep": torch.full((batch,), 500),
        "return_dict": False,
    }
    if config.use_rotary_positional_embeddings:
        whole = {"crops_coords": None, "grid_type": "slice", "max_size": (height, width)}
        found["image_rotary_emb"] = get_3d_rotary_pos_embed(
            config.attention_head_dim, grid_size=(height, width), temporal_size=frames, **whole
        )
    if config.get("ofs_embed_dim"):
        found["ofs"] = torch.full((1,), 2.0)
    return found


def portrait_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    return {
        **inputs(model, batch, grid, first),
        "id_cond": items(first, batch, config.LFE_id_dim, seed=2),
        "id_vit_hidden": [
            items(first, batch, 9, config.LFE_vit_dim, seed=3 + i) for i in range(config.LFE_num_scale)
        ],
    }


CASES = {
    "cogvideox": Case("CogVideoXTransformer3DModel", inputs),
    # As CogVideoX 2B, whose positions are added to the tokens.
    "cogvideox-2b": Case("CogVideoXTransformer3DModel", inputs, {"use_rotary_positional_embeddings": False}),
    "cogvideox1.5-i2v": Case(
        "CogVideoXTransformer3DModel",
        inputs,
        {"in_channels": 8, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 4},
    ),
    "consisid": Case("ConsisIDTransformer3DModel", portrait_inputs),
}
