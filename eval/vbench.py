"""VBench's scores without VBench: totals from what its dimensions gave, and the one dimension that needs no
network.

VBench (arXiv 2311.17982) normalises sixteen dimensions to 0..1, averages them with weights to a quality and a
semantic score, and those 4:1 to its total. VBench-2.0 (arXiv 2503.21755) averages eighteen dimensions within
five groups, and the groups. A total of a part of the dimensions is none, and is not given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dimension:
    """One dimension of VBench.

    Args:
        group: "quality" or "semantic".
        low, high: The scores that become 0 and 1.
        weight: In the mean of its group.
    """

    group: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0

    def normalised(self, score: float) -> float:
        """A score as it enters the totals."""
        return (score - self.low) / (self.high - self.low)


# Constants of scripts/cal_final_score.py and scripts/constant.py in Vchitect/VBench.
DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": Dimension("quality", 0.1462, 1.0),
    "background_consistency": Dimension("quality", 0.2615, 1.0),
    "temporal_flickering": Dimension("quality", 0.6293, 1.0),
    "motion_smoothness": Dimension("quality", 0.706, 0.9975),
    "aesthetic_quality": Dimension("quality"),
    "imaging_quality": Dimension("quality"),
    "dynamic_degree": Dimension("quality", weight=0.5),
    "object_class": Dimension("semantic"),
    "multiple_objects": Dimension("semantic"),
    "human_action": Dimension("semantic"),
    "color": Dimension("semantic"),
    "spatial_relationship": Dimension("semantic"),
    "scene": Dimension("semantic", 0.0, 0.8222),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855),
    "temporal_style": Dimension("semantic", 0.0, 0.364),
    "overall_consistency": Dimension("semantic", 0.0, 0.364),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
FILTERED = "filtered_videos"
"""The folder of the videos that VBench's own filter found to hold still."""

DIMENSIONS_2: dict[str, tuple[str, ...]] = {
    "human_fidelity": ("human_anatomy", "human_clothes", "human_identity"),
    "creativity": ("diversity", "composition"),
    "controllability": (
        "dynamic_spatial_relationship",
        "dynamic_attribute",
        "motion_order_understanding",
        "human_interaction",
        "complex_landscape",
        "complex_plot",
        "camera_motion",
    ),
    "physics": ("mechanics", "material", "thermotics", "multi-view_consistency"),
    "commonsense": ("motion_rationality", "instance_preservation"),
}
"""Group of VBench-2.0 -> its dimensions."""


