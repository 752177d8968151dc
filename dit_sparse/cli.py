"""The command line: ``dit-sparse generate``, ``calibrate``, ``methods``, ``models``, ``eval`` and ``bench``.

    dit-sparse generate --prompt "a red circle moving left on a gray background" --compare-dense
    dit-sparse generate --model wan2.1 --offload model --prompt "a cat runs" --output cat.mp4
    dit-sparse calibrate --method sparse_vdit --output calibration.json
    dit-sparse bench kernels --shape tiny-wan --density 0.25

What is done is in ``generate.py``, ``search.py`` and ``kernels/bench.py``; here are the flags, and what
becomes of errors: one line and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from inspect import getdoc
from pathlib import Path
from typing import Annotated

import typer

from dit_sparse.batch import generate_many
from dit_sparse.generate import Request, flat, say
from dit_sparse.generate import generate as make
from dit_sparse.search import calibrate as search

# Flags that several commands have.
Model = Annotated[str, typer.Option(help="Name (`dit-sparse models`), Hub id or folder.")]
Image = Annotated[Path | None, typer.Option(help="First frame (image to video) or reference image (VACE).")]
Preset = Annotated[str | None, typer.Option(help="quality, balanced (default) or fast.")]
Param = Annotated[
    list[str] | None, typer.Option(help="Parameter of the method, NAME=VALUE; may be given again.")
]
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

app = typer.Typer(
    help="Sparse attention for diffusion transformers: generate videos, and see what really ran.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
benchmarks = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
app.add_typer(benchmarks, name="bench")
evaluations = typer.Typer(help="Measure quality.", no_args_is_help=True)
app.add_typer(evaluations, name="eval")


@app.callback()
def _commands() -> None:
    """Sparse attention for diffusion transformers: generate videos, and see what really ran."""


@app.command()
def generate(
    model: Model = "tiny-wan",
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts, one a line (# begins a comment); each has the next seed."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    image: Image = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="LoRA: a file, folder or Hub id; may be given again.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Sparse method (see `dit-sparse methods`), dense for the stock model, or auto: radial for "
            "videos, draft for images."
        ),
    ] = "auto",
    density: Annotated[
        float | None,
        typer.Option(help="Share of the token pairs that sparse calls compute, in (0, 1]."),
    ] = None,
    preset: Preset = None,
    schedule: Annotated[
        str | None, typer.Option(help='When the method runs, e.g. "dense 0-25%; layers 0".')
    ] = None,
    param: Param = None,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu, gathered, flex or triton.")] = "auto",
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
    compile: Annotated[bool, typer.Option("--compile", help="Compile the repeated blocks.")] = False,
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
        with _plainly("stopped; nothing was written"):
            make(Request(**{**asked, "output": output or Path("out")}))
        return
    with _plainly("stopped; what is finished stays, and the same command goes on"):
        if prompts is None or output_dir is None:
            raise ValueError("--prompts and --output-dir need each other")
        if output is not None:
            raise ValueError(f"--output {output} is for one prompt: many go to --output-dir")
        generate_many(Request(**{**asked, "output": output_dir}), prompts, output_dir)


@app.command()
def calibrate(
    method: Annotated[str, typer.Option(help="sparse_vdit, efficient_vdit or paro.")],
    output: Annotated[
        Path, typer.Option(help="A .json; a .safetensors goes beside it where masks are needed.")
    ],
    model: Model = "tiny-wan",
    prompt: Annotated[list[str] | None, typer.Option(help="What a video shows; may be given again.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="More prompts, one a line.")] = None,
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
    with _plainly("stopped; nothing was written"):
        search(Request(**asked), **given, count=count)


@app.command()
def methods() -> None:
    """List the methods and their parameters with defaults."""
    from dit_sparse.processors import METHODS

    rows = []
    for name, cls in METHODS.items():
        parameters = ", ".join(f"{f.name}={f.default!r}" for f in fields(cls))
        rows.append((name, (getdoc(cls) or "").split("\n")[0], parameters))
    _table(("method", "what it computes", "parameters"), rows)


@app.command()
def models(
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Which method runs in which transformer instead.")
    ] = False,
) -> None:
    """List the models that have a name, with their Hub ids."""
    if matrix:
        _matrix()
        return
    from dit_sparse.pipelines.load import TINY, checkpoints

    rows = [(name, c.about if name == TINY else f"{c.about}\n{c.repo}") for name, c in checkpoints().items()]
    _table(("model", "about, and Hub id"), rows)


@benchmarks.command()
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

    with _plainly("stopped; what was measured until then is printed and written"):
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
                    _table(tuple(shown[0]), [tuple(cells.values()) for cells in shown])
                else:
                    bench.write_csv(sys.stdout, new, header=not rows)
                rows += new
                if output is not None:
                    with staged() as stage, stage(output).open("w") as file:
                        bench.write_csv(file, rows)


@evaluations.command()
def fidelity(
    reference: Annotated[Path, typer.Argument(help="A video, or a folder of videos, one for each prompt.")],
    outputs: Annotated[
        list[Path],
        typer.Argument(help="What to hold against it; videos of the same names in folders."),
    ],
    floor: Annotated[
        Path | None,
        typer.Option(help="The reference again, by another backend or dtype: the noise there is anyway."),
    ] = None,
    protocol: Annotated[str, typer.Option(help="default, svg, skimage or pooled.")] = "default",
    lpips: Annotated[bool, typer.Option("--lpips", help="Also LPIPS; its weights are fetched once.")] = False,
    output: Annotated[Path | None, typer.Option(help="A .json with formulas and curves over frames.")] = None,
) -> None:
    """PSNR, SSIM and LPIPS of videos against the dense ones.

    Reads .mp4 and .png, and .safetensors with a tensor "frames", which no codec has changed. With folders
    every mean has its bootstrap 95 % interval over the videos, and every further folder its paired difference
    from the first.
    """
    import json

    from dit_sparse.eval.fidelity_files import compare, table
    from dit_sparse.video import check_writable, staged

    with _plainly("stopped; nothing was written"):
        if output is not None:
            if output.suffix.lower() != ".json":
                raise ValueError(f"--output must end in .json, got {output}")
            check_writable("--output", output)
        result = compare(reference, outputs, floor=floor, protocol=protocol, with_lpips=lpips)
        if output is not None:
            with staged() as stage:
                stage(output).write_text(json.dumps(result, indent=1) + "\n")
        _table(*table(result))
        formulas = dict(result["protocol"])
        print(f"protocol {formulas.pop('name')}")
        for name, formula in formulas.items():
            print(f"{name}: {formula}")


@contextmanager
def _plainly(stopped: str) -> Iterator[None]:
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


def _matrix() -> None:
    """Transformers by methods, in plain text of a fixed width; what the columns and letters mean, below."""
    from dit_sparse.pipelines.matrix import matrix

    table = matrix()
    methods = list(next(iter(table.values())))
    reasons = list(dict.fromkeys(why for row in table.values() for why in row.values() if why))
    marks = {"": "x", **{why: chr(ord("a") + i) for i, why in enumerate(reasons)}}
    wide = max(map(len, table))
    print(" " * wide, *(f"{i + 1:>2}" for i in range(len(methods))))
    for cls, row in table.items():
        print(f"{cls:<{wide}}", *(f"{marks[row[name]]:>2}" for name in methods))
    print("\nx runs, and is tested by the contract suite")
    print(*(f"{i + 1} {name}" for i, name in enumerate(methods)), sep=", ")
    for why in reasons:
        print(f"{marks[why]}: {why}")


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i < len(columns) - 1 and columns[0] == "model")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
