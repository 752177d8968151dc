"""MiniMax-H3: video with sound from text, keyframes or references. Blocks attend over one packed sequence,
[text, frames and sounds that are given, sound, video], of which the video is the grid and what is given is a
prefix. No argument has its sizes: they are read off the rotary coordinates. The text's refiner stays dense.
"""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, stacks

TINY: Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "hidden_size": 24,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "ffn_dim": 32,
    "in_channels": 4,
    "audio_in_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "time_embed_hidden_dim": 24,
    "time_embed_dim": 16,
    "rope_freq_dim": 2,
}


def layers(model: Any) -> list[Layer]:
    """``transformer_blocks.*.attn``."""
    return stacks(model, ("transformer_blocks", "attn"))


def layout(model: Any, args: Arguments) -> TokenLayout | str:
    """From ``position_ids`` [S, 3] of (time, y, x): the last frame tells its size, and the grid goes back
    from it for as long as frames of the same coordinates come ever earlier.

    Sound stands before the grid: it has no frame. Reading the coordinates synchronises the device, once a
    forward.
    """
    points = args["position_ids"].cpu()
    tokens, last = len(points), points[-1, 0]
    frame = int((points[:, 0] == last).flip(0).long().cumprod(0).sum())
    height, width = (points[-frame:, axis].unique().numel() for axis in (1, 2))
    if frame != height * width:
        return f"the last {frame} tokens, of one time, are no frame of {height}x{width}"
    candidates = points[tokens % frame :].view(-1, frame, 3)
    is_frame = (candidates[..., 0] == candidates[:, :1, 0]).all(1)
    is_frame &= (candidates[..., 1:] == candidates[-1, :, 1:]).flatten(1).all(1)
    is_frame[:-1] &= candidates[:-1, 0, 0] < candidates[1:, 0, 0]
    frames = int(is_frame.flip(0).long().cumprod(0).sum())
    given = tokens - frames * frame - args["encoder_hidden_states"].shape[1]
    return TokenLayout((frames, height, width), text_first=True, prefix=given)


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; of every 17 frames, the first is a latent of its own."""
    _, height, width = transformer["patch_size"]
    side = vae["spatial_downsample_factor"]
    return 4, side * height, side * width


# Call: canvas of MiniMaxH3ModularPipeline in diffusers 0.42. Configuration: the class's defaults.
CHECKPOINTS: dict[str, Checkpoint] = {
    "minimax-h3": Checkpoint(
        "MiniMaxAI/MiniMax-H3",
        "h3",
        "text or keyframes to video with sound, with diffusers' ModularPipeline",
        {"height": 768, "width": 1344, "num_frames": 124, "fps": 24},
        "MiniMaxH3Transformer3DModel",
        {},
        (50, 56, 128),
        TokenLayout((37, 24, 42), text=256, text_first=True, prefix=2 * 207),
    ),
}

FAMILY = Family(
    name="minimax_h3",
    transformers={"MiniMaxH3Transformer3DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=pixels,
    joint=True,
    checkpoints=CHECKPOINTS,
)
