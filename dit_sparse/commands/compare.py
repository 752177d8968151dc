"""``dit-sparse compare``: the flags of ``eval/compare.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_sparse.commands.terminal import (
    Backend,
    Compile,
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
    Preset,
    Steps,
    Width,
    needs,
    plainly,
    table,
)
from dit_sparse.request import EXAMPLE, Request, check_prompt, numbers, read_prompts, words


def compare(
    methods: Annotated[str, typer.Option(help="Comma-separated, such as radial,draft.")],
    output_dir: Annotated[Path, typer.Option(help="For report.html, results and videos.")],
    densities: Annotated[
        str | None,
        typer.Option(help="Comma-separated, such as 0.15,0.25. Default: each method's preset or default."),
    ] = None,
    model: Model = "tiny-wan",
    prompt: Annotated[list[str] | None, typer.Option(help="May be given again.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of more, one a line; lines that begin with # are comments.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What videos should not show.")] = None,
    image: Image = None,
    lora: Lora = None,
    preset: Preset = None,
    schedule: Annotated[
        str | None,
        typer.Option(help='When methods run, e.g. "dense 0-25%; layers 0".'),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(help="Parameter of one method, METHOD.NAME=VALUE; may be given again."),
    ] = None,
    backend: Backend = "auto",
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
    compile: Compile = False,
    rounds: Annotated[int, typer.Option(help="Timed runs of each, in alternation. One shows no spread.")] = 1,
    protocol: Annotated[str, typer.Option(help="default, svg, skimage or pooled.")] = "default",
    lpips: Annotated[bool, typer.Option("--lpips", help="Also LPIPS; its weights are fetched once.")] = False,
) -> None:
    """Make the same videos dense and by several methods, and a page that shows them side by side.

    --output-dir gets the videos, results.json, results.csv and report.html, which needs no network. Its first
    rows are the stock model and the noise floor: dense attention by other kernels.
    """
    asked = dict(locals())
    for name in ("methods", "output_dir", "densities", "prompts", "prompt", "rounds", "protocol", "lpips"):
        del asked[name]
    with plainly("stopped; there are no results, and what was there before stays"):
        needs("jinja2", "matplotlib")
        from dit_sparse.eval.compare import compare as run
        from dit_sparse.eval.compare import lines

        texts = [*(prompt or ()), *(read_prompts("--prompts", prompts) if prompts is not None else ())]
        check_prompt(model, texts[0] if texts else None)
        result = run(
            Request(**asked, method="auto", output=output_dir),
            words("--methods", methods),
            numbers("--densities", densities) if densities is not None else (),
            texts or [EXAMPLE],
            rounds=rounds,
            protocol=protocol,
            lpips=lpips,
        )
        table(*lines(result))
        for row in result.rows:
            if row.refused:
                print(f"{row.label} refused: {row.refused}")
        if rounds == 1:
            print("Seconds and speed-up are of one run each; --rounds shows the spread.")
        print(output_dir / "report.html")
