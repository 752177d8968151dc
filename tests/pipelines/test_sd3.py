"""Stable Diffusion 3 end to end in its pipelines."""

from __future__ import annotations

from functools import partial

import pytest
import tiny_images
import torch
from families.sd3 import CASES, inputs
from offline.sd3 import pipeline
from PIL import Image
from tiny_images import picture, run
from whole_runs import WINDOW, branches, sparse_run, tokens

import dit_sparse
from dit_sparse import TokenLayout
from dit_sparse.pipelines.sd3 import layers, layout, pipeline_class


def test_second_attentions_are_layers_in_the_place_of_their_block() -> None:
    assert [layer.name for layer in layers(CASES["sd3"].model())] == [
        f"transformer_blocks.{i}.attn" for i in range(3)
    ]
    found = layers(CASES["sd3.5-medium"].model())
    assert [(layer.index, layer.name.removeprefix("transformer_blocks.")) for layer in found] == [
        (0, "0.attn"),
        (0, "0.attn2"),
        (1, "1.attn"),
        (1, "1.attn2"),
        (2, "2.attn"),
    ]
    assert {layer.count for layer in found} == {3}


@pytest.mark.parametrize("grid", [(1, 9, 7), (1, 3, 16)])
def test_layout(grid: tuple[int, int, int]) -> None:
    model = CASES["sd3"].model()
    assert layout(model, inputs(model, 2, grid, 0)) == TokenLayout(grid)


def test_text_to_image() -> None:
    report = sparse_run(pipeline(), run)
    assert branches(report) == {"cond_uncond"}
    assert tokens(report, batch=2) == {120 + 28}


def test_a_second_attention_sees_no_text() -> None:
    report = sparse_run(pipeline("sd3.5-medium"), run)
    assert {row.every[0] for row in report.rows if row.where.name.endswith("attn2")} == {2 * 120**2}
    assert tokens(report, batch=2) == {120, 120 + 28}


def test_skip_layer_guidance_is_a_call_of_its_own() -> None:
    """It leaves out a block at steps 1 and 2, for the prompt alone."""
    skipped = partial(run, skip_guidance_layers=[1], skip_layer_guidance_stop=0.6)
    report = sparse_run(pipeline(), skipped)
    assert branches(report) == {"cond_uncond", "cond_skip"}
    rows = [row.where for row in report.rows if row.where.branch == "cond_skip"]
    assert {(where.step, where.layer) for where in rows} == {(1, 0), (1, 2), (2, 0), (2, 2)}


def test_several_prompts_without_guidance() -> None:
    two = partial(run, prompt=["a cat runs", "the blue dog"], negative_prompt=None, guidance_scale=0.0)
    assert tokens(sparse_run(pipeline(), two), batch=2) == {120 + 28}


def test_image_to_image() -> None:
    changed = partial(run, image=picture(), strength=0.75)
    report = sparse_run(pipeline(name="StableDiffusion3Img2ImgPipeline"), changed, steps=[1, 2, 3])
    assert tokens(report, batch=2) == {120 + 28}


def test_inpainting() -> None:
    wide = CASES["sd3"]._replace(changes={"in_channels": 16, "out_channels": 16}).model()
    pipe = pipeline(name="StableDiffusion3InpaintPipeline", transformer=wide, vae=tiny_images.vae(16))
    filled = partial(run, image=picture(), mask_image=Image.new("L", (48, 40), 255), strength=1.0)
    assert tokens(sparse_run(pipe, filled), batch=2) == {120 + 28}


def test_fused_projections() -> None:
    """The model then has other processors."""
    pipe = pipeline()
    pipe.transformer.fuse_qkv_projections()
    assert tokens(sparse_run(pipe, run), batch=2) == {120 + 28}


def test_an_image_prompt_stays_dense() -> None:
    """The second attention of an IP-Adapter, over [image, text, image prompt]."""
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    model = CASES["sd3"].model()
    torch.manual_seed(0)
    for block in model.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(32, 16, 16, timesteps_emb_dim=16))
    prompt = {"ip_hidden_states": torch.randn(2, 4, 16), "temb": torch.randn(2, 16)}
    call = {**inputs(model, 2, (1, 10, 12), 0), "joint_attention_kwargs": prompt}
    with torch.no_grad():
        stock = model(**call)[0]
        with dit_sparse.apply(model, WINDOW, schedule="always") as session:
            out = model(**call)[0]
            report = session.report()
        assert torch.equal(model(**call)[0], stock)
    assert not torch.equal(out, stock)
    assert {row.where.name for row in report.sparse_rows} == {layer.name for layer in layers(model)}
    assert {row.where.reason for row in report.rows} == {"", "120 queries read 124 keys of another sequence"}


def test_the_pipeline_that_takes_what_is_given() -> None:
    index = {"_class_name": "StableDiffusion3Pipeline"}
    assert pipeline_class(index, False) == "StableDiffusion3Pipeline"
    assert pipeline_class(index, True) == "StableDiffusion3Img2ImgPipeline"
