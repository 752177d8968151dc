"""FLUX.1, LongCat-Image and Ovis-Image: text and image to image."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from families import Case, Grid, items


def ids(*grids: Grid, axes: int = 3) -> Tensor:
    """Position ids (image, row, column, 0 ...) of an image and reference images, [tokens, axes]."""
    of_images = []
    for i, (_, height, width) in enumerate(grids):
        place = torch.cartesian_prod(torch.tensor([i]), torch.arange(height), torch.arange(width))
        of_images.append(torch.nn.functional.pad(place, (0, axes - 3)))
    return torch.cat(of_images)


def inputs(
    model: Any, batch: int, grid: Grid, first: int, references: tuple[Grid, ...] = (), text: int = 12
) -> dict[str, Any]:
    """What all models of the family are called with."""
    config, img_ids = model.config, ids(grid, *references)
    return {
        "hidden_states": items(first, batch, len(img_ids), config.in_channels),
        "encoder_hidden_states": items(first, batch, text, config.joint_attention_dim, seed=1),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": img_ids,
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def flux(model: Any, batch: int, grid: Grid, first: int, **changes: Any) -> dict[str, Any]:
    return {
        **inputs(model, batch, grid, first, **changes),
        "pooled_projections": items(first, batch, model.config.pooled_projection_dim, seed=2),
        "guidance": torch.full((batch,), 3.5) if model.config.guidance_embeds else None,
    }


def longcat(model: Any, *call: Any, **changes: Any) -> dict[str, Any]:
    """Images are numbered from 1, rows and columns from 512."""
    given = inputs(model, *call, **changes)
    return {**given, "img_ids": given["img_ids"].float() + torch.tensor([1.0, 512.0, 512.0])}


GRID = (1, 10, 12)
REFERENCE = ((1, 5, 7),)
CASES = {
    "flux": Case("FluxTransformer2DModel", flux, {"guidance_embeds": True}, GRID),
    "flux-kontext": Case("FluxTransformer2DModel", partial(flux, references=REFERENCE), grid=GRID),
    "longcat-image": Case("LongCatImageTransformer2DModel", longcat, grid=GRID),
    "longcat-image-edit": Case(
        "LongCatImageTransformer2DModel", partial(longcat, references=REFERENCE), grid=GRID
    ),
    "ovis-image": Case("OvisImageTransformer2DModel", inputs, grid=GRID),
}
