"""Whole pipeline of Framepack with random weights."""

from __future__ import annotations

from typing import Any

import tiny_hunyuan as tiny


def pipeline() -> Any:
    from diffusers import HunyuanVideoFramepackPipeline

    pipe = HunyuanVideoFramepackPipeline(
        transformer=tiny.transformer("HunyuanVideoFramepackTransformer3DModel"),
        **tiny.vision(),
        **tiny.parts(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
