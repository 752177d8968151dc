"""Lumina-Image 2.0 end to end in its pipeline, and batches of prompts of different lengths."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families.lumina2 import CASES, inputs
from offline.lumina2 import pipeline
from tiny_images import run
from whole_runs import WINDOW, branches, sparse_run

import dit_sparse
from dit_sparse import Report, TokenLayout
from dit_sparse.pipelines.lumina2 import layers, layout, positions

# The pipeline takes a latent to be 8 pixels wide.
large = partial(run, height=160, width=192, system_prompt="the dog sits", max_sequence_length=32)


def test_layers_are_the_noise_refiner_and_the_layers() -> None:
    assert [(layer.index, layer.name) for layer in layers(CASES["lumina2"].model())] == [
        (0, "noise_refiner.0.attn"),
        (1, "layers.0.attn"),
        (2, "layers.1.attn"),
        (3, "layers.2.attn"),
    ]


@pytest.mark.parametrize("grid", [(1, 9, 7), (1, 3, 16)])
def test_layout(grid: tuple[int, int, int]) -> None:
    model = CASES["lumina2"].model()
    assert layout(model, inputs(model, 2, grid, 0)) == TokenLayout(grid, text_first=True)


def test_images_begin_behind_their_own_prompts() -> None:
    model = CASES["lumina2"].model()
    where = positions(model, inputs(model, 2, (1, 3, 4), 0))
    assert where is not None
    assert torch.equal(where, torch.stack([torch.arange(12) + 12, torch.arange(12) + 17]))
    assert positions(model, inputs(model, 1, (1, 3, 4), 1)) is None
    alike = {**inputs(model, 2, (1, 3, 4), 0), "encoder_attention_mask": torch.ones(2, 20)}
    assert positions(model, alike) is None


def lengths(report: Report, branch: str) -> set[int]:
    return {round(row.every[0] ** 0.5) for row in report.sparse_rows if row.where.branch == branch}


def test_text_to_image() -> None:
    """3 tokens of system prompt, 4 between it and the prompt, 4 of the prompt; and 3 without. Padding is cut
    off. The refiner, the first layer, sees no text."""
    report = sparse_run(pipeline(), large)
    assert branches(report) == {"cond", "uncond"}
    assert lengths(report, "cond") == {11 + 120}
    assert lengths(report, "uncond") == {3 + 120}
    assert {row.every[0] for row in report.rows if row.where.layer == 0} == {120**2}


def test_guidance_may_end_within_a_run() -> None:
    report = sparse_run(pipeline(), partial(large, cfg_trunc_ratio=0.5))
    assert {row.where.step for row in report.rows if row.where.branch == "uncond"} == {0, 1}


def test_prompts_of_different_lengths() -> None:
    """Tokens of the longest, of which two are hidden from the other item."""
    two = partial(large, prompt=["a cat runs", "the dog"], num_images_per_prompt=2)
    report = sparse_run(pipeline(), two)
    cond = {row.every[0] for row in report.sparse_rows if row.where.branch == "cond"}
    assert cond == {2 * (131 + 130) * 131}
    uncond = {row.every[0] for row in report.sparse_rows if row.where.branch == "uncond"}
    assert uncond == {4 * 123**2}


def test_a_padded_prompt_is_the_trimmed_one() -> None:
    pipe = pipeline()
    with dit_sparse.apply(pipe, WINDOW, schedule="always"):
        outs = [large(pipe, max_sequence_length=length) for length in (12, 32)]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blocks_compile_whole_with_prompts_of_different_lengths() -> None:
    model = CASES["lumina2"].model()
    call = inputs(model, 2, (1, 10, 12), 0)
    with dit_sparse.apply(model, WINDOW, schedule="always") as session:
        eager = model(**call)[0]
        for block in [*model.noise_refiner, *model.layers]:
            block.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(model(**call)[0], eager, atol=1e-6, rtol=1e-6)
        assert len(session.report().sparse_rows) == 4
