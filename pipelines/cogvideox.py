"""CogVideoX 1.0 and 1.5, and ConsisID: text, image and control video to video. Text stands before the grid in
one sequence and has no mask. Version 1.5 puts two latent frames into a token frame. Classifier-free guidance
is one batch, [uncond, cond]; the schedulers have no ``step_index``, so the step is the place of the timestep.
ConsisID's face tokens enter between blocks by a cross-attention that has no processor and stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import (
    Arguments,
    Checkpoint,
    Config,
    Family,
    Preset,
    kl_scale,
    own_pipeline,
    patches,
    scaled,
    stacks,
)
from dit_sparse.processors.spatial_window import SpatialWindowProcessor

TINY: Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 4,
    "text_embed_dim": 16,
    "num_layers": 3,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 17,
    "max_text_seq_length": 12,
    "use_rotary_positional_embeddings": True,
}
_TINY_FACE: Config = {
    "in_channels": 8,
    "is_train_face": True,
    "cross_attn_interval": 1,
    "cross_attn_dim_head": 4,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 8,
    "LFE_vit_dim": 8,
    "LFE_depth": 2,
    "LFE_dim_head": 4,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 1,
    "LFE_num_querie": 4,
    "LFE_output_dim": 21,  # what ConsisID computes for its cross-attention: 2 / 3 of 32 channels
    "LFE_ff_mult": 1,
    "LFE_num_scale": 2,
}


def layers(model: Any) -> list[Layer]:
    """``transformer_blocks.*.attn1``."""
    return stacks(model, ("transformer_blocks", "attn1"))


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, F, C, H, W]."""
    frames, _, height, width = args["hidden_states"].shape[1:]
    return TokenLayout(patches((frames, height, width), _patch(model.config)), text_first=True)


