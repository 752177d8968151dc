"""Z-Image: the noise refiner attends over the image, then the layers over [image, text]; the context refiner
sees text alone and stays dense. Image and text are each filled up to a multiple of 32 with pad tokens, which
take part in the attention. The omni variant puts [text, given images, image, SigLIP features of the given
images] in a sequence, where texts of different lengths in a batch shift the images. Guidance is one batched
call.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, kl_scale, patches, stacks

MULTIPLE = 32
"""``SEQ_MULTI_OF`` in diffusers."""

TINY: Config = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [4, 6, 6],
    "axes_lens": [256, 64, 64],
}


def layers(model: Any) -> list[Layer]:
    """The noise refiner, then ``layers``."""
    return stacks(model, ("noise_refiner", "attention"), ("layers", "attention"))


def layout(model: Any, args: Arguments) -> TokenLayout | str:
    """``x`` is a list of images [C, F, H, W], or (omni) of lists of given images and the one that is made."""
    omni = isinstance(args["x"][0], list)
    items = args["x"] if omni else [[image] for image in args["x"]]
    sizes = {tuple(None if image is None else tuple(image.shape[1:]) for image in item) for item in items}
    if len(sizes) > 1:
        return "a batch of images of different sizes"
    side = args.get("patch_size", 2)
    patch = args.get("f_patch_size", 1), side, side
    *given, grid = (None if size is None else patches(size, patch) for size in sizes.pop())
    if grid is None:
        return "the last image is missing"
    prefix = sum(MULTIPLE if tokens is None else _filled(prod(tokens)) for tokens in given)
    return TokenLayout(grid, text_first=omni, prefix=prefix, suffix=_filled(prod(grid)) - prod(grid))


def positions(model: Any, args: Arguments) -> Tensor | None:
    """Omni: the images of each batch item begin behind its own texts."""
    tokens = layout(model, args)
    if isinstance(tokens, str) or not tokens.text_first:
        return None
    starts = [sum(_filled(len(text)) for text in texts) for texts in args["cap_feats"]]
    return torch.tensor(starts)[:, None] + torch.arange(tokens.sequence)


def _filled(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """The pipelines use patches of 2 x 2 latents."""
    side = 2 * kl_scale(vae)
    return 1, side, side


def pipeline_class(index: Config, image: bool) -> str:
    """Text-to-image models also go on from an image; the omni variant takes one or none."""
    name: str = index["_class_name"]
    return "ZImageImg2ImgPipeline" if image and name == "ZImagePipeline" else name


def _z_image(repo: str, about: str, steps: int, guidance: float) -> Checkpoint:
    """The class's defaults are the released models', but for a longer text. Prompts of 97 to 128 tokens."""
    return Checkpoint(
        f"Tongyi-MAI/{repo}",
        "6b",
        f"{about}; fits a 24 GB card in bfloat16",
        {"height": 1024, "width": 1024, "num_inference_steps": steps, "guidance_scale": guidance},
        "ZImageTransformer2DModel",
        {"axes_lens": [1536, 512, 512]},
        (32, 30, 128),
        TokenLayout((1, 64, 64), text=128),
    )


CHECKPOINTS: dict[str, Checkpoint] = {
    "z-image-turbo": _z_image("Z-Image-Turbo", "text to image in 8 steps, 1024x1024", 8, 0.0),
    "z-image": _z_image("Z-Image", "text to image, 1024x1024", 50, 4.0),
}

FAMILY = Family(
    name="z-image",
    transformers={"ZImageTransformer2DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=pixels,
    joint=True,
    video=False,
    positions=positions,
    timestep="t",
    branches=("cond_uncond",),
    checkpoints=CHECKPOINTS,
    pipeline_class=pipeline_class,
)
