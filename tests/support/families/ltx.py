"""LTX-Video and LTX-2."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": items(first, batch, prod(grid), config.in_channels),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": items(first, batch, 12, config.caption_channels, seed=1),
        "encoder_attention_mask": torch.ones(batch, 12),
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }


def image_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """The first frame is given: it is at time 0."""
    timestep = torch.full((batch, prod(grid)), 500.0)
    timestep[:, : prod(grid[1:])] = 0
    return {**inputs(model, batch, grid, first), "timestep": timestep}


def coordinates(times: list[float], height: int, width: int) -> Tensor:
    """[3, S]: (seconds, y, x) of tokens, frame by frame."""
    y, x = (32.0 * torch.arange(n) for n in (height, width))
    return torch.stack(torch.meshgrid(torch.tensor(times) / 25, y, x, indexing="ij")).flatten(1)


def condition_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """A frame is given for a later time: it stands before the grid."""
    frames, height, width = grid
    times = [24.0, *(max(0.0, 8.0 * i - 7) for i in range(frames))]
    call = image_inputs(model, batch, (frames + 1, height, width), first)
    sizes = ("num_frames", "height", "width", "rope_interpolation_scale")
    call = {name: value for name, value in call.items() if name not in sizes}
    return {**call, "video_coords": coordinates(times, height, width).expand(batch, -1, -1)}


def joint_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """LTX-2: 7 tokens of sound beside the video."""
    call, config = inputs(model, batch, grid, first), model.config
    del call["rope_interpolation_scale"]
    return {
        **call,
        "audio_hidden_states": items(first, batch, 7, config.audio_in_channels, seed=2),
        "audio_encoder_hidden_states": items(first, batch, 12, config.caption_channels, seed=3),
        "audio_encoder_attention_mask": call["encoder_attention_mask"],
        "audio_num_frames": 7,
        "sigma": torch.full((batch,), 500.0),
    }


def reference_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """LTX-2 with the first frame given and two keyframes after the grid."""
    frames, height, width = grid
    longer = (frames + 2, height, width)
    call = joint_inputs(model, batch, longer, first)
    coords = model.rope.prepare_video_coords(batch, *longer, torch.device("cpu"))
    timestep = image_inputs(model, batch, longer, first)["timestep"]
    return {
        **call,
        "timestep": timestep,
        "audio_timestep": torch.full((batch,), 500.0),
        "num_frames": frames,
        "video_coords": coords,
    }


CASES = {
    "ltx": Case("LTXVideoTransformer3DModel", inputs),
    "ltx-i2v": Case("LTXVideoTransformer3DModel", image_inputs),
    "ltx-condition": Case("LTXVideoTransformer3DModel", condition_inputs),
    "ltx2": Case("LTX2VideoTransformer3DModel", joint_inputs),
    "ltx2-references": Case("LTX2VideoTransformer3DModel", reference_inputs),
}
