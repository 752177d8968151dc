"""Every model with a name at its full size, without weights: on the meta device nothing is computed.

The transformer is built from the configuration in its family file, attached, and called at its default size;
what each attention call is understood to be is compared with what the family file says.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.fx.experimental._config
from families import Case, cases
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import dit_sparse
from dit_sparse import TokenLayout
from dit_sparse.pipelines import families
from dit_sparse.pipelines.family import Checkpoint, Family

MODELS = {
    name: (family, checkpoint)
    for family in families().values()
    for name, checkpoint in family.checkpoints.items()
}
CASES = list(cases().values())


def built(checkpoint: Checkpoint) -> Any:
    import diffusers

    cls = getattr(diffusers, checkpoint.transformer, None)
    if cls is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {checkpoint.transformer}")
    with torch.device("meta"):
        return cls(**checkpoint.config).to(torch.bfloat16).eval()


class ReadsOne(TorchDispatchMode):
    """A value read off the meta device, which has none, is 1: there is no image, and one token of text."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        return func(*args, **(kwargs or {}))


def gives(case: Case, model: Any, tokens: TokenLayout) -> bool:
    """Whether the case calls the model on the grid of ``tokens``, with references where these have some."""
    layout = case.family.layout(model, case.inputs(model, 1, tokens.grid, 0))
    if isinstance(layout, str):
        return False
    return (layout.grid, layout.suffix > 0) == (tokens.grid, tokens.suffix > 0)


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_of_a_named_model_is_whole(name: str) -> None:
    family, checkpoint = MODELS[name]
    assert checkpoint.transformer in family.transformers
    assert checkpoint.repo.count("/") == 1
    assert checkpoint.attention is not None
    assert checkpoint.tokens is not None
    assert (checkpoint.tokens.text > 0) == family.joint
    assert checkpoint.about


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_full_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, checkpoint = MODELS[name]
    model = built(checkpoint)
    session = dit_sparse.apply(model, "window", schedule="layers 0-100%")
    layers = session.parts[0].layers
    assert [at.layer.name for at in layers] == [layer.name for layer in family.layers(model)]
    assert checkpoint.attention is not None
    shape = checkpoint.attention
    assert {(at.layer.count, at.layer.heads, at.layer.head_dim) for at in layers} == {shape}
    assert {at.layer.index for at in layers} == set(range(shape[0]))

    understood: dict[str, Any] = {}
    understand = session._understand

    def spy(here: Any, *rest: Any) -> Any:
        found = understand(here, *rest)
        assert here.q.shape[1] == shape[1]
        assert here.q.shape[3] == shape[2]
        understood[here.at.layer.name] = found
        return found

    monkeypatch.setattr(session, "_understand", spy)
    assert checkpoint.tokens is not None
    case = next(c for c in CASES if c.cls == checkpoint.transformer and gives(c, model, checkpoint.tokens))
    inputs = case.inputs(model, 1, checkpoint.tokens.grid, 0)
    case.on_meta(model)

    def place(x: Any) -> Any:
        if not torch.is_tensor(x):
            return x
        return x.to("meta", torch.bfloat16 if x.is_floating_point() else None)

    # The meta device knows no autocast, and counts nothing (Mochi cuts off what its mask hides).
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True), ReadsOne():
        model(**{n: x if n in case.read else tree_map(place, x) for n, x in inputs.items()})
    assert set(understood) == {at.layer.name for at in layers}
    # A refiner sees the image alone.
    assert any(layout.text for layout, *_ in understood.values()) == family.joint
    for layout, _, reason in understood.values():
        assert not reason
        assert replace(layout, text=0, suffix=0) == replace(checkpoint.tokens, text=0, suffix=0)
        assert layout.text_first == checkpoint.tokens.text_first


def test_every_family_names_a_model() -> None:
    def named(family: Family) -> bool:
        return bool(family.checkpoints)

    assert all(named(family) for family in families().values())
