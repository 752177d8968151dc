"""Whole pipelines of Kandinsky 5 with random weights."""

from __future__ import annotations

from typing import Any

import tiny_hunyuan
from families import cases

CASES = cases()


def pipeline(case: str, cls: str = "Kandinsky5T2VPipeline") -> Any:
    """Prompts are embedded beforehand: the encoder is a Qwen2.5-VL."""
    import diffusers

    pipe = getattr(diffusers, cls)(
        transformer=CASES[case].model(),
        vae=tiny_hunyuan.vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
