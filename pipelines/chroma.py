"""Chroma: text to image, FLUX.1-schnell without guidance and with a small network in place of its modulation.
Blocks attend over [text, image] as Flux's do, here with a mask that hides all but the first padding token.

Blocks make the mask of S keys an outer product, bool [B, 1, S, S]; its diagonal is the mask. The pipelines
hand it over as numbers, which torch adds to the scores, so that in dense calls it hides nothing
(huggingface/diffusers issues 12116 and 13619). In sparse calls it hides what it is meant to.
"""

from __future__ import annotations

from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.pipelines.family import Checkpoint, Config, Family
from dit_sparse.pipelines.flux import TINY as FLUX
from dit_sparse.pipelines.flux import layers, layout, packed

TINY: Config = {
    **FLUX,
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 16,
    "approximator_layers": 1,
}


def validity(mask: Tensor) -> Tensor:
    """The diagonal of [B, 1, S, S]: a token may be read where it may read itself."""
    return mask[:, 0].diagonal(dim1=1, dim2=2) != 0


def pipeline_class(index: Config, image: bool) -> str:
    """Every checkpoint also goes on from an image."""
    return "ChromaImg2ImgPipeline" if image else "ChromaPipeline"


# The configuration is that of the class. Call: the model card.
CHECKPOINTS: dict[str, Checkpoint] = {
    "chroma1-hd": Checkpoint(
        "lodestones/Chroma1-HD",
        "8.9b",
        "text to image, 1024x1024; 8.9B, on a 24 GB card with --offload model",
        {"height": 1024, "width": 1024, "num_inference_steps": 40, "guidance_scale": 3.0},
        "ChromaTransformer2DModel",
        {},
        (57, 24, 128),
        TokenLayout((1, 64, 64), text=512, text_first=True),
    )
}

FAMILY = Family(
    name="chroma",
    transformers={"ChromaTransformer2DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=packed,
    joint=True,
    video=False,
    validity=validity,
    checkpoints=CHECKPOINTS,
    pipeline_class=pipeline_class,
)
