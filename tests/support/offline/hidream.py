"""Whole pipeline of HiDream with random weights."""

from __future__ import annotations

from typing import Any

import tiny_images
import tiny_text
from families.hidream import CASES


def pipeline() -> Any:
    """16 tokens of text from T5, and twice 16 from Llama. It scales every size to that of a square image."""
    pipe = tiny_images.pipeline(
        "HiDreamImagePipeline",
        CASES["hidream"].model(),
        text_encoder=tiny_text.clip(8, projection=8, length=248),
        tokenizer=tiny_text.tokenizer(12, start=True),
        text_encoder_2=tiny_text.clip(8, projection=8, length=248),
        tokenizer_2=tiny_text.tokenizer(12, start=True),
        text_encoder_3=tiny_text.t5(16),
        tokenizer_3=tiny_text.tokenizer(),
        text_encoder_4=tiny_text.llama(16),
        tokenizer_4=tiny_text.tokenizer(),
    )
    pipe.default_sample_size = 34
    return pipe
