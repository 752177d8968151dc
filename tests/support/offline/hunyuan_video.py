"""Whole pipelines of HunyuanVideo with random weights."""

from __future__ import annotations

from typing import Any

import tiny_hunyuan as tiny


def pipeline(cls: str = "HunyuanVideoPipeline", more: dict[str, Any] | None = None, **changes: Any) -> Any:
    import diffusers

    model = tiny.transformer("HunyuanVideoTransformer3DModel", **changes)
    pipe = getattr(diffusers, cls)(transformer=model, **tiny.parts(), **(more or {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe
