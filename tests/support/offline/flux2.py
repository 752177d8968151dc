"""Whole pipelines of FLUX.2 with random weights."""

from __future__ import annotations

from typing import Any

import torch

from dit_sparse.pipelines.flux2 import FAMILY

TINY = FAMILY.transformers["Flux2Transformer2DModel"]


def pipeline(name: str = "Flux2KleinPipeline", **config: Any) -> Any:
    """A token is 8 x 8 pixels. Prompts come as embeddings."""
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = getattr(diffusers, name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=diffusers.Flux2Transformer2DModel(**{**TINY, **config}).eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
