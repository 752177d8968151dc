"""Whole pipelines of Chroma with random weights."""

from __future__ import annotations

from typing import Any

import tiny_images
import tiny_text
import torch

from dit_sparse.pipelines.chroma import FAMILY


def pipeline(name: str = "ChromaPipeline") -> Any:
    """A token is 4 x 4 pixels."""
    import diffusers

    torch.manual_seed(0)
    pipe = getattr(diffusers, name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=tiny_text.t5(16),
        tokenizer=tiny_text.tokenizer(),
        transformer=diffusers.ChromaTransformer2DModel(
            **FAMILY.transformers["ChromaTransformer2DModel"]
        ).eval(),
        vae=tiny_images.vae(1),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
