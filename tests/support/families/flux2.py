"""Flux.2: text and reference images to image."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from families import Case, Grid, items
from families.flux import ids


def inputs(
    model: Any, batch: int, grid: Grid, first: int, references: tuple[Grid, ...] = (), text: int = 12
) -> dict[str, Any]:
    config, img_ids = model.config, ids(grid, *references, axes=4)
    txt_ids = torch.cartesian_prod(*[torch.arange(n) for n in (1, 1, 1, text)])
    return {
        "hidden_states": items(first, batch, len(img_ids), config.in_channels),
        "encoder_hidden_states": items(first, batch, text, config.joint_attention_dim, seed=1),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": img_ids.expand(batch, -1, -1),
        "txt_ids": txt_ids.expand(batch, -1, -1),
        "guidance": torch.full((batch,), 4.0) if config.guidance_embeds else None,
        "return_dict": False,
    }


CASES = {
    "flux2": Case("Flux2Transformer2DModel", inputs, {"guidance_embeds": True}, (1, 10, 12)),
    "flux2-references": Case(
        "Flux2Transformer2DModel", partial(inputs, references=((1, 3, 5), (1, 4, 4))), grid=(1, 10, 12)
    ),
}
