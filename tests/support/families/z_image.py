"""Z-Image: text to image, and the omni variant with given images. Batch items have prompts of their own
length, so that a batch needs a mask and the images of omni stand at different places."""

from typing import Any

import torch
from torch import Tensor

from families import Case, Grid, items


def prompt(model: Any, item: int, seed: int = 1) -> Tensor:
    """12 tokens for even items and 40 for odd ones: 32 and 64 once they are filled up."""
    return items(item, 1, 12 + 28 * (item % 2), model.config.cap_feat_dim, seed=seed)[0]


def image(model: Any, item: int, grid: Grid, seed: int = 0) -> Tensor:
    return items(item, 1, model.in_channels, grid[0], 2 * grid[1], 2 * grid[2], seed=seed)[0]


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    batch_items = range(first, first + batch)
    return {
        "x": [image(model, item, grid) for item in batch_items],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [prompt(model, item) for item in batch_items],
        "return_dict": False,
    }


def omni_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """One given image of 4 x 7 tokens; a text before it and one behind."""
    batch_items = range(first, first + batch)
    return {
        **inputs(model, batch, grid, first),
        "x": [[image(model, item, (1, 4, 7), seed=2), image(model, item, grid)] for item in batch_items],
        "cap_feats": [[prompt(model, item), prompt(model, 0, seed=3)] for item in batch_items],
        "siglip_feats": [None] * batch,
        "image_noise_mask": [[0, 1]] * batch,
    }


def siglip_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """With features of the given image at the end of the sequence."""
    width = model.config.siglip_feat_dim
    features = [[items(item, 1, 3, 4, width, seed=4)[0], None] for item in range(first, first + batch)]
    return {**omni_inputs(model, batch, grid, first), "siglip_feats": features}


def output(out: tuple[list[Tensor]]) -> Tensor:
    return torch.stack(out[0])


IMAGE = (1, 10, 12)

CASES = {
    "z-image": Case("ZImageTransformer2DModel", inputs, grid=IMAGE, output=output),
    "z-image-omni": Case("ZImageTransformer2DModel", omni_inputs, grid=(1, 14, 15), output=output),
}
