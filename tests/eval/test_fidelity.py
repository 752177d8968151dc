"""PSNR and SSIM against their definitions, and the traps of other people's versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dit_sparse.eval.fidelity import frame_psnr, identical_frames, psnr, ssim


def video(seed: int, frames: int = 4, height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_psnr_is_the_mean_over_frames_of_the_definition() -> None:
    a, b = video(0), video(1)
    errors = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    expected = (10 * np.log10(255**2 / errors)).mean()
    assert psnr(a, b) == pytest.approx(expected, abs=1e-4)


def test_bytes_do_not_wrap() -> None:
    """A constant shift of 16 grey levels squares to 0 in bytes; the true value is 24.05 dB."""
    a = np.full((2, 16, 16, 3), 100, dtype=np.uint8)
    assert psnr(a, a + 16) == pytest.approx(20 * math.log10(255 / 16), abs=1e-4)
    assert psnr(a + 16, a) == psnr(a, a + 16)


def test_identical_frames_are_counted_and_not_averaged() -> None:
    a, b = video(0), video(1)
    b[1] = a[1]
    assert identical_frames(a, b) == 1
    assert torch.isinf(frame_psnr(a, b)).tolist() == [False, True, False, False]
    others = [0, 2, 3]
    assert psnr(a, b) == pytest.approx(psnr(a[others], b[others]), abs=1e-5)
    assert psnr(a, a) == math.inf
    assert identical_frames(a, a) == 4
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-6)


def test_layout_type_and_container_do_not_matter() -> None:
    a, b = video(0), video(1)
    for x, y in (
        (torch.from_numpy(a), torch.from_numpy(b)),
        (a.transpose(0, 3, 1, 2), b.transpose(0, 3, 1, 2)),
        (a.astype(np.float32) / 255, b),
        (torch.from_numpy(a).double() / 255, torch.from_numpy(b).double() / 255),
    ):
        assert psnr(x, y) == pytest.approx(psnr(a, b), abs=1e-4)
        assert ssim(x, y) == pytest.approx(ssim(a, b), abs=1e-4)


def test_ssim_is_the_gaussian_one() -> None:
    """Against the sums written out for one grey frame."""
    rng = np.random.default_rng(0)
    a = rng.random((1, 13, 17, 1))
    b = np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    x, y = (
        np.lib.stride_tricks.sliding_window_view(np.pad(v[0, :, :, 0], 5, mode="reflect"), (11, 11))
        for v in (a, b)
    )

    def mean(values: np.ndarray) -> np.ndarray:
        return (window * values).sum(axis=(2, 3))

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(a, b) == pytest.approx(expected.mean(), abs=1e-5)


def test_more_noise_is_worse() -> None:
    a = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    noisy = [(a + s * noise).clamp(0, 1) for s in (0.01, 0.05, 0.2)]
    for measure in (psnr, ssim):
        values = [measure(a, b) for b in noisy]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (video(0), video(0)[:3], "differ in size"),
        (video(0), video(0)[:, :20], "nothing is resized"),
        (video(0)[0], video(0)[0], r"\[F, H, W, C\]"),
        (video(0).astype(np.int32), video(0), "uint8 or floating point"),
        (video(0).astype(np.float32), video(0), "lies in 0..1"),
        (np.full((1, 16, 16, 3), np.nan), video(0, 1, 16, 16), "lies in 0..1"),
    ],
)
def test_what_is_no_pair_of_videos_is_refused(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        psnr(a, b)
    with pytest.raises(ValueError, match=message):
        ssim(a, b)


def test_ssim_refuses_frames_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(video(0, height=8), video(1, height=8))
