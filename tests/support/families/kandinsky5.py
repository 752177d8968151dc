"""Kandinsky 5: text and image to video, with tokens in raster order and in NABLA's."""

from math import prod
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    size = [n * p for n, p in zip(grid, config.patch_size, strict=True)]
    channels = config.in_visual_dim * (1 + config.visual_cond) + config.visual_cond
    return {
        "hidden_states": items(first, batch, *size, channels),
        "encoder_hidden_states": items(first, batch, 12, config.in_text_dim, seed=1),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": items(first, batch, config.in_text_dim2, seed=2),
        "visual_rope_pos": [torch.arange(n) for n in grid],
        "text_rope_pos": torch.arange(12),
        "scale_factor": (1.0, 2.0, 2.0),
        "return_dict": False,
    }


def subdued(model: Any) -> None:
    """Rotary embedding rounds q and k to bfloat16: a last bit that another batch size changes turns into
    the last of eight. Attention that counts less keeps this below what the tests compare to.
    """
    with torch.no_grad():
        for block in model.visual_transformer_blocks:
            block.self_attention.out_layer.weight.mul_(0.1)


def with_flex_attention(model: Any) -> None:
    """The only one of diffusers' backends that takes NABLA's blocks; uncompiled on the CPU it reads all."""
    subdued(model)
    for block in model.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = AttentionBackendName.FLEX


def nabla_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """NABLA takes whole squares of 8x8 tokens: as many of them as the frame has room for, at least one."""
    squares = grid[0], 8, 8 * max(1, round(prod(grid[1:]) / 64))
    blocks = prod(squares) // 64
    sparse = {"sta_mask": torch.ones(1, 1, blocks, blocks, dtype=torch.bool), "to_fractal": True, "P": 0.9}
    return {**inputs(model, batch, squares, first), "sparse_params": sparse}


def output(out: Any) -> torch.Tensor:
    """A model that returns no dict returns the tensor itself."""
    assert isinstance(out, torch.Tensor)
    return out


CLS = "Kandinsky5Transformer3DModel"
CASES = {
    "kandinsky5": Case(CLS, inputs, output=output, prepare=subdued),
    "kandinsky5-i2v": Case(CLS, inputs, {"visual_cond": True}, output=output, prepare=subdued),
    "kandinsky5-nabla": Case(
        CLS,
        nabla_inputs,
        {"attention_type": "nabla"},
        (5, 8, 8),
        output=output,
        prepare=with_flex_attention,
    ),
}
