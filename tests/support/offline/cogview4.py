"""Whole pipelines of CogView4 and CogView3-Plus with random weights."""

from __future__ import annotations

from typing import Any

import tiny_images
import tiny_text
from families import cogview3plus, cogview4

CASES = {**cogview4.CASES, **cogview3plus.CASES}


def pipeline(case: str, cls: str, scheduler: str) -> Any:
    import diffusers

    pipe = getattr(diffusers, cls)(
        tokenizer=tiny_text.tokenizer(),
        text_encoder=tiny_text.t5(16) if case == "cogview3plus" else tiny_text.llama(16),
        vae=tiny_images.vae(blocks=4),
        transformer=CASES[case].model(),
        scheduler=getattr(diffusers, scheduler)(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
