"""Lumina 2. Batch items have prompts of their own length, so that a batch needs a mask and its images stand
at different places."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    lengths = torch.tensor([12 + 5 * (item % 2) for item in range(first, first + batch)])
    return {
        "hidden_states": items(first, batch, config.in_channels, *(2 * n for n in grid[1:])),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": items(first, batch, 20, config.cap_feat_dim, seed=1),
        "encoder_attention_mask": (torch.arange(20) < lengths[:, None]).long(),
        "return_dict": False,
    }


def padded(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    given = inputs(model, 1, (1, 10, 12), 0)
    cut = {name: given[name][:, :12] for name in ("encoder_hidden_states", "encoder_attention_mask")}
    return given, {**given, **cut}


def on_meta(model: Any) -> None:
    """Texts fill their mask."""
    stock = model.rope_embedder.forward
    model.rope_embedder.forward = lambda image, mask: stock(image, torch.ones(mask.shape, dtype=torch.long))


CASES = {
    "lumina2": Case("Lumina2Transformer2DModel", inputs, grid=(1, 10, 12), padded=padded, on_meta=on_meta)
}
