"""``report.html`` of a comparison: one file that needs no network and shows its clips side by side."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from dit_sparse.eval import charts
from dit_sparse.eval.compare import ERROR_GAIN
from dit_sparse.eval.comparison import Cell, Comparison, Row
from dit_sparse.eval.fidelity_files import cell as quality_cell
from dit_sparse.report import runs

_HERE = Path(__file__).parent
_TYPES = {".mp4": "video/mp4", ".png": "image/png"}


def render(result: Comparison, folder: Path) -> str:
    """The page, with the clips of ``folder`` in it.

    Raises:
        ValueError: A clip of the comparison is missing.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    shown = [row for row in result.rows if not row.refused]
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["seconds"] = lambda value: f"{value:.2f}"
    template = environment.get_template("report.html.j2")
    return template.render(
        result=result,
        rows=result.rows,
        shown=shown,
        names=[name for name in ("psnr", "ssim", "lpips", "attributes") if name in shown[0].summary],
        cell=quality_cell,
        speed=_speed,
        facts=_facts(result),
        error_top=f"{1 / ERROR_GAIN:.0%}",
        reasons=[(row, _reasons(row.cells)) for row in shown if row.kind == "method"],
        is_image="fps" not in result.settings,
        floor=charts.noise_floor(result),
        scatter=charts.scatter(result),
        curves=[charts.curves(result, i) for i in range(len(result.prompts))],
        data=_data(result, shown, folder),
        style=(_HERE / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _facts(result: Comparison) -> list[str]:
    """The run in a line; what the pipeline chose by itself is not known."""
    asked = {name: value for name, value in result.settings.items() if value is not None}
    found = []
    for name, text in (
        ("height", "{} pixels high"),
        ("width", "{} wide"),
        ("num_frames", "{} frames"),
        ("num_inference_steps", "{} steps"),
        ("guidance_scale", "guidance {}"),
    ):
        if name in asked:
            found.append(text.format(asked[name]))
    found.append(result.device["name"])
    if "dtype" in result.device:
        found.append(result.device["dtype"])
    return found


def _speed(row: Row) -> str:
    ratio = row.summary["speed_up"]
    text = f"{ratio['median']:.2f}"
    return f"{text} ({ratio['low']:.2f} to {ratio['high']:.2f})" if len(ratio["ratios"]) > 1 else text


def _data(result: Comparison, shown: Sequence[Row], folder: Path) -> dict[str, Any]:
    """What the script reads."""
    files: dict[str, dict[str, str]] = {}
    rows = []
    for row in shown:
        clips = []
        for clip in row.clips:
            for file in (clip.file, clip.error_file):
                if file is not None:
                    files[file] = _embedded(folder / file)
            clips.append({"file": clip.file, "error": clip.error_file, "caption": _caption(clip.quality)})
        rows.append(
            {
                "label": row.label,
                "kind": row.kind,
                "clips": clips,
                "grids": _grids(row.cells),
                "masks": [vars(mask) for mask in row.masks],
            }
        )
    frames = len(shown[0].clips[0].per_frame["psnr"])
    return {"rows": rows, "files": files, "fps": result.settings.get("fps"), "frames": frames}


def _embedded(path: Path) -> dict[str, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"the clip {path} of the comparison cannot be read: {error.strerror}") from None
    return {"type": _TYPES[path.suffix], "base64": base64.b64encode(content).decode()}


def _caption(quality: dict[str, float | None]) -> str:
    units = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}", "lpips": "LPIPS {:.4f}"}
    known = {**units, "attributes": "attributes {:.0%}"}
    return ", ".join(
        "no frame differs" if value is None else known[name].format(value) for name, value in quality.items()
    )


def _grids(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Layer by step, for each transformer and branch: as indices into what was done, and densities.

    ``cells[layer][step]`` is None where the layer was not called, else [treatment, density, which of
    ``shares``]; these are the densities of the heads in thousandths, since a real model has millions.
    """
    grids = []

    def place(cell: Cell) -> tuple[str, str]:
        return cell.model, cell.branch

    for (model, branch), group in groupby(sorted(cells, key=place), key=place):
        here = list(group)
        treatments = list(dict.fromkeys((c.phase, c.reason, c.backend) for c in here))
        layers = sorted({(c.layer, c.name) for c in here})
        steps = 1 + max(c.step or 0 for c in here)
        table: list[list[Any]] = [[None] * steps for _ in layers]
        rows = {layer: i for i, layer in enumerate(layers)}
        shares: dict[tuple[int, ...], int] = {}
        for c in here:
            treatment = treatments.index((c.phase, c.reason, c.backend))
            which = shares.setdefault(tuple(round(1000 * share) for share in c.heads), len(shares))
            table[rows[c.layer, c.name]][c.step or 0] = [treatment, round(c.density, 3), which]
        grids.append(
            {
                "model": model,
                "branch": branch,
                "layers": layers,
                "shares": list(shares),
                "treatments": treatments,
                "cells": table,
            }
        )
    return grids


def _reasons(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """What was done with the calls of a run, the sparse ones first."""

    def treatment(cell: Cell) -> tuple[bool, str, str, str, str]:
        return cell.phase == "dense", cell.model, cell.phase, cell.reason, cell.backend

    found = []
    cells = list(cells)
    every = sum(c.calls for c in cells)
    for (_, model, phase, reason, backend), group in groupby(sorted(cells, key=treatment), key=treatment):
        here = list(group)
        found.append(
            {
                "model": model,
                "phase": phase,
                "reason": reason,
                "backend": backend,
                "calls": sum(c.calls for c in here),
                "share": sum(c.calls for c in here) / every,
                "steps": runs(c.step for c in here),
                "layers": runs(c.layer for c in here),
                "density": sum(c.density * c.calls for c in here) / sum(c.calls for c in here),
            }
        )
    return found
