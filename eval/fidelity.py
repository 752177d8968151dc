"""How far a video is from another one made from the same noise: PSNR and SSIM, the protocol spelled out.

Both are means over frames. PSNR: peak 1, one value per frame; identical frames, whose PSNR is infinite, are
left out of the mean and counted by :func:`identical_frames`. SSIM: Gaussian window of 11x11 pixels with
sigma 1.5, edges reflected, mean over all pixels and channels.

Videos are [F, H, W, C] or [F, C, H, W], tensors or arrays: uint8 in 0..255, or floats in 0..1. Bytes become
floats before anything is subtracted: a difference of bytes would wrap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 16
"""Frames handed to SSIM at once; it keeps several float copies of them."""


def psnr(a: Any, b: Any) -> float:
    """Mean over the frames that differ of the peak signal to noise ratio in dB; inf when none does.

    Raises:
        ValueError: Shapes that differ, or no videos of the kinds above.
    """
    values = frame_psnr(a, b)
    differ = values[values.isfinite()]
    return differ.mean().item() if len(differ) else float("inf")


def frame_psnr(a: Any, b: Any) -> Tensor:
    """Peak signal to noise ratio of each frame, float32 [F]; inf where the frames are identical."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = _pair(a, b)
    values = [peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b, strict=True)]
    return torch.stack(values)


def identical_frames(a: Any, b: Any) -> int:
    """How many frames are the same in both videos."""
    a, b = _pair(a, b)
    return int((a == b).flatten(1).all(1).sum())


def ssim(a: Any, b: Any) -> float:
    """Mean structural similarity, at most 1.

    Raises:
        ValueError: Shapes that differ, frames smaller than 11 pixels, or no videos of the kinds above.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = _pair(a, b)
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs frames of at least 11x11 pixels, got {a.shape[2]}x{a.shape[3]}")
    values = []
    for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
        value = structural_similarity_index_measure(
            x, y, gaussian_kernel=True, sigma=1.5, kernel_size=11, data_range=1.0, reduction="none"
        )
        assert isinstance(value, Tensor)
        values.append(value.reshape(-1))
    return torch.cat(values).mean().item()


def _pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    a, b = _frames(a), _frames(b)
    if a.shape != b.shape:
        raise ValueError(
            f"the videos differ in size, {tuple(a.shape)} and {tuple(b.shape)} as [F, C, H, W]: "
            "nothing is resized"
        )
    return a, b


def _frames(video: Any) -> Tensor:
    """float32 [F, C, H, W] in 0..1."""
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or (frames.shape[3] not in (1, 3) and frames.shape[1] not in (1, 3)):
        raise ValueError(
            f"a video is [F, H, W, C] or [F, C, H, W] with 1 or 3 channels, got {tuple(frames.shape)}"
        )
    if 0 in frames.shape:
        raise ValueError(f"a video needs frames and pixels, got {tuple(frames.shape)}")
    if frames.shape[3] in (1, 3):
        frames = frames.permute(0, 3, 1, 2)
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    if not frames.is_floating_point():
        raise ValueError(f"a video is uint8 or floating point, got {frames.dtype}")
    if frames.min() < 0 or frames.max() > 1 or not frames.isfinite().all():
        raise ValueError(
            f"a floating point video lies in 0..1, got {frames.min().item():g} to {frames.max().item():g}"
        )
    return frames.float()
