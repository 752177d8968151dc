"""Clock: which denoising step of how many, which branch, and where a run begins, without touching the model.

Sources, best first: the numbers diffusers passes to ``cache_context``; the pipeline's scheduler (its
``step_index``, or the place of the timestep among ``scheduler.timesteps``). A bare transformer has no clock.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dit_sparse.layout import TokenLayout


@dataclass(frozen=True)
class Tick:
    """One forward pass.

    Args:
        step, steps: None without a clock.
        branch: Which of the forward passes of a step.
        first: What was remembered is of no use: a run begins, or a part of one that counts its steps anew
            (the next chunk of a long video) or has another grid (a stage of a pyramid).
        begins: A run begins.
    """

    step: int | None
    steps: int | None
    branch: str
    first: bool
    begins: bool = False


class Clock:
    """The clock of one session; its transformers share it, so Wan2.2's two experts count through."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self._context: tuple[str, int | None, int | None] = ("", None, None)
        self._last: tuple[int | None, int | None, TokenLayout | str] | None = None
        self._hears_the_end = False
        self._stopped_at: int | None = None
        self._forwards = 0
        self._branches: set[str] = set()

    def listen(self, model: Any) -> dict[str, Callable[..., Any]]:
        """Instance attributes that let the clock hear what diffusers tells a model about the run."""
        shadows: dict[str, Callable[..., Any]] = {}
        if hasattr(model, "cache_context"):
            stock_context = model.cache_context

            @contextmanager
            def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
                outer = self._context
                self._context = name, kwargs.get("step_index"), kwargs.get("num_inference_steps")
                try:
                    with stock_context(name, **kwargs):
                        yield
                finally:
                    self._context = outer

            shadows["cache_context"] = cache_context
        if hasattr(model, "_reset_stateful_cache"):
            stock_reset = model._reset_stateful_cache
            self._hears_the_end = hasattr(self._pipe and self._pipe(), "maybe_free_model_hooks")

            def reset(*args: Any, **kwargs: Any) -> Any:
                self._stop()
                return stock_reset(*args, **kwargs)

            shadows["_reset_stateful_cache"] = reset
        return shadows

    def tick(self, timestep: Any, grid: TokenLayout | str, branches: tuple[str, ...]) -> Tick:
        """Read the clock at the start of a forward pass.

        Args:
            timestep: What the transformer is given as such.
            grid: Its token layout, or why there is none.
            branches: Names of a step's forward passes in call order, where diffusers gives none.
        """
        name, step, steps = self._context
        if step is None:
            step, steps = self._scheduler(timestep)
        last, self._last = self._last, (step, steps, grid)
        first = last is None or last[2] != grid or (last[0] is None) != (step is None)
        if not first and step is not None and last is not None and last[0] is not None:
            # The same branch again at the same step: a run that was broken off has been started anew.
            first = step < last[0] or (step == last[0] and name in self._branches)
        self._branches = {*(self._branches if not first and last and last[0] == step else ()), name} - {""}
        if not name and step is None:
            name = branches[0]
        elif not name:
            self._forwards = 0 if first or last is None or last[0] != step else self._forwards + 1
            name = branches[self._forwards] if self._forwards < len(branches) else f"call{self._forwards}"
        return Tick(step, steps, name, first, begins=first and not self._goes_on(last, step))

    def _goes_on(self, last: tuple[int | None, int | None, Any] | None, step: int | None) -> bool:
        """Whether what begins belongs to the run of the ``last`` forward pass, of which no end was heard.

        Then that was the last of its steps, or this is the next one. Otherwise it was broken off.
        """
        if not self._hears_the_end or last is None or last[0] is None or step is None:
            return False
        return last[0] + 1 in (last[1], step)

    def _scheduler(self, timestep: Any) -> tuple[int | None, int | None]:
        scheduler = getattr(self._pipe() if self._pipe is not None else None, "scheduler", None)
        if getattr(scheduler, "num_inference_steps", None) is None:
            return None, None
        assert scheduler is not None
        timesteps = scheduler.timesteps
        counts = hasattr(scheduler, "step_index")
        if counts and scheduler.step_index is not None:
            if scheduler.step_index == self._stopped_at:
                return None, None  # the scheduler still stands where the last run left it
            return scheduler.step_index, len(timesteps)
        timestep = torch.as_tensor(timestep)
        if counts and timestep.ndim != 2 and hasattr(scheduler, "index_for_timestep"):
            # It counts from the first step on, before which runs that start from an image set where that is.
            return getattr(scheduler, "begin_index", None) or 0, len(timesteps)
        # Helios' distilled scheduler never counts, nor the pipeline's in diffusion forcing, which gives each
        # frame one of its own. The noisiest frame tells the step: those that are given are without noise.
        # Pipelines may round a timestep to the dtype in which they give it.
        found = (timesteps.to(timestep.dtype) == timestep.amax().to(timesteps.device)).nonzero()
        if len(found):
            return int(found[0]), len(timesteps)
        return (0, len(timesteps)) if counts else (None, None)

    def _stop(self) -> None:
        """The pipeline has finished a run."""
        pipe = self._pipe() if self._pipe is not None else None
        self._stopped_at = getattr(getattr(pipe, "scheduler", None), "step_index", None)
        self._last = None
