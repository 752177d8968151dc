"""Whole pipelines of Z-Image with random weights."""

from __future__ import annotations

from typing import Any

import tiny_images
import tiny_text
from families.z_image import CASES


def tokenizer() -> Any:
    words = tiny_text.tokenizer(600)
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return words


def pipeline(name: str = "ZImagePipeline", model: Any = None, **parts: Any) -> Any:
    """Prompts of up to 32 tokens make 32."""
    return tiny_images.pipeline(
        name,
        model or CASES["z-image"].model(),
        text_encoder=tiny_text.llama(16),
        tokenizer=tokenizer(),
        **parts,
    )
