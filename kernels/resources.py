"""RESOURCES.md, the record of what the Triton kernels cost: its figures, its text, how to read it back."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dit_sparse.kernels.disassembly import Loop
from dit_sparse.kernels.targets import TARGETS, Target

FOLDER = Path(__file__).parent
# Files with Triton kernels and a function `variants`.
KERNELS = ("block_sparse", "block_sparse_backward", "mass", "linear", "quant", "routing", "lists")


class Key(NamedTuple):
    """Names one variant of one target."""

    file: str
    kernel: str
    label: str
    target: str

    def __str__(self) -> str:
        return f"{self.file}.{self.kernel} [{self.label}] {self.target}"


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave. Registers are per thread, memory is in bytes.

    Attributes:
        warps: Of one program, with those that warp specialization adds.
        spill_stores, spill_loads: Bytes of the instructions that spill registers and take them back.
        shared: Dynamic shared memory of one program; ``static_shared`` comes on top of it.
        tensor_memory: Columns of tensor memory of one program (sm_100).
        assembly: What ``loop`` was read from.
    """

    warps: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int
    shared: int
    tensor_memory: int
    loop: Loop
    assembly: str = field(default="", compare=False, repr=False)

    def occupancy(self, target: Target) -> int:
        """Warps resident on one multiprocessor while it runs nothing else; `INTRODUCTION` has the formula."""
        shared = self.static_shared + self.shared
        if target.is_amd:
            by_registers = 4 * min(8, 512 // _round_up(self.registers, 8))
            shared = _round_up(shared, 512)
        else:
            by_registers = 4 * (16384 // _round_up(32 * self.registers, 256))
            shared = _round_up(shared + 1024, 128)
        programs = min(
            target.programs,
            target.warps // self.warps,
            by_registers // self.warps,
            target.shared_total // max(shared, 1),
            512 // max(self.tensor_memory, 1),
        )
        return programs * self.warps


class Record(NamedTuple):
    """What RESOURCES.md says: the Triton it was made with, a hash of each file's sources, and the figures."""

    triton: str
    sources: dict[str, str]
    rows: dict[Key, Compiled]


INTRODUCTION = """\
# What the Triton kernels cost

Written by `make aot`; do not edit. Every kernel in every recorded configuration, compiled ahead of time for
GPUs that were not there: facts about the binaries, not timings. Continuous integration compiles a few of
them again and compares (`python -m dit_sparse.kernels.aot --check`).

Compiled with Triton {triton}.

* **registers** per thread, **spills** (bytes of the instructions that store / load them) and **stack**
  (bytes) are from the `ptxas -v` with which Triton made this very binary; on gfx942 from the assembly,
  where registers are vector registers, accumulators included.
* **shared**: static + dynamic shared memory of a program, in bytes. **tensor memory**: its columns
  (sm_100).
* **occupancy**: warps resident on a multiprocessor / the most it holds. Resident are `warps` times the
  programs that fit: the smallest of the most programs, the most warps / `warps`, the warps by registers /
  `warps`, all shared memory / that of a program, and 512 / its columns of tensor memory, each rounded down.
  Warps by registers are 4 x (16384 / (32 x registers, rounded up to 256)), since each of four schedulers
  has 16384 registers. The shared memory of a program is static + dynamic + 1024 that the system takes,
  rounded up to 128. On gfx942 a warp is a wavefront, warps by registers are 4 x (512 / (registers, rounded
  up to 8)), 32 at most, and the shared memory of a program is rounded up to 512. `targets.py` has the
  limits of each target.
* **tensor / all**: instructions in the text of the inner loop, those of the tensor cores / all. The
  docstring of `inner_loop` in `disassembly.py` says which loop that is; in kernels that finish whole blocks
  before partial ones it is the loop over whole blocks, which has no masks.
"""

# Tiles of 128 x 64, D 128, bfloat16: tensor-core and all instructions of the inner loop, and bytes of stack.
YARDSTICK = {
    "sm_80": (128, 642, 24),
    "sm_89": (128, 642, 0),
    "sm_90": (12, 447, 0),
    "sm_100": (24, 1462, 0),
    "sm_120": (128, 586, 80),
}
MEASURED = ("block_sparse", "forward_kernel", "bf16 D128 128x64")
YARDSTICK_TEXT = """\
## Yardstick

The forward kernel beside the leanest public block-sparse kernel known to us, compiled by the same Triton
for the same tile (128 queries x 64 keys, D 128, bfloat16): tensor / all of the inner loop, and bytes of
stack. Theirs assumes a fixed number of blocks per row and a length known at compile time; ours takes ragged
rows and any length.
"""

COLUMNS = (
    "kernel",
    "variant",
    "target",
    "warps",
    "registers",
    "spills",
    "stack",
    "shared",
    "tensor memory",
    "occupancy",
    "tensor / all",
)


def cells(key: Key, c: Compiled) -> list[str]:
    """One row of a table, by `COLUMNS`."""
    target = TARGETS[key.target]
    return [
        *(key.kernel, key.label, key.target),
        *(str(c.warps), str(c.registers), f"{c.spill_stores} / {c.spill_loads}", str(c.stack)),
        *(f"{c.static_shared} + {c.shared}", str(c.tensor_memory)),
        *(f"{c.occupancy(target)} / {target.warps}", f"{c.loop.tensor} / {c.loop.all}"),
    ]


def render(record: Record) -> str:
    """The text of RESOURCES.md."""
    rows = record.rows
    yardstick = []
    for target, (tensor, every, stack) in YARDSTICK.items():
        ours = rows.get(Key(*MEASURED, target))
        ours_text = f"{ours.loop.tensor} / {ours.loop.all}, {ours.stack}" if ours else "missing"
        yardstick.append([target, f"{tensor} / {every}, {stack}", ours_text])
    parts = [
        INTRODUCTION.format(triton=record.triton),
        YARDSTICK_TEXT,
        table(("target", "theirs", "ours"), yardstick),
    ]
    for file in KERNELS:
        parts += [f"## {file}\n", table(COLUMNS, [cells(k, c) for k, c in rows.items() if k.file == file])]
    parts.append("## Sources\n\nSHA-256 of each file and all it imports of `kernels/`.\n")
    hashes = [(file, record.sources[file]) for file in KERNELS if file in record.sources]
    parts.append(table(("file", "hash"), hashes))
    return "\n".join(parts)


def read(text: str) -> Record:
    """Take RESOURCES.md apart. A row that does not parse is missing."""
    version = re.search(r"^Compiled with Triton (\S+)\.$", text, re.MULTILINE)
    record, section = Record(version[1] if version else "", {}, {}), ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:]
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if section == "Sources" and row[0] in KERNELS:
            record.sources[row[0]] = row[1]
        elif section in KERNELS and len(row) == len(COLUMNS):
            figures = [int(n) for cell in row[3:] for n in re.findall(r"\d+", cell)]
            if len(figures) == 12:
                warps, registers, stores, loads, stack, static, shared, columns, _, _, tensor, every = figures
                record.rows[Key(section, *row[:3])] = Compiled(
                    warps, registers, stores, loads, stack, static, shared, columns, Loop(tensor, every)
                )
    return record


def sources(file: str) -> str:
    """Hash of a file of ``kernels/`` and all it imports from there."""
    texts: dict[str, bytes] = {}
    waiting = [file]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = (FOLDER / f"{name}.py").read_bytes()
            imports = [
                n.module or "" for n in ast.walk(ast.parse(texts[name])) if isinstance(n, ast.ImportFrom)
            ]
            waiting += [m.split(".")[2] for m in imports if m.startswith("dit_sparse.kernels.")]
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(name.encode() + b"\0" + texts[name] + b"\0")
    return digest.hexdigest()


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    columns = list(columns)
    return "".join(f"| {' | '.join(row)} |\n" for row in [columns, ["---"] * len(columns), *rows])


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
