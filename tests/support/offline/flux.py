"""Whole pipelines of FLUX.1 with random weights."""

from __future__ import annotations

from typing import Any

import tiny_images
import tiny_text
import torch

from dit_sparse.pipelines.flux import FAMILY

TINY = FAMILY.transformers["FluxTransformer2DModel"]


def pipeline(name: str = "FluxPipeline", config: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A token is 4 x 4 pixels."""
    import diffusers

    torch.manual_seed(0)
    given = {**TINY, "guidance_embeds": True, **(config or {})}
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "text_encoder": tiny_text.clip(8),
        "tokenizer": tiny_text.tokenizer(start=True),
        "text_encoder_2": tiny_text.t5(16),
        "tokenizer_2": tiny_text.tokenizer(),
        "transformer": diffusers.FluxTransformer2DModel(**given).eval(),
        "vae": tiny_images.vae(1),
    }
    pipe = getattr(diffusers, name)(**parts, **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe
