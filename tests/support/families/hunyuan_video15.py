"""HunyuanVideo 1.5: text and image to video."""

from typing import Any

import torch

from families import Case, Grid, hunyuan_video, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """Without an image its tokens are zeros, which the model hides."""
    config = model.config
    image = items(first, batch, 4, config.image_embed_dim, seed=3)
    return {
        "hidden_states": hunyuan_video.latents(model, batch, grid, first),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": items(first, batch, 12, config.text_embed_dim, seed=1),
        "encoder_attention_mask": hunyuan_video.lengths(first, batch, 12),
        "encoder_hidden_states_2": items(first, batch, 7, config.text_embed_2_dim, seed=2),
        "encoder_attention_mask_2": hunyuan_video.lengths(first, batch, 7),
        "image_embeds": image if config.task_type == "i2v" else torch.zeros_like(image),
        "return_dict": False,
    }


def padded_prompts(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Glyph tokens, in front of the prompt, keep their padding in both."""
    return hunyuan_video.padded(inputs(model, 2, (5, 4, 6), 0))


CASES = {
    "hunyuan15": Case("HunyuanVideo15Transformer3DModel", inputs, padded=padded_prompts),
    "hunyuan15-i2v": Case(
        "HunyuanVideo15Transformer3DModel", inputs, {"task_type": "i2v"}, padded=padded_prompts
    ),
}
