"""``dit-sparse eval vbench``: the flags of ``eval/vbench*.py``."""

from __future__ import annotations

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
from dit_sparse.request import Request, check_json

app = typer.Typer(
    help="VBench: its videos, the official package in its own environment, and scores without it.",
    no_args_is_help=True,
)

Python = Annotated[
    Path | None, typer.Option(help="Interpreter of the environment that vbench is installed in.")
]
Dimension = Annotated[
    list[str] | None, typer.Option(help="Only what this needs; may be given again. Default: all.")
]


@app.command()
def generate(
    output_dir: Annotated[Path, typer.Option(help="Gets videos/ and manifests/.")],
    vbench_python: Python = None,
    full_info: Annotated[
        Path | None, typer.Option(help="VBench_full_info.json, instead of --vbench-python.")
    ] = None,
    augmented: Annotated[
        Path | None,
        typer.Option(help="Rewritten prompts, line i for prompt i of the suite, which names the file."),
    ] = None,
    dimension: Dimension = None,
    shard: Annotated[str, typer.Option(help="I/N: every N-th video from the I-th, counted from 0.")] = "0/1",
    model: Model = "tiny-wan",
    negative_prompt: Annotated[str | None, typer.Option(help="What videos should not show.")] = None,
    lora: Lora = None,
    method: Annotated[
        str, typer.Option(help="Sparse method, auto for radial, or dense for the stock model.")
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
    seed: Annotated[int, typer.Option(help="Clip i of prompt j has the seed + 25 j + i.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    offload: Offload = "none",
    compile: Compile = False,
) -> None:
    """Make the videos of VBench's prompt suite: 5 of each prompt, 25 for temporal flickering.

    What is there already is not made again. Under torchrun or accelerate launch each process makes its share.
    """
    asked = dict(locals())
    for name in ("output_dir", "vbench_python", "full_info", "augmented", "dimension", "shard"):
        del asked[name]
    with plainly("stopped; what is finished stays, and the same command goes on"):
        from dit_sparse.batch import generate_many
        from dit_sparse.eval import vbench_suite

        if (vbench_python is None) == (full_info is None):
            raise ValueError("give one of --vbench-python and --full-info: where the prompts are")
        if vbench_python is not None:
            full_info = vbench_suite.full_info(vbench_suite.package(vbench_python))
        assert full_info is not None
        request = Request(**asked, output=output_dir / "videos", manifest_dir=output_dir / "manifests")
        jobs = partial(
            vbench_suite.jobs,
            full_info,
            dimensions=dimension or (),
            augmented=augmented,
            seed=seed,
            shard=_shard(shard),
        )
        generate_many(request, jobs)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard must be I/N with I below N, got {text!r}")
    return int(index), int(count)


@app.command()
def run(
    videos: Annotated[Path, typer.Argument(help="A folder of .mp4 alone.")],
    vbench_python: Annotated[
        Path, typer.Option(help="Interpreter of the environment that vbench is installed in.")
    ],
    output_dir: Annotated[Path, typer.Option(help="For the results, a file for each dimension.")],
    dimension: Dimension = None,
    mode: Annotated[
        str, typer.Option(help="vbench_standard for its own prompts, custom_input for other videos.")
    ] = "vbench_standard",
    gpus: Annotated[int, typer.Option(help="Processes, a GPU each.")] = 1,
) -> None:
    """Evaluate videos by the official vbench package, one dimension after the other.

    A dimension whose result is there is not evaluated again.
    """
    with plainly("stopped; what is finished stays, and the same command goes on"):
        from dit_sparse.eval.vbench_run import run as evaluate

        files = evaluate(videos, vbench_python, output_dir, dimensions=dimension or (), mode=mode, gpus=gpus)
        for file in files.values():
            print(file)


@app.command()
def flickering(
    videos: Annotated[Path, typer.Argument(help="A folder of .mp4.")],
    output: Annotated[Path | None, typer.Option(help="A .json as VBench writes it.")] = None,
) -> None:
    """Temporal flickering, the one dimension that needs no network, here and without vbench.

    VBench asks it of videos that hold still: motion counts as flicker.
    """
    with plainly("stopped; nothing was written"):
        from dit_sparse.eval.vbench import flickering as measure
        from dit_sparse.video import check_writable

        if output is not None:
            if not output.name.endswith("_eval_results.json"):
                raise ValueError(f"--output must end in _eval_results.json, as score looks for, got {output}")
            check_writable("--output", output)
        result = measure(videos)
        mean, found = result["temporal_flickering"]
        write_json(output, result)
        print(f"temporal flickering {mean:.6f}, {len(found)} videos")


@app.command()
def score(
    results: Annotated[
        list[Path], typer.Argument(help="Folders of *_eval_results.json; the first is compared with.")
    ],
    floor: Annotated[
        Path | None, typer.Option(help="Dense again, by another backend or dtype: the noise there is anyway.")
    ] = None,
    version: Annotated[int, typer.Option(help="1 for VBench, 2 for VBench-2.0.")] = 1,
    output: Annotated[Path | None, typer.Option(help="A .json.")] = None,
) -> None:
    """Dimensions, quality, semantic and total score from results, without vbench.

    In brackets the difference from the first folder, with its bootstrap 95 % interval over videos of the same
    names. A total that lacks a dimension is not given.
    """
    with plainly("stopped; nothing was written"):
        from dit_sparse.eval.vbench import rows_of
        from dit_sparse.eval.vbench import score as calculate

        if output is not None:
            check_json(output)
        result = calculate(results, floor=floor, version=version)
        write_json(output, result)
        table(*rows_of(result))
