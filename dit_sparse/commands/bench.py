"""``dit-sparse bench``: speed and memory."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

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
    table,
    write_json,
)
from dit_sparse.generate import say
from dit_sparse.request import Request, check_json

app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)


@app.command()
def kernels(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="wan2.1-14b-720p, wan2.1-1.3b-480p, hunyuanvideo-720p, tiny-wan, yardstick, long, or N,H,D: "
            "tokens, heads, head dim; may be given again. Default: by device."
        ),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(help="Share of the blocks to compute; may be given again. Default: the shape's."),
    ] = None,
    block: Annotated[
        str | None,
        typer.Option(help="Tokens of a block, 128, or of query and key block, 128x64. Default: the shape's."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 on CUDA, else float32), bfloat16, float16 or float32.")
    ] = "auto",
    pattern: Annotated[
        str, typer.Option(help="random: equally many blocks in each row; uneven: not so.")
    ] = "random",
    contenders: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, beside dense: auto, reference, cpu, gathered, flex, triton, "
            "flexattention, flexattention-masked, sdpa-loop, flash-attn, spas-sage-attn. Default: by device."
        ),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Also with gradients, as rows of their own.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure the peak memory of a call, not time.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="How long to time a case.")] = 4.0,
    output: Annotated[
        Path | None, typer.Option(help="A .csv; {device} in its name becomes the device's.")
    ] = None,
) -> None:
    """Time sparse attention kernels beside dense attention, in alternation.

    Prints a table on a terminal, and CSV into a pipe or file.
    """
    from dit_sparse.kernels import bench
    from dit_sparse.kernels.contenders import DEFAULT, chosen
    from dit_sparse.video import check_writable, staged

    with plainly("stopped; what was measured until then is printed and written"):
        if not 0 < seconds < float("inf"):
            raise ValueError(f"--seconds must be above 0, got {seconds:g}")
        shapes = shape or (("long",) if memory else ())
        cases = bench.cases(
            device=device, shapes=shapes, densities=density or (), block=block, dtype=dtype, pattern=pattern
        )
        if output is not None:
            output = bench.named_after_device(output, device)
            check_writable("--output", output)
        asked = contenders or ("auto" if memory else DEFAULT[device])
        passes = [(False, chosen(asked, device))]
        if backward:
            passes.append((True, chosen(asked, device, backward=True)))
        take = bench.memory if memory else partial(bench.measure, seconds=seconds)
        rows: list[bench.Row] = []
        for case in cases:
            say(str(case))
            for grad, names in passes:
                new = take(case, names, backward=grad)
                if sys.stdout.isatty():
                    shown = [bench.summary(row) for row in new]
                    table(tuple(shown[0]), [tuple(cells.values()) for cells in shown])
                else:
                    bench.write_csv(sys.stdout, new, header=not rows)
                rows += new
                if output is not None:
                    with staged() as stage, stage(output).open("w") as file:
                        bench.write_csv(file, rows)


@app.command()
def generate(
    model: Model = "tiny-wan",
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    image: Image = None,
    lora: Lora = None,
    method: Annotated[
        str, typer.Option(help="Sparse method, or auto: radial for videos, draft for images.")
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
    seed: Annotated[int, typer.Option(help="The same for every run.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    offload: Offload = "none",
    compile: Compile = False,
    rounds: Annotated[int, typer.Option(help="Timed runs of each, in alternation.")] = 5,
    output: Annotated[Path | None, typer.Option(help="A .json with every sample.")] = None,
) -> None:
    """Time whole generations, dense and sparse in turn in one process, part by part.

    Dense runs twice in each round: the ratio of its two times is what ratios here wobble by.
    """
    asked = dict(locals())
    for name in ("rounds", "output"):
        del asked[name]
    with plainly("stopped; nothing was written"):
        from dit_sparse.eval.latency import measure, rows_of

        if output is not None:
            check_json(output)
        result = measure(Request(**asked, output=Path("out")), rounds)
        write_json(output, result)
        about = result["device"]
        print(
            f"{result['model']['asked']} on {about['device']}, {about['threads']} threads, {about['dtype']}, "
            f"torch {about['torch']}, dit_sparse at {about['commit']}; dense by {result['dense_attention']}"
        )
        table(*rows_of(result))
        if rounds == 1:
            print("one run of each: no spread")
        if compile:
            print("under --compile self-attention and planning are not timed: a timer would break the graph")
