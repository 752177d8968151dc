"""One video or image with a sparse method, and the dense one where asked: what ``dit-sparse generate`` does.

Everything is checked before weights are loaded. Files appear whole, at the end, or not at all.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dit_sparse.request import (
    EXAMPLE,
    FRAME_RATES,
    Choice,
    Request,
    call_parameters,
    check_flags,
    check_prompt,
    choice_of,
    completed,
    device_of,
    flat,
    makes_video,
    read_image,
    settings_of,
)

if TYPE_CHECKING:
    from dit_sparse.attach import Session
    from dit_sparse.pipelines.load import Source

Attached = TypeVar("Attached", "Session", "Session | None")


@dataclass
class Run:
    """One run of a pipeline.

    Args:
        frames: uint8 [F, H, W, 3]; an image is one frame.
        seconds: Of the whole call, and in the parts of the pipeline.
        inside: Seconds in ``attention`` (self-attention core calls) and, of these, in ``planning``; empty
            where they were not timed.
        session: The session it ran in, detached by now; its report stays readable.
    """

    frames: Any
    seconds: dict[str, float]
    inside: dict[str, float] = field(default_factory=dict)
    session: Session | None = None


def generate(asked: Request) -> None:
    """Check, load, run, write, tell."""
    from dit_sparse.pipelines.load import find

    check_flags(asked)
    device = device_of(asked)
    source = find(asked.model)
    asked = completed(asked, makes_video(asked, source))
    check_prompt(asked.model, asked.prompt)
    settings = settings_of(asked, source)
    choice = None if asked.is_stock else choice_of(asked, source, settings)
    pipe = placed_pipeline(asked, source, device, settings)
    call = call_of(asked, source, settings)

    dense = None
    if asked.compare_dense:
        say("one untimed step of each")
        with removed(attached(pipe, asked, choice, "always")):
            warm_up(pipe, call, asked.seed)
        warm_up(pipe, call, asked.seed)
        with removed(left_alone(pipe)) as stock:
            dense = timed_run(pipe, call, asked, stock, "dense")
    with removed(None if choice is None else attached(pipe, asked, choice, choice.schedule)) as session:
        run = run_once(pipe, call, asked.seed, asked.method)
        run.session = session
    manifest = _manifest(asked, source, settings, choice, run, dense, pipe)
    _write(asked, manifest, run, dense)
    _tell(asked, manifest, run)


def attempt(
    pipe: Any,
    asked: Request,
    source: Source,
    settings: Mapping[str, Any],
    choice: Choice | None,
    session: Session | None,
) -> dict[str, Any]:
    """One run in a session that is attached (None is the stock model), and its files: the manifest.

    Raises:
        ValueError: The model made no video.
    """
    if session is not None:
        session.reseed(asked.seed)
    run = run_once(pipe, call_of(asked, source, settings), asked.seed, asked.output.stem)
    run.session = session
    manifest = _manifest(asked, source, settings, choice, run, None, pipe)
    _write(asked, manifest, run, None)
    return manifest


def placed_pipeline(asked: Request, source: Source, device: str, settings: Mapping[str, Any]) -> Any:
    """The pipeline, placed and prepared, with stock attention."""
    import torch

    from dit_sparse.pipelines.load import load

    name = asked.dtype
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    say(f"loading {asked.model} on {device} in {name}")
    pipe, _ = load(source, dtype=getattr(torch, name), image=asked.image is not None)
    for i, lora in enumerate(asked.lora or ()):
        _add_lora(pipe, lora, f"lora_{i}")
    if asked.lora:
        pipe.set_adapters([f"lora_{i}" for i in range(len(asked.lora))])
    if settings["flow_shift"] is not None:
        _set_flow_shift(pipe, settings["flow_shift"])
    if asked.offload == "none":
        pipe.to(device)
    elif asked.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif asked.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        # The autoencoder is small, and its cached convolutions are not made for being moved leaf by leaf.
        pipe.enable_group_offload(
            onload_device=torch.device(device),
            offload_type="leaf_level",
            use_stream=True,
            exclude_modules=["vae"],
        )
    if asked.compile:
        for model in _transformers(pipe):
            model.compile_repeated_blocks(fullgraph=True)
    return pipe


def _add_lora(pipe: Any, lora: str, name: str) -> None:
    try:
        pipe.load_lora_weights(lora, adapter_name=name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"--lora {lora} cannot be loaded: {flat(error)}") from error
    if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
        raise ValueError(f"--lora {lora} has no weights for {type(pipe).__name__}")


def _set_flow_shift(pipe: Any, value: float) -> None:
    config = pipe.scheduler.config
    name = next((n for n in ("flow_shift", "shift") if n in config), None)
    if name is None:
        raise ValueError(f"--flow-shift: {type(pipe.scheduler).__name__} has no shift")
    pipe.scheduler = type(pipe.scheduler).from_config(config, **{name: value})


def _transformers(pipe: Any) -> list[Any]:
    names = (name for name in pipe.components if name.startswith("transformer"))
    return [pipe.components[name] for name in names if pipe.components[name] is not None]


def call_of(asked: Request, source: Source, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of the pipeline's call."""
    own = call_parameters(asked, source)
    call = {n: v for n, v in settings.items() if n not in ("fps", "flow_shift")}
    call.update({name: settings["fps"] for name in FRAME_RATES if name in own})
    call["prompt"] = EXAMPLE if asked.prompt is None else asked.prompt
    if asked.negative_prompt is not None:
        call["negative_prompt"] = asked.negative_prompt
    if asked.image is not None:
        from PIL import ImageOps

        image = read_image(asked.image)
        if "height" in call:
            image = ImageOps.fit(image, (call["width"], call["height"]))
        call.update({"image": image} if "image" in own else {"reference_images": [image]})
        if "max_area" in own:  # FLUX.1 Kontext takes of height and width their proportion alone
            call["max_area"] = call["height"] * call["width"]
    return call


