"""Chroma end to end in its pipelines, and its masks, which are S x S."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families.chroma import CASES, padded
from offline.chroma import pipeline
from PIL import Image
from whole_runs import WINDOW, branches, sparse_run

import dit_sparse
from dit_sparse import METHODS
from dit_sparse.pipelines.chroma import layers, validity

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    """Latents of 12 x 10 tokens after 16 of text."""
    settings: dict[str, Any] = {
        "prompt": "a cat runs",
        "negative_prompt": "a dog",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "height": 48,
        "width": 40,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


def test_layers_are_those_of_both_kinds_of_blocks() -> None:
    assert [layer.name for layer in layers(CASES["chroma"].model())] == [
        *(f"transformer_blocks.{i}.attn" for i in range(2)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(2)),
    ]


def test_validity_is_the_diagonal() -> None:
    keys = torch.tensor([[True, False, True], [True, True, False]])
    mask = keys[:, None, None, :] * keys[:, None, :, None]
    assert torch.equal(validity(mask), keys)
    assert torch.equal(validity(mask.to(torch.bfloat16)), keys)


def test_no_mask_is_kept() -> None:
    """Each layer has one of its own, of S x S."""
    model = CASES["chroma"].model()
    with dit_sparse.apply(model, WINDOW, schedule="always") as session, torch.no_grad():
        model(**padded(model)[0])
        (part,) = session.parts
        assert part.forward is not None
        assert not part.forward.masks
        assert session.report().sparse_rows


@torch.no_grad()
def test_compiled_with_a_mask() -> None:
    model = CASES["chroma"].model()
    call = padded(model)[0]
    with dit_sparse.apply(model, WINDOW, schedule="always") as session:
        eager = model(**call)[0]
        out = torch.compile(model, backend="eager", fullgraph=True)(**call)[0]
        assert len(session.report().sparse_rows) == 4
    torch.testing.assert_close(out, eager, atol=1e-6, rtol=1e-6)


def test_text_to_image_in_two_passes() -> None:
    report = sparse_run(pipeline(), run)
    assert branches(report) == {"cond", "uncond"}
    # "a cat runs" is four tokens, "a dog" three, and the first padding token counts.
    queries = 16 + 120
    keys = {"cond": 5 + 120, "uncond": 4 + 120}
    assert {(r.where.branch, r.every[0]) for r in report.sparse_rows} == {
        (branch, queries * n) for branch, n in keys.items()
    }


def test_a_batch_of_prompts() -> None:
    two = partial(run, prompt=["a cat runs", "the blue dog sits of"], negative_prompt=["a dog", "bird"])
    assert branches(sparse_run(pipeline(), two)) == {"cond", "uncond"}


def test_image_to_image() -> None:
    changed = partial(run, image=Image.new("RGB", (40, 48), (200, 80, 20)), strength=0.75)
    report = sparse_run(pipeline("ChromaImg2ImgPipeline"), changed, steps=[1, 2, 3])
    assert branches(report) == {"cond", "uncond"}


@torch.no_grad()
def test_a_padded_prompt_is_a_trimmed_one() -> None:
    """Though the pipeline hands its mask over as numbers, which hide nothing from the stock model."""
    pipe = pipeline()
    call = partial(run, pipe, prompt=None, negative_prompt=None, guidance_scale=1.0)
    embeds, mask = pipe._get_t5_prompt_embeds("a cat runs", max_sequence_length=16)
    length = int(mask.sum())
    assert mask.is_floating_point()
    assert length == 5
    short = {"prompt_embeds": embeds[:, :length], "prompt_attention_mask": mask[:, :length]}
    long = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    stock = call(**short)
    for method in (METHODS["dense"](block=16), WINDOW):
        with dit_sparse.apply(pipe, method, schedule="always") as session:
            session.full_plan_is_dense = False
            padded, trimmed = call(**long), call(**short)
        torch.testing.assert_close(padded, trimmed, atol=1e-4, rtol=1e-4)
        if method is not WINDOW:
            torch.testing.assert_close(padded, stock, atol=1e-4, rtol=1e-4)
