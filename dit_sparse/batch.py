"""A video or image of every prompt in a file, by one process or several: ``dit-sparse generate --prompts``.

    dit-sparse generate --prompts prompts.txt --output-dir out
    torchrun --nproc-per-node 8 --no-python dit-sparse generate --prompts prompts.txt --output-dir out
    accelerate launch --num-processes 8 --no_python dit-sparse generate --prompts prompts.txt --output-dir out

Each process has the whole model on a device of its own, and makes every n-th of what is still to be made. A
file and its manifest appear together: a run that was stopped goes on where it was when it is started again.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.generate import attached, attempt, identity, placed_pipeline, removed
from dit_sparse.request import (
    Request,
    check_flags,
    choice_of,
    completed,
    device_of,
    flag_of,
    flat,
    makes_video,
    settings_of,
)

if TYPE_CHECKING:
    from dit_sparse.pipelines.load import Source
    from dit_sparse.request import Choice

_PATIENCE = timedelta(days=30)
"""How long a process waits at the end for one that is still making a video."""
_SLUG = 40


@dataclass(frozen=True)
class Batch:
    """What a run makes: a request for each prompt, and what they have in common."""

    requests: list[Request]
    source: Source
    settings: dict[str, Any]
    choice: Choice | None


@dataclass(frozen=True)
class Job:
    """One file of a run: its prompt, its seed, and its name without suffix."""

    prompt: str
    seed: int
    name: str


def jobs_of(texts: Sequence[str], seed: int) -> list[Job]:
    """A job for each prompt; prompt i has the seed ``seed`` + i."""
    named = zip(texts, names(texts), strict=True)
    return [Job(text, seed + i, name) for i, (text, name) in enumerate(named)]


def generate_many(asked: Request, jobs: Callable[[], Sequence[Job]], index: Path | None = None) -> None:
    """Check, load, make and write each, tell.

    Args:
        asked: What all have in common; ``output`` is the folder they go to.
        jobs: Reads what is to be made.
        index: Gets the manifests of all files that are there in the end, by the files' names.

    Raises:
        ValueError: Something asked cannot be, told by the first process before weights are loaded; or some
            prompts failed, told when all others are made.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    on_cpu = asked.device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    try:
        todo: list[int] = []
        problem: str | None = None
        if state.is_main_process:
            try:
                batch = _planned(_placed(asked, state), jobs, index)
                todo = [i for i, one in enumerate(batch.requests) if not _is_made(one, batch)]
            except ValueError as error:
                problem = flat(error)
        # Told by one, as files that appear meanwhile must not change the shares of the others.
        todo, problem = broadcast_object_list([todo, problem])
        _stop_at(problem, state)
        if not state.is_main_process:
            batch = _planned(_placed(asked, state), jobs, index)
        mine = [batch.requests[i] for i in todo[state.process_index :: state.num_processes]]
        failures = gather_object(_made(mine, batch))
        if state.is_main_process:
            _write_index(index, batch, made=len(todo) - len(failures))
        _stop_at(f"{len(failures)} of {len(todo)} failed: {'; '.join(failures)}" if failures else None, state)
    finally:
        state.destroy_process_group()


def _stop_at(problem: str | None, state: Any) -> None:
    """End every process; the first one says why."""
    if problem is not None:
        raise ValueError(problem) if state.is_main_process else SystemExit(2)


def _placed(asked: Request, state: Any) -> Request:
    """The request on the device of this process."""
    if state.num_processes == 1 or state.device.type == "cpu":
        return asked
    if ":" in asked.device:
        raise ValueError(f"--device {asked.device} is one device for {state.num_processes} processes")
    return replace(asked, device=str(state.device))


