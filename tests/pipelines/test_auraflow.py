"""AuraFlow end to end in its pipeline."""

from __future__ import annotations

from functools import partial

import pytest
from families.auraflow import CASES, inputs
from offline.auraflow import pipeline
from tiny_images import run
from whole_runs import branches, sparse_run, tokens

from dit_sparse import TokenLayout
from dit_sparse.pipelines.auraflow import layers, layout


def test_layers_are_those_of_both_kinds_of_blocks() -> None:
    found = layers(CASES["auraflow"].model())
    assert [(layer.index, layer.name) for layer in found] == [
        (0, "joint_transformer_blocks.0.attn"),
        (1, "joint_transformer_blocks.1.attn"),
        (2, "single_transformer_blocks.0.attn"),
        (3, "single_transformer_blocks.1.attn"),
    ]


@pytest.mark.parametrize("grid", [(1, 9, 7), (1, 3, 16)])
def test_layout(grid: tuple[int, int, int]) -> None:
    model = CASES["auraflow"].model()
    assert layout(model, inputs(model, 2, grid, 0)) == TokenLayout(grid, text_first=True)


def test_text_to_image() -> None:
    report = sparse_run(pipeline(), run)
    assert branches(report) == {"cond_uncond"}
    assert tokens(report, batch=2) == {8 + 16 + 120}


def test_several_prompts_without_guidance() -> None:
    two = partial(run, prompt=["a cat runs", "the blue dog"], negative_prompt=None, guidance_scale=1.0)
    assert tokens(sparse_run(pipeline(), two), batch=2) == {8 + 16 + 120}


def test_fused_projections() -> None:
    """The model then has other processors."""
    pipe = pipeline()
    pipe.transformer.fuse_qkv_projections()
    assert tokens(sparse_run(pipe, run), batch=2) == {8 + 16 + 120}
