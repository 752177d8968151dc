"""Whole pipeline of Mochi with random weights."""

from __future__ import annotations

from typing import Any

import tiny_text
import torch
from families.mochi import CASES

CASE = CASES["mochi"]


def pipeline(**changes: Any) -> Any:
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline

    torch.manual_seed(0)
    pipe = MochiPipeline(
        tokenizer=tiny_text.tokenizer(),
        text_encoder=tiny_text.t5(16),
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ).eval(),
        transformer=CASE._replace(changes={"in_channels": 12}).model(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **changes,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
