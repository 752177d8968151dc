"""Whole pipeline of AuraFlow with random weights."""

from __future__ import annotations

from typing import Any

import tiny_images
import tiny_text
from families.auraflow import CASES


def pipeline() -> Any:
    """8 registers and 16 tokens of text."""
    return tiny_images.pipeline(
        "AuraFlowPipeline",
        CASES["auraflow"].model(),
        text_encoder=tiny_text.t5(16, umt5=True),
        tokenizer=tiny_text.tokenizer(),
    )
