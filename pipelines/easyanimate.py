"""EasyAnimate 5.1: text to video, inpainting (and so image to video), control. Text stands before the grid in
one sequence, padding and all: no mask reaches the transformer. Given frames and control come as further
channels. Classifier-free guidance is one batch, [uncond, cond].
"""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, kl_scale, patches, stacks

TINY: Config = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 3,
    "mmdit_layers": 2,
    "time_embed_dim": 4,
    "text_embed_dim": 16,
}


def layers(model: Any) -> list[Layer]:
    """``transformer_blocks.*.attn1``, of which the first project text by weights of its own."""
    return stacks(model, ("transformer_blocks", "attn1"))


def layout(model: Any, args: Arguments) -> TokenLayout:
    """``hidden_states`` is [B, C, F, H, W]."""
    patch = model.config.patch_size
    return TokenLayout(patches(args["hidden_states"].shape[2:], (1, patch, patch)), text_first=True)


def anchors(model: Any, args: Arguments) -> int:
    """The first frame is what an inpainting model is given as image, and a control model as reference."""
    return int(model.config.in_channels > model.config.out_channels)


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; the first frame is a token frame of its own."""
    side = kl_scale(vae)
    return side // 2, side * transformer["patch_size"], side * transformer["patch_size"]


# Calls: the pipelines' own defaults, frames a second as in diffusers' documentation. Channels: the pipelines
# put beside 16 of the latents 1 of the mask and 16 of the given frames, or 16 of control and 16 of reference.
_CALL = {
    "height": 512,
    "width": 512,
    "num_frames": 49,
    "fps": 8,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
}
_CONFIG: Config = {"in_channels": 16, "out_channels": 16, "patch_size": 2}
_CLASS = "EasyAnimateTransformer3DModel"
_SHAPE = (48, 48, 64)
_TOKENS = TokenLayout((13, 32, 32), text=256, text_first=True)

CHECKPOINTS: dict[str, Checkpoint] = {
    "easyanimate": Checkpoint(
        "alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",
        "12b",
        "text to video, 256 to 1024 pixels a side; 40 GB of weights in float16",
        _CALL,
        _CLASS,
        _CONFIG,
        _SHAPE,
        _TOKENS,
    ),
    "easyanimate-inp": Checkpoint(
        "alibaba-pai/EasyAnimateV5.1-12b-zh-InP-diffusers",
        "12b",
        "text and, from Python, given frames to video; 40 GB of weights in float16",
        _CALL,
        _CLASS,
        {**_CONFIG, "in_channels": 33},
        _SHAPE,
        _TOKENS,
    ),
    "easyanimate-control": Checkpoint(
        "alibaba-pai/EasyAnimateV5.1-12b-zh-Control-diffusers",
        "12b",
        "text and, from Python, control video and reference image to video; 40 GB of weights in float16",
        _CALL,
        _CLASS,
        {**_CONFIG, "in_channels": 48},
        _SHAPE,
        _TOKENS,
    ),
}

FAMILY = Family(
    name="easyanimate",
    transformers={"EasyAnimateTransformer3DModel": TINY},
    layers=layers,
    layout=layout,
    pixels=pixels,
    joint=True,
    anchors=anchors,
    branches=("cond_uncond",),
    checkpoints=CHECKPOINTS,
    call={"negative_prompt": ""},  # guidance needs one, and None is none
)
