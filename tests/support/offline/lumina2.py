"""Whole pipeline of Lumina-Image 2.0 with random weights."""

from __future__ import annotations

from typing import Any

import tiny_images
import tiny_text
from families.lumina2 import CASES


def pipeline() -> Any:
    return tiny_images.pipeline(
        "Lumina2Pipeline",
        CASES["lumina2"].model(),
        vae=tiny_images.vae(blocks=4),
        text_encoder=tiny_text.llama(16),
        tokenizer=tiny_text.tokenizer(),
    )