def _planned(asked: Request, jobs: Callable[[], Sequence[Job]], index: Path | None) -> Batch:
    """Everything that can be checked before weights are loaded."""
    from dit_sparse.pipelines.load import find
    from dit_sparse.video import check_writable

    check_flags(asked)
    device_of(asked)
    for name in ("prompt", "report", "compare_dense"):
        if getattr(asked, name):
            raise ValueError(f"{flag_of(name)} is for one prompt, got --prompts too")
    todo = jobs()
    source = find(asked.model)
    if index is not None:
        check_writable("--output-dir", index)
    video = makes_video(asked, source)
    suffix = ".mp4" if video else ".png"
    requests = [
        completed(
            replace(asked, prompt=job.prompt, seed=job.seed, output=asked.output / f"{job.name}{suffix}"),
            video,
        )
        for job in todo
    ]
    settings = settings_of(asked, source)
    choice = None if asked.is_stock else choice_of(requests[0], source, settings)
    return Batch(requests, source, settings, choice)


def names(prompts: Sequence[str]) -> list[str]:
    """File names without suffix, such as ``0003-a-cat-runs``: number from 0, and the first words in ASCII."""
    found = []
    for i, prompt in enumerate(prompts):
        plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
        words = "".join(c if c.isalnum() else " " for c in plain).split()
        slug = ""
        for word in words:
            if len(slug) + len(word) >= _SLUG:
                break
            slug += f"-{word}"
        found.append(f"{i:04d}{slug}")
    return found


def _is_made(one: Request, batch: Batch) -> bool:
    """Whether a file is there with its manifest.

    Raises:
        ValueError: It was made of something else than is asked for now.
    """
    if not (one.output.exists() and one.manifest.exists()):
        return False
    wanted = json.loads(json.dumps(identity(one, batch.source, batch.settings, batch.choice)))
    try:
        found = json.loads(one.manifest.read_text())
        known = {name: found[name] for name in wanted}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{one.manifest} is no readable manifest: {flat(error)}") from None
    known["method"].pop("backend", None)  # it may be another: the device is
    changes = [change for name, value in wanted.items() for change in _changes(name, known[name], value)]
    if changes:
        raise ValueError(
            f"{one.output} was made with {', '.join(changes)}: give another --output-dir, or remove it"
        )
    return True


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """What differs, named as deep as it is."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [c for key in {**old, **new} for c in _changes(f"{name}.{key}", old.get(key), new.get(key))]
    return [f"{name} {old!r} and not {new!r}"]


def _made(requests: Sequence[Request], batch: Batch) -> list[str]:
    """Make these; returns what failed, and why."""
    failures: list[str] = []
    if not requests:
        return failures
    first = requests[0]
    pipe = placed_pipeline(first, batch.source, device_of(first), batch.settings)
    choice = batch.choice
    with removed(None if choice is None else attached(pipe, first, choice, choice.schedule)) as session:
        for one in requests:
            try:
                manifest = attempt(pipe, one, batch.source, batch.settings, choice, session)
            except ValueError as error:
                failures.append(f"{one.output.stem} ({flat(error)})")
                continue
            except Exception as error:
                error.add_note(f"while making {one.output} of {one.prompt!r}")
                raise
            seconds, density = manifest["seconds"]["total"], manifest["density"]["full_run"]
            print(f"{one.output}  {seconds:.2f} s, density {density:.3f}", flush=True)
    return failures


def _write_index(index: Path | None, batch: Batch, made: int) -> None:
    """The manifests of all files that are there, by the files' names."""
    from dit_sparse.video import staged

    there = [one for one in batch.requests if one.output.exists() and one.manifest.exists()]
    if index is not None:
        files = {one.output.name: json.loads(one.manifest.read_text()) for one in there}
        whole = {"format": 1, "prompts": len(batch.requests), "files": files}
        with staged() as stage:
            stage(index).write_text(json.dumps(whole, indent=1) + "\n")
    where = batch.requests[0].output.parent if index is None else index
    print(f"{where}  {len(there)} of {len(batch.requests)} prompts, {made} made now")
