"""One calibration file: what ``dit-sparse calibrate`` does.

Everything is checked before weights are loaded, as for ``dit-sparse generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from dit_sparse.generate import call_of, placed_pipeline, say
from dit_sparse.request import (
    Request,
    check_flags,
    check_json,
    choice_of,
    device_of,
    read_prompts,
    settings_of,
)

COUNT = 4
"""Prompts of the bundled model where none are given."""


def calibrate(asked: Request, *, prompts: Sequence[str], prompt_file: Path | None, count: int | None) -> None:
    """Check, load, search, write, tell.

    Args:
        prompts, prompt_file: Where prompts come from.
        count: How many of them; default all.
    """
    from dit_sparse.calibration import CalibratedProcessor
    from dit_sparse.calibration import calibrate as search
    from dit_sparse.pipelines.load import find
    from dit_sparse.processors import METHODS

    known = [name for name, cls in METHODS.items() if issubclass(cls, CalibratedProcessor)]
    if asked.method not in known:
        raise ValueError(f"--method must be one of {', '.join(known)}, got {asked.method!r}")
    check_flags(asked)
    check_json(asked.output)
    device = device_of(asked)
    source = find(asked.model)
    texts = _prompts(asked.model, prompts, prompt_file, count)
    settings = settings_of(asked, source)
    choice = choice_of(asked, source, settings)
    method = METHODS[asked.method](**choice.parameters)
    assert isinstance(method, CalibratedProcessor)
    if method.calibrated is not None:
        raise ValueError(f"--param calibration: {asked.output} is to be made, got one that exists")
    pipe = placed_pipeline(asked, source, device, settings)
    call = call_of(asked, source, settings)
    del call["prompt"]
    pipe.set_progress_bar_config(desc="calibrating")
    found = search(
        pipe,
        method,
        texts,
        seeds=range(asked.seed, asked.seed + len(texts)),
        source=asked.model,
        settings=call,
        schedule=choice.schedule,
    )
    found.save(asked.output)
    densities = [layer["density"] for layer in found.layers.values() if "density" in layer]
    density = f", mean density {fmean(densities):.3f}" if densities else ""
    say(f"{len(texts)} prompts, {len(found.layers)} layers, steps: {found.schedule}{density}")
    print(f"{asked.output}  use it with --method {asked.method} --param calibration={asked.output}")


def _prompts(
    model: str, prompts: Sequence[str], prompt_file: Path | None, count: int | None
) -> tuple[str, ...]:
    from dit_sparse.pipelines.load import TINY

    texts = list(prompts)
    if prompt_file is not None:
        texts += read_prompts("--prompt-file", prompt_file)
    if count is not None and count < 1:
        raise ValueError(f"--prompts must be at least 1, got {count}")
    if not texts and model == TINY:
        from dit_sparse.pipelines.tiny.data import held_out_prompts

        texts = [text for text, _ in held_out_prompts(count or COUNT, seed=1)]
    if not texts:
        raise ValueError(f"--prompt or --prompt-file is missing: what should {model} show?")
    if count is not None and count > len(texts):
        raise ValueError(f"--prompts {count}: only {len(texts)} were given")
    return tuple(texts[:count])
