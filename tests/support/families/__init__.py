"""Tiny models of every family for the contract: one file for each family file, with its ``CASES``.

A case says how to call the model; its configuration is the family's. Random inputs belong to batch items, so
that a batch of two holds the same as two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dit_sparse.pipelines import FAMILIES, Family
from dit_sparse.pipelines.matrix import missing

Grid = tuple[int, int, int]


class Case(NamedTuple):
    """One model of a family.

    Args:
        cls: Class in diffusers.
        inputs: (model, batch, grid, first) -> keywords of its forward for batch items first, first + 1, ...
            on a token grid, with tuples for results. Sizes are read off ``model.config``, so that it serves
            the full-size models too.
        changes: To the family's tiny configuration.
        grid: Token grid of the default inputs: 100 to 150 tokens.
        padded: model -> (inputs with a padded prompt, the same with the padding cut off); None where padding
            reaches no self-attention or cannot be cut off.
        output: What the model returns -> the tensor to compare.
        batched: Whether the model takes more than one batch item.
        prepare: Done to a new model.
        read: Names of inputs whose values are read, so that they cannot lie on the meta device.
        on_meta: Replaces what reads the values of tensors in a model on the meta device, which has none.
    """

    cls: str
    inputs: Callable[[Any, int, Grid, int], dict[str, Any]]
    changes: Mapping[str, Any] = {}
    grid: Grid = (5, 4, 6)
    padded: Callable[[Any], tuple[dict[str, Any], dict[str, Any]]] | None = None
    output: Callable[[Any], Tensor] = lambda out: out[0]
    batched: bool = True
    prepare: Callable[[Any], None] = lambda model: None
    read: tuple[str, ...] = ("img_ids", "txt_ids")
    on_meta: Callable[[Any], None] = lambda model: None

    @property
    def family(self) -> Family:
        return import_module(f"dit_sparse.pipelines.{FAMILIES[self.cls]}").FAMILY

    @property
    def stock(self) -> type | None:
        """The class, or None where the installed diffusers lacks it."""
        import diffusers

        return getattr(diffusers, self.cls, None)

    def model(self) -> Any:
        """With random weights, also where the class begins with zeros, and always the same."""
        torch.manual_seed(0)
        if self.stock is None:
            pytest.skip(missing(self.cls))
        model = self.stock(**{**self.family.transformers[self.cls], **self.changes}).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                unset = not parameter.isfinite().all()  # torch.empty, which diffusers had in some versions
                if parameter.numel() and (unset or not parameter.any()):
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        self.prepare(model)
        return model


def items(first: int, batch: int, *shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers [batch, *shape]; each batch item has its own."""
    return torch.stack([
        torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * seed + item))
        for item in range(first, first + batch)
    ])  # fmt: skip


class Scheduler:
    """The face that the clock reads of a scheduler."""

    num_inference_steps: int | None = None
    timesteps: range = range(0)
    step_index: int | None = None


class Pipe:
    """What ``apply`` and the clock ask of a pipeline around one transformer."""

    def __init__(self, model: Any) -> None:
        self.components = {"transformer": model}
        self.scheduler = Scheduler()


@contextmanager
def at_step(pipe: Pipe, branch: str, step: int | None = None, steps: int = 20) -> Iterator[None]:
    """The forward passes within belong to this step and branch (of models whose pipelines name it)."""
    scheduler, model = pipe.scheduler, pipe.components["transformer"]
    scheduler.step_index = step
    scheduler.num_inference_steps = None if step is None else steps
    scheduler.timesteps = range(steps)
    with model.cache_context(branch) if hasattr(model, "cache_context") else nullcontext():
        yield


def cases() -> dict[str, Case]:
    """Name -> case, of all families."""
    found: dict[str, Case] = {}
    for file in dict.fromkeys(FAMILIES.values()):
        found.update(import_module(f"families.{file}").CASES)
    return found
