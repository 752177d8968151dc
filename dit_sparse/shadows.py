"""What finds an attached model as if it were stock: copies, saved files, and methods that replace processors.

These are methods of the model; while it is attached, an instance attribute of that name stands before each.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from dit_sparse.checkpointing import Checkpoint, checkpointing
from dit_sparse.router import Part

_REPLACE_PROCESSORS = ("fuse_qkv_projections", "unfuse_qkv_projections", "_load_ip_adapter_weights")


class Hook:
    """The root forward pre-hook. It marks a model as attached; pickles carry an empty one instead."""

    def __init__(self, session: Any, part: Part) -> None:
        self.session, self.part = session, part

    @torch.compiler.disable  # a compiled model calls it outside its graph, where it would be traced by itself
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.session.begin(self.part, args, kwargs)

    def __reduce__(self) -> Any:
        return NoHook, ()


class NoHook:
    """A hook that does nothing."""

    def __call__(self, *_: Any) -> None:
        return None


def shadows(part: Part) -> dict[str, Callable[..., Any]]:
    """Name of a method of the model -> what stands before it."""
    model: Any = part.model

    def deepcopy(memo: dict[int, Any]) -> nn.Module:
        with standing_aside(part):
            return copy.deepcopy(model, memo)

    def reduce_ex(protocol: Any) -> Any:
        reduced: Any = object.__reduce_ex__(model, protocol)
        make, args, state, *_ = reduced
        return make, args, {name: value for name, value in state.items() if name not in part.shadows}

    @wraps(model.save_pretrained)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        with standing_aside(part):
            return model.save_pretrained(*args, **kwargs)

    copying: dict[str, Callable[..., Any]] = {
        "__deepcopy__": deepcopy,
        "__reduce_ex__": reduce_ex,
        "save_pretrained": save_pretrained,
    }
    return copying | {name: _replacing(part, name) for name in _REPLACE_PROCESSORS if hasattr(model, name)}


def _replacing(part: Part, name: str) -> Callable[..., Any]:
    """A method of the model that may give layers other processors, and the attachment to those.

    It finds the stock processors, which some models remember for its counterpart.
    """
    model: Any = part.model

    @wraps(getattr(model, name))
    def replacing(*args: Any, **kwargs: Any) -> Any:
        mine = [at for at in part.layers if at.module.processor is at.processor]
        with standing_aside(part):
            for at in mine:
                at.restore()
            before = [at.module.processor for at in mine]
            try:
                return getattr(model, name)(*args, **kwargs)
            finally:
                others = [at for at, p in zip(mine, before, strict=True) if at.module.processor is not p]
                for at in mine:
                    at.redirect()
                if others:
                    warnings.warn(
                        f"{name} gave {len(others)} layers of {type(model).__name__} another processor, "
                        f"{type(others[0].stock).__name__}; they were attached again, as before",
                        stacklevel=2,
                    )

    return replacing


@contextmanager
def standing_aside(part: Part) -> Iterator[None]:
    """The model as if stock, but for its processors: redirected ones copy as stock by themselves."""
    model: Any = part.model
    hidden = {name: model.__dict__.pop(name) for name in part.shadows}
    registries = [model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs]
    hooks = [registry.copy() for registry in registries]
    for key, hook in hooks[0].items():
        if isinstance(hook, Hook):
            for registry in registries:
                registry.pop(key, None)
    branches = [(at.module._modules, at.module._modules.pop("sparse_branch", None)) for at in part.layers]
    checkpoints = [(m, f) for m, f in checkpointing(model) if isinstance(f, Checkpoint)]
    for module, function in checkpoints:
        module._gradient_checkpointing_func = function.stock
    try:
        yield
    finally:
        model.__dict__.update(hidden)
        for registry, saved in zip(registries, hooks, strict=True):
            registry.update(saved)
        for modules, branch in branches:
            if branch is not None:
                modules["sparse_branch"] = branch
        for module, function in checkpoints:
            module._gradient_checkpointing_func = function
