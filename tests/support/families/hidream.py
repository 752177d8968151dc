"""HiDream: images that are not square, with tokens to fill them up, and square ones."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    size = [n * config.patch_size for n in grid[1:]]
    of_layers = range(max(config.llama_layers) + 1)
    return {
        "hidden_states": items(first, batch, config.in_channels, *size),
        "timesteps": torch.full((batch,), 500),
        "encoder_hidden_states_t5": items(first, batch, 6, config.caption_channels[0], seed=1),
        "encoder_hidden_states_llama3": torch.stack(
            [items(first, batch, 4, config.caption_channels[1], seed=10 + layer) for layer in of_layers]
        ),
        "pooled_embeds": items(first, batch, config.text_emb_dim, seed=2),
        "return_dict": False,
    }


def on_meta(model: Any) -> None:
    """Experts count their tokens, and the sizes of images are a tensor."""
    model.unpatchify = lambda image, *_: image
    for module in model.modules():
        if hasattr(module, "moe_infer"):
            module.moe_infer = lambda x, *_: x


CASES = {
    # Filled up to 34 x 34 / 4 tokens.
    "hidream": Case("HiDreamImageTransformer2DModel", inputs, grid=(1, 14, 18), on_meta=on_meta),
    "hidream-square": Case("HiDreamImageTransformer2DModel", inputs, grid=(1, 11, 11)),
}
