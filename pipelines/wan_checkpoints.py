"""The released models of the Wan family: configurations as in diffusers' conversion scripts
(convert_wan_to_diffusers.py, convert_skyreelsv2_to_diffusers.py), defaults as in its examples.
"""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.pipelines.family import Checkpoint, Config

# `fps` and `flow_shift` are no keywords of the pipeline's call: whoever calls it takes them out. Sources:
# examples in diffusers 0.42 (Wan2.1: flow shift 3 for 480p, 5 for 720p); wan/configs of Wan-Video/Wan2.2.
_480P = {"height": 480, "width": 832, "num_frames": 81, "fps": 16, "flow_shift": 3.0}
_720P = {"height": 720, "width": 1280, "num_frames": 81, "fps": 16, "flow_shift": 5.0}
_540P = {"height": 544, "width": 960, "num_frames": 97, "fps": 24, "flow_shift": 8.0}
_WAN21 = {"num_inference_steps": 50, "guidance_scale": 5.0}
_SKYREELS: dict[str, Any] = {**_540P, "num_inference_steps": 50, "guidance_scale": 6.0}

_GRID_480P, _GRID_720P, _GRID_540P = (
    TokenLayout((21, 30, 52)),
    TokenLayout((21, 45, 80)),
    TokenLayout((25, 34, 60)),
)

_SMALL: Config = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_LARGE: Config = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}  # Wan's own defaults
_FROM_CHANNELS: Config = {"in_channels": 36}  # beside the noise: the mask of given frames, and these frames
_FROM_IMAGE: Config = {**_FROM_CHANNELS, "image_dim": 1280, "added_kv_proj_dim": 5120}

_SHAPE_SMALL, _SHAPE_LARGE = (30, 12, 128), (40, 40, 128)

_GROUP = "on a 24 GB card with --offload group"

