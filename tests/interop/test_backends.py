"""set_attention_backend: the user's choice is that of every call the model makes itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tiny_models as tiny
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)

import dit_sparse

pytestmark = pytest.mark.filterwarnings("ignore:.*outside a pipeline run")

METHOD = tiny.TopK(keep=2)
NATIVE, MATH = AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often each backend was called; the process-wide choice is put back afterwards."""
    counts: Counter[Any] = Counter()

    def counted(name: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        def backend(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return run(*args, **kwargs)

        return backend

    for name in (NATIVE, MATH):
        run = _AttentionBackendRegistry._backends[name]
        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, counted(name, run))
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", NATIVE)
    return counts


@torch.no_grad()
@pytest.mark.parametrize("first", ["attach", "choose"])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_dense_calls_keep_the_chosen_backend(used: Counter[Any], first: str, how: str) -> None:
    """Those of a layer the schedule leaves dense, and cross-attention: 1 + 3 of 6."""
    torch._dynamo.reset()
    model, inputs = tiny.wan(), tiny.wan_inputs()
    with dit_sparse.apply(model, METHOD, schedule="layers 0"):
        wanted = model(**inputs)[0]
    assert used == {NATIVE: 4}
    steps = [
        lambda: dit_sparse.apply(model, METHOD, schedule="layers 0"),
        lambda: model.set_attention_backend("_native_math"),
    ]
    for step in steps if first == "attach" else reversed(steps):
        step()
    used.clear()
    call = torch.compile(model, backend="eager") if how == "compiled" else model
    torch.testing.assert_close(call(**inputs)[0], wanted, atol=1e-5, rtol=1e-5)
    if how == "eager":
        assert used == {MATH: 4}
        session = dit_sparse.session(model)
        assert session is not None
        assert len(session.report().sparse_rows) == 2
        session.remove()
        used.clear()
        model(**inputs)
        assert used == {MATH: 6}
        model.reset_attention_backend()
        assert {p._attention_backend for p in model.attn_processors.values()} == {None}


@torch.no_grad()
def test_attaching_chooses_nothing_for_the_process(used: Counter[Any]) -> None:
    """Also where set_attention_backend does so itself, https://github.com/huggingface/diffusers/issues/14249."""
    other = tiny.wan(num_layers=1)
    for attached in (False, True):
        _AttentionBackendRegistry._active_backend = NATIVE
        model = tiny.wan()
        session = dit_sparse.apply(model, METHOD, schedule="always") if attached else None
        assert _AttentionBackendRegistry._active_backend is NATIVE
        model.set_attention_backend("_native_math")
        if session is None:
            leaked = _AttentionBackendRegistry._active_backend
        else:
            session.remove()
        assert _AttentionBackendRegistry._active_backend is leaked
        used.clear()
        other(**tiny.wan_inputs())
        assert used == {leaked: 2}


@torch.no_grad()
def test_the_context_manager(used: Counter[Any]) -> None:
    model, inputs = tiny.wan(), tiny.wan_inputs()
    dit_sparse.apply(model, METHOD, schedule="layers 0")
    with attention_backend("_native_math"):
        model(**inputs)
    assert used == {MATH: 4}
    used.clear()
    model(**inputs)
    assert used == {NATIVE: 4}


@torch.no_grad()
def test_the_older_generation_has_no_backends(used: Counter[Any]) -> None:
    """CogVideoX calls F.scaled_dot_product_attention: the choice changes nothing, attached or not."""
    from families import cases

    case = cases()["cogvideox"]
    model = case.model()
    dit_sparse.apply(model, METHOD, schedule="layers 0")
    assert isinstance(model, diffusers.CogVideoXTransformer3DModel)
    wanted = case.output(model(**case.inputs(model, 1, case.grid, 0)))
    model.set_attention_backend("_native_math")
    assert torch.equal(case.output(model(**case.inputs(model, 1, case.grid, 0))), wanted)
    assert not used
