"""Whole pipelines of PixArt with random weights."""

from __future__ import annotations

from typing import Any

import tiny_images
import tiny_text
from families.pixart import CASES


def pipeline(name: str = "PixArtSigmaPipeline", scheduler: str = "DPMSolverMultistepScheduler") -> Any:
    import diffusers

    return tiny_images.pipeline(
        name,
        CASES["pixart"].model(),
        scheduler=getattr(diffusers, scheduler)(),
        text_encoder=tiny_text.t5(16),
        tokenizer=tiny_text.tokenizer(),
    )
