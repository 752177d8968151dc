"""Whole pipelines of Helios with random weights."""

from __future__ import annotations

from typing import Any

import tiny_models
from families import cases

CASES = cases()


def pipeline(cls: str = "HeliosPipeline", scheduler: Any = None, **config: Any) -> Any:
    import diffusers

    base = tiny_models.wan_pipeline()
    pipe = getattr(diffusers, cls)(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=base.vae,
        scheduler=scheduler or diffusers.HeliosScheduler(stages=1, use_dynamic_shifting=True, shift=1.0),
        transformer=CASES["helios"].model(),
        **config,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
