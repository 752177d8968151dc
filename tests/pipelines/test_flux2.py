"""FLUX.2 end to end in its pipelines."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families.flux2 import CASES
from offline.flux2 import pipeline
from PIL import Image
from whole_runs import WINDOW, branches, sparse_run, tokens

import dit_sparse
from dit_sparse.pipelines.flux2 import layers


def embeds(seed: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 14, 16, generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    """Latents of 12 x 10 tokens after 14 of text."""
    settings: dict[str, Any] = {
        "prompt_embeds": embeds(0),
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "height": 96,
        "width": 80,
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


def test_layers_are_those_of_both_kinds_of_blocks() -> None:
    found = layers(CASES["flux2"].model())
    assert [(layer.index, layer.name) for layer in found] == [
        (0, "transformer_blocks.0.attn"),
        (1, "transformer_blocks.1.attn"),
        (2, "single_transformer_blocks.0.attn"),
        (3, "single_transformer_blocks.1.attn"),
    ]
    assert {(layer.heads, layer.head_dim, layer.dim) for layer in found} == {(2, 16, 32)}


def test_text_to_image() -> None:
    report = sparse_run(pipeline("Flux2Pipeline", guidance_embeds=True), run)
    assert branches(report) == {"cond"}
    assert tokens(report) == {14 + 120}


def test_klein_with_guidance_and_a_batch() -> None:
    guided = partial(run, prompt_embeds=embeds(0, 2), negative_prompt_embeds=embeds(1, 2), guidance_scale=4.0)
    report = sparse_run(pipeline(), guided)
    assert branches(report) == {"cond", "uncond"}


@pytest.mark.parametrize("name", ["Flux2Pipeline", "Flux2KleinPipeline"])
def test_reference_images_follow_the_one_that_is_made(name: str) -> None:
    pictures = [Image.new("RGB", size, (200, 80, 20)) for size in ((64, 72), (72, 64))]
    report = sparse_run(pipeline(name), partial(run, image=pictures))
    assert tokens(report) == {14 + 120 + 2 * 8 * 9}


def test_the_kv_pipeline_says_that_it_cannot() -> None:
    pipe = pipeline("Flux2KleinKVPipeline")
    with pytest.raises(ValueError, match=r"Flux2KleinKVPipeline .* cannot be redirected"):
        dit_sparse.apply(pipe, WINDOW)
    assert dit_sparse.session(pipe.transformer) is None
