"""HiDream end to end in its pipeline."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families.hidream import CASES, inputs
from offline.hidream import pipeline
from tiny_images import run
from whole_runs import WINDOW, branches, sparse_run, tokens

import dit_sparse
from dit_sparse import TokenLayout
from dit_sparse.pipelines.hidream import layers, layout

FILLED = 34 * 34 // 4


def test_layers_are_those_of_both_kinds_of_blocks() -> None:
    found = layers(CASES["hidream"].model())
    assert [(layer.index, layer.name) for layer in found] == [
        (0, "double_stream_blocks.0.block.attn1"),
        (1, "double_stream_blocks.1.block.attn1"),
        (2, "single_stream_blocks.0.block.attn1"),
        (3, "single_stream_blocks.1.block.attn1"),
    ]


def test_layout() -> None:
    model = CASES["hidream"].model()
    assert layout(model, inputs(model, 2, (1, 9, 7), 0)) == TokenLayout((1, 9, 7), suffix=FILLED - 63)
    assert layout(model, inputs(model, 2, (1, 8, 8), 0)) == TokenLayout((1, 8, 8))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_layout_of_packed_images(as_tensor: bool) -> None:
    model = CASES["hidream"].model()
    sizes = [(5, 7), (5, 7)]
    args = {"hidden_states": torch.zeros(2, 40, 16), "img_sizes": torch.tensor(sizes) if as_tensor else sizes}
    assert layout(model, args) == TokenLayout((1, 5, 7), suffix=5)
    args["img_sizes"] = torch.tensor([(5, 7), (7, 5)])
    assert layout(model, args) == "a batch of images of different sizes"


@torch.no_grad()
def test_a_packed_image_is_the_patched_one() -> None:
    model = CASES["hidream"].model()
    call = inputs(model, 1, (1, 14, 15), 0)
    packed, masks, sizes, ids = model.patchify(call["hidden_states"])
    with dit_sparse.apply(model, WINDOW, schedule="always") as session:
        out = model(**call)[0]
        rest = {"hidden_states_masks": masks, "img_sizes": sizes, "img_ids": ids}
        assert torch.equal(model(**{**call, "hidden_states": packed, **rest})[0], out)
        assert session.report().density < 1


def test_text_to_image() -> None:
    """15 x 18 tokens, filled up."""
    report = sparse_run(pipeline(), run)
    assert branches(report) == {"cond_uncond"}
    assert tokens(report, batch=2) == {FILLED + 3 * 16}


def test_a_square_image_without_guidance() -> None:
    square = partial(run, height=48, width=48, guidance_scale=0.0)
    assert tokens(sparse_run(pipeline(), square)) == {17 * 17 + 3 * 16}
