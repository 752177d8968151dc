"""Time block-sparse beside dense attention, and measure its memory: what ``dit-sparse bench kernels`` does.

Contenders run in turns in one process, one sample of each per round, and a ratio is taken within every round
before percentiles are: a machine that slows down slows both sides of it. ``eta`` is dense time x density /
time: how fast a computed token pair is, measured in dense attention's.

On a CPU, let nothing else run. OMP_NUM_THREADS sets the threads; one per physical core is right. Where others
use the cores all the same, OMP_WAIT_POLICY=passive keeps threads from spinning at barriers for longer than
the work between them takes.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import csv
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from dit_sparse.kernels.contenders import CONTENDERS, DENSE, Attention, sdpa_loop
from dit_sparse.order import fill_counts
from dit_sparse.plan import Plan, blocks_of, top_k
from dit_sparse.stopwatch import PeakMemory

DTYPES = ("float32", "bfloat16", "float16")
PATTERNS = ("random", "uneven")
PERCENTILES = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
# A sample repeats its call until it lasts this long: then the clock and the wait for a GPU cost nothing.
SAMPLE_SECONDS = 0.01
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """Self-attention of one transformer call, and the block and densities it is measured at by default."""

    tokens: int
    heads: int
    head_dim: int
    block: tuple[int, int] = (128, 128)
    densities: tuple[float, ...] = (0.2, 0.5)


SHAPES = {
    "wan2.1-14b-720p": (Shape(21 * 45 * 80, 40, 128),),  # 81 frames of 720x1280
    "wan2.1-1.3b-480p": (Shape(21 * 30 * 52, 12, 128),),  # 81 frames of 480x832
    "hunyuanvideo-720p": (Shape(33 * 45 * 80 + 256, 24, 128),),  # 129 frames of 720x1280, and the prompt
    "tiny-wan": (Shape(33 * 8 * 16, 4, 48, (32, 32)),),  # 65 frames of 64x128
    "yardstick": (
        Shape(8192, 2, 128),
        Shape(16_384, 1, 128, densities=(0.1,)),
        Shape(4096, 2, 64, (64, 64), densities=(0.25,)),
    ),
    "long": tuple(Shape(tokens, 1, 128, densities=(0.05,)) for tokens in (32_768, 65_536, 131_072)),
}
DEFAULT_SHAPES = {
    "cpu": ("yardstick",),
    "cuda": ("wan2.1-1.3b-480p", "wan2.1-14b-720p", "hunyuanvideo-720p"),
}


@dataclass(frozen=True)
class Case:
    """One attention to compute. ``density`` is what was asked for, before it is rounded to whole blocks."""

    shape: Shape
    density: float
    device: str = "cpu"
    dtype: str = "float32"
    pattern: str = "random"

    def __str__(self) -> str:
        s = self.shape
        return (
            f"{s.tokens} tokens, {s.heads} heads of {s.head_dim}, blocks of {s.block[0]}x{s.block[1]}, "
            f"density {self.density:g} ({self.pattern}), {self.dtype} on {self.device}"
        )

    def plan(self) -> Plan:
        """Random key blocks: in each row equally many or, if uneven, from one up to twice the density."""
        rows, keys = (blocks_of(self.shape.tokens, block) for block in self.shape.block)
        g = torch.Generator().manual_seed(0)
        wanted = torch.full((1, self.shape.heads, rows), self.density * keys)
        if self.pattern == "uneven":
            wanted *= 2 * torch.rand(wanted.shape, generator=g)
        scores = torch.rand(*wanted.shape, keys, generator=g)
        return Plan.from_blocks(top_k(scores, wanted.round().long()), self.shape.block).to(self.device)

    def tensors(self) -> list[Tensor]:
        """q, k and v, each [1, H, S, D]."""
        s, dtype = self.shape, getattr(torch, self.dtype)
        g = torch.Generator(self.device).manual_seed(0)
        size = (1, s.heads, s.tokens, s.head_dim)
        return [torch.randn(size, generator=g, dtype=dtype, device=self.device) for _ in range(3)]

    def density_of(self, plan: Plan) -> float:
        """Token pairs computed over all of them, the ragged last block counted as it is."""
        there = torch.ones(1, 1, self.shape.tokens, dtype=torch.bool, device=self.device)
        return plan.density(*(fill_counts(there, block) for block in plan.block))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one case. What was not measured is None, and where it failed ``note`` says why.

    Percentiles are over rounds. ``rms_error`` is the RMS of the difference to the same attention in float64
    (float32 on a GPU), divided by the RMS of the latter. ``peak_mib`` is what one call held at most beyond
    its inputs, results included.
    """

    device: str
    commit: str
    torch: str
    triton: str
    threads: int
    contender: str
    direction: str
    dtype: str
    B: int
    H: int
    S: int
    D: int
    block: str
    pattern: str
    density: float
    rounds: int | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    dense_p50_ms: float | None = None
    speedup: float | None = None
    eta_p20: float | None = None
    eta: float | None = None
    eta_p80: float | None = None
    rms_error: float | None = None
    peak_mib: float | None = None
    note: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


