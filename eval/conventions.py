"""PSNR and SSIM of this project beside hand-computed ones and other libraries', on the same clips.

    python -m dit_sparse.eval.conventions --output eval/FIDELITY.md

Needs scikit-image. The real clip is the bundled model's, dense and by Radial from one noise.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_sparse.eval.fidelity import psnr, ssim
from dit_sparse.kernels.bench import identity

Clip = NDArray[np.uint8]
"""[F, H, W, 3]."""
PROMPT = "a red circle moving left on a gray background"


def made_clips() -> dict[str, tuple[Clip, Clip]]:
    """Pairs whose PSNR is a line of arithmetic."""
    noise = np.random.default_rng(0).integers(60, 180, (4, 24, 40, 3), dtype=np.uint8)
    half, steps, some = noise.copy(), noise.copy(), noise.copy()
    half[:, :, :20] += 10
    for i, off in enumerate((1, 3, 9, 27)):
        steps[i] += off
    some[2] += 5
    return {
        "all pixels off by 16": (noise, noise + 16),
        "all pixels off by 32": (noise, noise + 32),
        "half of the pixels off by 10": (noise, half),
        "frames off by 1, 3, 9, 27": (noise, steps),
        "one frame of four off by 5": (noise, some),
    }


BY_HAND = {
    "all pixels off by 16": 20 * math.log10(255 / 16),
    "all pixels off by 32": 20 * math.log10(255 / 32),
    "half of the pixels off by 10": 20 * math.log10(255 / 10) + 10 * math.log10(2),
    "frames off by 1, 3, 9, 27": 20 * math.log10(255) - 20 * math.log10(3) * (0 + 1 + 2 + 3) / 4,
    "one frame of four off by 5": 20 * math.log10(255 / 5),
}
"""Mean over the frames that differ, in dB."""
POOLED_BY_HAND = {
    **{name: BY_HAND[name] for name in list(BY_HAND)[:3]},
    "frames off by 1, 3, 9, 27": 10 * math.log10(255**2 / ((1 + 9 + 81 + 729) / 4)),
    "one frame of four off by 5": 20 * math.log10(255 / 5) + 10 * math.log10(4),
}


def defined_psnr(a: Clip, b: Clip) -> float:
    """The definition in float64: mean over the frames that differ."""
    errors = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / errors[errors > 0])))


def wrapped_psnr(a: Clip, b: Clip) -> float:
    """What comes of subtracting and squaring bytes, modulo 256."""
    errors = ((a - b) ** 2).mean(axis=(1, 2, 3))
    known = errors[errors > 0]
    return float(np.mean(10 * np.log10(255**2 / known))) if len(known) else math.inf


def torchmetrics_psnr(a: Clip, b: Clip) -> float:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    frames = zip(torch.from_numpy(a).float(), torch.from_numpy(b).float(), strict=True)
    values = [float(peak_signal_noise_ratio(x, y, data_range=255.0)) for x, y in frames]
    return float(np.mean([value for value in values if math.isfinite(value)]))


def skimage_psnr(a: Clip, b: Clip) -> float:
    from skimage.metrics import peak_signal_noise_ratio

    differ = [i for i in range(len(a)) if (a[i] != b[i]).any()]
    return float(np.mean([peak_signal_noise_ratio(a[i], b[i], data_range=255) for i in differ]))


def skimage_ssim(a: Clip, b: Clip) -> float:
    """With the library's defaults: 7x7 pixels, sample variances."""
    from skimage.metrics import structural_similarity

    values = [structural_similarity(x, y, channel_axis=2, data_range=255) for x, y in zip(a, b, strict=True)]
    return float(np.mean(values))


