"""What commands have in common: flags, tables, and what becomes of errors: one line and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_sparse.generate import say
from dit_sparse.request import flat

Model = Annotated[str, typer.Option(help="Name (`dit-sparse models`), Hub id or folder.")]
Image = Annotated[Path | None, typer.Option(help="First frame (image to video) or reference image (VACE).")]
Preset = Annotated[str | None, typer.Option(help="quality, balanced (default) or fast.")]
Param = Annotated[
    list[str] | None, typer.Option(help="Parameter of the method, NAME=VALUE; may be given again.")
]
Lora = Annotated[list[str] | None, typer.Option(help="LoRA: a file, folder or Hub id; may be given again.")]
Density = Annotated[
    float | None, typer.Option(help="Share of the token pairs that sparse calls compute, in (0, 1].")
]
ScheduleText = Annotated[str | None, typer.Option(help='When the method runs, e.g. "dense 0-25%; layers 0".')]
Backend = Annotated[str, typer.Option(help="auto, reference, cpu, gathered, flex or triton.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the repeated blocks.")]
Height = Annotated[int | None, typer.Option(help="In pixels. Default: the model's.")]
Width = Annotated[int | None, typer.Option(help="In pixels. Default: the model's.")]
NumFrames = Annotated[int | None, typer.Option(help="Default: the model's.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")]
GuidanceScale = Annotated[float | None, typer.Option(help="Default: the model's.")]
FlowShift = Annotated[float | None, typer.Option(help="Of the scheduler. Default: the model's.")]
Dtype = Annotated[
    str, typer.Option(help="auto (bfloat16 on CUDA, else float32), bfloat16, float16 or float32.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Offload = Annotated[
    str,
    typer.Option(help="none, model, sequential or group: keep weights in CPU memory until used."),
]


@contextmanager
def plainly(stopped: str) -> Iterator[None]:
    """One line and an exit code for what the person at the terminal can change, instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        say(stopped)
        raise typer.Exit(130) from None
    except ValueError as error:
        say(f"error: {flat(error)}")
        raise typer.Exit(2) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        say("error: out of GPU memory; try --offload model or group, fewer frames, or a smaller size")
        raise typer.Exit(1) from None


def needs(*packages: str) -> None:
    """ValueError for the first package of the ``eval`` extra that is not installed."""
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install 'dit-sparse[eval]'")


def write_json(output: Path | None, result: Any) -> None:
    """Where a file was asked for."""
    import json

    from dit_sparse.video import staged

    if output is not None:
        with staged() as stage:
            stage(output).write_text(json.dumps(result, indent=1) + "\n")


_UNFOLDED = {"model": 1, "row": 1, "median (20-80 %)": 1}
"""By the name of a first column: how many columns are not folded when a terminal is narrow."""


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i < _UNFOLDED.get(columns[0], 0))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
