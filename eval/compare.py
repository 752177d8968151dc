"""Methods and densities side by side, from the same noise: what ``dit-sparse compare`` does.

The first row is the stock model, the second the noise floor: dense attention by the block-sparse kernels,
which differs from the first by rounding alone. Rows run in turn within a round, and the next round in
reverse, so that what drifts on the machine cancels in the ratios.
"""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from io import StringIO
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.batch import jobs_of
from dit_sparse.eval import fidelity
from dit_sparse.eval.attributes import attributes
from dit_sparse.eval.comparison import Cell, Clip, Comparison, Row
from dit_sparse.eval.fidelity_files import cell, interval, measured
from dit_sparse.eval.masks import PlanMasks
from dit_sparse.generate import (
    attached,
    by_kernels,
    call_of,
    device_of_run,
    identity,
    left_alone,
    placed_pipeline,
    removed,
    say,
    timed_run,
    versions,
    warm_up,
)
from dit_sparse.request import (
    Request,
    check_flags,
    choice_of,
    device_of,
    flat,
    makes_video,
    settings_of,
)
from dit_sparse.stopwatch import PeakMemory

if TYPE_CHECKING:
    from dit_sparse.attach import Session
    from dit_sparse.generate import Run
    from dit_sparse.pipelines.load import Source
    from dit_sparse.request import Choice

DENSE, FLOOR = "dense", "noise-floor"
ERROR_GAIN = 4
"""Error pictures are as bright as can be where a colour is off by 1 / ERROR_GAIN of its range."""
_QUALITIES = ("psnr", "ssim", "lpips", "attributes")


@dataclass(eq=False)
class Setting:
    """A row, and how it is run."""

    row: Row
    asked: Request
    choice: Choice | None = None

    def attach(self, pipe: Any, schedule: str = "") -> Session:
        """As the row says, or a method at other steps."""
        if self.row.kind == "dense":
            return left_alone(pipe)
        if self.row.kind == "floor":
            return by_kernels(pipe, self.asked.backend)
        assert self.choice is not None
        return attached(pipe, self.asked, self.choice, schedule or self.choice.schedule)


