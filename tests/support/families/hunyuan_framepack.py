"""Framepack: a section of a video after its history."""

from typing import Any

import torch

from families import Case, Grid, hunyuan_video, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """With history as the pipeline gives it."""
    common = hunyuan_video.inputs(model, batch, grid, first)
    channels, frames, *sides = common["hidden_states"].shape[1:]
    history = {"clean": 2, "history_2x": 2, "history_4x": 16}
    return {
        **common,
        "image_embeds": items(first, batch, 3, model.config.image_proj_dim, seed=3),
        "indices_latents": torch.arange(7, 7 + frames),
        **{f"latents_{k}": items(first, batch, channels, n, *sides, seed=n) for k, n in history.items()},
        **{f"indices_latents_{k}": torch.arange(n) for k, n in history.items()},
    }


def padded_prompts(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a batch: a single prompt the model trims itself."""
    return hunyuan_video.padded(inputs(model, 2, (5, 4, 6), 0))


CASES = {"framepack": Case("HunyuanVideoFramepackTransformer3DModel", inputs, padded=padded_prompts)}
