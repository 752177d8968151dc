"""The rewrite keeps every processor class of diffusers as it was, but for where its attention call goes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny_models as tiny
import torch

from dit_sparse.core import Redirected
from dit_sparse.redirect import redirected


def processor_classes() -> list[type]:
    import importlib
    import pkgutil

    import diffusers.models.transformers as package
    from diffusers.models import attention_processor

    modules = [attention_processor]
    modules += [
        importlib.import_module(f"{package.__name__}.{m.name}")
        for m in pkgutil.iter_modules(package.__path__)
    ]
    found = {
        c
        for module in modules
        for c in vars(module).values()
        if inspect.isclass(c)
        and c.__module__ == module.__name__
        and "Processor" in c.__name__
        and "__call__" in vars(c)
    }
    return sorted(found, key=lambda c: (c.__module__, c.__name__))


CAUSAL = {"MiniMaxMusic3DepthAttnProcessor"}
"""All their attention is causal by its source, which is left alone."""


def calls_core(cls: type) -> bool:
    names = cls.__call__.__code__.co_names  # type: ignore[operator]
    return "dispatch_attention_fn" in names or "scaled_dot_product_attention" in names


def test_every_processor_of_diffusers_with_an_attention_call_can_be_redirected() -> None:
    classes = processor_classes()
    assert len(classes) > 70
    for cls in classes:
        new = redirected(cls, Redirected)
        assert (new is not None) == (calls_core(cls) and cls.__name__ not in CAUSAL), cls
        if new is not None:
            assert issubclass(new, cls)
            assert inspect.signature(new.__call__) == inspect.signature(cls.__call__)  # type: ignore[operator]
            assert new.__call__.__globals__ is cls.__call__.__globals__  # type: ignore[operator]
            assert new is redirected(cls, Redirected)


def test_another_of_its_kind_is_a_stock_one() -> None:
    """As diffusers makes them when it unloads an IP-Adapter."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    new = redirected(WanAttnProcessor, Redirected)
    assert new is not None
    assert type(new()) is WanAttnProcessor


def test_line_numbers_are_those_of_the_models_file() -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    new = redirected(WanAttnProcessor, Redirected)
    assert new is not None

    class Broken(Redirected):
        def _core(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            raise RuntimeError("core")

    processor: Any = WanAttnProcessor()
    processor.__class__ = redirected(WanAttnProcessor, Broken)
    model = tiny.wan()
    with pytest.raises(RuntimeError, match="core") as caught:
        processor(model.blocks[0].attn1, tiny.randn(1, 8, 24))
    frame = caught.traceback[-2]
    line = inspect.getsource(inspect.getmodule(WanAttnProcessor)).splitlines()[frame.lineno]  # type: ignore[arg-type]
    assert str(frame.path) == inspect.getsourcefile(WanAttnProcessor)
    assert "dispatch_attention_fn" in line


def test_what_has_no_source_is_refused() -> None:
    space: dict[str, Any] = {}
    exec(
        "class NoSource:\n    def __call__(self, a, x):\n        F.scaled_dot_product_attention(x, x, x)",
        space,
    )
    with pytest.raises(ValueError, match=r"source of NoSource\.__call__ is needed"):
        redirected(space["NoSource"], Redirected)


def test_closures_are_refused() -> None:
    scale = 2.0

    class Closure:
        def __call__(self, attn: Any, x: Any) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, scale=scale)

    with pytest.raises(ValueError, match=r"Closure\.__call__ is not a plain method"):
        redirected(Closure, Redirected)
