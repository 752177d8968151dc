"""Whole pipelines of Qwen-Image with random weights."""

from __future__ import annotations

from typing import Any

import torch

from dit_sparse.pipelines.qwen_image import FAMILY

TINY = FAMILY.transformers["QwenImageTransformer2DModel"]


def pipeline(name: str = "QwenImagePipeline", config: dict[str, Any] | None = None, **parts: Any) -> Any:
    """A token is 16 x 16 pixels. Prompts come as embeddings."""
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    given = {**TINY, "in_channels": 16, "out_channels": 4, **(config or {})}
    pipe = getattr(diffusers, name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=diffusers.QwenImageTransformer2DModel(**given).eval(),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
