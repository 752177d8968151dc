"""``dit-sparse bench``: speed and memory."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dit_sparse.commands.terminal import plainly, table
from dit_sparse.generate import say

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