def torchmetrics_ssim(a: Clip, b: Clip) -> float:
    """With the library's defaults, values in 0..255."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (torch.from_numpy(clip).permute(0, 3, 1, 2).float() for clip in (a, b))
    value = structural_similarity_index_measure(x, y, data_range=255.0)
    assert isinstance(value, torch.Tensor)
    return float(value)


def defined_ssim(a: Clip, b: Clip) -> float:
    """The sums of the ``svg`` protocol written out in float64: 11x11 pixels, edges padded with zeros."""

    def mean(values: Any) -> Any:
        padded = np.pad(values, ((0, 0), (5, 5), (5, 5), (0, 0)))
        return np.lib.stride_tricks.sliding_window_view(padded, (11, 11), axis=(1, 2)).mean(axis=(-2, -1))

    x, y = a / 255.0, b / 255.0
    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(values.mean())


SSIM_PEERS: dict[str, tuple[str, Callable[[Clip, Clip], float]]] = {
    "default": ("torchmetrics", torchmetrics_ssim),
    "svg": ("written out in float64", defined_ssim),
    "skimage": ("scikit-image", skimage_ssim),
}
"""Protocol -> what its SSIM is held against. ``pooled`` has that of ``skimage``."""


def real_clip() -> tuple[Clip, Clip]:
    """tiny-wan in its study setting, dense and by Radial from the same noise."""
    from diffusers import WanPipeline

    import dit_sparse
    from dit_sparse.pipelines import tiny

    pipe = WanPipeline.from_pretrained(tiny.MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)

    def run() -> Clip:
        generator = torch.Generator().manual_seed(0)
        frames = pipe(PROMPT, generator=generator, output_type="np", **tiny.STUDY).frames[0]
        return (np.asarray(frames) * 255).round().astype(np.uint8)

    dense = run()
    with dit_sparse.apply(pipe, "radial", block=16, schedule="dense 0-25%"):
        return dense, run()


def compressed(clip: Clip) -> Clip:
    """After H.264, as ``dit-sparse generate`` writes it."""
    from dit_sparse.video import read_video, write_video

    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, torch.from_numpy(clip), 16)
        return read_video(path).numpy()


def report(real: tuple[Clip, Clip]) -> str:
    """FIDELITY.md."""
    from skimage.metrics import peak_signal_noise_ratio

    files = compressed(real[0]), compressed(real[1])
    clips = {**made_clips(), "tiny-wan, Radial and dense": real, "the same after H.264": files}
    names = ("torch", "torchmetrics", "scikit-image", "numpy")
    lines = [
        INTRODUCTION.format(
            date=time.strftime("%Y-%m-%d"),
            machine=identity("cpu")["device"],
            versions=", ".join(f"{name} {version(name)}" for name in names),
            prompt=PROMPT,
        ),
        "## PSNR, dB: mean over the frames that differ (`default`, `skimage`)\n",
        "| clip | by hand | here | torchmetrics | scikit-image | most apart | bytes that wrap |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (a, b) in clips.items():
        truth = BY_HAND.get(name, defined_psnr(a, b))
        found = [psnr(a, b), torchmetrics_psnr(a, b), skimage_psnr(a, b)]
        apart = max(abs(value - truth) for value in found)
        cells = [*(f"{value:.4f}" for value in (truth, *found)), f"{apart:.0e}", f"{wrapped_psnr(a, b):.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "\n## PSNR, dB: one error for all frames (`pooled`)\n",
        "| clip | by hand | here | scikit-image | most apart |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (a, b) in clips.items():
        error = ((a.astype(np.float64) - b) ** 2).mean()
        truth, found_here = POOLED_BY_HAND.get(name, 10 * math.log10(255**2 / error)), psnr(a, b, "pooled")
        whole = float(peak_signal_noise_ratio(a, b, data_range=255))
        apart = max(abs(value - truth) for value in (found_here, whole))
        lines.append(f"| {name} | {truth:.4f} | {found_here:.4f} | {whole:.4f} | {apart:.0e} |")
    lines += [
        "\n## SSIM\n",
        "| clip | protocol | here | held against | it says | apart |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (a, b) in clips.items():
        for protocol, (whom, peer) in SSIM_PEERS.items():
            ours, theirs = ssim(a, b, protocol), peer(a, b)
            apart = abs(ours - theirs)
            lines.append(f"| {name} | {protocol} | {ours:.6f} | {whom} | {theirs:.6f} | {apart:.0e} |")
    decibels = [psnr(*clip, protocol) for clip in (real, files) for protocol in ("default", "pooled")]
    shares = [ssim(*clip, protocol) for clip in (real, files) for protocol in SSIM_PEERS]
    lines.append(
        f"\nOn the real clip alone, conventions and compression move PSNR from {min(decibels):.2f} to "
        f"{max(decibels):.2f} dB and SSIM from {min(shares):.4f} to {max(shares):.4f}: name the protocol."
    )
    return "\n".join(lines) + "\n"


INTRODUCTION = """# PSNR and SSIM on the same clips

Made by `python -m dit_sparse.eval.conventions --output eval/FIDELITY.md` on {machine}, {date};
{versions}.

The first five clips are noise of 24x40 pixels and 4 frames with a known change, so that PSNR is a line of
arithmetic; the last two are tiny-wan's "{prompt}", 25 frames of 64x128, before and after
compression, where "by hand" is the definition in float64. The last column of the first table is what comes of
subtracting and squaring bytes, which wrap modulo 256: 16 and 32 square to nothing, and such a PSNR hardly
falls below 28 dB whatever it looks at.
"""


def main() -> None:
    """The command line."""
    from dit_sparse.video import check_writable, staged

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the tables there as Markdown")
    args = parser.parse_args()
    try:
        if args.output:
            check_writable("--output", args.output)
        if find_spec("skimage") is None:
            raise ValueError("scikit-image is not installed: pip install scikit-image")
        text = report(real_clip())
    except ValueError as error:
        parser.error(str(error))
    print(text)
    if args.output:
        with staged() as stage:
            stage(args.output).write_text(text)


if __name__ == "__main__":
    main()
