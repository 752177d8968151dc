"""How far a video is from another one made from the same noise: PSNR, SSIM and LPIPS, by a named protocol.

How papers measure moves these numbers as much as what they measure: a clip that drifts has a pooled PSNR
several dB below its mean over frames. Compare numbers of one of the :data:`PROTOCOLS` only.

Videos are [F, H, W, C] or [F, C, H, W], tensors or arrays: uint8 in 0..255, or floats in 0..1. Bytes become
floats before anything is subtracted: a difference of bytes would wrap. Nothing is resized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 16
"""Frames handed to SSIM at once; it keeps several float copies of them."""

SMALLEST = 11
"""Pixels a side that every protocol's SSIM has room for."""


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(
        x, y, gaussian_kernel=True, sigma=1.5, kernel_size=11, data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values.reshape(-1)


def _uniform(x: Tensor, y: Tensor, *, size: int, padding: int, sample: bool) -> Tensor:
    """SSIM with the mean of ``size`` x ``size`` pixels for a window; ``sample`` variances divide by n - 1."""

    def mean(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values, size, stride=1, padding=padding)

    x, y = x.double(), y.double()  # a variance is a difference of nearly equal means
    c1, c2 = 0.01**2, 0.03**2
    n = size * size
    unbiased = n / (n - 1) if sample else 1.0
    mx, my = mean(x), mean(y)
    vx, vy, both = (
        unbiased * (mean(a * b) - ma * mb)
        for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my))
    )
    values = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return values.flatten(1).mean(1).float()


@dataclass(frozen=True)
class Protocol:
    """How three numbers come about.

    Args:
        psnr: In words.
        ssim: In words.
        lpips: In words.
        pooled: One e for the whole video instead of one for each frame.
        keeps_identical: The infinite PSNR of identical frames counts in the mean, which it makes infinite.
        window: (x, y), [F, C, H, W] in 0..1 -> SSIM of each frame.
        net: Backbone of LPIPS.
        signed: LPIPS is given values in -1..1, as its networks were trained, instead of 0..1.
    """

    psnr: str
    ssim: str
    lpips: str
    pooled: bool = False
    keeps_identical: bool = False
    window: Callable[[Tensor, Tensor], Tensor] = _gaussian
    net: str = "alex"
    signed: bool = True


_ERROR = "e the mean squared difference of values in 0..1"
_MEAN = f"mean over the frames that differ of -10 log10(e), {_ERROR}"
_GAUSS = "Gaussian window of 11x11 pixels, sigma 1.5, edges reflected; mean over pixels, channels and frames"
_SEVEN = "uniform window of 7x7 pixels where it fits, sample variances; mean over pixels, channels and frames"
_ALEX = "AlexNet, values in -1..1, mean over frames"

PROTOCOLS: dict[str, Protocol] = {
    "default": Protocol(_MEAN, _GAUSS, _ALEX),
    "svg": Protocol(
        f"mean over frames of -10 log10(e), {_ERROR}; infinite as soon as two frames are identical",
        "uniform window of 11x11 pixels, edges padded with zeros; mean over pixels, channels and frames",
        "VGG, values in 0..1 (the network expects -1..1), mean over frames",
        keeps_identical=True,
        window=partial(_uniform, size=11, padding=5, sample=False),
        net="vgg",
        signed=False,
    ),
    "skimage": Protocol(_MEAN, _SEVEN, _ALEX, window=partial(_uniform, size=7, padding=0, sample=True)),
    "pooled": Protocol(
        f"-10 log10(e), {_ERROR}, over all frames",
        _SEVEN,
        _ALEX,
        pooled=True,
        window=partial(_uniform, size=7, padding=0, sample=True),
    ),
}
"""``svg`` is what the scripts of Sparse VideoGen compute, ``skimage`` the metrics of scikit-image with their
defaults, ``pooled`` one error for all frames as in SparseVideo."""


def psnr(a: Any, b: Any, protocol: str = "default") -> float:
    """Peak signal to noise ratio in dB; inf when no frame differs.

    Raises:
        ValueError: Shapes that differ, no videos of the kinds above, or an unknown protocol.
    """
    how = protocol_of(protocol)
    if how.pooled:
        a, b = _pair(a, b)
        error = (a - b).double().square().mean().item()
        return -10 * math.log10(error) if error else math.inf
    return mean_psnr(frame_psnr(a, b), protocol)


def mean_psnr(values: Tensor, protocol: str = "default") -> float:
    """:func:`psnr` out of that of the frames, by a protocol that is not pooled."""
    counted = values if protocol_of(protocol).keeps_identical else values[values.isfinite()]
    return counted.mean().item() if len(counted) else math.inf


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


def ssim(a: Any, b: Any, protocol: str = "default") -> float:
    """Mean structural similarity, at most 1.

    Raises:
        ValueError: As :func:`psnr`, and frames smaller than 11 pixels.
    """
    return frame_ssim(a, b, protocol).mean().item()


def frame_ssim(a: Any, b: Any, protocol: str = "default") -> Tensor:
    """Structural similarity of each frame, float32 [F]."""
    window = protocol_of(protocol).window
    a, b = _pair(a, b)
    if min(a.shape[2:]) < SMALLEST:
        raise ValueError(f"SSIM needs frames of at least 11x11 pixels, got {a.shape[2]}x{a.shape[3]}")
    return torch.cat([window(x, y) for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True)])


def lpips(a: Any, b: Any, protocol: str = "default") -> float:
    """Mean learned perceptual distance; 0 when no frame differs.

    Raises:
        ValueError: As :func:`psnr`, one channel, or weights that are neither in torch's hub cache nor can be
            fetched.
    """
    return frame_lpips(a, b, protocol).mean().item()


def frame_lpips(a: Any, b: Any, protocol: str = "default") -> Tensor:
    """Learned perceptual distance of each frame, float32 [F]."""
    how = protocol_of(protocol)
    a, b = _pair(a, b)
    if a.shape[1] != 3:
        raise ValueError(f"LPIPS needs 3 channels, got {a.shape[1]}")
    measure = _lpips_of(how.net)
    # torchmetrics maps nothing here: it would map 0..1 to -1..1 for every protocol.
    pairs = ((2 * x - 1, 2 * y - 1) if how.signed else (x, y) for x, y in zip(a, b, strict=True))
    with torch.no_grad():
        return torch.stack([measure(x[None], y[None]).float() for x, y in pairs])


@lru_cache(maxsize=2)
def _lpips_of(net: str) -> Any:
    from urllib.error import URLError

    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=False)  # type: ignore[arg-type]
    except ModuleNotFoundError as error:
        raise ValueError(f"LPIPS needs torchvision ({error}): pip install 'dit-sparse[eval]'") from None
    except (URLError, OSError) as error:
        raise ValueError(
            f"LPIPS needs the ImageNet weights of {net}, which are not in {torch.hub.get_dir()}/checkpoints "
            f"and cannot be fetched: {error}"
        ) from None


def protocol_of(name: str) -> Protocol:
    """A protocol by its name; ValueError with those there are."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def described(name: str, with_lpips: bool) -> dict[str, str]:
    """A protocol in words, for a file of results."""
    how = protocol_of(name)
    known = {"name": name, "psnr": how.psnr, "ssim": how.ssim}
    return {**known, "lpips": how.lpips} if with_lpips else known


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
    if frames.shape[3] in (1, 3) and frames.shape[1] in (1, 3):
        raise ValueError(
            f"is {tuple(frames.shape)} [F, H, W, C] or [F, C, H, W]? both would be 1 or 3 pixels high or wide"
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
