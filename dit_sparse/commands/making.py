"""``dit-sparse generate`` and ``calibrate``: the flags of ``generate.py``, ``batch.py`` and ``search.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_sparse.batch import generate_many, jobs_of
from dit_sparse.commands.terminal import (
    Backend,
    Compile,
    Density,
    Device,
    Dtype,
    FlowShift,
    GuidanceScale,
    Height,
    Image,
    Lora,
    Model,
    NumFrames,
    Offload,
    Param,
    Preset,
    ScheduleText,
    Steps,
    Width,
    plainly,
)
from dit_sparse.generate import generate as make
from dit_sparse.request import Request, read_prompts
from dit_sparse.search import calibrate as search


def generate(
    model: Model = "tiny-wan",
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of prompts, one a line (lines with # first are comments); each has the next seed."
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    image: Image = None,
    lora: Lora = None,
    method: Annotated[
        str,
        typer.Option(
            help="Sparse method (see `dit-sparse methods`), dense for the stock model, or auto: radial for "
            "videos, draft for images."
        ),
    ] = "auto",
    density: Density = None,
    preset: Preset = None,
    schedule: ScheduleText = None,
    param: Param = None,
    backend: Backend = "auto",
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    flow_shift: FlowShift = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same video.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    offload: Offload = "none",
    compile: Compile = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="An .mp4, or a .png of image models; a manifest goes beside it as .json. Default: out."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="With --prompts: where they go. What is there already is not made again."),
    ] = None,
    compare_dense: Annotated[
        bool,
        typer.Option("--compare-dense", help="Also make the dense one from the same noise, and compare."),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write what ran, call by call, to this .json.")] = None,
) -> None:
    """Generate a video with sparse attention.

    On a 24 GB card, Wan2.1 1.3B runs as it is, and the 14B models with --offload group.
    """
    asked = dict(locals())
    del asked["prompts"], asked["output_dir"]
    if prompts is None and output_dir is None:
        with plainly("stopped; nothing was written"):
            make(Request(**{**asked, "output": output or Path("out")}))
        return
    with plainly("stopped; what is finished stays, and the same command goes on"):
        if prompts is None or output_dir is None:
            raise ValueError("--prompts and --output-dir need each other")
        if output is not None:
            raise ValueError(f"--output {output} is for one prompt: many go to --output-dir")
        file = prompts
        generate_many(
            Request(**{**asked, "output": output_dir}),
            lambda: jobs_of(read_prompts("--prompts", file), seed),
            output_dir / "manifest.json",
        )


def calibrate(
    method: Annotated[str, typer.Option(help="sparse_vdit, efficient_vdit or paro.")],
    output: Annotated[
        Path, typer.Option(help="A .json; a .safetensors goes beside it where masks are needed.")
    ],
    model: Model = "tiny-wan",
    prompt: Annotated[list[str] | None, typer.Option(help="What a video shows; may be given again.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="More, one a line; # first is a comment.")] = None,
    prompts: Annotated[
        int | None, typer.Option(help="How many of them. Default: all, or 4 of tiny-wan's own.")
    ] = None,
    image: Image = None,
    preset: Preset = None,
    schedule: Annotated[
        str | None, typer.Option(help="When the method will run: other steps are not looked at.")
    ] = None,
    param: Param = None,
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    flow_shift: FlowShift = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next one has the next seed.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    offload: Offload = "none",
) -> None:
    """Search a method's modes, frames or masks on a model's own runs, for one size.

    The file serves later runs of the same model at the same size.
    """
    asked = dict(locals())
    given = {"prompts": asked.pop("prompt") or (), "prompt_file": asked.pop("prompt_file")}
    count = asked.pop("prompts")
    with plainly("stopped; nothing was written"):
        search(Request(**asked), **given, count=count)
