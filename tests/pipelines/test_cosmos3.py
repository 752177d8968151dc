"""Cosmos 3 in its own pipeline: queries are fewer than keys, and text reads itself elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as models
import tiny_text
import torch
from families import cases
from PIL import Image

import dit_sparse
from dit_sparse import RadialProcessor, TokenLayout
from dit_sparse.pipelines.cosmos3 import FAMILY, TINY, layers

RADIAL = RadialProcessor(block=8, decay=0.2, decimate_below=16)
CASE, GIVEN = cases()["cosmos3"], cases()["cosmos3-given"]


def pipeline() -> Any:
    from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler

    tokenizer = tiny_text.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    pipe = Cosmos3OmniPipeline(
        transformer=CASE.model(),
        text_tokenizer=tokenizer,
        vae=models.wan_pipeline().vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        enable_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, **call: Any) -> torch.Tensor:
    settings = {
        "height": 64,
        "width": 96,
        "num_frames": 17,
        "num_inference_steps": 4,
        "output_type": "latent",
    }
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat runs", "a dog", generator=generator, return_dict=False, **{**settings, **call})[0]


def test_layers() -> None:
    found = layers(CASE.model())
    assert [layer.name for layer in found] == [f"layers.{i}.self_attn" for i in range(3)]
    assert {(layer.heads, layer.head_dim, layer.dim) for layer in found} == {(4, 16, 32)}


def test_layouts() -> None:
    model = CASE.model()
    alone, given = (case.inputs(model, 1, (5, 4, 6), 0) for case in (CASE, GIVEN))
    assert FAMILY.layout(model, alone) == TokenLayout((5, 4, 6), text_first=True)
    assert FAMILY.layout(model, given) == TokenLayout((5, 4, 6), text_first=True, suffix=7)
    assert (FAMILY.anchors(model, alone), FAMILY.anchors(model, given)) == (0, 1)
    several = {**alone, "vision_token_shapes": [(5, 4, 6), (1, 4, 6)]}
    assert FAMILY.layout(model, several) == "2 images or videos share the sequence"
    assert FAMILY.multiples is not None
    sizes = {"scale_factor_temporal": 4, "scale_factor_spatial": 16}
    assert FAMILY.pixels({"latent_patch_size": 2}, sizes) == (4, 32, 32)
    assert FAMILY.multiples(TINY, sizes) == (4, 16, 16)


@pytest.mark.parametrize("image", [False, True])
def test_pipeline(image: bool) -> None:
    pipe = pipeline()
    given = {"image": Image.new("RGB", (96, 64), (200, 80, 20))} if image else {}
    stock = run(pipe, **given)
    with dit_sparse.apply(pipe, RADIAL, schedule="always", strict=True) as session:
        out = run(pipe, **given)
        report = session.report()
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert torch.equal(run(pipe, **given), stock)
    assert {(row.where.step, row.where.name, row.where.branch) for row in report.rows} == {
        (step, f"layers.{i}.self_attn", branch)
        for step in range(4)
        for i in range(3)
        for branch in ("cond", "uncond")
    }
    assert report.density == report.sparse_density < 1
    # One call a layer: text's own attention is not among them.
    assert {row.calls for row in report.rows} == {1}


def test_text_counts_as_keys_only() -> None:
    """12 tokens of text and 120 of the grid: 120 queries read 132 keys, or with the method here fewer."""
    model = CASE.model()
    inputs = CASE.inputs(model, 1, CASE.grid, 0)
    for method, pairs in ((dit_sparse.DenseProcessor(block=8), 120 * 132), (Beside(block=8), 120 * (8 + 12))):
        with dit_sparse.apply(model, method, schedule="always") as session:
            session.full_plan_is_dense = False
            model(**inputs)
            rows = session.report().rows
        assert {row.every for row in rows} == {(120 * 132,) * 4}
        assert {row.pairs for row in rows} == {(pairs,) * 4}


class Beside(models.Diagonal):
    """Every query block of the grid reads itself and text."""

    def plan(self, q: torch.Tensor, k: torch.Tensor, call: Any) -> Any:
        keep = torch.eye(k.shape[2] // self.block + 1, dtype=torch.bool)
        keep[:, call.grid_blocks(self.block) :] = True
        return dit_sparse.Plan.from_blocks(keep, self.block)


@torch.no_grad()
def test_leaving_out_keys_is_what_a_mask_would_do() -> None:
    """Against attention computed by hand from the queries, keys and values of the model's own call."""
    model, method = CASE.model(), Beside(block=8)
    inputs = CASE.inputs(model, 1, CASE.grid, 0)
    seen: list[tuple[torch.Tensor, ...]] = []
    with dit_sparse.apply(model, method, schedule="always") as session:
        route = session.route

        def spy(at: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
            out = route(at, q, k, v, *rest)
            seen.append((q, k, v, out))
            return out

        session.route = spy
        model(**inputs)
    assert len(seen) == 3
    token = torch.arange(132)  # text first
    mask = (token < 12) | ((token - 12) // 8 == torch.arange(120)[:, None] // 8)
    for q, k, v, out in seen:
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        torch.testing.assert_close(out, expected)


def test_compiled_as_one_graph() -> None:
    model = CASE.model()
    inputs = CASE.inputs(model, 1, CASE.grid, 0)
    with torch.no_grad(), dit_sparse.apply(model, RADIAL, schedule="always", strict=True):
        eager = model(**inputs)[0][0]
        torch._dynamo.reset()
        for block in model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(model(**inputs)[0][0], eager)
