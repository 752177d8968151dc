"""Gradient checkpointing: what is recomputed in a backward is the forward it belongs to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from dit_sparse.router import Part


class Checkpoint:
    """Stands in for a model's gradient checkpointing function; ``stock`` is that function."""

    def __init__(self, part: Part, stock: Callable[..., Any]) -> None:
        self.part, self.stock = part, stock

    def __call__(self, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        part, forward, calls = self.part, self.part.forward, 0

        def run(*inner: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1 or forward is None:
                return module(*inner, **named)
            current, part.forward = part.forward, replace(forward, replays=True)
            try:
                return module(*inner, **named)
            finally:
                part.forward = current

        return self.stock(run, *args, **kwargs)

    def __reduce__(self) -> Any:
        return copy.copy, (self.stock,)


def checkpointing(model: nn.Module) -> list[tuple[Any, Any]]:
    """(module, its gradient checkpointing function) for every module that has one."""
    found = ((m, m.__dict__.get("_gradient_checkpointing_func")) for m in model.modules())
    return [(module, function) for module, function in found if function is not None]


def wrap(part: Part) -> list[Callable[[], None]]:
    """Wrap what is not wrapped yet; returns how to undo it."""
    undo: list[Callable[[], None]] = []
    for module, function in checkpointing(part.model):
        if not isinstance(function, Checkpoint):
            module._gradient_checkpointing_func = wrapper = Checkpoint(part, function)
            undo.append(partial(_unwrap, module, wrapper))
    return undo


def _unwrap(module: Any, wrapper: Checkpoint) -> None:
    if module.__dict__.get("_gradient_checkpointing_func") is wrapper:
        module._gradient_checkpointing_func = wrapper.stock
