"""Every method on the bundled model at equal densities, beside dense attention and beside chance.

    python -m dit_sparse.eval.study --prompts 12 --out outputs/study --results eval/RESULTS.md

The same prompts and noises for all, the same dense steps at head and tail of each run. A row of the
table is one method at the setting nearest to a density; its control keeps random blocks at the density it
achieved. Rounds go prompt by prompt, dense before and after each, so that what drifts on the machine cancels
in the ratios. What is done is kept in ``--out``: started again, the study goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dit_sparse
from dit_sparse.calibration import CalibratedProcessor, calibrate
from dit_sparse.eval.attributes import attributes, paired_interval
from dit_sparse.eval.fidelity import psnr, ssim
from dit_sparse.generate import by_kernels, left_alone
from dit_sparse.kernels.bench import identity
from dit_sparse.layout import TokenLayout
from dit_sparse.method import SparseProcessor
from dit_sparse.pipelines import tiny
from dit_sparse.pipelines.tiny import data
from dit_sparse.pipelines.wan_presets import PRESETS
from dit_sparse.processors import METHODS
from dit_sparse.processors.random import RandomProcessor
from dit_sparse.stopwatch import CallTimer
from dit_sparse.video import check_writable, staged

SCHEDULE = "dense 0-25%, 92-100%"
FLOOR = "noise floor"
NOT_TRAINING_FREE = ("dense", "sla", "linvideo")
"""Methods that are nothing without training, or nothing sparse."""


OWN: dict[str, dict[str, Any]] = {
    "radial": {"block": 16},
    "rettention": {"inner": METHODS["radial"](block=16)},  # type: ignore[call-arg]
}
"""Parameters in place of the bundled model's presets: at 13 frames Radial's floor is 0.46 in blocks of 32."""


def setting(name: str, density: float, layout: TokenLayout, pipe: Any, folder: Path) -> SparseProcessor:
    """The method's setting nearest to a density, calibrated on two prompts of another seed where it can be.

    Raises:
        ValueError: The method does not reach the density; the message has its floor.
    """
    preset = PRESETS.get((name, "tiny"), {}).get("balanced")
    method = METHODS[name](**OWN.get(name, preset.parameters if preset else {}))
    method = method.at_density(density, layout)
    if not isinstance(method, CalibratedProcessor) or name == "efficient_vdit":  # its k is the density
        return method
    file = folder / f"{name}-{density:g}.json"
    if not file.exists():
        prompts = [prompt for prompt, _ in data.held_out_prompts(2, seed=1)]
        calibrate(pipe, method, prompts, source="tiny-wan", settings=tiny.STUDY, schedule=SCHEDULE).save(file)
    return METHODS[name](calibration=file)  # type: ignore[call-arg]


def generate(
    pipe: Any, prompt: str, seed: int, method: SparseProcessor | None, is_floor: bool = False
) -> tuple[Any, dict[str, Any]]:
    """One video [F, H, W, 3] of floats, and what it took: seconds in all, in attention and in planning.

    Without a method every call is left to the model, or for the noise floor computed whole by the kernels.
    """
    if method is not None:
        attached = dit_sparse.apply(pipe, method, schedule=SCHEDULE)
    else:
        attached = by_kernels(pipe, schedule=SCHEDULE) if is_floor else left_alone(pipe)
    with attached as session, CallTimer(pipe, session) as timer:
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        frames = pipe(prompt, generator=generator, output_type="np", **tiny.STUDY).frames[0]
        seconds = time.perf_counter() - start
        report = session.report()
    row = {"seconds": seconds, **timer.seconds()}
    return frames, {**row, "density": report.density, "sparse_density": report.sparse_density}


class Study:
    """The rows so far, one JSON line each, and what is still to be made."""

    def __init__(self, folder: Path, pipe: Any, names: Sequence[str], densities: Sequence[float]) -> None:
        self.file = folder / "rows.jsonl"
        self.pipe = pipe
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.cells: dict[tuple[str, float], SparseProcessor | str] = {}
        frames, height, width = (tiny.STUDY[key] for key in ("num_frames", "height", "width"))
        layout = TokenLayout(((frames + 1) // 2, height // 8, width // 8))
        for density in densities:
            for name in names:
                try:
                    self.cells[name, density] = setting(name, density, layout, pipe, folder)
                except ValueError as error:
                    self.cells[name, density] = str(error)
        self.layout = layout

    def has(self, name: str, density: float, prompt: int) -> bool:
        return any((r["name"], r["density_asked"], r["prompt"]) == (name, density, prompt) for r in self.rows)

    def control(self, achieved: float) -> float:
        """The density of a row's control: what the row achieved, rounded up to half a percent."""
        return min(1.0, ceil(achieved * 200 - 1e-6) / 200)

    def round(self, prompt: int, text: str) -> None:
        """Everything that is missing for one prompt."""
        todo = [key for key, m in self.cells.items() if not isinstance(m, str) and not self.has(*key, prompt)]
        if not todo and self.has("dense", 1.0, prompt) and self.has(FLOOR, 1.0, prompt):
            return
        seed = prompt
        truth, first = generate(self.pipe, text, seed, None)
        made = [(*key, self.cells[key]) for key in todo]
        for name, density, method in made:
            assert isinstance(method, SparseProcessor)
            frames, row = generate(self.pipe, text, seed, method)
            self._add(name, density, prompt, {**row, **_judged(frames, truth, text)}, method)
        mine = [r for r in self.rows if r["prompt"] == 0 and r["name"] not in ("dense", FLOOR, "control")]
        for density in sorted({self.control(r["sparse_density"]) for r in mine}):
            if not self.has("control", density, prompt):
                method = RandomProcessor(block=32).at_density(density, self.layout)
                frames, row = generate(self.pipe, text, seed, method)
                self._add("control", density, prompt, {**row, **_judged(frames, truth, text)}, method)
        if not self.has(FLOOR, 1.0, prompt):
            frames, row = generate(self.pipe, text, seed, None, is_floor=True)
            self._add(FLOOR, 1.0, prompt, {**row, **_judged(frames, truth, text)}, None)
        _, last = generate(self.pipe, text, seed, None)
        seconds = {key: (first[key] + last[key]) / 2 for key in ("seconds", "attention")}
        if not self.has("dense", 1.0, prompt):
            row = {**first, **seconds, **_judged(truth, truth, text)}
            self._add("dense", 1.0, prompt, row, None)

    def _add(
        self, name: str, density: float, prompt: int, row: Mapping[str, Any], method: SparseProcessor | None
    ) -> None:
        line = {"name": name, "density_asked": density, "prompt": prompt, **row, "method": repr(method)}
        self.rows.append(line)
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def column(self, name: str, density: float, key: str) -> list[float]:
        """One figure over the prompts, in their order."""
        rows = [r for r in self.rows if (r["name"], r["density_asked"]) == (name, density)]
        return [r[key] for r in sorted(rows, key=lambda r: r["prompt"])]

    def table(self, about: Mapping[str, str]) -> str:
        """RESULTS.md."""
        lines = [INTRODUCTION.format(**about)]
        dense = {key: self.column("dense", 1.0, key) for key in ("seconds", "attention", "score")}
        lines.append(
            f"Dense: {np.mean(dense['seconds']):.2f} s a video, {np.mean(dense['attention']):.2f} s of it in "
            f"self-attention; attribute score {np.mean(dense['score']):.3f}.\n"
        )
        for density in sorted({asked for _, asked in self.cells}):
            lines += [f"## Density {density:g}\n", HEAD, self._floor_line(dense["seconds"])]
            lines += [
                self._line(name, asked, method, dense["seconds"])
                for (name, asked), method in self.cells.items()
                if asked == density
            ]
            lines.append("")
        return "\n".join(lines)

    def _floor_line(self, dense: list[float]) -> str:
        take = partial(self.column, FLOOR, 1.0)
        cells = [
            f"{FLOOR}: dense by the kernels",
            "1.000 (1.000)",
            f"{np.mean(take('psnr')):.2f}",
            f"{np.mean(take('ssim')):.4f}",
            "",
            f"{np.mean(take('score')):.3f}",
            f"{np.mean(take('attention')):.2f}",
            f"{np.mean(take('planning')):.3f}",
            _speed_up(dense, take("seconds")),
        ]
        return "| " + " | ".join(cells) + " |"

    def _line(self, name: str, asked: float, method: SparseProcessor | str, dense: list[float]) -> str:
        if isinstance(method, str):
            floor = re.search(r"floor ([0-9.]*[0-9])", method)
            return f"| {name} | n/a, {f'floor {floor[1]}' if floor else method} |" + " |" * 7
        take = partial(self.column, name, asked)
        achieved = take("sparse_density")
        control = partial(self.column, "control", self.control(achieved[0]))
        gain, low, high = _difference(take("psnr"), control("psnr"))
        verdict = "above" if low > 0 else "below" if high < 0 else "not told apart"
        cells = [
            name,
            f"{np.mean(achieved):.3f} ({np.mean(take('density')):.3f})",
            f"{np.mean(take('psnr')):.2f}",
            f"{np.mean(take('ssim')):.4f}",
            f"{gain:+.2f} ({low:+.2f} to {high:+.2f}), {verdict}",
            f"{np.mean(take('score')):.3f}",
            f"{np.mean(take('attention')):.2f}",
            f"{np.mean(take('planning')):.3f}",
            _speed_up(dense, take("seconds")),
        ]
        return "| " + " | ".join(cells) + " |"


