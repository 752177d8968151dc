"""Wan: text, image and VACE to video, Animate, ChronoEdit and SkyReels-V2."""

from typing import Any

import torch

from families import Case, Grid, items


def inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    config = model.config
    size = [n * p for n, p in zip(grid, config.patch_size, strict=True)]
    given = {
        "hidden_states": items(first, batch, config.in_channels, *size),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": items(first, batch, 12, config.text_dim, seed=1),
        "return_dict": False,
    }
    if config.added_kv_proj_dim is not None:  # with an image, text has 512 tokens
        given["encoder_hidden_states"] = items(first, batch, 512, config.text_dim, seed=1)
        given["encoder_hidden_states_image"] = items(first, batch, 257, config.image_dim, seed=3)
    if config.get("inject_sample_info"):
        given["fps"] = [1] * batch
    return given


def vace_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    common = inputs(model, batch, grid, first)
    size = common["hidden_states"].shape[2:]
    return {
        **common,
        "control_hidden_states": items(first, batch, model.config.vace_in_channels, *size, seed=2),
        "control_hidden_states_scale": torch.ones(len(model.config.vace_layers)),
    }


def animate_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """A frame of latents is four of the face video, but the first, and the reference, which has no face."""
    common, side = inputs(model, batch, grid, first), model.config.motion_encoder_size
    frames, *size = common["hidden_states"].shape[2:]
    faces = items(first, batch, 3, 1, 1, 1, seed=5).expand(-1, -1, 4 * (frames - 2) + 1, side, side)
    return {
        **common,
        "pose_hidden_states": items(first, batch, model.config.latent_channels, frames - 1, *size, seed=4),
        "face_pixel_values": faces,
    }


def forcing_inputs(model: Any, batch: int, grid: Grid, first: int) -> dict[str, Any]:
    """Diffusion forcing: a timestep for each frame."""
    timestep = torch.linspace(400, 900, grid[0]).expand(batch, -1)
    return {**inputs(model, batch, grid, first), "timestep": timestep, "enable_diffusion_forcing": True}


CASES = {
    "wan": Case("WanTransformer3DModel", inputs),
    # As Wan2.2's image to video: image latents and mask as 6 more input channels.
    "wan-i2v": Case("WanTransformer3DModel", inputs, {"in_channels": 10}),
    "wan-vace": Case("WanVACETransformer3DModel", vace_inputs),
    "wan-animate": Case("WanAnimateTransformer3DModel", animate_inputs),
    "chronoedit": Case("ChronoEditTransformer3DModel", inputs),
    "skyreels": Case("SkyReelsV2Transformer3DModel", inputs),
    "skyreels-forcing": Case("SkyReelsV2Transformer3DModel", forcing_inputs),
}