def compare(
    asked: Request,
    methods: Sequence[str],
    densities: Sequence[float],
    prompts: Sequence[str],
    *,
    rounds: int = 1,
    protocol: str = "default",
    lpips: bool = False,
) -> Comparison:
    """Check, load, run, write, tell.

    Args:
        asked: What all rows have in common; ``output`` is the folder. ``param`` holds "METHOD.NAME=VALUE".
        methods: Names. Each runs at each density, or without densities at its preset or default.
        prompts: Prompt i has the noise of ``asked.seed`` + i.
        rounds: Runs of each row and prompt. Quality is that of the first.

    Raises:
        ValueError: Something asked cannot be, told before weights are loaded. A method that does not reach a
            density, or does not apply to the model, is a row that says so, unless nothing is left.
    """
    from dit_sparse.pipelines.load import find
    from dit_sparse.video import check_writable

    folder = asked.output
    check_flags(replace(asked, param=None))
    if not methods:
        raise ValueError("--methods is missing: what should be compared?")
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    fidelity.protocol_of(protocol)
    device = device_of(asked)
    source = find(asked.model)
    for name in ("results.json", "results.csv", "report.html"):
        check_writable("--output-dir", folder / name)
    video = makes_video(asked, source)
    settings = settings_of(asked, source)
    rows = settings_of_rows(asked, methods, densities, source, settings)
    former = _files_of(folder)
    pipe = placed_pipeline(asked, source, device, settings)
    jobs = [one for one in rows if not one.row.refused]
    suffix = ".mp4" if video else ".png"
    requests = [
        replace(asked, prompt=job.prompt, seed=job.seed, output=Path(f"{job.name}{suffix}"))
        for job in jobs_of(prompts, asked.seed)
    ]
    calls = [call_of(request, source, settings) for request in requests]
    say("one untimed step of each")
    for job in jobs:
        with removed(job.attach(pipe, "always")):  # a single step could be a dense one of its schedule
            warm_up(pipe, calls[0], requests[0].seed)
    judge = Judge(folder, settings.get("fps"), protocol, lpips, source.size == "tiny")
    for request, call in zip(requests, calls, strict=True):
        judge.dense = None
        for i in range(rounds):
            for job in jobs if i % 2 == 0 else reversed(jobs):
                _run(pipe, job, request, call, judge, is_first=i == 0)
    for job in jobs:
        job.row.summary = _summary(job.row, jobs[0].row)
    about = identity(requests[0], source, settings, None)
    result = Comparison(
        command=shlex.join(["dit-sparse", *sys.argv[1:]]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        device=device_of_run(asked, pipe),
        model=about["model"],
        settings=about["settings"],
        prompts=list(prompts),
        seeds=[request.seed for request in requests],
        negative_prompt=asked.negative_prompt,
        image=about["image"],
        protocol=fidelity.described(protocol, lpips),
        rounds=rounds,
        rows=[one.row for one in rows],
    )
    _write(result, folder)
    for file in former - _files_of(folder):
        (folder / file).unlink(missing_ok=True)
    return result


def settings_of_rows(
    asked: Request,
    methods: Sequence[str],
    densities: Sequence[float],
    source: Source,
    settings: Mapping[str, Any],
) -> list[Setting]:
    """Dense, the noise floor, and every method at every density; those that cannot be say why.

    Raises:
        ValueError: Parameters of a method that is not compared; methods or densities given twice or wrong; or
            no method is left.
    """
    own = _parameters_of(methods, asked.param or ())
    wanted: Sequence[float | None] = densities or (None,)
    rows = [
        Setting(Row(DENSE, "dense", "the model's own attention", "", ""), asked),
        Setting(Row(FLOOR, "floor", "dense by the block-sparse kernels", "always", ""), asked),
    ]
    for method, density in product(methods, wanted):
        one = replace(asked, method=method, density=density, param=own[method])
        check_flags(one)
        if one.is_stock:
            raise ValueError(f"--methods {method}: dense is the first row of every comparison")
        label = method if density is None else f"{method}-{density:g}"
        if any(label == other.row.label for other in rows):
            raise ValueError(f"--methods and --densities come to {label} twice")
        row = Row(label, "method", method, "", "", requested_density=density)
        setting = Setting(row, one)
        try:
            setting.choice = choice_of(one, source, settings)
        except ValueError as error:
            row.refused = flat(error)
        else:
            row.schedule, row.source = setting.choice.schedule, setting.choice.source
        rows.append(setting)
    if all(one.row.refused for one in rows[2:]):
        raise ValueError("; ".join(f"{one.row.label}: {one.row.refused}" for one in rows[2:]))
    return rows


def _parameters_of(methods: Sequence[str], given: Sequence[str]) -> dict[str, list[str]]:
    """``["radial.block=64"]`` as the ``--param`` of each method."""
    own: dict[str, list[str]] = {method: [] for method in methods}
    for text in given:
        method, dot, rest = text.partition(".")
        if not dot or method not in own:
            raise ValueError(f"--param must be METHOD.NAME=VALUE with one of --methods, got {text!r}")
        own[method].append(rest)
    return own


@dataclass(eq=False)
class Judge:
    """Writes clips, and holds them against the dense one of the same prompt, before any compression.

    Args:
        fps: None for images.
        checks_prompt: Prompts are of the bundled model's kind, whose truth can be told.
        dense: uint8 [F, H, W, 3] of the prompt at hand.
    """

    folder: Path
    fps: int | None
    protocol: str
    lpips: bool
    checks_prompt: bool
    dense: Tensor | None = None

    def clip(self, label: str, request: Request, run: Run) -> Clip:
        from dit_sparse.video import staged, write_frames

        if self.dense is None:
            self.dense = run.frames
        found = measured(run.frames, self.dense, self.protocol, self.lpips)
        quality: dict[str, float | None] = {
            name: found[name] for name in ("psnr", "ssim", "lpips") if name in found
        }
        if self.checks_prompt and (score := _attributes(run.frames, request.prompt or "")) is not None:
            quality["attributes"] = score
        file = Path("videos" if self.fps else "images", label, request.output)
        error = None if label == DENSE else file.with_stem(f"{file.stem}_error")
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        with staged() as stage:
            write_frames(stage(self.folder / file), run.frames, self.fps)
            if error is not None:
                write_frames(stage(self.folder / error), error_picture(run.frames, self.dense), self.fps)
        assert run.session is not None
        report = run.session.report()
        return Clip(
            file=file.as_posix(),
            error_file=None if error is None else error.as_posix(),
            seconds={},
            density={"full_run": report.density, "sparse_calls": report.sparse_density},
            quality=quality,
            per_frame=found["per_frame"],
            identical_frames=found["identical_frames"],
        )


def _attributes(frames: Tensor, prompt: str) -> float | None:
    """The share of a prompt's statements that are true; None where it is not of the kind that can be read."""
    try:
        return float(attributes(frames, prompt)["score"])
    except ValueError:
        return None


def error_picture(frames: Tensor, dense: Tensor) -> Tensor:
    """The largest difference of the three colours at every pixel, as brightness: uint8 [F, H, W, 3].

    Black is no difference; white is one of 1 / :data:`ERROR_GAIN` of the range or more.
    """
    from matplotlib import colormaps

    table = torch.from_numpy(colormaps["inferno"].resampled(256)(range(256))[:, :3] * 255).round().byte()
    table[0] = 0
    off = (frames.int() - dense.int()).abs().amax(-1) * ERROR_GAIN
    return table[off.clamp(max=255)]


def _run(
    pipe: Any, job: Setting, request: Request, call: Mapping[str, Any], judge: Judge, is_first: bool
) -> None:
    """One run of one row; the first of a prompt is judged, and the first of all looked into."""
    row = job.row
    look = is_first and not row.clips
    with removed(job.attach(pipe)) as session, PeakMemory(pipe._execution_device) as memory:
        with PlanMasks(session, enabled=look and row.kind == "method") as masks:
            run = timed_run(pipe, call, request, session, row.label)
        if row.kind == "method":
            row.method = repr(session.method)
    row.memory_mib.append(memory.peak_mib)
    if is_first:
        row.clips.append(judge.clip(row.label, request, run))
    if look:
        row.masks = masks.read()
        row.cells = [_cell(entry) for entry in session.report().to_dict(heads=True)["rows"]]
    for part, taken in {**run.seconds, **run.inside}.items():
        row.clips[-1].seconds.setdefault(part, []).append(taken)


def _cell(entry: Mapping[str, Any]) -> Cell:
    heads = [round(head["density"], 4) for head in entry["heads"]]
    same = {name: entry[name] for name in ("model", "step", "layer", "name", "branch", "phase")}
    return Cell(
        **same,
        density=round(entry["density"], 6),
        backend=entry["backend"],
        reason=entry["reason"],
        calls=entry["calls"],
        heads=heads[:1] if len(set(heads)) == 1 else heads,
    )


def _summary(row: Row, dense: Row) -> dict[str, Any]:
    """See :class:`Row`."""
    summary: dict[str, Any] = {}
    for name in _QUALITIES:
        values = [clip.quality[name] for clip in row.clips if name in clip.quality]
        if values:
            summary[name] = interval(values)
    ratios = [
        theirs / ours
        for mine, other in zip(row.clips, dense.clips, strict=True)
        for ours, theirs in zip(mine.seconds["total"], other.seconds["total"], strict=True)
    ]
    parts = dict.fromkeys(part for clip in row.clips for part in clip.seconds)
    summary["seconds"] = {
        part: median([t for clip in row.clips for t in clip.seconds.get(part, [])]) for part in parts
    }
    summary["speed_up"] = {
        "median": median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "ratios": ratios,
    }
    summary["density"] = {
        name: sum(clip.density[name] for clip in row.clips) / len(row.clips)
        for name in ("full_run", "sparse_calls")
    }
    known = [mib for mib in row.memory_mib if mib is not None]
    summary["peak_memory_mib"] = max(known) if known else None
    return summary


def _write(result: Comparison, folder: Path) -> None:
    from dit_sparse.eval.page import render
    from dit_sparse.video import staged

    with staged() as stage:
        result.save(stage(folder / "results.json"))
        stage(folder / "results.csv").write_text(table(result))
        stage(folder / "report.html").write_text(render(result, folder), encoding="utf-8")


def _files_of(folder: Path) -> set[str]:
    """The clips of the comparison that is in a folder, if one is."""
    try:
        result = Comparison.load(folder / "results.json")
    except ValueError:
        return set()
    clips = [clip for row in result.rows for clip in row.clips]
    return {file for clip in clips for file in (clip.file, clip.error_file) if file is not None}


def table(result: Comparison) -> str:
    """``results.csv``: a line for each row and prompt."""
    names = ["row", "prompt", "seed", "requested_density", "density_full_run", "density_sparse_calls"]
    names += [*_QUALITIES, "identical_frames", "seconds", "attention_seconds", "planning_seconds", "speed_up"]
    names += ["peak_memory_mib", "method", "schedule", "file", "refused"]
    stream = StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    dense = result.rows[0]
    for row in result.rows:
        about = {
            "row": row.label,
            "requested_density": row.requested_density,
            "method": row.method,
            "schedule": row.schedule,
            "refused": row.refused,
        }
        if row.refused:
            writer.writerow(about)
        for i, clip in enumerate(row.clips):
            seconds = {part: median(taken) for part, taken in clip.seconds.items()}
            pairs = zip(dense.clips[i].seconds["total"], clip.seconds["total"], strict=True)
            writer.writerow(
                {
                    **about,
                    "prompt": result.prompts[i],
                    "seed": result.seeds[i],
                    "density_full_run": clip.density["full_run"],
                    "density_sparse_calls": clip.density["sparse_calls"],
                    **clip.quality,
                    "identical_frames": clip.identical_frames,
                    "seconds": seconds["total"],
                    "attention_seconds": seconds.get("attention"),
                    "planning_seconds": seconds.get("planning"),
                    "speed_up": median(theirs / ours for theirs, ours in pairs),
                    "peak_memory_mib": row.summary["peak_memory_mib"],
                    "file": clip.file,
                }
            )
    return stream.getvalue()


def lines(result: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows for a terminal."""
    shown = [name for name in _QUALITIES if name in result.rows[0].summary]
    rows = []
    for row in result.rows:
        if row.refused:
            continue
        ratio, seconds = row.summary["speed_up"], row.summary["seconds"]["total"]
        speed = f"{ratio['median']:.2f}"
        if len(ratio["ratios"]) > 1:
            speed += f" ({ratio['low']:.2f}-{ratio['high']:.2f})"
        quality = [_mean(row.summary[name], name) for name in shown]
        density = f"{row.summary['density']['full_run']:.3f}"
        rows.append((row.label, density, *quality, f"{seconds:.2f}", speed))
    return ("row", "density", *shown, "seconds", "speed-up"), rows


def _mean(value: Mapping[str, Any], name: str) -> str:
    """Without the interval, for which a terminal has no room."""
    return cell({**value, "interval": None}, name)