def totals(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Quality, semantic and total of VBench's dimensions, in 0..1.

    Args:
        scores: Dimension -> the mean that VBench gave, in 0..1. Spaces and underscores are the same.

    Returns:
        "quality", "semantic" and "total"; None where a dimension of it is missing.

    Raises:
        ValueError: A dimension VBench does not have, or a score outside 0..1.
    """
    known = _named(scores, DIMENSIONS)
    result: dict[str, float | None] = {}
    for group in ("quality", "semantic"):
        own = {name: d for name, d in DIMENSIONS.items() if d.group == group}
        if set(own) <= set(known):
            weighted = [d.weight * d.normalised(known[name]) for name, d in own.items()]
            result[group] = sum(weighted) / sum(d.weight for d in own.values())
        else:
            result[group] = None
    quality, semantic = result["quality"], result["semantic"]
    result["total"] = None
    if quality is not None and semantic is not None:
        both = QUALITY_WEIGHT + SEMANTIC_WEIGHT
        result["total"] = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / both
    return result


def totals_2(scores: Mapping[str, float]) -> dict[str, float | None]:
    """The five groups and the total of VBench-2.0; None where a dimension is missing. As :func:`totals`."""
    known = _named(scores, {name for names in DIMENSIONS_2.values() for name in names})
    groups = {
        group: fmean(known[n] for n in names) if set(names) <= set(known) else None
        for group, names in DIMENSIONS_2.items()
    }
    complete = [value for value in groups.values() if value is not None]
    return {**groups, "total": fmean(complete) if len(complete) == len(groups) else None}


def _named(scores: Mapping[str, float], known: Any) -> dict[str, float]:
    named = {name.strip().lower().replace(" ", "_"): value for name, value in scores.items()}
    unknown = sorted(set(named) - set(known))
    if unknown:
        raise ValueError(f"unknown dimensions {', '.join(unknown)}; there are {', '.join(known)}")
    for name, value in named.items():
        if not 0 <= value <= 1:
            raise ValueError(f"the score of {name} must lie in 0..1, got {value:g}")
    return named


def read_results(path: Path) -> dict[str, float]:
    """Dimension -> mean score of a ``*_eval_results.json`` as VBench writes it: {dimension: [mean, videos]}.

    Raises:
        ValueError: The file is none.
    """
    try:
        found = json.loads(path.read_text())
        return {name: float(entry[0]) for name, entry in found.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is no result of VBench: {error}") from None


def read_videos(path: Path) -> dict[str, dict[str, float]]:
    """Dimension -> file name -> score, in the units of the means, of a file that :func:`read_results` reads.

    Dimensions whose means are not those of their videos are left out: they have no score of a video. So is
    flickering of the videos that VBench's filter chose, as it numbers them anew.
    """
    means, found = read_results(path), {}
    for dimension, entry in json.loads(path.read_text()).items():
        try:
            paths = {Path(v["video_path"]): float(v["video_results"]) for v in entry[1]}
        except (TypeError, ValueError, LookupError):
            continue
        if any(path.parent.name == FILTERED for path in paths):
            continue
        scores = {path.name: value for path, value in paths.items()}
        mean = fmean(scores.values()) if scores else math.nan
        # Imaging quality has its videos in percent.
        unit = next(
            (unit for unit in (1, 100) if math.isclose(mean, unit * means[dimension], rel_tol=1e-6)), 0
        )
        if unit:
            found[dimension] = {name: score / unit for name, score in scores.items()}
    return found


def read_folder(folder: Path) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(means, videos) of all results in a folder, as :func:`read_results` and :func:`read_videos`.

    Raises:
        ValueError: It has none, or two of one dimension that differ.
    """
    files = sorted(folder.glob("*_eval_results.json")) if folder.is_dir() else [folder]
    if not files:
        raise ValueError(f"{folder} has no *_eval_results.json")
    means: dict[str, float] = {}
    videos: dict[str, dict[str, float]] = {}
    for file in files:
        for name, mean in read_results(file).items():
            key = name.strip().lower().replace(" ", "_")
            if means.setdefault(key, mean) != mean:
                raise ValueError(f"{folder} has two results of {key}, {means[key]:g} and {mean:g}")
        videos |= read_videos(file)
    return means, videos


def score(folders: Sequence[Path], *, floor: Path | None = None, version: int = 1) -> dict[str, Any]:
    """Dimensions and totals of folders of results, and their differences from the first.

    Args:
        folders: Dense first. ``floor`` is dense again, by another backend or dtype.
        version: 1 for VBench, 2 for VBench-2.0.

    Returns:
        ``rows``: label -> ``dimensions``, ``normalised`` (for VBench), ``totals`` (None where a dimension is
        missing) and, but for the first, ``minus_first``: dimension -> mean difference, and where both have
        scores of the very same videos, its paired bootstrap 95 % interval.
    """
    from dit_sparse.eval.fidelity_files import interval

    if version not in (1, 2):
        raise ValueError(f"--version must be 1 or 2, got {version}")
    labelled = [(str(folder), folder) for folder in folders]
    if floor is not None:
        labelled.append(("noise floor", floor))
    rows: dict[str, dict[str, Any]] = {}
    first: tuple[dict[str, float], dict[str, dict[str, float]]] | None = None
    for label, folder in labelled:
        means, videos = read_folder(folder)
        total = totals(means) if version == 1 else totals_2(means)
        rows[label] = {"dimensions": means, "totals": total}
        if version == 1:
            rows[label]["normalised"] = {n: DIMENSIONS[n].normalised(mean) for n, mean in means.items()}
        if first is None:
            first = means, videos
            continue
        differences = {}
        for name in (name for name in first[0] if name in means):
            own, theirs = (set(scores.get(name, ())) for scores in (videos, first[1]))
            shared = sorted(own) if own == theirs else []
            found = interval([videos[name][v] for v in shared], [first[1][name][v] for v in shared])
            mean = means[name] - first[0][name]
            differences[name] = {"mean": mean, "interval": found["interval"], "videos": len(shared)}
        rows[label]["minus_first"] = differences
    return {"format": 1, "version": version, "rows": rows}


def rows_of(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and lines for a terminal, in percent: dimensions down, folders across."""
    rows = result["rows"]
    names = DIMENSIONS if result["version"] == 1 else [n for group in DIMENSIONS_2.values() for n in group]
    lines = [(name, *(_shown(row, name) for row in rows.values())) for name in names]
    for name in next(iter(rows.values()))["totals"]:
        values = (row["totals"][name] for row in rows.values())
        lines.append((name.upper(), *("not complete" if v is None else f"{100 * v:.2f}" for v in values)))
    return ("%", *rows), lines


def _shown(row: Mapping[str, Any], name: str) -> str:
    if name not in row["dimensions"]:
        return "-"
    text = f"{100 * row['dimensions'][name]:.2f}"
    difference = row.get("minus_first", {}).get(name)
    if difference is not None:
        text += f" ({100 * difference['mean']:+.2f}"
        if difference["interval"] is not None:
            low, high = difference["interval"]
            text += f", {100 * low:+.2f} to {100 * high:+.2f}"
        text += ")"
    return text


def flickering(videos: Path) -> dict[str, Any]:
    """:func:`temporal_flickering` of the .mp4 of a folder, as VBench writes results.

    Raises:
        ValueError: There are none, or one cannot be read.
    """
    from dit_sparse.video import read_video

    files = sorted(videos.glob("*.mp4")) if videos.is_dir() else []
    if not files:
        raise ValueError(f"{videos} is no folder with .mp4 in it")
    found = [{"video_path": str(f), "video_results": temporal_flickering(read_video(f))} for f in files]
    return {"temporal_flickering": [fmean(one["video_results"] for one in found), found]}  # type: ignore[misc]


def temporal_flickering(frames: Tensor) -> float:
    """VBench's dimension of that name: 1 minus the mean absolute difference of neighbouring frames.

    VBench asks it of static scenes only: motion counts as flicker.

    Args:
        frames: uint8 [F, H, W, 3].

    Raises:
        ValueError: Fewer than two frames, or no bytes.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or len(frames) < 2:
        raise ValueError(
            f"expected uint8 [F, H, W, 3] of at least two frames, got {frames.dtype} {tuple(frames.shape)}"
        )
    steps = (frames[1:].float() - frames[:-1].float()).abs().flatten(1).mean(1)
    return 1 - steps.mean().item() / 255
