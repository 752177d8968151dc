"""``dit-sparse inspect`` and ``attention-maps``: the flags of their namesakes in ``eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dit_sparse.commands.terminal import (
    Device,
    Dtype,
    FlowShift,
    GuidanceScale,
    Height,
    Image,
    Model,
    NumFrames,
    Offload,
    Param,
    Steps,
    Width,
    needs,
    plainly,
    table,
)
from dit_sparse.request import Request

if TYPE_CHECKING:
    from dit_sparse.eval.inspection import Inspection
    from dit_sparse.layout import TokenLayout


def inspect(
    method: Annotated[str, typer.Option(help="Sparse method (see `dit-sparse methods`).")],
    grid: Annotated[
        str | None, typer.Option(help="FRAMES,HEIGHT,WIDTH in tokens, after patching, such as 21,30,52.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Name (`dit-sparse models`): grid, text, heads and layers at its usual size."),
    ] = None,
    text: Annotated[int | None, typer.Option(help="Text tokens in the same sequence.")] = None,
    text_first: Annotated[
        bool | None, typer.Option("--text-first/--text-last", help="Text stands before the grid.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Of the layer. Default: 4, or the model's.")] = None,
    density: Annotated[
        float | None, typer.Option(help="The method's setting nearest to this share of the token pairs.")
    ] = None,
    param: Param = None,
    layer: Annotated[int, typer.Option(help="Index of the layer, from 0.")] = 0,
    layers: Annotated[int | None, typer.Option(help="Layers of the model, for its totals.")] = None,
    step: Annotated[int | None, typer.Option(help="Index of the denoising step, from 0.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of methods that draw samples, and of toy attention.")] = 0,
    output: Annotated[Path, typer.Option(help="The picture: a .png or .svg.")] = Path("plan.png"),
) -> None:
    """Draw what a method computes, without a model, and tell what it costs.

    Methods that choose by q and k are shown on toy attention whose heads are known: within a frame, along
    time, along rows, everywhere.
    """
    with plainly("stopped; nothing was written"):
        needs("matplotlib")
        from dit_sparse.video import check_writable, staged

        if output.suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"--output must end in .png or .svg, got {output}")
        check_writable("--output", output)
        look = _inspected(
            method, grid, model, text, text_first, heads, density, param, layer, layers, step, steps, seed
        )
        with staged() as stage:
            look.figure().savefig(stage(output), dpi=150)
        table(("what", "value"), look.facts)
        print(output)


def attention_maps(
    output_dir: Annotated[Path, typer.Option(help="For maps.safetensors, maps.json and a picture a layer.")],
    model: Model = "tiny-wan",
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    image: Image = None,
    layers: Annotated[str, typer.Option(help="Indices with commas; -1 is the last; all.")] = "0,-1",
    heads: Annotated[str, typer.Option(help="Indices with commas; -1 is the last; all.")] = "all",
    steps_shown: Annotated[
        str, typer.Option("--at-steps", help="Indices of steps with commas; -1 is the last; all.")
    ] = "0,-1",
    branch: Annotated[str, typer.Option(help="cond, uncond, or all.")] = "cond",
    resolution: Annotated[int, typer.Option(help="Most rows and columns of a map.")] = 128,
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    flow_shift: FlowShift = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same maps.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    offload: Offload = "none",
) -> None:
    """Capture where a model's attention goes in a dense run, and which pattern each head suits.

    Calls that are not chosen are the model's own; all maps together take at most 512 MiB.
    """
    asked = dict(locals())
    for name in ("output_dir", "layers", "heads", "steps_shown", "branch", "resolution"):
        del asked[name]
    with plainly("stopped; nothing was written"):
        needs("matplotlib")
        from dit_sparse.eval.attention_maps import BlockMaps
        from dit_sparse.eval.attention_maps import attention_maps as run

        if resolution < 1:
            raise ValueError(f"--resolution must be at least 1, got {resolution}")
        maps = BlockMaps(
            layers=_indices("--layers", layers),
            heads=_indices("--heads", heads),
            steps=_indices("--at-steps", steps_shown),
            branch=None if branch == "all" else branch,
            resolution=resolution,
        )
        request = Request(**asked, method="dense", preset=None, schedule=None, param=None, output=output_dir)
        paths, lines = run(request, maps)
        columns = ("map", "frame", "position", "text", "entropy", "suits", "keeps", "best")
        table(columns, lines)
        print("A map is step/layer/head/branch. Keeps, best: mass in a quarter of the pairs, by that pattern")
        print("and by the best choice of blocks.")
        for path in paths:
            print(path)


def _indices(flag: str, text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"{flag} must be indices with commas between them, or all, got {text!r}") from None


def _inspected(
    name: str,
    grid: str | None,
    model: str | None,
    text: int | None,
    text_first: bool | None,
    heads: int | None,
    density: float | None,
    param: list[str] | None,
    layer: int,
    layers: int | None,
    step: int | None,
    steps: int | None,
    seed: int,
) -> Inspection:
    from dataclasses import replace

    from dit_sparse.calibration import CalibratedProcessor
    from dit_sparse.eval.inspection import inspect as look
    from dit_sparse.processors import METHODS, method_of
    from dit_sparse.request import parameters_of

    if name not in METHODS:
        raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {name!r}")
    for flag, value, least in (
        ("--heads", heads, 1),
        ("--layers", layers, 1),
        ("--steps", steps, 1),
        ("--layer", layer, 0),
        ("--step", step, 0),
        ("--text", text, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} must be at least {least}, got {value}")
    try:
        method = method_of(name, parameters_of(param or ()))
    except TypeError as error:
        raise ValueError(f"--param: {name} does not take these: {error}") from None
    found = method.calibrated if isinstance(method, CalibratedProcessor) else None
    layout, head_dim = None, 128
    if model is not None:
        layout, (known_layers, known_heads, head_dim) = _usual(model)
        layers, heads = layers or known_layers, heads or known_heads
    names = [""] if found is None else list(found.layers)
    if found is not None:
        layers, heads = layers or len(names), heads or found.heads
    if grid is not None:
        layout = _with_grid(layout, _grid(grid))
    elif found is not None and layout is None:
        layout = _with_grid(None, found.grid)
    if layout is None:
        raise ValueError("--grid or --model is missing: what is to be attended?")
    layout = replace(
        layout,
        text=layout.text if text is None else text,
        text_first=layout.text_first if text_first is None else text_first,
    )
    for flag, index, count in (("--layer", layer, layers), ("--step", step, steps)):
        if count is not None and index is not None and index >= count:
            raise ValueError(f"{flag} must be below {flag}s {count}, got {index}")
    if density is not None:
        if not 0 < density <= 1:
            raise ValueError(f"--density must be above 0 and at most 1, got {density:g}")
        method = method.at_density(density, layout)
    return look(
        method,
        layout,
        heads=heads or 4,
        head_dim=head_dim,
        layer=layer,
        layers=layers,
        name=names[layer] if layer < len(names) else "",
        step=step,
        steps=steps,
        seed=seed,
    )


def _usual(model: str) -> tuple[TokenLayout, tuple[int, int, int]]:
    """Layout and (layers, heads, head dim) of a named model at its recommended size, from its entry alone."""
    from dit_sparse.layout import TokenLayout
    from dit_sparse.pipelines.load import TINY, checkpoints, find

    known = checkpoints()
    if model not in known:
        raise ValueError(
            f"--model must be a name out of `dit-sparse models`, got {model!r}; give --grid instead"
        )
    entry = known[model]
    if model == TINY:
        source, usual = find(model), entry.defaults
        config = source.transformer
        layout = TokenLayout(source.grid(usual["num_frames"], usual["height"], usual["width"]))
        return layout, (config["num_layers"], config["num_attention_heads"], config["attention_head_dim"])
    if entry.tokens is None or entry.attention is None:
        raise ValueError(f"--model {model}: nothing says what size it makes; give --grid instead")
    return entry.tokens, entry.attention


def _grid(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"--grid must be FRAMES,HEIGHT,WIDTH in tokens, got {text!r}") from None


def _with_grid(layout: TokenLayout | None, grid: tuple[int, ...]) -> TokenLayout:
    from dataclasses import replace

    from dit_sparse.layout import TokenLayout

    return TokenLayout(grid) if layout is None else replace(layout, grid=grid)  # type: ignore[arg-type]
