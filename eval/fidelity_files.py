"""``dit-sparse eval fidelity``: videos in files against reference videos, with what noise there is anyway.

A reference and an output are a file each, or folders of files with the same names, one for each prompt.
``.mp4`` and ``.png`` are what players and papers see; ``.safetensors`` with one tensor ``frames``, uint8
[F, H, W, 3], loses nothing to a codec.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from dit_sparse.eval import fidelity
from dit_sparse.eval.attributes import paired_interval

SUFFIXES = (".mp4", ".png", ".safetensors")


def measured(a: Tensor, b: Tensor, protocol: str, with_lpips: bool) -> dict[str, Any]:
    """Every number of one pair, and its curves over the frames; infinite PSNR is None, as in JSON."""
    curves = {"psnr": fidelity.frame_psnr(a, b), "ssim": fidelity.frame_ssim(a, b, protocol)}
    pooled = fidelity.protocol_of(protocol).pooled
    psnr = fidelity.psnr(a, b, protocol) if pooled else fidelity.mean_psnr(curves["psnr"], protocol)
    values = {"psnr": psnr, "ssim": curves["ssim"].mean().item()}
    if with_lpips:
        curves["lpips"] = fidelity.frame_lpips(a, b, protocol)
        values["lpips"] = curves["lpips"].mean().item()
    return {
        **{name: _finite(value) for name, value in values.items()},
        "frames": len(a),
        "identical_frames": fidelity.identical_frames(a, b),
        "per_frame": {name: [_finite(v) for v in curve.tolist()] for name, curve in curves.items()},
    }


def compare(
    reference: Path,
    outputs: Sequence[Path],
    *,
    floor: Path | None = None,
    protocol: str = "default",
    with_lpips: bool = False,
) -> dict[str, Any]:
    """Each of ``outputs`` against ``reference``, as what ``--output`` writes.

    Args:
        reference, outputs, floor: A file each, or folders with the same names in them.
        floor: The reference made anew by another backend or dtype: how far apart two dense runs are.

    Raises:
        ValueError: Files that are missing, cannot be read, or do not fit each other.
    """
    fidelity.protocol_of(protocol)
    names = _names(reference)
    rows: dict[str, dict[str, Any]] = {}
    for label, path in [*((str(o), o) for o in outputs), *([("noise floor", floor)] if floor else [])]:
        found = {}
        for name in names:
            a, b = read(reference / name), read(path / name)
            try:
                found[str(name)] = measured(a, b, protocol, with_lpips)
            except ValueError as error:
                raise ValueError(f"{path / name}: {error}") from None
        rows[label] = {**_summary(found), "videos": found}
    first = rows[str(outputs[0])]["videos"]
    for output in outputs[1:]:
        row = rows[str(output)]
        row["minus_first"] = {
            name: interval([row["videos"][v][name] for v in first], [first[v][name] for v in first])
            for name in ("psnr", "ssim", *(["lpips"] if with_lpips else []))
        }
    return {
        "format": 1,
        "protocol": fidelity.described(protocol, with_lpips),
        "reference": str(reference),
        "read_from": sorted({(reference / name).suffix[1:] for name in names}),
        "rows": rows,
    }


def read(path: Path) -> Tensor:
    """uint8 [F, H, W, 3] of a file."""
    from dit_sparse.video import read_video

    if not path.is_file():
        raise ValueError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: expected a video")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if set(tensors) != {"frames"}:
            raise ValueError(f"{path} must hold one tensor 'frames', got {sorted(tensors)}")
        return tensors["frames"]
    return read_video(path)


def _names(reference: Path) -> list[Path]:
    """Paths below ``reference``, which may itself be the only file."""
    if not reference.is_dir():
        return [Path()]
    names = sorted(p.relative_to(reference) for p in reference.iterdir() if p.suffix in SUFFIXES)
    if not names:
        raise ValueError(f"{reference} has no videos ({', '.join(SUFFIXES)})")
    return names


def _summary(videos: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the videos, each with its bootstrap 95 % interval where there are several."""
    summary: dict[str, Any] = {}
    for name in ("psnr", "ssim", "lpips"):
        values = [video[name] for video in videos.values() if name in video]
        if values:
            summary[name] = interval(values)
    for name in ("frames", "identical_frames"):
        summary[name] = sum(video[name] for video in videos.values())
    return summary


def interval(a: Sequence[float | None], b: Sequence[float | None] | None = None) -> dict[str, Any]:
    """Mean of a - b (of a alone) over the pairs that have both, and its paired bootstrap interval."""
    b = [0.0] * len(a) if b is None else b
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs:
        return {"mean": None, "interval": None, "videos": 0}
    xs, ys = zip(*pairs, strict=True)
    bounds = paired_interval(xs, ys) if len(pairs) > 1 else None
    return {"mean": fmean(xs) - fmean(ys), "interval": bounds, "videos": len(pairs)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def rows_of(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows for a terminal."""
    names = [n for n in ("psnr", "ssim", "lpips") if n in result["protocol"]]
    rows = []
    for label, row in result["rows"].items():
        cells = [cell(row[name], name) for name in names]
        rows.append((label, *cells, f"{row['identical_frames']} of {row['frames']}"))
        if "minus_first" in row:
            rows.append(("  minus the first", *(cell(row["minus_first"][n], n) for n in names), ""))
    return (f"against {result['reference']}", *names, "identical frames"), rows


def cell(value: Mapping[str, Any], name: str) -> str:
    """A mean and its interval, as :func:`interval` gives them."""
    if value["mean"] is None:
        return "no frame differs"
    digits = {"psnr": 2, "attributes": 3}.get(name, 4)
    text = f"{value['mean']:.{digits}f}"
    if value["interval"] is None:
        return text
    low, high = value["interval"]
    return f"{text} ({low:.{digits}f} to {high:.{digits}f})"