def cases(
    *,
    device: str = "cpu",
    shapes: Sequence[str] = (),
    densities: Sequence[float] = (),
    block: str | None = None,
    dtype: str = "auto",
    pattern: str = "random",
) -> list[Case]:
    """What was asked for, checked.

    Args:
        device: "cpu" or "cuda".
        shapes: Names out of :data:`SHAPES`, or "N,H,D": tokens, heads, head dim. Empty: a choice by device.
        densities: In place of those of the shapes.
        block: In place of that of the shapes: "128", or query and key block as "128x64".
        dtype: "auto" is bfloat16 on CUDA and float32 on the CPU.
        pattern: "random", or "uneven" for rows that read unequally many blocks.

    Raises:
        ValueError: The message starts with the flag.
    """
    for flag, value, known in (
        ("--device", device, tuple(DEFAULT_SHAPES)),
        ("--dtype", dtype, ("auto", *DTYPES)),
        ("--pattern", pattern, PATTERNS),
    ):
        if value not in known:
            raise ValueError(f"{flag} must be one of {', '.join(known)}, got {value!r}")
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"--density must be above 0 and at most 1, got {density:g}")
    wanted = [shape for text in shapes or DEFAULT_SHAPES[device] for shape in _shapes(text)]
    if block is not None:
        wanted = [replace(shape, block=_block(block)) for shape in wanted]
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine shows no CUDA device")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return [Case(s, density, device, dtype, pattern) for s in wanted for density in densities or s.densities]


def _shapes(text: str) -> tuple[Shape, ...]:
    if text in SHAPES:
        return SHAPES[text]
    numbers = re.fullmatch(r"([1-9]\d*),([1-9]\d*),([1-9]\d*)", text)
    if numbers is None:
        raise ValueError(
            f"--shape must be N,H,D (tokens, heads, head dim) or one of {', '.join(SHAPES)}, got {text!r}"
        )
    tokens, heads, head_dim = map(int, numbers.groups())
    return (Shape(tokens, heads, head_dim),)


def _block(text: str) -> tuple[int, int]:
    sizes = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if sizes is None:
        raise ValueError(f"--block must be tokens, as in 128 or 128x64, got {text!r}")
    return int(sizes[1]), int(sizes[2] or sizes[1])


