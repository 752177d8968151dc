"""fuse_qkv_projections and IP-Adapters: models that replace processors while a method is attached."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import tiny_models as tiny
import torch
from families import Pipe, cases

import dit_sparse
from dit_sparse.core import Redirected

pytestmark = pytest.mark.filterwarnings("ignore:.*outside a pipeline run")

METHOD = tiny.TopK(keep=2)
REPLACING = ["cogvideox", "sd3", "pixart", "auraflow"]
"""Models that give every layer a processor of another class."""
MODELS = [*REPLACING, "wan", "flux"]


def case_of(name: str) -> Any:
    if name not in cases() or cases()[name].stock is None:
        pytest.skip(f"there is no {name} here")
    return cases()[name]


def warned(name: str) -> AbstractContextManager[Any]:
    """Only what replaces processors warns."""
    return pytest.warns(UserWarning, match="attached again") if name in REPLACING else nullcontext()


def layers_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(getattr(m, "processor", None), Redirected)]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_fused_layers_stay_sparse(name: str) -> None:
    """Fused before or after attaching, and unfused again: the same layers run sparse on the same numbers."""
    case = case_of(name)
    model = case.model()
    inputs = case.inputs(model, 1, case.grid, 0)

    def run() -> torch.Tensor:
        return case.output(model(**inputs))

    stock = run()
    session = dit_sparse.apply(Pipe(model), METHOD, schedule="always")
    sparse, layers = run(), layers_of(model)
    report = [(row.where, row.density) for row in session.report().rows]
    assert (sparse - stock).abs().max() > 1e-4
    before = {layer: type(layer.processor) for layer in layers}
    with warned(name):
        model.fuse_qkv_projections()
    assert dit_sparse.session(model) is session
    assert layers_of(model) == layers
    assert all((type(layer.processor) is not before[layer]) == (name in REPLACING) for layer in layers)
    assert all(layer.fused_projections for layer in layers)
    torch.testing.assert_close(run(), sparse, atol=1e-5, rtol=1e-5)
    assert [(row.where, row.density) for row in session.report().rows] == report
    with warned(name):
        model.unfuse_qkv_projections()
    assert {layer: type(layer.processor) for layer in layers_of(model)} == before
    torch.testing.assert_close(run(), sparse, atol=1e-5, rtol=1e-5)
    with warned(name):
        model.fuse_qkv_projections()
    session.remove()
    model.unfuse_qkv_projections()
    assert not layers_of(model)
    torch.testing.assert_close(run(), stock, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_what_is_restored_is_what_the_model_would_have_without_us(name: str) -> None:
    case = case_of(name)
    left = []
    for attached in (False, True):
        model = case.model()
        session = dit_sparse.apply(Pipe(model), METHOD) if attached else None
        with warned(name) if attached else nullcontext():
            model.fuse_qkv_projections()
        if session is not None:
            session.remove()
        found = {m: type(m.processor) for m in model.modules() if hasattr(m, "processor")}
        out = case.output(model(**case.inputs(model, 1, case.grid, 0)))
        left.append(
            (list(found.values()), model.original_attn_processors if name in REPLACING else None, out)
        )
    assert left[0][0] == left[1][0]
    if left[0][1] is not None:
        assert {k: type(p) for k, p in left[0][1].items()} == {k: type(p) for k, p in left[1][1].items()}
    assert torch.equal(left[0][2], left[1][2])


@torch.no_grad()
@pytest.mark.parametrize("name", ["cogvideox", "flux"])
def test_attached_to_a_fused_model(name: str) -> None:
    case = case_of(name)
    model = case.model()
    inputs = case.inputs(model, 1, case.grid, 0)
    with dit_sparse.apply(Pipe(model), METHOD, schedule="always"):
        sparse = case.output(model(**inputs))
    model.fuse_qkv_projections()
    fused = {m: m.processor for m in model.modules() if hasattr(m, "processor")}
    session = dit_sparse.apply(Pipe(model), METHOD, schedule="always")
    torch.testing.assert_close(case.output(model(**inputs)), sparse, atol=1e-5, rtol=1e-5)
    session.remove()
    assert {m: m.processor for m in model.modules() if hasattr(m, "processor")} == fused
    session = dit_sparse.apply(Pipe(model), METHOD, schedule="always")
    with warned(name):
        model.unfuse_qkv_projections()
    torch.testing.assert_close(case.output(model(**inputs)), sparse, atol=1e-5, rtol=1e-5)
    assert len(session.report().sparse_rows) == len(layers_of(model)) > 0


@torch.no_grad()
def test_the_user_may_still_end_the_session_by_a_stock_processor() -> None:
    from diffusers.models.attention_processor import FusedCogVideoXAttnProcessor2_0

    model = case_of("cogvideox").model()
    model.fuse_qkv_projections()
    session = dit_sparse.apply(Pipe(model), METHOD)
    model.set_attn_processor(FusedCogVideoXAttnProcessor2_0())
    assert not session.active
    assert not layers_of(model)


@torch.no_grad()
def test_processors_of_a_session_that_has_ended_are_stock() -> None:
    """Code that keeps ``attn_processors`` and sets them again, as PAG does, may outlive a session."""
    model = tiny.wan()
    stock = dict(model.attn_processors)
    with dit_sparse.apply(model, METHOD):
        kept = dict(model.attn_processors)
    model.set_attn_processor(dict(kept))
    assert model.attn_processors == stock
    other = tiny.wan()
    session = dit_sparse.apply(other, METHOD)
    other.set_attn_processor(dict(kept))
    assert not session.active
    assert not layers_of(other)


@torch.no_grad()
def test_an_ip_adapter_may_be_loaded_into_an_attached_model() -> None:
    """Its processors are modules and make a second attention call, of the image's keys, which stays dense."""
    case = case_of("flux")
    model = case.model()
    width, blocks = model.inner_dim, len(model.transformer_blocks)
    shapes = {"weight": (width, model.config.joint_attention_dim), "bias": (width,)}
    adapter = {
        "image_proj": {
            "proj.weight": tiny.randn(4 * model.config.joint_attention_dim, 8),
            "proj.bias": torch.zeros(4 * model.config.joint_attention_dim),
            "norm.weight": torch.ones(model.config.joint_attention_dim),
            "norm.bias": torch.zeros(model.config.joint_attention_dim),
        },
        "ip_adapter": {
            f"{i}.to_{x}_ip.{name}": tiny.randn(*shape, seed=i)
            for i in range(blocks) for x in "kv" for name, shape in shapes.items()
        },
    }  # fmt: skip
    embeds = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [tiny.randn(1, 1, 8)]}}
    inputs = {**case.inputs(model, 1, case.grid, 0), **embeds}
    session = dit_sparse.apply(Pipe(model), tiny.TopK(keep=999), schedule="always")
    layers = layers_of(model)
    with pytest.warns(UserWarning, match="FluxIPAdapterAttnProcessor; they were attached again"):
        model._load_ip_adapter_weights([adapter], low_cpu_mem_usage=False)
    assert layers_of(model) == layers
    out = case.output(model(**inputs))
    assert len(session.report().sparse_rows) == len(layers)
    assert {r.where.reason for r in session.report().rows if r.where.reason} == {
        "120 queries read 4 keys of another sequence"
    }
    names = set(model.state_dict())
    session.remove()
    torch.testing.assert_close(out, case.output(model(**inputs)), atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == names
    assert not layers_of(model)
