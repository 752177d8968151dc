"""FLUX.1: text to image, Kontext and the Tools (Fill, Depth, Canny). Double and then single blocks attend
over [text, image] alike. Images come as packed sequences, so the grid is read off the position ids. Kontext's
reference image follows the one that is made; what the Tools and ControlNets are given lies in channels or is
added between blocks. An IP-Adapter's second attention, over image prompts, stays dense.

LongCat-Image, with references where it edits, and Ovis-Image are the same to a method.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import (
    Arguments,
    Checkpoint,
    Config,
    Family,
    Preset,
    kl_scale,
    own_pipeline,
    stacks,
)

TINY: Config = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


def layers(model: Any) -> list[Layer]:
    """Double blocks, then single blocks."""
    return stacks(model, ("transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))


def layout(model: Any, args: Arguments) -> TokenLayout | str:
    """As ``img_ids`` say."""
    return grid_of(args["img_ids"])


@lru_cache(maxsize=4)  # a tensor hashes as the object it is: pipelines give the same one at every step
def grid_of(ids: Tensor) -> TokenLayout | str:
    """The layout of position ids (image, row, column, ...): one image row by row, then reference images.

    Rows and columns are counted, not read: in bfloat16, ids above 256 are rounded. This waits for the device.

    Args:
        ids: [tokens, axes], or with a batch axis before, of which the models read the first item.
    """
    image, row, column = (ids if ids.ndim == 2 else ids[0]).cpu()[:, :3].unbind(1)
    tokens = int((image == image[0]).sum())
    width = int((row[:tokens] == row[0]).sum())
    height = tokens // width
    if tokens == height * width and (image[:tokens] == image[0]).all():
        rows, columns = (x[:tokens].view(height, width) for x in (row, column))
        if (rows == rows[:, :1]).all() and (columns == columns[:1]).all():
            return TokenLayout((1, height, width), text_first=True, suffix=len(image) - tokens)
    return "the image ids do not begin with the rows of one image"


def packed(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """A token is 2 x 2 latents."""
    side = 2 * kl_scale(vae)
    return 1, side, side


_IN_PYTHON = {
    "FluxFillPipeline": "needs a mask",
    "FluxControlPipeline": "needs a control image",
    "LongCatImageEditPipeline": "chooses the size of the image itself",
}


def pipeline_class(index: Config, image: bool) -> str:
    """FLUX.1 also goes on from an image, and Kontext takes one or none.

    Raises:
        ValueError: An image for a model that takes none, or a pipeline that asks for more than others.
    """
    name: str = index["_class_name"]
    if name in _IN_PYTHON:
        raise ValueError(f"{name} {_IN_PYTHON[name]}: call it in Python, with dit_sparse.apply")
    if name == "FluxKontextPipeline":
        return name
    return "FluxImg2ImgPipeline" if image and name == "FluxPipeline" else own_pipeline(index, image)


def _windows(schedule: str, window: int, source: str) -> Preset:
    """GNA at 4096 x 4096 pixels; other sizes have windows in proportion, in whole tiles."""
    sizes = {"window": (1, window, window), "stride": (1, 16, 16), "base": (-1, 256, 256)}
    return Preset({**sizes, "tile": (1, 16, 8), "exact": False}, schedule, source)


_GNA = "arXiv 2504.16922, FLUX.1-dev at 4K: 90.2 % sparse, "
_PARO = "arXiv 2506.16054, FLUX at 1024x1024: "
PRESETS = {
    ("neighborhood", "12b"): {
        "quality": _windows("dense 0-32%", 112, "a larger window than published, 80.9 % sparse"),
        "balanced": _windows("dense 0-32%", 80, f"{_GNA}9 of 28 steps dense: GenEval .5785, 1.45x on a B200"),
        "fast": _windows("always", 80, f"{_GNA}no dense steps: 1.82x on a B200; quality unpublished"),
    },
    ("paro", "12b"): {
        "quality": Preset({"density": 0.75}, "always", f"{_PARO}dense rate 0.75, there with INT4"),
        "balanced": Preset(
            {"density": 0.5}, "always", f"{_PARO}dense rate 0.5: ImageReward 1.04, 1.02 dense"
        ),
        "fast": Preset({"density": 0.3}, "always", "arXiv 2506.16054's rate for video; unpublished for FLUX"),
    },
}

# Configurations: scripts/convert_flux_to_diffusers.py and src/flux/util.py of black-forest-labs/flux. Calls:
# the model cards and the examples of diffusers 0.42.
_1024 = {"height": 1024, "width": 1024}
_GRID = (1, 64, 64)
_DEV = {"guidance_embeds": True}
_24GB = "needs access granted on the Hub; on a 24 GB card with --offload model"


def _flux(
    repo: str,
    about: str,
    defaults: Config,
    config: Config = _DEV,
    text: int = 512,
    grid: tuple[int, int, int] = _GRID,
    suffix: int = 0,
) -> Checkpoint:
    return Checkpoint(
        f"black-forest-labs/{repo}",
        "12b",
        f"{about}; {_24GB}",
        defaults,
        "FluxTransformer2DModel",
        config,
        (57, 24, 128),
        TokenLayout(grid, text=text, text_first=True, suffix=suffix),
    )


CHECKPOINTS: dict[str, Checkpoint] = {
    "flux.1-dev": _flux(
        "FLUX.1-dev",
        "text to image, to 2 megapixels",
        {**_1024, "num_inference_steps": 50, "guidance_scale": 3.5},
    ),
    "flux.1-schnell": _flux(
        "FLUX.1-schnell",
        "text to image in 4 steps",
        {**_1024, "num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256},
        {},
        text=256,
    ),
    "flux.1-krea-dev": _flux(
        "FLUX.1-Krea-dev",
        "text to image with a photographic look",
        {**_1024, "num_inference_steps": 28, "guidance_scale": 4.5},
    ),
    "flux.1-kontext-dev": _flux(
        "FLUX.1-Kontext-dev",
        "edits an image as the prompt says",
        {**_1024, "num_inference_steps": 28, "guidance_scale": 2.5},
        suffix=4096,
    ),
    "flux.1-fill-dev": _flux(
        "FLUX.1-Fill-dev",
        "fills the masked part of an image",
        {"height": 1632, "width": 1232, "num_inference_steps": 50, "guidance_scale": 30.0},
        {**_DEV, "in_channels": 384, "out_channels": 64},
        grid=(1, 102, 77),
    ),
    "flux.1-depth-dev": _flux(
        "FLUX.1-Depth-dev",
        "text and a depth map to image",
        {**_1024, "num_inference_steps": 30, "guidance_scale": 10.0},
        {**_DEV, "in_channels": 128, "out_channels": 64},
    ),
    "flux.1-canny-dev": _flux(
        "FLUX.1-Canny-dev",
        "text and the edges of an image to image",
        {**_1024, "num_inference_steps": 50, "guidance_scale": 30.0},
        {**_DEV, "in_channels": 128, "out_channels": 64},
    ),
    # https://huggingface.co/meituan-longcat/LongCat-Image/blob/main/transformer/config.json
    "longcat-image": Checkpoint(
        "meituan-longcat/LongCat-Image",
        "longcat-6b",
        "text to image, Chinese and English; 6B, on a 24 GB card with --offload model",
        {"height": 768, "width": 1344, "num_inference_steps": 50, "guidance_scale": 4.5},
        "LongCatImageTransformer2DModel",
        {"num_layers": 10, "num_single_layers": 20},
        (30, 24, 128),
        TokenLayout((1, 48, 84), text=512, text_first=True),
    ),
    "ovis-image": Checkpoint(
        "AIDC-AI/Ovis-Image-7B",
        "ovis-7b",
        "text to image, good at writing; 7B, on a 24 GB card with --offload model",
        {**_1024, "num_inference_steps": 50, "guidance_scale": 5.0},
        "OvisImageTransformer2DModel",
        {},
        (33, 24, 128),
        TokenLayout(_GRID, text=256, text_first=True),
    ),
}

FAMILY = Family(
    name="flux",
    transformers={
        "FluxTransformer2DModel": {**TINY, "pooled_projection_dim": 8},
        "LongCatImageTransformer2DModel": TINY,
        "OvisImageTransformer2DModel": {**TINY, "out_channels": None},
    },
    layers=layers,
    layout=layout,
    pixels=packed,
    joint=True,
    video=False,
    presets=PRESETS,
    checkpoints=CHECKPOINTS,
    pipeline_class=pipeline_class,
)