def measure(case: Case, names: Iterable[str], *, backward: bool = False, seconds: float = 4.0) -> list[Row]:
    """Time contenders and dense attention for ``seconds``, after first calls that are not counted.

    Args:
        names: Keys of :data:`CONTENDERS`; "dense" takes part in any case.
        backward: Time the gradients of q, k and v too.
    """
    row = _row_of(case, backward)
    names = dict.fromkeys(("dense", *names))
    torch.compiler.reset()  # a compiled function takes only so many shapes
    # Many GPUs have next to no float64, and hardly a contender there computes in float32.
    exact = torch.float32 if case.device == "cuda" else torch.float64
    try:
        plan, tensors = case.plan(), case.tensors()
        truth = sdpa_loop(plan, case.shape.tokens, exact)(*tensors)
    except torch.OutOfMemoryError as error:
        return [row(name, note=_reason(error)) for name in names]
    density = case.density_of(plan)
    calls: dict[str, Callable[[], Tensor]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = {"density": density}
        try:
            call = _call(CONTENDERS[name](plan, case.shape.tokens), tensors, backward)
            out = call()
            if name not in DENSE:
                found[name]["rms_error"] = ((out - truth).norm() / truth.norm()).item()
            del out
            if case.device == "cuda":
                found[name]["peak_mib"] = _peak(call, case.device)
        # Other people's packages raise what they like, and the rows of the rest are wanted all the same.
        except Exception as error:
            found[name]["note"] = _reason(error)
        else:
            calls[name] = call
    del truth
    times = alternate(calls, seconds, partial(_wait, case.device))
    for name, taken in times.items():
        found[name] |= compared(taken, times.get("dense"), None if name in DENSE else density)
    return [row(name, **values) for name, values in found.items()]


def alternate(
    calls: Mapping[str, Callable[[], object]], seconds: float, wait: Callable[[], None]
) -> dict[str, Tensor]:
    """Seconds of each call, float64 [rounds]; entry i of all of them was taken in round i.

    Args:
        seconds: How long to go on; :data:`MIN_ROUNDS` are made in any case.
        wait: Returns once the device has finished.
    """

    def timed(name: str, repeats: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            calls[name]()
        wait()
        return (time.perf_counter() - start) / repeats

    repeats = {name: ceil(SAMPLE_SECONDS / timed(name, 1)) for name in calls}
    rounds: list[dict[str, float]] = []
    order, end = list(calls), time.perf_counter() + seconds
    while calls and (len(rounds) < MIN_ROUNDS or time.perf_counter() < end):
        rounds.append({name: timed(name, repeats[name]) for name in order})
        order.reverse()  # a steady drift within rounds then cancels too
    return {name: torch.tensor([taken[name] for taken in rounds], dtype=torch.float64) for name in calls}


def compared(taken: Tensor, dense: Tensor | None, density: float | None) -> dict[str, Any]:
    """The columns of a row that come from times.

    Args:
        taken: Seconds of a contender, float64 [rounds].
        dense: Those of dense attention in the same rounds; None where it cannot run.
        density: Of a sparse contender. None for a dense one, which has no eta.
    """
    low, mid, high = (1e3 * taken).quantile(PERCENTILES).tolist()
    found: dict[str, Any] = {"rounds": len(taken), "p20_ms": low, "p50_ms": mid, "p80_ms": high}
    if dense is not None:
        ratio = (dense / taken).quantile(PERCENTILES)
        found |= {"dense_p50_ms": 1e3 * dense.quantile(0.5).item(), "speedup": ratio[1].item()}
        if density is not None:
            found |= zip(("eta_p20", "eta", "eta_p80"), (density * ratio).tolist(), strict=True)
    return found


def memory(case: Case, names: Iterable[str], *, backward: bool = False) -> list[Row]:
    """Peak memory of one call of each contender, after a first one that loads and compiles what it needs."""
    row = _row_of(case, backward)
    torch.compiler.reset()
    plan, tensors = case.plan(), case.tensors()
    row = partial(row, density=case.density_of(plan))
    rows = []
    for name in names:
        try:
            call = _call(CONTENDERS[name](plan, case.shape.tokens), tensors, backward)
            call()
            rows.append(row(name, peak_mib=_peak(call, case.device)))
        except Exception as error:
            rows.append(row(name, note=_reason(error)))
    return rows


def _peak(call: Callable[[], object], device: str) -> float:
    """MiB that a call held at most beyond what was there before."""
    with PeakMemory(device) as memory:
        call()
    if memory.peak_mib is None or memory.before_mib is None:
        raise ValueError(memory.why)
    return memory.peak_mib - memory.before_mib


def _call(attention: Attention, tensors: Sequence[Tensor], backward: bool) -> Callable[[], Tensor]:
    if not backward:
        return torch.no_grad()(partial(attention, *tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]
    grad = torch.ones_like(leaves[0])

    def both() -> Tensor:
        out = attention(*leaves)
        if not out.requires_grad:
            raise ValueError("gives no gradients")
        torch.autograd.grad(out, leaves, grad)
        return out.detach()

    return both


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # what a compiler wraps says more than its wrapping
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[:200]}"


def _row_of(case: Case, backward: bool) -> Callable[..., Row]:
    """Makes rows of this case out of a contender and what was measured of it."""
    s = case.shape
    known = {
        **identity(case.device),
        "direction": "forward+backward" if backward else "forward",
        "dtype": case.dtype,
        "B": 1,
        "H": s.heads,
        "S": s.tokens,
        "D": s.head_dim,
        "block": f"{s.block[0]}x{s.block[1]}",
        "pattern": case.pattern,
        "density": case.density,
    }
    return lambda contender, **measured: Row(contender=contender, **{**known, **measured})


@cache
def identity(device: str) -> dict[str, Any]:
    """What a measurement depends on beside its case: device, commit, torch, triton and threads."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": triton,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def _commit() -> str:
    """Of the clone that this file is tracked in, or else the package's version."""
    file = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=file.parent, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return version("dit-sparse")


def write_csv(stream: TextIO, rows: Iterable[Row], *, header: bool = True) -> None:
    """Lines of :data:`COLUMNS`."""
    writer = csv.writer(stream, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(map(cell, astuple(row)))


def named_after_device(path: Path, device: str) -> Path:
    """``{device}`` in a .csv path, replaced by the device's name as far as it is fit for a path.

    Raises:
        ValueError: Another suffix.
    """
    if path.suffix.lower() != ".csv":
        raise ValueError(f"--output must end in .csv, got {path}")
    name = re.sub(r"[^a-z0-9]+", "-", identity(device)["device"].lower()).strip("-")
    return Path(str(path).replace("{device}", name))


def summary(row: Row) -> dict[str, str]:
    """Column and cell for a person to read: what differs within a case, medians with their spreads."""

    def spread(low: object, mid: object, high: object) -> str:
        return "" if mid is None else f"{cell(mid)} ({cell(low)}-{cell(high)})"

    return {
        "contender": row.contender,
        "direction": row.direction,
        "ms (20-80 %)": spread(row.p20_ms, row.p50_ms, row.p80_ms),
        "speed-up": cell(row.speedup),
        "eta (20-80 %)": spread(row.eta_p20, row.eta, row.eta_p80),
        "rms error": cell(row.rms_error),
        "MiB": cell(row.peak_mib),
        "note": row.note,
    }


def cell(value: object) -> str:
    """A value of a row as text: four digits of a number, nothing for what was not measured."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