def attached(pipe: Any, asked: Request, choice: Choice | None, schedule: str) -> Session:
    import dit_sparse
    from dit_sparse.processors import METHODS

    assert choice is not None
    return dit_sparse.apply(
        pipe,
        METHODS[asked.method](**choice.parameters),
        density=asked.density,
        schedule=schedule,
        backend=asked.backend,
        seed=asked.seed,
    )


def left_alone(pipe: Any) -> Session:
    """A session that leaves every call to the model: bit for bit the stock model, with a report."""
    import dit_sparse

    return dit_sparse.apply(pipe, "dense", schedule="dense 0-100%")


def by_kernels(pipe: Any, backend: str = "auto", schedule: str = "always") -> Session:
    """A session that computes all of attention by the block-sparse kernels: dense, rounded otherwise.

    Its videos tell how far from the dense one a video is by rounding alone: the noise floor.
    """
    import dit_sparse

    session = dit_sparse.apply(pipe, "dense", schedule=schedule, backend=backend)
    session.full_plan_is_dense = False
    return session


@contextmanager
def removed(session: Attached) -> Iterator[Attached]:
    """The session for the time of a block; None is the stock model."""
    try:
        yield session
    finally:
        if session is not None:
            session.remove()


def timed_run(pipe: Any, call: Mapping[str, Any], asked: Request, session: Session, name: str) -> Run:
    """A run in a session that is attached, with the time inside its self-attention core calls.

    Under ``torch.compile`` a timer would break the graph: there that time stays unknown.
    """
    from dit_sparse.stopwatch import CallTimer

    if asked.compile:
        run = run_once(pipe, call, asked.seed, name)
    else:
        with CallTimer(pipe, session) as timer:
            run = run_once(pipe, call, asked.seed, name)
            run.inside = timer.seconds()
    run.session = session
    return run


