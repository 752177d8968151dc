"""Mochi: text to video. The text of the first batch item is shorter than that of the others."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    frames, height, width = grid
    size = frames, height * config.patch_size, width * config.patch_size
    longest = config.max_sequence_length
    lengths = torch.where(torch.arange(first, first + batch) == 0, longest - 3, longest)
    return {
        "hidden_states": items(first, batch, config.in_channels, *size),
        "encoder_hidden_states": items(first, batch, longest, config.text_embed_dim, seed=1),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.arange(longest) < lengths[:, None],
        "return_dict": False,
    }


def padded(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first item's prompt has 9 of 12 tokens."""
    given = inputs(model, 1, (5, 4, 6), 0)
    return given, {**given, **{name: given[name][:, :9] for name in _TEXT}}


_TEXT = "encoder_hidden_states", "encoder_attention_mask"

CASES = {"mochi": Case("MochiTransformer3DModel", inputs, padded=padded)}
