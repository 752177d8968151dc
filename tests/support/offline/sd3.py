"""Whole pipelines of Stable Diffusion 3 with random weights."""

from __future__ import annotations

from typing import Any

import tiny_images
import tiny_text
from families.sd3 import CASES


def pipeline(case: str = "sd3", name: str = "StableDiffusion3Pipeline", **parts: Any) -> Any:
    """12 tokens of text from CLIP and 16 from T5."""
    return tiny_images.pipeline(
        name,
        parts.pop("transformer", None) or CASES[case].model(),
        text_encoder=tiny_text.clip(8, projection=8),
        text_encoder_2=tiny_text.clip(8, projection=8),
        text_encoder_3=tiny_text.t5(16),
        tokenizer=tiny_text.tokenizer(12, start=True),
        tokenizer_2=tiny_text.tokenizer(12, start=True),
        tokenizer_3=tiny_text.tokenizer(),
        **parts,
    )