def anchors(model: Any, args: Arguments) -> int:
    """The given image is the first frame and comes as further channels.

    So does a control video, where reading the first frame does no harm.
    """
    return int(model.config.in_channels > model.config.out_channels)


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; the first frame is a token frame of its own.

    In version 1.5 the pipeline repeats it to fill that token frame.
    """
    scale = vae["temporal_compression_ratio"], *[kl_scale(vae)] * 2
    return scaled(scale, _patch(transformer))


def pipeline_class(index: Config, image: bool) -> str:
    """Every pipeline of ConsisID starts from an image."""
    return own_pipeline(index, image, "ConsisID" if "ConsisID" in index["_class_name"] else "ImageToVideo")


def _patch(config: Config) -> tuple[int, int, int]:
    # ConsisID has no patch_size_t; CogVideoX 1.0 has None.
    return config.get("patch_size_t") or 1, config["patch_size"], config["patch_size"]


_RETTENTION = "arXiv 2505.22918: 15 of 50 steps dense, refresh every 5 steps, lambda 0.04; "
_PARO = "arXiv 2506.16054, 49 frames at 480x720: no dense steps; jamescsq47/PAROAtten at 3ac854f: 10 masks; "
_BLADE = "2 dense steps as arXiv 2508.10774's training-free comparison; "
_BLADE_CODE = "github.com/ziplab/VIDEO-BLADE, its CogVideoX settings (sparsity 0.833)"
_ADASPA = "arXiv 2502.21079: 10 of 50 steps dense, searches at steps 10 and 30; sparsity "
_SPARSE_VDIT = "arXiv 2506.03065, 81 frames at 768x1360: no dense steps; "

PRESETS: dict[tuple[str, str], Mapping[str, Preset]] = {
    ("rettention", "2b"): {
        "quality": Preset({"period": 3}, "dense 0-30%", f"{_RETTENTION}period 3 unpublished"),
        "balanced": Preset({}, "dense 0-30%", f"{_RETTENTION}window of 1/16 as published for images"),
        "fast": Preset(
            {"inner": SpatialWindowProcessor(keep=0.03125)},
            "dense 0-30%",
            f"{_RETTENTION}window of 1/32: PSNR 27.96, SSIM 0.894",
        ),
    },
    ("paro", "5b"): {
        "quality": Preset({"density": 0.5, "masks": 10}, "always", f"{_PARO}dense rate 0.5: PSNR 29.1"),
        "balanced": Preset({"density": 0.3, "masks": 10}, "always", f"{_PARO}dense rate 0.3: PSNR 22.9"),
        "fast": Preset({"density": 0.2, "masks": 10}, "always", f"{_PARO}dense rate 0.2: PSNR 19.4"),
    },
    ("blade", "5b"): {
        "quality": Preset(
            {"most": 0.2, "summary": 15, "samples": 32},
            "dense 0-1",
            f"{_BLADE}twice the blocks of {_BLADE_CODE}",
        ),
        "balanced": Preset(
            {"most": 0.1, "summary": 15, "samples": 32}, "dense 0-1", f"{_BLADE}{_BLADE_CODE}"
        ),
        "fast": Preset(
            {"most": 0.1, "summary": 30, "samples": 32},
            "dense 0-1",
            f"{_BLADE}half the means of {_BLADE_CODE}",
        ),
    },
    ("adaspa", "1.5-5b"): {
        "quality": Preset({"density": 0.3}, "dense 0-20%", f"{_ADASPA}0.7, of its sweep"),
        "balanced": Preset({"density": 0.2}, "dense 0-20%", f"{_ADASPA}0.8: PSNR 23.3, 1.66x on an A100"),
        "fast": Preset({"density": 0.1}, "dense 0-20%", f"{_ADASPA}0.9, of its sweep"),
    },
    ("sparse_vdit", "1.5-5b"): {
        "quality": Preset(
            {"share": 0.2, "budget": 0.4}, "always", f"{_SPARSE_VDIT}share and budget unpublished"
        ),
        "balanced": Preset(
            {"share": 0.2, "budget": 0.265},
            "always",
            f"{_SPARSE_VDIT}70.7 of 147.9 PFLOPs come to density 0.265; PSNR 24.1, 1.76x on an A800; share "
            "unpublished",
        ),
        "fast": Preset(
            {"share": 0.15, "budget": 0.2}, "always", f"{_SPARSE_VDIT}share and budget unpublished"
        ),
    },
}

# Calls: the model cards and the examples of diffusers 0.42. Configurations: diffusers,
# scripts/convert_cogvideox_to_diffusers.py.
_CALL = {"num_inference_steps": 50, "guidance_scale": 6.0}
_480P = {"height": 480, "width": 720, "num_frames": 49, "fps": 8, **_CALL}
_768P = {"height": 768, "width": 1360, "num_frames": 81, "fps": 16, **_CALL}
_COGVIDEOX = "CogVideoXTransformer3DModel"
_5B: Config = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
_15: Config = {
    **_5B,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
}
_SHAPE = (42, 48, 64)
_TOKENS = TokenLayout((13, 30, 45), text=226, text_first=True)
_15_TOKENS = TokenLayout((11, 48, 85), text=226, text_first=True)

CHECKPOINTS: dict[str, Checkpoint] = {
    "cogvideox-2b": Checkpoint(
        "zai-org/CogVideoX-2b",
        "2b",
        "text to video, 480x720; 13 GB of weights in 16 bits",
        _480P,
        _COGVIDEOX,
        {},
        (30, 30, 64),
        _TOKENS,
    ),
    "cogvideox-5b": Checkpoint(
        "zai-org/CogVideoX-5b",
        "5b",
        "text to video, 480x720; 21 GB of weights in bfloat16",
        _480P,
        _COGVIDEOX,
        _5B,
        _SHAPE,
        _TOKENS,
    ),
    "cogvideox-5b-i2v": Checkpoint(
        "zai-org/CogVideoX-5b-I2V",
        "5b",
        "image to video, 480x720 only; 21 GB of weights in bfloat16",
        _480P,
        _COGVIDEOX,
        {**_5B, "in_channels": 32, "use_learned_positional_embeddings": True},
        _SHAPE,
        _TOKENS,
    ),
    "cogvideox1.5-5b": Checkpoint(
        "zai-org/CogVideoX1.5-5B",
        "1.5-5b",
        "text to video, 768x1360; 21 GB of weights in bfloat16",
        _768P,
        _COGVIDEOX,
        _15,
        _SHAPE,
        _15_TOKENS,
    ),
    "cogvideox1.5-5b-i2v": Checkpoint(
        "zai-org/CogVideoX1.5-5B-I2V",
        "1.5-5b",
        "image to video, 768 pixels and more a side; 21 GB of weights in bfloat16",
        _768P,
        _COGVIDEOX,
        {**_15, "in_channels": 32, "ofs_embed_dim": 512},
        _SHAPE,
        _15_TOKENS,
    ),
    "consisid": Checkpoint(
        "BestWishYsh/ConsisID-preview",
        "5b",
        "portrait to video, 480x720; needs face embeddings that ConsisID's own helpers compute, from Python",
        _480P,
        "ConsisIDTransformer3DModel",
        {**_5B, "in_channels": 32, "use_learned_positional_embeddings": True, "is_train_face": True},
        _SHAPE,
        _TOKENS,
    ),
}

FAMILY = Family(
    name="cogvideox",
    transformers={
        _COGVIDEOX: TINY,
        "ConsisIDTransformer3DModel": {**TINY, **_TINY_FACE},
    },
    layers=layers,
    layout=layout,
    pixels=pixels,
    joint=True,
    anchors=anchors,
    branches=("cond_uncond",),
    presets=PRESETS,
    checkpoints=CHECKPOINTS,
    pipeline_class=pipeline_class,
)
