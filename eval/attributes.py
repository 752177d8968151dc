"""Does a video show what its caption says? Plain image processing; no model judges a model.

    python -m dit_sparse.eval.attributes --prompts 64                    # the bundled model, dense
    python -m dit_sparse.eval.attributes --prompts 64 --method radial    # and a sparse method, in pairs

What differs from the background is cut into connected pieces. A piece has the palette colour nearest to its
median, the kind whose ideal outline of the same area and centre overlaps it best, and the direction in which
its centre drifts over the first `data.STRAIGHT` frames (later, shapes bounce). The background is the palette
colour nearest to each frame's median.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import dit_sparse
from dit_sparse.generate import by_kernels
from dit_sparse.pipelines import tiny
from dit_sparse.pipelines.tiny import data
from dit_sparse.pipelines.wan_presets import PRESETS
from dit_sparse.processors import METHODS
from dit_sparse.video import check_writable, staged

# All in units that do not depend on the resolution: colour distances in RGB of 0..1, areas as shares of the
# picture, speeds in picture heights per frame. Training shapes cover 3 to 6 % and move 0.012 to 0.022 heights
# per frame.
FOREGROUND = 0.25
BACKGROUND_WITHIN = 0.2
SMALLEST = 0.008
OVERLAP = 0.75
SLOWEST = 0.004

FLOOR = "noise floor"


@dataclass(frozen=True)
class Seen:
    """One shape as observed; None where nothing fits well. `presence`: the share of frames that show it."""

    colour: str
    kind: str | None
    direction: str | None
    presence: float


def _as_video(frames: Tensor | np.ndarray) -> Tensor:
    """Float32 [F, H, W, 3] in 0..1, or ValueError."""
    video = torch.as_tensor(frames)
    if video.ndim != 4 or video.shape[-1] != 3 or video.shape[0] < 5:
        raise ValueError(f"expected frames [F >= 5, H, W, 3], got {tuple(video.shape)}")
    if video.dtype == torch.uint8:
        return video.float() / 255
    if not video.is_floating_point() or not video.isfinite().all() or video.min() < 0 or video.max() > 1:
        raise ValueError(f"expected uint8, or finite floats in 0..1, got {video.dtype} that is neither")
    return video.float()


def _nearest(colours: Tensor, palette: dict[str, tuple[float, float, float]]) -> tuple[list[str], Tensor]:
    """Names and distances of the palette entries nearest to colours [N, 3]."""
    names = list(palette)
    distance, index = torch.cdist(colours, torch.tensor(list(palette.values()))).min(1)
    return [names[i] for i in index], distance


def _pieces(mask: Tensor) -> Tensor:
    """Connected pieces of masks [F, H, W]: int64 labels, 0 outside, equal within a piece of a frame."""
    labels = torch.arange(1, mask[0].numel() + 1).view(1, *mask.shape[1:]) * mask
    while True:
        grown = F.max_pool2d(labels.float()[:, None], 3, 1, 1)[:, 0].long() * mask
        if torch.equal(grown, labels):
            return labels
        labels = grown


def _outline_overlaps(piece: Tensor) -> list[float]:
    """Intersection over union of a piece [H, W] with each ideal kind of its area and centre, as in SHAPES."""
    y, x = piece.nonzero().float().unbind(1)
    area, dx, dy = (
        piece.sum().item(),
        torch.arange(piece.shape[1]) - x.mean(),
        torch.arange(piece.shape[0]) - y.mean(),
    )
    dx, dy = dx[None, :], dy[:, None]
    ideals = {
        "circle": dx**2 + dy**2 <= area / np.pi,
        "square": torch.maximum(dx.abs(), dy.abs()) <= area**0.5 / 2,
        # An equilateral triangle of circumradius R has the area 1.299 R^2, and each side is R/2 from its
        # centre.
        "triangle": torch.maximum(dy, 0.866 * dx.abs() - 0.5 * dy) <= (area / 1.299) ** 0.5 / 2,
    }
    return [(piece & ideals[k]).sum().item() / (piece | ideals[k]).sum().item() for k in data.SHAPES]


def _direction(track: list[tuple[int, float, float]], height: int) -> str | None:
    """Name of the way a track of (frame, x, y) goes, or None where it hardly moves or moves askew."""
    when, x, y = (np.array(v, dtype=float) for v in zip(*track, strict=True))
    if len(when) < 4:
        return None
    vx, vy = np.polyfit(when, x, 1)[0] / height, np.polyfit(when, y, 1)[0] / height
    major, minor = sorted((abs(vx), abs(vy)), reverse=True)
    if major < SLOWEST or minor > major / 2:
        return None
    if abs(vx) > abs(vy):
        return "right" if vx > 0 else "left"
    return "down" if vy > 0 else "up"


def observe(frames: Tensor | np.ndarray) -> tuple[str | None, list[Seen]]:
    """The background's name and every shape seen in at least half of the frames, the most present first.

    frames: [F, H, W, 3], uint8 or floats in 0..1, at least 5 frames. Of several pieces of one colour in a
    frame the largest counts. Raises ValueError for other input.
    """
    video = _as_video(frames)
    count, height, width, _ = video.shape
    medians = video.flatten(1, 2).median(1).values
    names, distances = _nearest(medians, data.BACKGROUNDS)
    votes = [n for n, d in zip(names, distances, strict=True) if d < BACKGROUND_WITHIN]
    background = max(set(votes), key=votes.count) if votes else None
    if background is None or votes.count(background) < 0.75 * count:
        background = None

    labels = _pieces((video - medians[:, None, None]).norm(dim=-1) > FOREGROUND)
    tracks: dict[str, list[tuple[int, float, float]]] = {}
    overlaps: dict[str, list[list[float]]] = {}
    for f in range(count):
        found: dict[str, Tensor] = {}
        values, areas = labels[f][labels[f] > 0].unique(return_counts=True)
        for value in values[areas >= SMALLEST * height * width]:
            piece = labels[f] == value
            (colour,), _ = _nearest(video[f][piece].median(0).values[None], data.COLOURS)
            if colour not in found or piece.sum() > found[colour].sum():
                found[colour] = piece
        for colour, piece in found.items():
            y, x = piece.nonzero().float().mean(0).tolist()
            tracks.setdefault(colour, []).append((f, x, y))
            overlaps.setdefault(colour, []).append(_outline_overlaps(piece))

    seen = []
    for colour, track in tracks.items():
        means = np.mean(overlaps[colour], axis=0)
        kind = data.SHAPES[int(means.argmax())] if means.max() >= OVERLAP else None
        start = [p for p in track if p[0] < data.STRAIGHT]
        direction = _direction(start, height) if start else None
        seen.append(Seen(colour, kind, direction, len(track) / count))
    seen = [s for s in seen if s.presence >= 0.5]
    return background, sorted(seen, key=lambda s: -s.presence)


def attributes(frames: Tensor | np.ndarray, caption: str) -> dict[str, Any]:
    """Which of a caption's statements a video bears out.

    frames: [F, H, W, 3], uint8 or floats in 0..1, at least 5 frames. caption: as `data.parse` reads it.
    Returns {"background": bool, "shapes": [{"colour": bool, "kind": bool, "direction": bool}, ...] in the
    caption's order, "score": the share that is true}. Caption shapes and seen shapes are paired to agree
    most, colour before kind before direction; a shape without a partner has everything wrong. Raises
    ValueError for other frames or captions.
    """
    wanted = data.parse(caption)
    background, seen = observe(frames)

    def judge(shape: data.Shape, other: Seen | None) -> dict[str, bool]:
        return {
            name: other is not None and getattr(shape, name) == getattr(other, name)
            for name in ("colour", "kind", "direction")
        }

    partners: list[Seen | None] = [*seen[: len(wanted.shapes)]]
    partners += [None] * (len(wanted.shapes) - len(partners))
    pairings = [
        [judge(s, p) for s, p in zip(wanted.shapes, order, strict=True)]
        for order in itertools.permutations(partners)
    ]
    shapes = max(
        pairings, key=lambda p: sum(4 * s["colour"] + 2 * s["kind"] + 1.5 * s["direction"] for s in p)
    )
    right = [background == wanted.background, *(v for s in shapes for v in s.values())]
    return {"background": right[0], "shapes": shapes, "score": sum(right) / len(right)}


def paired_interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of mean(a - b), where a[i] and b[i] belong to the same prompt and seed.

    Raises ValueError when the two have different lengths or fewer than two entries.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"expected two equally long sequences of at least 2, got {len(a)} and {len(b)}")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    rng = np.random.default_rng(seed)
    means = difference[rng.integers(0, len(difference), (10_000, len(difference)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def study(
    pipe: Any,
    prompts: Sequence[tuple[str, Any]],
    settings: dict[str, Any],
    *,
    seed: int = 0,
    attach: Callable[[Any], Any] | None = None,
) -> list[dict[str, Any]]:
    """One video per prompt, scored: rows of prompt, seed, seconds and everything `attributes` says.

    prompts: as `data.held_out_prompts` gives them. Prompt i starts from the noise of seed + i, so that two
    studies pair up. attach: called with the pipeline first, such as `lambda p: dit_sparse.apply(p, "draft",
    density=0.25)`; the session it returns tells the density of each run and is removed in the end.
    """
    session = attach(pipe) if attach else None
    rows = []
    try:
        for i, (prompt, _) in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + i)
            start = time.perf_counter()
            frames = pipe(prompt, generator=generator, output_type="np", **settings).frames[0]
            seconds = time.perf_counter() - start
            row = {"prompt": prompt, "seed": seed + i, "seconds": seconds, **attributes(frames, prompt)}
            if session is not None:
                report = session.report()
                row |= {"density": report.density, "sparse_density": report.sparse_density}
            rows.append(row)
    finally:
        if session is not None:
            session.remove()
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over a study: the score, each attribute on its own, seconds per video, densities."""
    shapes = [s for r in rows for s in r["shapes"]]
    means = {
        "score": np.mean([r["score"] for r in rows]),
        "background": np.mean([r["background"] for r in rows]),
    }
    means |= {name: np.mean([s[name] for s in shapes]) for name in ("colour", "kind", "direction")}
    for name in ("seconds", "density", "sparse_density"):
        if name in rows[0]:
            means[name] = np.mean([r[name] for r in rows])
    return {k: round(float(v), 4) for k, v in means.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=tiny.MODEL_DIR, help="a WanPipeline folder")
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts, at most 64 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="noise of the first prompt (%(default)s)")
    parser.add_argument(
        "--full", action="store_true", help="the default setting instead of the study setting"
    )
    parser.add_argument(
        "--method",
        choices=sorted(set(METHODS) - {"dense"}),
        help="a sparse method, beside the dense model; dense alone without",
    )
    parser.add_argument(
        "--floor",
        action="store_true",
        help="also dense by the block-sparse kernels: what rounding alone does",
    )
    parser.add_argument("--density", type=float, help="for --method; default its balanced preset")
    parser.add_argument("--out", type=Path, help="write rows and summaries there as JSON")
    args = parser.parse_args()
    try:
        _run(args)
    except ValueError as error:
        parser.error(str(error))


