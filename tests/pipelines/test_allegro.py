"""Allegro in its own pipeline, and with the mask that training has."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from families.allegro import CASES
from offline.allegro import pipeline

import dit_sparse
from dit_sparse import Phase, RadialProcessor, TokenLayout
from dit_sparse.pipelines.allegro import FAMILY, pixels

RADIAL = RadialProcessor(block=8, decay=0.2, decimate_below=16)


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    """Latents of 4 steps; grid (5, 4, 6) by default."""
    settings: dict[str, Any] = {
        "prompt": "a cat runs",
        "negative_prompt": "a dog",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "height": 64,
        "width": 96,
        "num_frames": 20,
        "max_sequence_length": 16,
        "clean_caption": False,
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


# The released model's scheduler, and one without a step index.
@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDIMScheduler"])
def test_text_to_video(scheduler: str) -> None:
    pipe = pipeline(scheduler)
    stock = run(pipe)
    with dit_sparse.apply(pipe, RADIAL, schedule="dense 0-25%; layers 0") as session:
        out = run(pipe)
        report = session.report()
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert torch.equal(run(pipe), stock)
    assert {row.where.branch for row in report.rows} == {"cond_uncond"}
    assert {row.where.step for row in report.rows} == {0, 1, 2, 3}
    assert {(r.where.step, r.where.layer) for r in report.sparse_rows} == {
        (step, layer) for step in (1, 2, 3) for layer in (1, 2)
    }
    assert {row.where.reason for row in report.rows} == {"", "schedule"}
    assert {row.every[0] for row in report.rows} == {2 * 120**2}
    assert 0 < report.sparse_density < 1


def test_what_the_mask_hides_has_no_effect() -> None:
    case = CASES["allegro-masked"]
    model = case.model()
    inputs = case.inputs(model, 2, case.grid, 0)
    hidden = inputs["attention_mask"][:, None] == 0
    other = {**inputs, "hidden_states": inputs["hidden_states"] + hidden * tiny.randn(*hidden.shape, seed=9)}
    with torch.no_grad(), dit_sparse.apply(model, RADIAL, schedule="always", strict=True) as session:
        a, b = model(**inputs)[0], model(**other)[0]
        rows = session.report().sparse_rows
    shown = ~hidden.expand_as(a)
    torch.testing.assert_close(a[shown], b[shown], atol=1e-6, rtol=1e-6)
    # Of a frame's 24 tokens 20 are keys; of the first item, in 4 of the 5 frames.
    assert {row.every[0] / row.calls for row in rows} == {120 * (80 + 100)}


@torch.no_grad()
def test_compiled_as_one_graph_equals_eager() -> None:
    torch._dynamo.reset()
    case = CASES["allegro-masked"]
    model = case.model()
    inputs = case.inputs(model, 2, case.grid, 0)
    with dit_sparse.apply(model, RADIAL, schedule="always", strict=True):
        eager = model(**inputs)[0]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs)[0], eager, atol=1e-5, rtol=1e-5)


def test_a_bias_that_is_no_mask_stays_dense() -> None:
    case = CASES["allegro"]
    model = case.model()
    bias = {"attention_mask": tiny.randn(1, 1, 120)}
    inputs = {**case.inputs(model, 1, case.grid, 0), **bias}
    stock = model(**inputs)[0]
    with dit_sparse.apply(model, RADIAL, schedule="always") as session:
        assert torch.equal(model(**inputs)[0], stock)
        rows = session.report().rows
    assert all(row.where.phase is Phase.DENSE for row in rows)
    assert {row.where.reason for row in rows} == {
        "attention_mask is [B, F, H, W] where it hides pixels, got shape (1, 1, 120)"
    }


def test_layers_and_layout() -> None:
    model = CASES["allegro"].model()
    found = FAMILY.layers(model)
    assert [layer.name for layer in found] == [f"transformer_blocks.{i}.attn1" for i in range(3)]
    assert {(layer.heads, layer.head_dim, layer.dim) for layer in found} == {(2, 12, 24)}
    for case in CASES.values():
        args = case.inputs(model, 2, (3, 7, 5), 0)
        assert FAMILY.layout(model, args) == TokenLayout((3, 7, 5))


def test_default_size() -> None:
    checkpoint = FAMILY.checkpoints["allegro"]
    transformer = {"patch_size": 2, "patch_size_t": 1}
    vae = {"temporal_compression_ratio": 4, "block_out_channels": (128, 256, 512, 512)}
    made, scale = checkpoint.defaults, pixels(transformer, vae)
    size = made["num_frames"], made["height"], made["width"]
    assert checkpoint.tokens is not None
    assert checkpoint.tokens.grid == tuple(n // s for n, s in zip(size, scale, strict=True))
    assert not FAMILY.lone_first_frame
