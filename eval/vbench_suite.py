"""VBench's prompts as the installed package has them, and the videos it looks for.

The package stays in an environment of its own, since its pins are old: nothing of it is imported here.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dit_sparse.batch import Job
from dit_sparse.eval.vbench import DIMENSIONS

CLIPS, STATIC_CLIPS = 5, 25
"""Videos for a prompt, and for one of :data:`STATIC`, of which VBench keeps five that hold still."""
STATIC = "temporal_flickering"
_LONGEST = 255
_FIND = """
import importlib.util, json
found = importlib.util.find_spec("vbench")
print(json.dumps(list(found.submodule_search_locations) if found else None))
"""


@dataclass(frozen=True)
class Entry:
    """One entry of the prompt suite: a few prompts have two, with other dimensions."""

    prompt: str
    dimensions: tuple[str, ...]

    @property
    def clips(self) -> int:
        return STATIC_CLIPS if STATIC in self.dimensions else CLIPS


def package(python: Path) -> Path:
    """The folder of the ``vbench`` package in the environment of an interpreter, which does not import it.

    Raises:
        ValueError: There is no such interpreter, or it has no ``vbench``.
    """
    try:
        found = subprocess.run((python, "-c", _FIND), capture_output=True, text=True, check=True).stdout
        places = json.loads(found.strip().splitlines()[-1])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        raise ValueError(f"--vbench-python {python} does not run Python: {error}") from None
    if not places:
        raise ValueError(f"--vbench-python {python} has no vbench: {python} -m pip install vbench")
    return Path(places[0])


def full_info(folder: Path) -> Path:
    """The prompt suite within the package."""
    return folder / "VBench_full_info.json"


def read_suite(path: Path, dimensions: Sequence[str] = ()) -> list[tuple[int, Entry]]:
    """(index, entry) of the prompt suite; of those with one of ``dimensions`` where some are named.

    Raises:
        ValueError: The file is no such list, or a dimension is none of VBench's.
    """
    check_dimensions(dimensions)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        entries = [Entry(str(one["prompt_en"]), tuple(one["dimension"])) for one in found]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no prompt suite of VBench: {error}") from None
    for entry in entries:
        check_dimensions(entry.dimensions)
        name = f"{entry.prompt}-{STATIC_CLIPS - 1}.mp4"
        if "/" in name or len(name.encode()) > _LONGEST:
            raise ValueError(f"{path}: {entry.prompt!r} cannot be the name of a file, as VBench asks for")
    wanted = set(dimensions) or set(DIMENSIONS)
    return [(i, entry) for i, entry in enumerate(entries) if wanted & set(entry.dimensions)]


def check_dimensions(names: Sequence[str]) -> None:
    """ValueError for a dimension that VBench does not have."""
    for name in names:
        if name not in DIMENSIONS:
            raise ValueError(f"--dimension must be one of {', '.join(DIMENSIONS)}, got {name!r}")


def read_augmented(path: Path, entries: int) -> list[str]:
    """Rewritten prompts, line i being that of entry i of the suite.

    Raises:
        ValueError: The file cannot be read, has another number of lines than the suite has entries, or an
            empty one: any of these would pair prompts with the names of others.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--augmented {path} cannot be read: {error}") from None
    if lines and not lines[-1]:
        lines.pop()
    if len(lines) != entries:
        raise ValueError(f"--augmented {path} has {len(lines)} lines for {entries} prompts of the suite")
    for i, line in enumerate(lines):
        if not line.strip():
            raise ValueError(f"--augmented {path}: line {i + 1} is empty")
    return [line.strip() for line in lines]


def jobs(
    suite: Path,
    *,
    dimensions: Sequence[str] = (),
    augmented: Path | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> list[Job]:
    """The videos to make: ``{prompt}-{i}.mp4``, i from 0, with the suite's prompt where it is rewritten too.

    Args:
        suite: The full-info JSON of the package.
        dimensions: Only what these need; default all.
        augmented: See :func:`read_augmented`.
        seed: Clip i of entry j has the seed ``seed`` + 25 j + i, whatever dimensions are asked for.
        shard: (i, n): every n-th video, from the i-th.

    Raises:
        ValueError: See :func:`read_suite` and :func:`read_augmented`.
    """
    texts = read_augmented(augmented, len(read_suite(suite))) if augmented is not None else None
    found: dict[str, Job] = {}
    for i, entry in read_suite(suite, dimensions):
        for clip in range(entry.clips):
            name = f"{entry.prompt}-{clip}"
            text = entry.prompt if texts is None else texts[i]
            # A prompt that has two entries has one video.
            found.setdefault(name, Job(text, seed + STATIC_CLIPS * i + clip, name))
    part = list(found.values())[shard[0] :: shard[1]]
    if not part:
        raise ValueError(f"--shard {shard[0]}/{shard[1]} of {len(found)} videos is empty")
    return part


def missing(videos: Path, suite: Path, dimension: str) -> list[str]:
    """Names that VBench will look for in a folder and not find."""
    there = {path.name for path in videos.iterdir()}
    wanted = dict.fromkeys(
        f"{entry.prompt}-{clip}.mp4"
        for _, entry in read_suite(suite, [dimension])
        for clip in range(entry.clips if dimension == STATIC else CLIPS)
    )
    return [name for name in wanted if name not in there]
