"""LTX-Video and LTX-2: text and image to video, LTX-2 with sound. Sequences come packed, [B, S, C], and the
grid beside them as arguments of forward, in latents; where LTX-Video is given coordinates instead, it is read
off those. Images and videos to keep at other times than the start are frames of their own before or after the
grid. Of LTX-2's six attentions a block, only that among video tokens is over the grid.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.pipelines.family import Arguments, Checkpoint, Config, Family, patches, stacks

_TINY: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 3,
    "caption_channels": 16,
}
TINY: dict[str, Config] = {
    "LTXVideoTransformer3DModel": _TINY,
    "LTX2VideoTransformer3DModel": {
        **_TINY,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 8,
        "gated_attn": True,
        "perturbed_attn": True,
    },
}


def layers(model: Any) -> list[Layer]:
    """``attn1``; in LTX-2 ``audio_attn1`` is another's."""
    return stacks(model, ("transformer_blocks", "attn1"))


def layout(model: Any, args: Arguments) -> TokenLayout | str:
    """From the sizes in latents; LTX-2 appends keyframes and references to the grid."""
    tokens, config = args["hidden_states"].shape[1], model.config
    coordinates = args.get("video_coords")
    if coordinates is not None and coordinates.ndim == 3:
        return located(coordinates)
    sizes = [args[name] for name in ("num_frames", "height", "width") if args.get(name) is not None]
    if len(sizes) < 3:
        return "num_frames, height and width of the latents are not among the arguments"
    grid = patches(sizes, (config.patch_size_t, config.patch_size, config.patch_size))
    return TokenLayout(grid, suffix=max(0, tokens - prod(grid)))


def located(coordinates: Tensor) -> TokenLayout | str:
    """The layout of LTX-Video's tokens at (seconds, y, x), [B, 3, S], which come frame by frame.

    The grid begins at time 0 and goes on for as long as time does. What stands before it has later times
    (``LTXConditionPipeline``), what follows has earlier ones (``LTXI2VLongMultiPromptPipeline``). Reading
    the coordinates synchronises the device, once a forward.
    """
    seconds, y, x = coordinates[0].cpu()
    height, width = y.unique().numel(), x.unique().numel()
    frame = height * width
    if len(y) % frame:
        return f"{len(y)} tokens at {height} heights and {width} widths are no whole frames"
    seconds, y, x = (axis.view(-1, height, width) for axis in (seconds, y, x))
    times = seconds[:, 0, 0].tolist()
    is_raster = (seconds == seconds[:, :1, :1]).all() and (y == y[:1, :, :1]).all() and (x == x[:1, :1]).all()
    if not is_raster or 0 not in times:
        return "the tokens do not stand in the order of their coordinates"
    start = stop = times.index(0)
    while stop + 1 < len(times) and times[stop + 1] > times[stop]:
        stop += 1
    after = len(times) - stop - 1
    return TokenLayout((stop - start + 1, height, width), prefix=start * frame, suffix=after * frame)


def anchors(model: Any, args: Arguments) -> int:
    """A given image is the first frame, which then has a timestep of its own."""
    timestep = args["timestep"]
    return int(timestep.ndim > 1 and timestep.shape[1] > 1)


def pixels(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """(frames, height, width) that become one token; older configs leave the scales to be counted."""
    halvings = sum(vae.get("spatio_temporal_scaling", ()))
    side = vae.get("spatial_compression_ratio") or vae["patch_size"] * 2**halvings
    frames = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * 2**halvings
    side *= transformer["patch_size"]
    return frames * transformer["patch_size_t"], side, side


def pipeline_class(index: Config, image: bool) -> str:
    """Text to video and image to video share a checkpoint."""
    name: str = index["_class_name"]
    with_image = {"LTXPipeline": "LTXImageToVideoPipeline", "LTX2Pipeline": "LTX2ImageToVideoPipeline"}
    return with_image.get(name, name) if image else name


# Calls: diffusers' page on LTX-Video and, in diffusers 0.42, the example of LTX2Pipeline. Configurations:
# diffusers, scripts/convert_ltx_to_diffusers.py and convert_ltx2_to_diffusers.py.
_512 = {"height": 512, "width": 768, "fps": 24}

CHECKPOINTS: dict[str, Checkpoint] = {
    "ltx-video": Checkpoint(
        "Lightricks/LTX-Video",
        "2b",
        "text or image to video; fits a 24 GB card in bfloat16 with --offload model",
        {**_512, "num_frames": 161, "num_inference_steps": 50, "guidance_scale": 3.0},
        "LTXVideoTransformer3DModel",
        {},
        (28, 32, 64),
        TokenLayout((21, 16, 24)),
    ),
    "ltx-video-13b": Checkpoint(
        "Lightricks/LTX-Video-0.9.7-dev",
        "13b",
        "text, image or video to video; on a 24 GB card with --offload group",
        {**_512, "num_frames": 161, "num_inference_steps": 30, "guidance_scale": 5.0},
        "LTXVideoTransformer3DModel",
        {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
        (48, 32, 128),
        TokenLayout((21, 16, 24)),
    ),
    "ltx-2": Checkpoint(
        "Lightricks/LTX-2",
        "19b",
        "text or image to video with sound; on a 24 GB card with --offload group",
        {**_512, "num_frames": 121, "num_inference_steps": 30, "guidance_scale": 3.0},
        "LTX2VideoTransformer3DModel",
        {},
        (48, 32, 128),
        TokenLayout((16, 16, 24)),
    ),
}

FAMILY = Family(
    name="ltx",
    transformers=TINY,
    layers=layers,
    layout=layout,
    pixels=pixels,
    anchors=anchors,
    checkpoints=CHECKPOINTS,
    pipeline_class=pipeline_class,
)
