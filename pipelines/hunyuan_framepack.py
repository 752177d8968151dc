"""Framepack: HunyuanVideo that makes a video section by section. The sequence is [history at a quarter of the
resolution, at half, whole frames, the section, text]; history is read and updated by all and is no grid. A
single prompt is trimmed by the model, a batch is padded and masked. Every section counts its steps from 0 and
remembers nothing of the one before.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.pipelines import hunyuan_video
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, own_pipeline

TINY: Config = {
    **hunyuan_video.TINY,
    "has_image_proj": True,
    "image_proj_dim": 6,
    "has_clean_x_embedder": True,
}

_HISTORY = {"latents_clean": (1, 2, 2), "latents_history_2x": (2, 4, 4), "latents_history_4x": (4, 8, 8)}
"""Latents that become one token; shorter and smaller ones are padded."""


def layout(model: Any, args: Arguments) -> TokenLayout:
    """The prefix is all history; the model cannot run without any of it."""
    history = sum(
        prod(-(-n // p) for n, p in zip(args[name].shape[2:], patch, strict=True))
        for name, patch in _HISTORY.items()
    )
    return TokenLayout(hunyuan_video.grid(model, args), prefix=history)


# 91 frames at 832x480: sections of 9 latent frames; history of 16, 2 and 1 + 1 frames of 104x60 latents.
CHECKPOINTS: dict[str, Checkpoint] = {
    name: Checkpoint(
        repo,
        "framepack",
        f"image to video of any length, {sampling} sampling; a transformer alone, for "
        "HunyuanVideoFramepackPipeline with the other parts of hunyuanvideo-community/HunyuanVideo",
        {
            "height": 832,
            "width": 480,
            "num_frames": 91,
            "num_inference_steps": 30,
            "guidance_scale": 9.0,
            "sampling_type": sampling,
            "fps": 30,
        },
        "HunyuanVideoFramepackTransformer3DModel",
        {"has_image_proj": True, "has_clean_x_embedder": True},
        (60, 24, 128),
        TokenLayout((9, 52, 30), text=985, prefix=2 * 52 * 30 + 26 * 15 + 4 * 13 * 8),
    )
    for name, repo, sampling in (
        ("framepack", "lllyasviel/FramePackI2V_HY", "inverted_anti_drifting"),
        ("framepack-f1", "lllyasviel/FramePack_F1_I2V_HY_20250503", "vanilla"),
    )
}

FAMILY = Family(
    name="hunyuan_framepack",
    transformers={"HunyuanVideoFramepackTransformer3DModel": TINY},
    layers=hunyuan_video.layers,
    layout=layout,
    pixels=hunyuan_video.pixels,
    joint=True,
    checkpoints=CHECKPOINTS,
    pipeline_class=partial(own_pipeline, starts_from_image="Framepack"),
)
