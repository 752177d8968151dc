"""PSNR, SSIM and LPIPS against their definitions, and the traps of other people's versions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from dit_sparse.eval import fidelity
from dit_sparse.eval.fidelity import (
    PROTOCOLS,
    frame_lpips,
    frame_psnr,
    frame_ssim,
    identical_frames,
    lpips,
    psnr,
    ssim,
)


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


def drifting(frames: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A smooth clip, and one whose error grows from frame to frame."""
    y, x = np.mgrid[:40, :56] / 40
    clip = np.stack([[np.sin(3 * x + y + t / 4 + c) / 2 + 0.5 for c in range(3)] for t in range(frames)])
    noise = np.random.default_rng(0).normal(0, 1, clip.shape)
    off = np.clip(clip + noise * np.linspace(0.005, 0.2, frames)[:, None, None, None], 0, 1)
    return tuple((v.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8) for v in (clip, off))  # type: ignore[return-value]


def test_the_skimage_protocol_is_scikit_image() -> None:
    from skimage import metrics

    a, b = drifting()
    decibels = [metrics.peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    similar = [metrics.structural_similarity(x, y, channel_axis=2) for x, y in zip(a, b, strict=True)]
    assert psnr(a, b, "skimage") == pytest.approx(np.mean(decibels), abs=1e-4)
    assert frame_ssim(a, b, "skimage").numpy() == pytest.approx(np.array(similar), abs=1e-5)
    assert ssim(a, b, "pooled") == pytest.approx(np.mean(similar), abs=1e-5)


def test_the_pooled_protocol_has_one_error() -> None:
    a, b = drifting()
    error = ((a / 255 - b / 255) ** 2).mean()
    assert psnr(a, b, "pooled") == pytest.approx(-10 * np.log10(error), abs=1e-4)
    assert psnr(a, b, "pooled") < psnr(a, b) - 4
    assert psnr(a, a, "pooled") == math.inf


def test_the_svg_protocol() -> None:
    """SSIM by a uniform window of 11 x 11 pixels over zeros, written out; PSNR keeps identical frames."""
    a, b = drifting(2)

    def windows(v: np.ndarray) -> np.ndarray:
        padded = np.pad(v / 255, ((0, 0), (5, 5), (5, 5), (0, 0)))
        return np.lib.stride_tricks.sliding_window_view(padded, (11, 11), axis=(1, 2))

    x, y = windows(a), windows(b)
    mx, my = x.mean((-1, -2)), y.mean((-1, -2))
    vx, vy = (x * x).mean((-1, -2)) - mx**2, (y * y).mean((-1, -2)) - my**2
    both = (x * y).mean((-1, -2)) - mx * my
    expected = (2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert ssim(a, b, "svg") == pytest.approx(expected.mean(), abs=1e-5)
    assert psnr(a, b, "svg") == pytest.approx(psnr(a, b), abs=1e-5)
    b[0] = a[0]
    assert psnr(a, b, "svg") == math.inf
    assert psnr(a, b) < math.inf


def test_protocols_differ_and_say_how() -> None:
    a, b = drifting()
    values = {(round(psnr(a, b, name), 3), round(ssim(a, b, name), 5)) for name in PROTOCOLS}
    assert len(values) == len(PROTOCOLS)
    assert all(p.psnr and p.ssim and p.lpips for p in PROTOCOLS.values())
    with pytest.raises(ValueError, match="unknown protocol 'svgg'; there are default, svg"):
        psnr(a, b, "svgg")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A torch hub cache of random networks, in the files that real weights come in."""
    import torchvision

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for name, weights in (
        ("alexnet", torchvision.models.AlexNet_Weights.DEFAULT),
        ("vgg16", torchvision.models.VGG16_Weights.DEFAULT),
    ):
        torch.manual_seed(0)
        state = getattr(torchvision.models, name)(weights=None).state_dict()
        torch.save(state, tmp_path / "checkpoints" / weights.url.rsplit("/", 1)[1])
    fidelity._lpips_of.cache_clear()
    yield tmp_path
    fidelity._lpips_of.cache_clear()


def by_definition(a: np.ndarray, b: np.ndarray, net: str, layers: tuple[int, ...], signed: bool) -> float:
    """Zhang et al. 2018: weighted squared distance of normalised features, over positions and layers."""
    import torchmetrics
    import torchvision

    torch.manual_seed(0)
    features = getattr(torchvision.models, net)(weights=None).features.eval()
    own = Path(torchmetrics.__file__).parent / "functional/image/lpips_models"
    linear = torch.load(
        own / f"{'alex' if net == 'alexnet' else 'vgg'}.pth", weights_only=True, map_location="cpu"
    )
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    total = 0.0
    for frames in zip(a, b, strict=True):
        x, y = (torch.from_numpy(f).permute(2, 0, 1).float() / 255 for f in frames)
        x, y = ((2 * v - 1 if signed else v) for v in (x, y))
        x, y = ((v - shift) / scale for v in (x, y))
        for i, layer in enumerate(features):
            x, y = layer(x), layer(y)
            if i in layers:
                one, two = (v / (v.norm(dim=0, keepdim=True) + 1e-10) for v in (x, y))
                weights = linear[f"lin{layers.index(i)}.model.1.weight"][0]
                total += float((weights * (one - two) ** 2).sum(0).mean())
    return total / len(a)


@torch.no_grad()
def test_lpips_end_to_end(hub: Path) -> None:
    a, b = (v[:2].repeat(2, 1).repeat(2, 2) for v in drifting())
    default = by_definition(a, b, "alexnet", (1, 4, 7, 9, 11), signed=True)
    svg = by_definition(a, b, "vgg16", (3, 8, 15, 22, 29), signed=False)
    assert lpips(a, b) == pytest.approx(default, rel=1e-3)
    assert lpips(a, b, "svg") == pytest.approx(svg, rel=1e-3)
    assert lpips(a, a) == 0
    assert 0 < frame_lpips(a, b)[0] < frame_lpips(a, b)[1]


def test_lpips_without_weights_says_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    fidelity._lpips_of.cache_clear()
    a, b = drifting(1)
    with pytest.raises(ValueError, match=rf"weights of alex, which are not in {tmp_path}/checkpoints"):
        lpips(a, b)


def offline(*_: object, **__: object) -> None:
    raise URLError("no network")


@pytest.mark.parametrize("shape", [(4, 3, 16, 3), (4, 3, 16, 1), (4, 1, 16, 3)])
def test_a_shape_that_can_be_read_two_ways_is_refused(shape: tuple[int, ...]) -> None:
    a = np.zeros(shape, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"\[F, H, W, C\] or \[F, C, H, W\]\?"):
        psnr(a, a)
