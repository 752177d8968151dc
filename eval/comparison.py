"""What ``dit-sparse compare`` found: ``results.json``, and what ``report.html`` is made of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Clip:
    """What one prompt gave under one setting.

    Args:
        file: The video, or image of an image model, relative to the folder.
        error_file: |this - dense| of every pixel, as a picture of the same size and length; None for dense.
        seconds: Part of the run -> seconds in each round: ``total``, the parts that ``Stopwatch`` names, and
            within the transformer ``attention`` and ``planning`` where they were timed.
        density: ``full_run`` and ``sparse_calls``, computed token pairs over all.
        quality: ``psnr`` (None: no frame differs), ``ssim``, ``lpips`` where asked; for the bundled model
            ``attributes``, the share of the prompt's statements the video bears out.
        per_frame: Name -> the measure of each frame (None: the frame is identical).
        identical_frames: How many frames are the dense ones.
    """

    file: str
    error_file: str | None
    seconds: dict[str, list[float]]
    density: dict[str, float]
    quality: dict[str, float | None]
    per_frame: dict[str, list[float | None]]
    identical_frames: int


@dataclass
class Cell:
    """The attention calls of one layer at one step in one branch, as a report's row.

    ``heads`` are the densities of its heads, or a single one that all have.
    """

    model: str
    step: int | None
    layer: int
    name: str
    branch: str
    phase: str
    density: float
    backend: str
    reason: str
    calls: int
    heads: list[float]


@dataclass
class Mask:
    """The blocks that heads of a layer computed at one step, in the last item of the batch.

    Args:
        heads: Those that computed these very blocks.
        block: Tokens of a query and a key block.
        image: PNG as a data URI, at most 64x64: rows are queries, columns keys, black what is computed; where
            several blocks share a pixel, the darker the more of them.
    """

    model: str
    step: int | None
    layer: int
    branch: str
    heads: list[int]
    block: tuple[int, int]
    density: float
    image: str


@dataclass
class Row:
    """One setting: dense, the noise floor (dense by other kernels), or a method at a density.

    Args:
        label: Unique, and the stem of its files.
        kind: "dense", "floor" or "method".
        method: Name and parameters, as Python would build it.
        refused: Why it could not be run; it then has no clips.
        clips: One for each prompt.
        cells, masks: Of the first prompt's first run.
        memory_mib: The peak of each run.
        summary: Over prompts and rounds. Each name of ``quality`` -> {"mean", "interval", "videos"},
            interval being the bootstrap 95 % one, None for a single prompt. ``seconds``: part -> median.
            ``speed_up``: {"median", "low", "high", "ratios"} of dense over this within each round and prompt.
            ``density``: means of the clips'. ``peak_memory_mib``: the most, or None.
    """

    label: str
    kind: str
    method: str
    schedule: str
    source: str
    requested_density: float | None = None
    refused: str = ""
    clips: list[Clip] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    memory_mib: list[float | None] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass
class Comparison:
    """A whole comparison; the first row is dense, the second the noise floor."""

    command: str
    created: str
    versions: dict[str, str]
    device: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    prompts: list[str]
    seeds: list[int]
    negative_prompt: str | None
    image: str | None
    protocol: dict[str, str]
    rounds: int
    rows: list[Row]
    format: int = 1

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: The file is none.
        """
        try:
            found = json.loads(path.read_text())
            rows = [
                Row(
                    **{
                        **row,
                        "clips": [Clip(**clip) for clip in row["clips"]],
                        "cells": [Cell(**cell) for cell in row["cells"]],
                        "masks": [Mask(**{**m, "block": tuple(m["block"])}) for m in row["masks"]],
                    }
                )
                for row in found["rows"]
            ]
            return cls(**{**found, "rows": rows})
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{path} is no comparison of dit-sparse: {error}") from None