def _run(args: argparse.Namespace) -> None:
    if args.out:
        check_writable("--out", args.out)

    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    prompts, settings = data.held_out_prompts(args.prompts), tiny.DEFAULT if args.full else tiny.STUDY
    result: dict[str, Any] = {"prompts": len(prompts), "settings": settings}
    rows = {}
    if args.method:
        preset = PRESETS.get((args.method, "tiny"), {}).get("balanced")
        options = {} if preset is None else {"schedule": preset.schedule, **preset.parameters}
        result["method"] = {"name": args.method, **options, "requested_density": args.density}

        def attach(p: Any) -> Any:
            return dit_sparse.apply(p, args.method, density=args.density, **options)

        # First, so that a density it cannot reach is told before the dense videos are made.
        rows[args.method] = study(pipe, prompts, settings, seed=args.seed, attach=attach)
    if args.floor:
        rows[FLOOR] = study(pipe, prompts, settings, seed=args.seed, attach=by_kernels)
    rows["dense"] = study(pipe, prompts, settings, seed=args.seed)
    result |= {name: summary(videos) for name, videos in rows.items()}
    theirs = [row["score"] for row in rows["dense"]]
    for name, key in ((args.method, "score_over_dense"), (FLOOR, "noise_floor_over_dense")):
        if name in rows:
            ours = [row["score"] for row in rows[name]]
            low, high = paired_interval(ours, theirs)
            result[key] = {"mean": float(np.mean(ours) - np.mean(theirs)), "low": low, "high": high}
    print(json.dumps(result))
    if args.out:
        with staged() as stage:
            stage(args.out).write_text(json.dumps({**result, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
