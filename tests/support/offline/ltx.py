"""Whole pipelines of LTX-Video and LTX-2 with random weights."""

from __future__ import annotations

from typing import Any

import tiny_text
import torch
from families import cases

CASES = cases()


def vae(cls: Any, **changes: Any) -> Any:
    """16x16 pixels and 4 frames a latent of 4 channels."""
    torch.manual_seed(0)
    scaling = (True, True, False, False)
    sizes = {
        "latent_channels": 4,
        "block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
        "spatio_temporal_scaling": scaling,
        "decoder_spatio_temporal_scaling": scaling,
        "decoder_inject_noise": (False,) * 5,
        "upsample_residual": (False,) * 4,
        "upsample_factor": (1,) * 4,
        "patch_size": 4,
        "patch_size_t": 1,
    }
    return cls(**{**sizes, **changes}).eval()


def pipeline(cls: str = "LTXPipeline", scheduler: Any = None) -> Any:
    import diffusers

    pipe = getattr(diffusers, cls)(
        tokenizer=tiny_text.tokenizer(),
        text_encoder=tiny_text.t5(16),
        transformer=CASES["ltx"].model(),
        vae=vae(diffusers.AutoencoderKLLTXVideo),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def joint_pipeline(cls: str = "LTX2Pipeline") -> Any:
    """LTX-2 with prompts embedded beforehand: its encoder is a Gemma."""
    import diffusers
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=1,
        **{f"{of}_connector_{n}": size for of in ("video", "audio") for n, size in sizes.items()},
        video_connector_num_learnable_registers=None,
        audio_connector_num_learnable_registers=None,
    ).eval()
    sound = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8
    )
    scaling = (True, True, False, False)
    pipe = getattr(diffusers, cls)(
        tokenizer=tiny_text.tokenizer(),
        text_encoder=None,
        connectors=connectors,
        transformer=CASES["ltx2"].model(),
        vae=vae(
            diffusers.AutoencoderKLLTX2Video,
            spatio_temporal_scaling=scaling,
            downsample_type=("spatiotemporal",) * 4,
            decoder_block_out_channels=(8,) * 3,
            decoder_layers_per_block=(1,) * 4,
            decoder_spatio_temporal_scaling=(True, True, False),
            upsample_residual=(False,) * 3,
            upsample_factor=(1,) * 3,
        ),
        audio_vae=sound.eval(),
        vocoder=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