CHECKPOINTS: dict[str, Checkpoint] = {
    "wan2.1": Checkpoint(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "1.3b",
        "text to video, 480p; about 29 GB on disk; fits a 24 GB card in bfloat16",
        {**_480P, **_WAN21},
        "WanTransformer3DModel",
        _SMALL,
        _SHAPE_SMALL,
        _GRID_480P,
    ),
    "wan2.1-14b": Checkpoint(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "14b",
        f"text to video, 480p and 720p; {_GROUP}",
        {**_720P, **_WAN21},
        "WanTransformer3DModel",
        {},
        _SHAPE_LARGE,
        _GRID_720P,
    ),
    "wan2.1-i2v": Checkpoint(
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "14b",
        f"image to video, 480p; {_GROUP}",
        {**_480P, **_WAN21},
        "WanTransformer3DModel",
        _FROM_IMAGE,
        _SHAPE_LARGE,
        _GRID_480P,
    ),
    "wan2.1-i2v-720p": Checkpoint(
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        "14b",
        f"image to video, 720p; {_GROUP}",
        {**_720P, **_WAN21},
        "WanTransformer3DModel",
        _FROM_IMAGE,
        _SHAPE_LARGE,
        _GRID_720P,
    ),
    "wan2.1-vace": Checkpoint(
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        "1.3b",
        "text and reference image to video, 480p; fits a 24 GB card in bfloat16",
        {**_480P, **_WAN21},
        "WanVACETransformer3DModel",
        {**_SMALL, "vace_layers": tuple(range(0, 30, 2))},
        _SHAPE_SMALL,
        _GRID_480P,
    ),
    "wan2.1-vace-14b": Checkpoint(
        "Wan-AI/Wan2.1-VACE-14B-diffusers",
        "14b",
        f"text and reference image to video, 480p and 720p; {_GROUP}",
        {**_720P, **_WAN21},
        "WanVACETransformer3DModel",
        {},
        _SHAPE_LARGE,
        _GRID_720P,
    ),
    "wan2.2": Checkpoint(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "a14b",
        f"text to video, two experts, 480p and 720p; {_GROUP}",
        {
            **_720P,
            "num_inference_steps": 40,
            "guidance_scale": 4.0,
            "guidance_scale_2": 3.0,
            "flow_shift": 12.0,
        },
        "WanTransformer3DModel",
        {},
        _SHAPE_LARGE,
        _GRID_720P,
    ),
    "wan2.2-i2v": Checkpoint(
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "a14b",
        f"image to video, two experts, 480p and 720p; {_GROUP}",
        {**_720P, "num_inference_steps": 40, "guidance_scale": 3.5, "guidance_scale_2": 3.5},
        "WanTransformer3DModel",
        _FROM_CHANNELS,
        _SHAPE_LARGE,
        _GRID_720P,
    ),
    "wan2.2-5b": Checkpoint(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "5b",
        "text or image to video, 720p at 24 frames a second; on a 24 GB card with --offload model",
        {**_720P, **_WAN21, "height": 704, "num_frames": 121, "fps": 24},
        "WanTransformer3DModel",
        {
            "in_channels": 48,
            "out_channels": 48,
            "num_attention_heads": 24,
            "num_layers": 30,
            "ffn_dim": 14336,
        },
        (30, 24, 128),
        TokenLayout((31, 22, 40)),
    ),
    "wan2.2-animate": Checkpoint(
        "Wan-AI/Wan2.2-Animate-14B-Diffusers",
        "animate",
        f"character image, pose and face video to video, 720p; from Python; {_GROUP}",
        {
            "height": 720,
            "width": 1280,
            "segment_frame_length": 77,
            "num_inference_steps": 20,
            "guidance_scale": 1.0,
            "fps": 30,
        },
        "WanAnimateTransformer3DModel",
        {"added_kv_proj_dim": 5120},
        _SHAPE_LARGE,
        _GRID_720P,  # the latent frames of 77, and one of the reference
    ),
    "chronoedit": Checkpoint(
        "nvidia/ChronoEdit-14B-Diffusers",
        "chronoedit",
        f"edits an image: the last frame of a video from it is the result, 720p; {_GROUP}",
        {"height": 720, "width": 1280, "num_frames": 5, "fps": 16, **_WAN21},
        "ChronoEditTransformer3DModel",
        _FROM_IMAGE,
        _SHAPE_LARGE,
        TokenLayout((2, 45, 80)),
    ),
    "skyreels-v2": Checkpoint(
        "Skywork/SkyReels-V2-T2V-14B-540P-Diffusers",
        "skyreels",
        f"text to video, 540p at 24 frames a second; {_GROUP}",
        _SKYREELS,
        "SkyReelsV2Transformer3DModel",
        _LARGE,
        _SHAPE_LARGE,
        _GRID_540P,
    ),
    "skyreels-v2-i2v": Checkpoint(
        "Skywork/SkyReels-V2-I2V-14B-540P-Diffusers",
        "skyreels",
        f"image to video, 540p at 24 frames a second; {_GROUP}",
        {**_SKYREELS, "guidance_scale": 5.0, "flow_shift": 5.0},
        "SkyReelsV2Transformer3DModel",
        {**_LARGE, **_FROM_IMAGE},
        _SHAPE_LARGE,
        _GRID_540P,
    ),
    "skyreels-v2-df": Checkpoint(
        "Skywork/SkyReels-V2-DF-14B-540P-Diffusers",
        "skyreels",
        f"text or image to long video by diffusion forcing, 540p at 24 frames a second; {_GROUP}",
        _SKYREELS,
        "SkyReelsV2Transformer3DModel",
        _LARGE,
        _SHAPE_LARGE,
        _GRID_540P,
    ),
    "skyreels-v2-df-1.3b": Checkpoint(
        "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
        "skyreels-1.3b",
        "text or image to long video by diffusion forcing, 540p; fits a 24 GB card in bfloat16",
        _SKYREELS,
        "SkyReelsV2Transformer3DModel",
        {**_SMALL, "inject_sample_info": True},
        _SHAPE_SMALL,
        _GRID_540P,
    ),
}
