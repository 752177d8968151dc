"""Z-Image end to end in its pipelines: text to image, and the omni variant that is given images."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families.z_image import CASES, image, inputs, omni_inputs, output, siglip_inputs
from offline.z_image import pipeline
from tiny_images import picture, run
from tiny_models import Diagonal, TopK
from whole_runs import WINDOW, branches, sparse_run, tokens

import dit_sparse
from dit_sparse import SparseProcessor, TokenLayout
from dit_sparse.pipelines.z_image import layers, layout, pipeline_class, positions

LONG = "a cat runs " * 15
long = partial(run, prompt=LONG, max_sequence_length=64)


def test_layers_are_the_noise_refiner_and_the_layers() -> None:
    assert [(layer.index, layer.name) for layer in layers(CASES["z-image"].model())] == [
        (0, "noise_refiner.0.attention"),
        (1, "layers.0.attention"),
        (2, "layers.1.attention"),
        (3, "layers.2.attention"),
    ]


@pytest.mark.parametrize(("grid", "fill"), [((1, 9, 7), 1), ((1, 8, 8), 0), ((1, 5, 13), 31)])
def test_layout(grid: tuple[int, int, int], fill: int) -> None:
    model = CASES["z-image"].model()
    assert layout(model, inputs(model, 2, grid, 0)) == TokenLayout(grid, suffix=fill)
    assert positions(model, inputs(model, 2, grid, 0)) is None


def test_layout_of_omni() -> None:
    """[text, given image, image, rest]: items begin at 64 and 96, the given image has 28 tokens."""
    model = CASES["z-image-omni"].model()
    given = omni_inputs(model, 2, (1, 9, 7), 0)
    assert layout(model, given) == TokenLayout((1, 9, 7), text_first=True, prefix=32, suffix=1)
    where = positions(model, given)
    assert where is not None
    assert torch.equal(where, torch.stack([torch.arange(96) + 64, torch.arange(96) + 96]))
    absent = {**given, "x": [[None, image(model, 0, (1, 9, 7))]]}
    assert layout(model, absent) == TokenLayout((1, 9, 7), text_first=True, prefix=32, suffix=1)
    assert layout(model, {**given, "x": [[image(model, 0, (1, 9, 7)), None]]}) == "the last image is missing"


def test_images_of_different_sizes_in_a_batch_stay_dense() -> None:
    model = CASES["z-image"].model()
    given = {**inputs(model, 2, (1, 6, 6), 0), "x": [image(model, 0, (1, 6, 6)), image(model, 1, (1, 6, 8))]}
    with dit_sparse.apply(model, WINDOW, schedule="always") as session, torch.no_grad():
        model(**given)
        reasons = {row.where.reason for row in session.report().rows}
    assert reasons == {"a batch of images of different sizes"}


@torch.no_grad()
def test_features_of_given_images_are_text() -> None:
    """They stand behind the image, the captions before it. A batch equals two calls, and everything the stock
    model's call."""
    model = CASES["z-image-omni"]._replace(changes={"siglip_feat_dim": 8}).model()

    def forward(method: SparseProcessor, batch: int, first: int = 0) -> torch.Tensor:
        with dit_sparse.apply(model, method, schedule="always") as session:
            session.full_plan_is_dense = False
            out = output(model(**siglip_inputs(model, batch, (1, 14, 15), first)))
            assert {row.where.name for row in session.report().sparse_rows} == names
        return out

    names = {layer.name for layer in layers(model)}
    stock = output(model(**siglip_inputs(model, 2, (1, 14, 15), 0)))
    torch.testing.assert_close(forward(TopK(keep=999), 2), stock, atol=1e-5, rtol=1e-5)
    together = forward(Diagonal(), 2)
    apart = torch.cat([forward(Diagonal(), 1, item) for item in range(2)])
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)
    assert (together - stock).abs().max() > 1e-3


def test_text_to_image() -> None:
    """The prompts fill 32 tokens each, and the image 128."""
    report = sparse_run(pipeline(), run)
    assert branches(report) == {"cond_uncond"}
    assert tokens(report, batch=2) == {128 + 32}
    assert {row.every[0] for row in report.rows if row.where.layer == 0} == {2 * 128**2}


def test_prompts_of_different_lengths_need_a_mask() -> None:
    report = sparse_run(pipeline(), long)
    assert {row.every[0] for row in report.sparse_rows} == {192 * (192 + 160)}


def test_without_guidance() -> None:
    assert tokens(sparse_run(pipeline(), partial(run, guidance_scale=0.0))) == {128 + 32}


def test_guidance_may_end_within_a_run() -> None:
    """The last steps then have the prompt alone, in the call that bore the name of both."""
    report = sparse_run(pipeline(), partial(long, cfg_truncation=0.4))
    assert branches(report) == {"cond_uncond"}
    per_step = {row.where.step: row.every[0] for row in report.sparse_rows}
    assert per_step == {1: 192 * (192 + 160), 2: 192**2, 3: 192**2}


def test_image_to_image() -> None:
    changed = partial(run, image=picture(), strength=0.75)
    report = sparse_run(pipeline("ZImageImg2ImgPipeline"), changed, steps=[1, 2, 3])
    assert tokens(report, batch=2) == {128 + 32}


def omni() -> Any:
    from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipe = pipeline(
        "ZImageOmniPipeline",
        CASES["z-image-omni"]._replace(changes={"siglip_feat_dim": 8}).model(),
        siglip=Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=16, num_patches=16)).eval(),
        siglip_processor=Siglip2ImageProcessor(patch_size=16, max_num_patches=16),
    )
    pipe.vae.to(torch.bfloat16)
    return pipe


def test_omni_with_a_given_image() -> None:
    """96 tokens of text, 256 of the given image, 128 of the image and 64 of features."""
    report = sparse_run(omni(), partial(run, image=picture(64, 64)))
    assert branches(report) == {"cond_uncond"}
    assert tokens(report, batch=2) == {96 + 256 + 128 + 64}


def test_omni_from_text() -> None:
    assert tokens(sparse_run(omni(), run), batch=2) == {32 + 128}


def test_the_pipeline_that_takes_what_is_given() -> None:
    assert pipeline_class({"_class_name": "ZImagePipeline"}, False) == "ZImagePipeline"
    assert pipeline_class({"_class_name": "ZImagePipeline"}, True) == "ZImageImg2ImgPipeline"
    assert {pipeline_class({"_class_name": "ZImageOmniPipeline"}, image) for image in (False, True)} == {
        "ZImageOmniPipeline"
    }
