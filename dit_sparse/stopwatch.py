"""Seconds in the parts of a pipeline, and in single calls."""

from __future__ import annotations

import ctypes
import platform
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.watch import Watch

if TYPE_CHECKING:
    from dit_sparse.attach import Session
    from dit_sparse.plan import Plan


@dataclass
class Stopwatch:
    """Seconds in the transformers, the encoders and the autoencoder while it is entered.

    On CUDA it waits for the device at both ends of a part, so that work is counted where it is done.
    """

    pipe: Any
    seconds: dict[str, float] = field(default_factory=dict)
    undo: list[Callable[[], Any]] = field(default_factory=list)

    def now(self) -> float:
        """Seconds on a clock of its own, once the device has finished."""
        device = self.pipe._execution_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def __enter__(self) -> Stopwatch:
        started: list[float] = []
        for name, module in self.pipe.components.items():
            part = name.rstrip("_1234")
            if module is None or part not in ("transformer", "text_encoder", "image_encoder"):
                continue

            def begin(*_: Any) -> None:
                started.append(self.now())

            def end(*_: Any, part: str = part) -> None:
                self._add(part, self.now() - started.pop())

            self.undo += [
                module.register_forward_pre_hook(begin).remove,
                module.register_forward_hook(end).remove,
            ]
        vae = self.pipe.components.get("vae")
        for name in ("encode", "decode") if vae is not None else ():
            setattr(vae, name, self._timed(getattr(vae, name), f"vae_{name}"))
            self.undo.append(partial(delattr, vae, name))
        return self

    def __exit__(self, *_: object) -> None:
        while self.undo:
            self.undo.pop()()

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            out = function(*args, **kwargs)
            self._add(part, self.now() - start)
            return out

        return timed

    def _add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds


def spanned(function: Callable[..., Any], read: Callable[[], Any], spans: list[tuple[Any, Any]]) -> Any:
    """``function``, which appends what ``read`` gives before and after each call to ``spans``."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = read()
        out = function(*args, **kwargs)
        spans.append((start, read()))
        return out

    return timed


def span_timer(pipe: Any) -> tuple[Callable[[], Any], Callable[[list[tuple[Any, Any]]], float]]:
    """(read, total): a clock that does not make the device wait, and the seconds in a list of its spans."""
    device = pipe._execution_device
    if device.type != "cuda":
        return time.perf_counter, lambda spans: sum(end - start for start, end in spans)

    def read() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def total(spans: list[tuple[Any, Any]]) -> float:
        torch.cuda.synchronize(device)
        return sum(start.elapsed_time(end) for start, end in spans) / 1000

    return read, total


class CallTimer(Watch):
    """Seconds in self-attention's core calls, and in choosing blocks within them, while it is entered.

    A core call is softmax attention alone: no projections, no rotation, no cross-attention. It is timed
    whether a method or the model computes it. Not for compiled models, whose graph a timer would break.

    Args:
        pipe: The pipeline of the session.
    """

    def __init__(self, pipe: Any, session: Session) -> None:
        self.session = session
        self.attention: list[tuple[Any, Any]] = []
        self.choosing: list[tuple[Any, Any]] = []
        self._read, self._total = span_timer(pipe)
        self._depth = 0
        self._undo = ExitStack()

    def planning(self, make: Callable[[], Plan]) -> Plan:
        start = None if self._depth else self._read()
        self._depth += 1
        try:
            return make()
        finally:
            self._depth -= 1
            if start is not None:
                self.choosing.append((start, self._read()))

    def seconds(self) -> dict[str, float]:
        """``attention`` and ``planning``, the second being part of the first."""
        return {"attention": self._total(self.attention), "planning": self._total(self.choosing)}

    def __enter__(self) -> CallTimer:
        for part in self.session.parts:
            for at in part.layers:
                at.processor._core = spanned(at.processor._core, self._read, self.attention)
                self._undo.callback(delattr, at.processor, "_core")
        self.session.watches.append(self)
        self._undo.callback(self.session.watches.remove, self)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()


class PeakMemory:
    """The most memory that is held while it is entered.

    On CUDA that is what torch has allocated on the device. On the CPU it is the process' resident memory,
    with libraries, weights and what torch keeps for later: differences within a process mean more than sums.

    Args:
        device: Where the work is done.

    Attributes:
        before_mib: Held at the beginning; None where it cannot be known.
        peak_mib: Held at most; known at the end.
        why: Why it cannot be known.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.before_mib: float | None = None
        self.peak_mib: float | None = None
        self.why = ""

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            self.before_mib = torch.cuda.memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
        elif platform.libc_ver()[0] != "glibc":
            self.why = "the peak memory of a call on the CPU is known on Linux with glibc only"
        else:
            # What earlier calls freed but the heap kept would be taken unseen.
            ctypes.CDLL(None).malloc_trim(0)
            try:
                # Unlike getrusage's, this peak can be set back.
                Path("/proc/self/clear_refs").write_text("5")
            except OSError as error:
                self.why = f"the peak memory of a call cannot be set back: {error}"
            else:
                self.before_mib = _resident_peak_mib()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.peak_mib = torch.cuda.max_memory_allocated(self.device) / 2**20
        elif not self.why:
            self.peak_mib = _resident_peak_mib()


def _resident_peak_mib() -> float:
    (kib,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) / 1024