def _judged(frames: Any, truth: Any, text: str) -> dict[str, Any]:
    decibels = psnr(frames, truth)
    return {
        "psnr": decibels if math.isfinite(decibels) else 99.0,
        "ssim": ssim(frames, truth),
        "score": attributes(frames, text)["score"],
    }


def _speed_up(dense: Sequence[float], seconds: Sequence[float]) -> str:
    ratios = sorted(d / s for d, s in zip(dense, seconds, strict=True))
    return f"{np.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def _difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    low, high = paired_interval(a, b)
    return float(np.mean(a) - np.mean(b)), low, high


INTRODUCTION = """# Results on the bundled model

Made by

    {command}

on {machine}, {date}, dit_sparse at {commit}. tiny-wan in its study setting ({tokens} tokens, {steps} steps),
{prompts} held-out prompts, one noise each, schedule `{schedule}` for every method. Means over prompts.

* density: achieved by the calls the method ran in, and in brackets over the full run.
* PSNR (dB) and SSIM: to the dense video of the same prompt and noise.
* over random: PSNR above the control, which keeps random blocks at the row's achieved density, drawn anew at
  every layer and step (every query block keeps its own); in brackets the paired bootstrap 95 % interval over
  prompts. "above" and "below" are claimed only where it excludes 0.
* score: the share of a prompt's statements the video bears out (`eval/attributes.py`).
* attention, planning: seconds a video inside self-attention's core calls, and in choosing blocks there.
* speed-up: dense seconds over the method's, end to end; median and range over prompts.
* noise floor: nothing left out, but computed by the block-sparse kernels in the same steps, which round
  otherwise; PSNR before rounding to bytes. Its speed-up is the kernels' alone: a method that is not above it
  gains nothing by leaving blocks out on so small a model.
* n/a: the method does not reach the density on this grid; its message says the floor.

The videos are 25 frames of 64x128: what holds here need not hold for a model of billions of parameters.
"""
HEAD = """| method | density | PSNR | SSIM | over random | score | attention | planning | speed-up |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    free = [name for name in METHODS if name not in NOT_TRAINING_FREE]
    parser.add_argument("--methods", default=",".join(free), help="comma-separated (%(default)s)")
    parser.add_argument("--densities", default="0.2,0.4", help="comma-separated (%(default)s)")
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts, at most 64 (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/study"), help="what is done is kept there")
    parser.add_argument("--results", type=Path, help="write the table there as Markdown")
    args = parser.parse_args()
    names = args.methods.split(",")
    if args.prompts < 2:
        parser.error(f"--prompts must be at least 2, for intervals, got {args.prompts}")
    if unknown := sorted(set(names) - set(METHODS)):
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    try:
        densities = [float(text) for text in args.densities.split(",")]
        if args.results:
            check_writable("--results", args.results)
        _run(args, names, densities)
    except ValueError as error:
        parser.error(str(error))


def _run(args: argparse.Namespace, names: Sequence[str], densities: Sequence[float]) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(tiny.MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)
    study = Study(args.out, pipe, names, densities)
    prompts = data.held_out_prompts(args.prompts)
    generate(pipe, prompts[0][0], 0, None)  # untimed: the first run loads code and compiles
    for i, (text, _) in enumerate(prompts):
        study.round(i, text)
        print(f"prompt {i + 1} of {len(prompts)} done", flush=True)
    command = "python -m dit_sparse.eval.study"
    for name in ("methods", "densities", "prompts", "out", "results"):
        command += f" --{name} {getattr(args, name)}" if getattr(args, name) is not None else ""
    known = identity("cpu")
    table = study.table(
        {
            "command": command,
            "machine": f"{known['device']}, {known['threads']} threads, torch {known['torch']}",
            "date": time.strftime("%Y-%m-%d"),
            "commit": known["commit"],
            "tokens": str(study.layout.tokens),
            "steps": str(tiny.STUDY["num_inference_steps"]),
            "prompts": str(len(prompts)),
            "schedule": SCHEDULE,
        }
    )
    print(table)
    if args.results:
        with staged() as stage:
            stage(args.results).write_text(table)


if __name__ == "__main__":
    main()
