"""The official ``vbench`` package, driven in its own environment, one dimension after the other.

Its console script builds a shell line and forgets how that ended. So what it starts is started here.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from dit_sparse.eval.vbench import DIMENSIONS, FILTERED, read_results
from dit_sparse.eval.vbench_suite import (
    CLIPS,
    STATIC,
    check_dimensions,
    full_info,
    missing,
    package,
    read_suite,
)
from dit_sparse.generate import say
from dit_sparse.video import staged

NEEDS_SUITE = (
    "object_class",
    "multiple_objects",
    "scene",
    "appearance_style",
    "color",
    "spatial_relationship",
)
"""Dimensions that VBench gives only to videos of its own prompts."""
MODES = ("vbench_standard", "custom_input")
_ERRORS = 2
"""The error stream, where what is not a result goes."""
_FILTER = "from vbench.cli.vbench import main; main()"


def run(
    videos: Path,
    python: Path,
    output: Path,
    *,
    dimensions: Sequence[str] = (),
    mode: str = MODES[0],
    gpus: int = 1,
) -> dict[str, Path]:
    """Evaluate videos, and return the file of each dimension, as VBench writes it.

    For flickering, the videos that hold still are chosen first, by VBench's own filter. It comes last: the
    filter's weights are fetched by another dimension. A dimension whose file is there is not evaluated again.

    Args:
        videos: A folder of .mp4 and nothing else: VBench takes the suffix of whatever it sees first.
        python: The interpreter of an environment with ``vbench``.
        output: Gets ``{dimension}_eval_results.json``, and in ``about.json`` what they are of.
        dimensions: Default all that ``mode`` allows.
        mode: "vbench_standard" for the prompt suite, "custom_input" for other videos.
        gpus: Processes, a GPU each; one for appearance style, of which several would average other frames.

    Raises:
        ValueError: Something is missing, told first; or some dimensions failed, told in the end.
    """
    if mode not in MODES:
        raise ValueError(f"--mode must be one of {', '.join(MODES)}, got {mode!r}")
    check_dimensions(dimensions)
    own = mode == "custom_input"
    for name in dimensions:
        if own and name in NEEDS_SUITE:
            raise ValueError(f"--dimension {name} is for videos of VBench's own prompts, not --mode {mode}")
    wanted = list(dimensions) or [name for name in DIMENSIONS if not (own and name in NEEDS_SUITE)]
    if not videos.is_dir():
        raise ValueError(f"{videos} is no folder of videos")
    others = sorted(path.name for path in videos.iterdir() if path.suffix != ".mp4")
    if others:
        raise ValueError(f"{videos} must hold .mp4 alone, VBench stumbles over others: {_some(others)}")
    home = package(python)
    files = {name: output / f"{name}_eval_results.json" for name in wanted}
    about = {"videos": str(videos.absolute()), "mode": mode}
    _check_same(output / "about.json", about)
    todo = [name for name in wanted if not _is_done(files[name], name)]
    todo.sort(key=lambda name: name == STATIC)
    if not own:
        for name in todo:
            absent = missing(videos, full_info(home), name)
            if absent:
                raise ValueError(f"{videos} lacks {len(absent)} videos for {name}: {_some(absent)}")
    output.mkdir(parents=True, exist_ok=True)
    with staged() as stage:
        stage(output / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    failures = []
    for i, name in enumerate(todo):
        print(f"{name} ({i + 1} of {len(todo)})", flush=True)
        try:
            _evaluate(name, videos, python, home, files[name], mode, gpus)
        except ValueError as error:
            failures.append(f"{name} ({error})")
    if failures:
        raise ValueError(f"{len(failures)} of {len(todo)} dimensions failed: {'; '.join(failures)}")
    return files


def _evaluate(name: str, videos: Path, python: Path, home: Path, file: Path, mode: str, gpus: int) -> None:
    with TemporaryDirectory(dir=file.parent, prefix=f".{name}-") as place:
        folder = Path(place)
        if name == STATIC and mode == MODES[0]:
            still = folder / "still"
            _call(python, "-c", _FILTER, "static_filter", "--videos_path", videos, "--result_path", still)
            videos = still / FILTERED
        arguments = {
            "videos_path": videos.absolute(),
            "dimension": name,
            "output_path": folder,
            "full_json_dir": full_info(home),
            "mode": mode,
            "imaging_quality_preprocessing_mode": "longer",
        }
        processes = 1 if name == "appearance_style" else gpus
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
        flags = (text for flag, value in arguments.items() for text in (f"--{flag}", value))
        _call(python, *launch, home / "launch" / "evaluate.py", *flags)
        found = sorted(folder.glob("*_eval_results.json"))
        if len(found) != 1 or name not in read_results(found[0]):
            raise ValueError("it wrote no result")
        if mode == MODES[0]:
            _check_count(name, len(json.loads(found[0].read_text())[name][1]), full_info(home))
        found[0].replace(file)


def _check_count(name: str, found: int, suite: Path) -> None:
    """ValueError where VBench evaluated fewer videos than the suite has; of those that hold still, told."""
    wanted = CLIPS * len(read_suite(suite, [name]))
    if found == wanted:
        return
    what = f"{found} of {wanted} videos of {name} were evaluated"
    if name != STATIC:
        raise ValueError(what)
    say(f"warning: {what}: the others do not hold still")


def _check_same(path: Path, about: dict[str, str]) -> None:
    """ValueError where a folder has results of other videos."""
    if not path.exists():
        return
    before = json.loads(path.read_text())
    for name, value in about.items():
        if before.get(name) != value:
            raise ValueError(
                f"{path.parent} has results with {name} {before.get(name)} and not {value}: "
                "give another --output-dir"
            )


def _call(*command: object) -> None:
    """Run it, with what it says on the error stream."""
    try:
        subprocess.run([str(part) for part in command], check=True, stdout=_ERRORS)
    except OSError as error:
        raise ValueError(f"{command[0]} cannot be run: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"exit code {error.returncode}") from None


def _is_done(file: Path, name: str) -> bool:
    return file.exists() and name in read_results(file)


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
