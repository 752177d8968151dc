"""Wan 2.1 and 2.2: text, image and VACE to video. Text and image enter by cross-attention, which stays dense.

Presets of Radial. Script and helper are those of github.com/mit-han-lab/radial-attention at 72788d4, tables
those of the paper, arXiv 2506.19852. Density is that of the sparse calls alone, at the size named per model:

=====  ========  =============================================  =======  ================================
size   intent    setting                                        density  from
=====  ========  =============================================  =======  ================================
1.3b   quality   decay 1, 13 of 50 steps and layers 0-1 dense   0.46     480x832, 81 frames; decay of the
                                                                         script's command line, Table B
1.3b   balanced  decay 0.2, 12 of 50 steps and layer 0 dense    0.37     the Wan2.1 script
1.3b   fast      decay 0.2, block 64, 8 of 50 steps, layer 0    0.28     Table B; block of Wan2.2
14b    quality   decay 1, 13 of 50 steps and layers 0-1 dense   0.41     720x1280, 81 frames; as 1.3b
14b    balanced  decay 0.2, 12 of 50 steps and layer 0 dense    0.27     the Wan2.1 script; Table 1 (768x1280,
                                                                         69 frames): PSNR 23.9, 1.77x
14b    fast      decay 0.2, 8 of 50 steps and layer 0 dense     0.27     Table B: PSNR 21.7 with 8 dense
                                                                         steps, 23.2 with 11, 23.6 with 12
a14b   quality   decay 1, block 64, 12 of 40, layers 0-1        0.39     720x1280, 81 frames; decay as above
a14b   balanced  decay 0.8, block 64, 11 of 40 steps, layer 0   0.35     the Wan2.2 script
a14b   fast      decay 0.8, block 64, 5 of 40, layers 0-1       0.35     defaults of the Wan2.2 helper
5b     quality   as a14b                                        0.31     704x1280, 121 frames; unpublished
5b     others    as a14b                                        0.27     unpublished
tiny   quality   decay 1, block 32, frames down to bands of 64  0.36     64x128, 65 frames; unpublished
tiny   balanced  decay 1, block 32                              0.25     unpublished
tiny   fast      decay 0.2, block 32                            0.23     unpublished
=====  ========  =============================================  =======  ================================
"""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.pipelines.family import Checkpoint, Family, Preset


def layers(model: Any) -> list[tuple[str, int, int]]:
    """``blocks.*.attn1``, and VACE's control blocks under the index of the block they feed."""
    count = len(model.blocks)
    found = [(f"blocks.{i}.attn1", i, count) for i in range(count)]
    if hasattr(model, "vace_blocks"):
        found += [(f"vace_blocks.{i}.attn1", at, count) for i, at in enumerate(model.config.vace_layers)]
    return found


