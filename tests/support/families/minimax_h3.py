"""MiniMax-H3: [text, keyframes, sound, video] in one sequence, laid out by diffusers' own block."""

from math import prod
from typing import Any

import torch

from families import Case, Grid, items

TEXT = 12


def inputs(
    model: Any, batch: int, grid: Grid, first: int, keyframes: tuple[float, ...] = ()
) -> dict[str, Any]:
    """17 frames are 5 latents, and a second has 24 frames and 2 x 40 latents of sound.

    Args:
        keyframes: Times of given frames, after the text.
    """
    from diffusers.modular_pipelines.minimax_h3.before_denoise import (  # lacking in older versions
        _frame_position_grid,
        _temporal_position_grid,
    )

    config = model.config
    frames, height, width = grid
    frame, sound = height * width, 2 * round(((frames - 2) * 17 / 5 + 5) / 24 * 40)
    _, patch_height, patch_width = config.patch_size
    plane, _ = _frame_position_grid(height * patch_height, width * patch_width, patch_height, patch_width)
    times = _temporal_position_grid(frames, float(TEXT))
    points = [torch.nn.functional.pad(torch.arange(TEXT, dtype=torch.float64)[:, None], (0, 2))]
    points += [torch.nn.functional.pad(plane, (1, 0), value=TEXT + time) for time in keyframes]
    points += [torch.nn.functional.pad(torch.arange(sound // 2)[:, None].double(), (0, 2)).repeat(2, 1)]
    points += [torch.cat([times.repeat_interleave(frame)[:, None], plane.repeat(frames, 1)], 1)]
    position_ids = torch.cat(points)
    given, total = len(keyframes) * frame, len(position_ids)
    rows = torch.arange(total)
    text, keys, heard, video = rows.split([TEXT, given, sound, frames * frame])
    tags = torch.zeros(total, dtype=torch.long)
    tags[text], tags[heard] = 1, 2
    is_given = torch.zeros(total, dtype=torch.long)
    is_given[keys] = 1
    channels = config.in_channels * prod(config.patch_size)
    return {
        "hidden_states": items(first, batch, given + frames * frame, channels),
        "audio_hidden_states": items(first, batch, sound, config.audio_in_channels, seed=1),
        "encoder_hidden_states": items(first, batch, TEXT, config.text_dim, seed=2),
        "timestep": torch.tensor([0.5, 0.9]),
        "timestep_indices": is_given,
        "token_tags": tags,
        "position_ids": position_ids,
        "video_indices": torch.cat([keys, video]),
        "audio_indices": heard,
        "text_indices": text,
        "return_dict": False,
    }


def keyframe_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """The last frame is given."""
    return inputs(model, batch, grid, first, keyframes=(30.0,))


def on_meta(model: Any) -> None:
    """Rotary angles are computed from coordinates that have values."""
    stock = model.rope.forward
    model.rope.forward = lambda position_ids: stock(position_ids.to("meta"))


CLS = "MiniMaxH3Transformer3DModel"
CASES = {
    "minimax-h3": Case(CLS, inputs, read=("position_ids",), on_meta=on_meta),
    "minimax-h3-keyframes": Case(CLS, keyframe_inputs),
}
