"""Every model with a name at its full size, without weights: on the meta device nothing is computed.

The transformer is built from the configuration in its family file, attached, and called at its default size;
what each attention call is understood to be is compared with what the family file says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import cases
from torch.utils._pytree import tree_map

import dit_sparse
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

    def spy(at: Any, forward: Any, q: Any, *rest: Any) -> Any:
        found = understand(at, forward, q, *rest)
        assert q.shape[1] == shape[1]
        assert q.shape[3] == shape[2]
        understood[at.layer.name] = found
        return found

    monkeypatch.setattr(session, "_understand", spy)
    case = next(c for c in CASES if c.cls == checkpoint.transformer)
    assert checkpoint.tokens is not None
    inputs = case.inputs(model, 1, checkpoint.tokens.grid, 0)

    def place(x: Any) -> Any:
        if not torch.is_tensor(x):
            return x
        return x.to("meta", torch.bfloat16 if x.is_floating_point() else None)

    model(**tree_map(place, inputs))
    assert set(understood) == {at.layer.name for at in layers}
    for layout, _, reason in understood.values():
        assert not reason
        assert replace(layout, text=0) == replace(checkpoint.tokens, text=0)
        assert (layout.text > 0) == family.joint
        assert layout.text_first == checkpoint.tokens.text_first


def test_every_family_names_a_model() -> None:
    def named(family: Family) -> bool:
        return bool(family.checkpoints)

    assert all(named(family) for family in families().values())
