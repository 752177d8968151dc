"""Chroma: Flux with a mask over text and image."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from families import Case, Grid, flux


def inputs(model: Any, batch: int, grid: Grid, first: int, text: int = 12) -> dict[str, Any]:
    """Nothing is hidden: with gradient checkpointing, diffusers' single blocks forget the mask."""
    mask = torch.ones(batch, text + prod(grid), dtype=torch.bool)
    return {**flux.inputs(model, batch, grid, first, text=text), "attention_mask": mask}


def padded(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    long, short = (inputs(model, 2, (1, 10, 12), 0, text) for text in (12, 7))
    long["attention_mask"][:, 7:12] = False
    short["encoder_hidden_states"] = long["encoder_hidden_states"][:, :7]
    return long, short


CASES = {"chroma": Case("ChromaTransformer2DModel", inputs, grid=(1, 10, 12), padded=padded)}