def run_once(pipe: Any, call: Mapping[str, Any], seed: int, name: str | None) -> Run:
    """One timed run from the seed's noise; ``name`` is shown at its progress bar, None shows none.

    Raises:
        ValueError: The model made values that are no numbers.
    """
    import torch

    from dit_sparse.stopwatch import Stopwatch

    pipe.set_progress_bar_config(disable=name is None, desc=name)
    generator = torch.Generator().manual_seed(seed)
    with Stopwatch(pipe) as watch:
        start = watch.now()
        out = pipe(**{"output_type": "np", **call}, generator=generator)
        total = watch.now() - start
    kind = next(name for name in ("frames", "images", "image") if name in out)
    frames = torch.as_tensor(out[kind][0] if kind == "frames" else out[kind][:1])
    if not frames.isfinite().all():
        raise ValueError("the model made values that are no numbers; try --dtype bfloat16 or float32")
    seconds = {"total": total, **watch.seconds}
    return Run((frames * 255).round().to(torch.uint8), seconds)


def warm_up(pipe: Any, call: Mapping[str, Any], seed: int) -> None:
    """One untimed step: the first loads code, compiles and allocates."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    short = {**call, "num_inference_steps": 1, "output_type": "latent"}
    pipe(**short, generator=torch.Generator().manual_seed(seed))


def identity(
    asked: Request, source: Source, settings: Mapping[str, Any], choice: Choice | None
) -> dict[str, Any]:
    """The part of a manifest that says what was asked for: the same on any device."""
    method: dict[str, Any] = {"name": "dense"}
    if choice is not None:
        method = {
            "name": asked.method,
            "parameters": choice.parameters,
            "requested_density": asked.density,
            "schedule": choice.schedule,
            "preset": choice.preset,
            "source": choice.source,
        }
    return {
        "model": {
            "asked": asked.model,
            "location": "in the package" if source.size == "tiny" else source.location,
            "revision": None if Path(source.location).is_dir() else source.folder.name,
            "pipeline": source.pipeline_class(asked.image is not None),
            "size": source.size,
            "lora": asked.lora or [],
        },
        "prompt": EXAMPLE if asked.prompt is None else asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "image": None if asked.image is None else str(asked.image),
        "seed": asked.seed,
        "settings": dict(settings),
        "method": method,
    }


def versions() -> dict[str, str]:
    """Of what a run depends on."""
    packages = ("dit-sparse", "torch", "diffusers", "transformers")
    return {**{name: version(name) for name in packages}, "python": platform.python_version()}


def device_of_run(asked: Request, pipe: Any) -> dict[str, Any]:
    """What a run is done on, and how."""
    import torch

    device = pipe._execution_device
    is_cuda = device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name(device) if is_cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(_transformers(pipe)[0].dtype).removeprefix("torch."),
        "offload": asked.offload,
        "compile": asked.compile,
    }


def _manifest(
    asked: Request,
    source: Source,
    settings: Mapping[str, Any],
    choice: Choice | None,
    run: Run,
    dense: Run | None,
    pipe: Any,
) -> dict[str, Any]:
    """What was asked, on what, and what came of it."""
    about = identity(asked, source, settings, choice)
    density = {"full_run": 1.0, "sparse_calls": 1.0}
    if run.session is not None:
        report = run.session.report()
        density = {"full_run": report.density, "sparse_calls": report.sparse_density}
        about["method"]["backend"] = report.about["backend"]
    return {
        "format": 1,
        "versions": versions(),
        **about,
        "device": device_of_run(asked, pipe),
        "density": density,
        "seconds": run.seconds,
        "comparison": None if dense is None else _compared(run, dense),
    }


def _write(asked: Request, manifest: Mapping[str, Any], run: Run, dense: Run | None) -> None:
    """Every file, all or none."""
    import torch

    from dit_sparse.video import staged, write_frames

    fps = manifest["settings"].get("fps")
    with staged() as stage:
        write_frames(stage(asked.output), run.frames, fps)
        stage(asked.manifest).write_text(json.dumps(manifest, indent=1) + "\n")
        if dense is not None:
            write_frames(stage(asked.comparison), torch.cat([dense.frames, run.frames], dim=2), fps)
        if run.session is not None and asked.report is not None:
            stage(asked.report).write_text(run.session.report().to_json() + "\n")


def _compared(run: Run, dense: Run) -> dict[str, Any]:
    """Times and fidelity of a run beside the dense one, and Amdahl's bound on its speed-up."""
    from dit_sparse.eval.fidelity import identical_frames, psnr, ssim

    decibels = psnr(run.frames, dense.frames)
    assert run.session is not None
    total = dense.seconds["total"]
    share = dense.inside["attention"] / total if dense.inside else None
    density = run.session.report().density
    return {
        "dense_seconds": dense.seconds,
        "speed_up": total / run.seconds["total"],
        "attention_share": share,
        "amdahl_bound": None if share is None else amdahl_bound(share, density),
        "psnr": decibels if isfinite(decibels) else None,
        "ssim": ssim(run.frames, dense.frames),
        "frames": len(run.frames),
        "identical_frames": identical_frames(run.frames, dense.frames),
    }


