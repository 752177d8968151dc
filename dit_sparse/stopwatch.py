"""Seconds in the parts of a pipeline, and in single calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch


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
        if self.pipe._execution_device.type == "cuda":
            torch.cuda.synchronize()
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
    if pipe._execution_device.type != "cuda":
        return time.perf_counter, lambda spans: sum(end - start for start, end in spans)

    def read() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def total(spans: list[tuple[Any, Any]]) -> float:
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000

    return read, total