def layout(model: Any, args: Mapping[str, Any]) -> TokenLayout:
    """``hidden_states`` is [B, C, F, H, W]; patches do not overlap."""
    _, _, *size = args["hidden_states"].shape
    frames, height, width = (n // p for n, p in zip(size, model.config.patch_size, strict=True))
    return TokenLayout((frames, height, width))


def anchors(model: Any, args: Mapping[str, Any]) -> int:
    """The given image is the first frame. It comes as extra input channels, or (TI2V) with a timestep of its
    own.

    TI2V has timesteps per token also without an image; reading the first frame does no harm there.
    """
    is_vace = hasattr(model, "vace_blocks")
    extra_channels = model.config.in_channels > model.config.out_channels and not is_vace
    return int(extra_channels or args["timestep"].ndim == 2)


def size_of(transformer: Mapping[str, Any], experts: int) -> str | None:
    """The key of the presets, read off a transformer's config for fine-tuned copies; None where unknown.

    Args:
        transformer: The transformer's ``config.json``.
        experts: Transformers of the pipeline, 2 for the A14B models of Wan2.2.
    """
    sizes = {(12, 30): "1.3b", (40, 40): "14b", (24, 30): "5b"}
    size = sizes.get((transformer["num_attention_heads"], transformer["num_layers"]))
    return "a14b" if size == "14b" and experts == 2 else size


def pixels(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; the first frame is a token frame of its own.

    Older configs of the autoencoder do not name its scales; they are the class's defaults, 4 and 8.
    """
    scale = vae.get("scale_factor_temporal", 4), *[vae.get("scale_factor_spatial", 8)] * 2
    frames, height, width = (s * p for s, p in zip(scale, transformer["patch_size"], strict=True))
    return frames, height, width


def multiples(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int, int]:
    """(t, h, w): frames are one above a multiple of t, height and width are multiples of h and w.

    The pipelines ask for multiples of 16 in any case.
    """
    frames, height, width = pixels(transformer, vae)
    return frames, lcm(16, height), lcm(16, width)


def pipeline_class(index: Mapping[str, Any], image: bool) -> str:
    """The pipeline in diffusers for a ``model_index.json``: Wan2.2 TI2V has two.

    Raises:
        ValueError: An image for a model that takes none, or none for one that needs it.
    """
    name, both = index["_class_name"], index.get("expand_timesteps", False)
    if both:
        return "WanImageToVideoPipeline" if image else "WanPipeline"
    if name == "WanPipeline" and image:
        raise ValueError("a text-to-video model takes no image; image-to-video models are listed as such")
    if name == "WanImageToVideoPipeline" and not image:
        raise ValueError("an image-to-video model needs an image")
    return name


_SCRIPT = "mit-han-lab/radial-attention at 72788d4, "
_PAPER = "arXiv 2506.19852, "
_HALF_BLOCK = {"block": 64}
_SMALL_BLOCK = {"block": 32, "decay": 1.0}

_WAN22 = {
    "quality": Preset(
        {**_HALF_BLOCK, "decay": 1.0},
        "dense 0-30%; layers 0-1",
        f"{_SCRIPT}default decay of the command line; 30 % warm-up as in SVG2, arXiv 2505.18875",
    ),
    "balanced": Preset(
        {**_HALF_BLOCK, "decay": 0.8},
        "dense 0-27.5%; layers 0",
        f"{_SCRIPT}wan_22_t2v_inference: decay 0.8, block 64, 11 of 40 steps and 1 layer dense",
    ),
    "fast": Preset(
        {**_HALF_BLOCK, "decay": 0.8},
        "dense 0-12.5%; layers 0-1",
        f"{_SCRIPT}defaults of the Wan2.2 helper: decay 0.8, 5 steps and 2 layers dense",
    ),
}
_WAN21_QUALITY = Preset(
    {"decay": 1.0},
    "dense 0-26%; layers 0-1",
    f"{_SCRIPT}default decay of the command line; {_PAPER}Table B: no gain past 12 of 50 dense steps",
)
_WAN21_BALANCED = Preset(
    {"decay": 0.2},
    "dense 0-24%; layers 0",
    f"{_SCRIPT}wan_t2v_inference: decay 0.2, 12 of 50 steps and 1 layer dense; "
    f"{_PAPER}Table 1: 14B at 768x1280x69, PSNR 23.9, SSIM 0.842, 1.77x on an H100",
)
_WARM_UP = f"{_PAPER}Table B: at equal compute, PSNR 21.7 with 8 and 23.6 with 12 of 50 dense steps"

PRESETS: dict[tuple[str, str], dict[str, Preset]] = {
    ("radial", "1.3b"): {
        "quality": _WAN21_QUALITY,
        "balanced": _WAN21_BALANCED,
        "fast": Preset({**_HALF_BLOCK, "decay": 0.2}, "dense 0-16%; layers 0", _WARM_UP),
    },
    ("radial", "14b"): {
        "quality": _WAN21_QUALITY,
        "balanced": _WAN21_BALANCED,
        "fast": Preset({"decay": 0.2}, "dense 0-16%; layers 0", _WARM_UP),
    },
    ("radial", "a14b"): _WAN22,
    ("radial", "5b"): {
        name: Preset(p.parameters, p.schedule, f"unpublished for this model; as Wan2.2 A14B: {p.source}")
        for name, p in _WAN22.items()
    },
    ("radial", "tiny"): {
        "quality": Preset(
            {**_SMALL_BLOCK, "decimate_below": 64},
            "dense 0-25%; layers 0",
            "unpublished: chosen for tiny-wan",
        ),
        "balanced": Preset(
            {**_SMALL_BLOCK}, "dense 0-25%", "unpublished: chosen for tiny-wan, density below 0.3"
        ),
        "fast": Preset({"block": 32, "decay": 0.2}, "dense 0-10%", "unpublished: chosen for tiny-wan"),
    },
}

# `fps` and `flow_shift` are no keywords of the pipeline's call: whoever calls it takes them out. Sources:
# examples in diffusers 0.42 (Wan2.1: flow shift 3 for 480p, 5 for 720p); wan/configs of Wan-Video/Wan2.2.
_480P = {"height": 480, "width": 832, "num_frames": 81, "fps": 16, "flow_shift": 3.0}
_720P = {"height": 720, "width": 1280, "num_frames": 81, "fps": 16, "flow_shift": 5.0}
_WAN21 = {"num_inference_steps": 50, "guidance_scale": 5.0}

CHECKPOINTS: dict[str, Checkpoint] = {
    "wan2.1": Checkpoint(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "1.3b",
        "text to video, 480p; about 29 GB on disk; fits a 24 GB card in bfloat16",
        {**_480P, **_WAN21},
    ),
    "wan2.1-14b": Checkpoint(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "14b",
        "text to video, 480p and 720p; on a 24 GB card with --offload group",
        {**_720P, **_WAN21},
    ),
    "wan2.1-i2v": Checkpoint(
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "14b",
        "image to video, 480p; on a 24 GB card with --offload group",
        {**_480P, **_WAN21},
    ),
    "wan2.1-i2v-720p": Checkpoint(
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        "14b",
        "image to video, 720p; on a 24 GB card with --offload group",
        {**_720P, **_WAN21},
    ),
    "wan2.1-vace": Checkpoint(
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        "1.3b",
        "text and reference image to video, 480p; fits a 24 GB card in bfloat16",
        {**_480P, **_WAN21},
    ),
    "wan2.1-vace-14b": Checkpoint(
        "Wan-AI/Wan2.1-VACE-14B-diffusers",
        "14b",
        "text and reference image to video, 480p and 720p; on a 24 GB card with --offload group",
        {**_720P, **_WAN21},
    ),
    "wan2.2": Checkpoint(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "a14b",
        "text to video, two experts, 480p and 720p; on a 24 GB card with --offload group",
        {
            **_720P,
            "num_inference_steps": 40,
            "guidance_scale": 4.0,
            "guidance_scale_2": 3.0,
            "flow_shift": 12.0,
        },
    ),
    "wan2.2-i2v": Checkpoint(
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "a14b",
        "image to video, two experts, 480p and 720p; on a 24 GB card with --offload group",
        {**_720P, "num_inference_steps": 40, "guidance_scale": 3.5, "guidance_scale_2": 3.5},
    ),
    "wan2.2-5b": Checkpoint(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "5b",
        "text or image to video, 720p at 24 frames a second; on a 24 GB card with --offload model",
        {**_720P, **_WAN21, "height": 704, "num_frames": 121, "fps": 24},
    ),
}

FAMILY = Family(
    name="wan",
    transformers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    layers=layers,
    layout=layout,
    anchors=anchors,
    schedule="dense 0-25%; layers 0",
    presets=PRESETS,
    checkpoints=CHECKPOINTS,
)
