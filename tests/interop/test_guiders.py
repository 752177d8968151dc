"""Guiders that perturb attention: PAG pipelines, PAG by hooks, and skipped layers."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_images
import tiny_models as tiny
import tiny_text
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import LayerSkipConfig, _apply_layer_skip_hook
from families import Pipe, cases

import dit_sparse
from dit_sparse.pipelines.matrix import missing

pytestmark = pytest.mark.filterwarnings("ignore:.*outside a pipeline run")

FULL, SPARSE = tiny.TopK(keep=999), tiny.TopK(keep=2)
MODELS = ["hunyuanimage", "qwen-image", "cogview4", "z-image"]
"""Whose processors diffusers knows; of the first two it returns one result where their blocks expect two."""


def guided(name: str, config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dit_sparse.Session]:
    """A forward pass with the layers of a block changed, as by a guider: stock, attached, and the session."""
    if cases()[name].stock is None:
        pytest.skip(missing(cases()[name].cls))
    case = cases()[name]
    model = case.model()
    inputs, outs = case.inputs(model, 1, case.grid, 0), []
    for attached in (False, True):
        if attached:
            session = dit_sparse.apply(Pipe(model), FULL, schedule="always")
            session.full_plan_is_dense = False
        _apply_layer_skip_hook(model, LayerSkipConfig(indices=[0], **config), name="guider")
        outs.append(case.output(model(**inputs)))
        HookRegistry.check_if_exists_or_initialize(model).remove_hook("guider", recurse=True)
    return outs[0], outs[1], session


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS[2:])
def test_a_skipped_layer_is_skipped(name: str) -> None:
    """SkipLayerGuidance finds a redirected processor's class like the stock one."""
    config = {"skip_attention": True, "skip_ff": False}
    stock, out, session = guided(name, config)
    torch.testing.assert_close(out, stock, atol=1e-5, rtol=1e-5)
    assert len(session.report().rows) == sum(len(part.layers) for part in session.parts) - 1


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_perturbed_attention_is_left_to_the_model(name: str) -> None:
    """PAG by a hook lets sdpa return its values: a sparse kernel would not notice."""
    config = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    stock, out, session = guided(name, config)
    torch.testing.assert_close(out, stock, atol=1e-5, rtol=1e-5)
    reasons = sorted(row.where.reason for row in session.report().rows)
    assert reasons[-1] == "a guider replaces its attention weights"
    assert set(reasons[:-1]) == {""}


def test_a_pag_pipeline_replaces_the_processors_it_perturbs() -> None:
    """For the time of a run, which warns and leaves those layers to it; the others stay sparse."""
    pipe = tiny_images.pipeline(
        "StableDiffusion3PAGPipeline",
        cases()["sd3"].model(),
        text_encoder=tiny_text.clip(8, projection=8),
        text_encoder_2=tiny_text.clip(8, projection=8),
        text_encoder_3=tiny_text.t5(16),
        tokenizer=tiny_text.tokenizer(12, start=True),
        tokenizer_2=tiny_text.tokenizer(12, start=True),
        tokenizer_3=tiny_text.tokenizer(),
        pag_applied_layers=["blocks.1"],
    )
    stock = tiny_images.run(pipe, pag_scale=2.0)
    session = dit_sparse.apply(pipe, SPARSE, schedule="always")
    with pytest.warns(UserWarning, match=r"1 of \d layers no longer .*transformer_blocks\.1\.attn"):
        out = tiny_images.run(pipe, pag_scale=2.0)
    assert torch.isfinite(out).all()
    assert (out - stock).abs().max() > 1e-3
    assert dit_sparse.session(pipe) is session
    assert 1 not in {row.where.layer for row in session.report().rows}
    assert len(session.report().sparse_rows) == len(session.report().rows) > 0
    tiny_images.run(pipe, pag_scale=0.0)
    assert 1 in {row.where.layer for row in session.report().sparse_rows}
    session.remove()
    assert torch.equal(tiny_images.run(pipe, pag_scale=2.0), stock)