def amdahl_bound(share: float, density: float) -> float:
    """The speed-up that density explains, at dense attention's time per token pair.

    Args:
        share: Of dense attention in the time of a dense run.
    """
    return 1 / (1 - share + share * density)


def _tell(asked: Request, manifest: Mapping[str, Any], run: Run) -> None:
    """What came of it, on standard output."""
    settings, density = manifest["settings"], manifest["density"]
    count, height, width, _ = run.frames.shape
    fps = settings.get("fps")
    what = f"{height}x{width}" if fps is None else f"{count} frames of {height}x{width} at {fps} fps"
    lines = [(str(asked.output), f"{what}, seed {asked.seed}; manifest {asked.manifest}")]
    if run.session is not None:
        method = manifest["method"]
        backend = method["backend"].split(" (")[0]
        lines += [
            ("method", f"{asked.method}, {method['schedule']}; backend {backend}"),
            (
                "density",
                f"full run {density['full_run']:.3f}, sparse calls alone {density['sparse_calls']:.3f}",
            ),
        ]
    lines.append(("seconds", _parts(manifest["seconds"])))
    comparison = manifest["comparison"]
    if comparison is not None:
        lines += [
            ("dense", _parts(comparison["dense_seconds"])),
            ("speed-up", _speed_up(comparison, density["full_run"])),
            ("fidelity", _fidelity(comparison)),
            (str(asked.comparison), "dense left, sparse right"),
        ]
    if asked.report is not None:
        lines.append((str(asked.report), "what ran, call by call"))
    wide = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"{label:<{wide}}  {text}")
    if run.session is not None and not run.session.report().sparse_rows:
        reasons = sorted({row.where.reason for row in run.session.report().rows})
        say(f"note: no call ran sparse ({', '.join(reasons)})")


def _parts(seconds: Mapping[str, float]) -> str:
    rest = seconds["total"] - sum(v for n, v in seconds.items() if n != "total")
    parts = [f"{n.replace('_', ' ')} {v:.2f}" for n, v in seconds.items() if n != "total"]
    return f"{seconds['total']:.2f}: {', '.join(parts)}, rest {rest:.2f}"


def _speed_up(comparison: Mapping[str, Any], density: float) -> str:
    """The measured factor beside what density and dense attention's share explain of it.

    Kernels that compute a token pair faster than the model's own attention go beyond that bound.
    """
    measured = f"{comparison['speed_up']:.2f}x end to end, one run each"
    share = comparison["attention_share"]
    if share is None:
        return f"{measured}; no bound under --compile, where attention is not timed"
    return (
        f"{measured}; at the dense run's time per token pair Amdahl's bound is "
        f"{comparison['amdahl_bound']:.2f}x (self-attention {share:.0%} of that run, density {density:.3f})"
    )


def _fidelity(comparison: Mapping[str, Any]) -> str:
    decibels = comparison["psnr"]
    psnr = "no frame differs" if decibels is None else f"PSNR {decibels:.2f} dB"
    return (
        f"{psnr}, SSIM {comparison['ssim']:.4f} to the dense video before compression; "
        f"{comparison['identical_frames']} of {comparison['frames']} frames identical"
    )


def say(text: str) -> None:
    """A line on the error stream, where progress goes; the result goes to standard output."""
    print(text, file=sys.stderr, flush=True)
