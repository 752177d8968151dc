"""HunyuanImage 2.1 in its own pipelines: what really ran is read off the report."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_hunyuan as tiny
import tiny_text
import torch
from families import cases
from offline.hunyuan_image import guider, pipeline, shortened
from torch import Tensor
from whole_runs import WINDOW, branches, sparse_run

import dit_sparse
from dit_sparse import TokenLayout
from dit_sparse.pipelines.hunyuan_image import FAMILY

CASES = cases()
GRID = 10 * 12
REFINER = CASES["hunyuanimage-refiner"].changes
DISTILLED = {"guidance_embeds": True, "use_meanflow": True}


def test_layers_are_both_stacks_and_no_refiner() -> None:
    model = CASES["hunyuanimage"].model()
    stacks = ("transformer_blocks", "single_transformer_blocks")
    assert [layer.name for layer in FAMILY.layers(model)] == [f"{s}.{i}.attn" for s in stacks for i in (0, 1)]


@pytest.mark.parametrize(("name", "frames"), [("hunyuanimage", ()), ("hunyuanimage-refiner", (1,))])
@pytest.mark.parametrize("size", [(10, 12), (7, 3)])
def test_layout_has_one_frame(name: str, frames: tuple[int, ...], size: tuple[int, int]) -> None:
    model = CASES[name].model()
    for batch in (1, 2):
        latents = torch.zeros(batch, model.config.in_channels, *frames, *size)
        assert FAMILY.layout(model, {"hidden_states": latents}) == TokenLayout((1, *size))


def run(pipe: Any, **changes: Any) -> Tensor:
    """Latents of one run; grid (1, 10, 12), with a glyph text."""
    settings = {
        "prompt": 'a cat runs "blue dog"',
        "negative_prompt": "a bird",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "height": 40,
        "width": 48,
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


def test_text_to_image_under_a_guider() -> None:
    report = sparse_run(pipeline(guider()), run)
    assert branches(report) == {"pred_cond", "pred_uncond"}
    # Padding is hidden; quoted words are text to be drawn as well.
    text = {"pred_cond": 8 + 6, "pred_uncond": 3}
    for row in report.rows:
        assert row.every[0] == (GRID + text[row.where.branch]) * (GRID + 12 + 8)


def test_two_prompts_of_different_lengths() -> None:
    prompts = {"prompt": ["a cat runs", "a dog"], "negative_prompt": ["a", "the blue bird sits"]}
    report = sparse_run(pipeline(guider()), lambda pipe: run(pipe, **prompts))
    assert branches(report) == {"pred_cond", "pred_uncond"}


def test_distilled() -> None:
    report = sparse_run(pipeline(**DISTILLED), run)
    assert branches(report) == {"pred_cond"}


def test_skip_layer_guidance_is_a_branch_of_its_own() -> None:
    from diffusers import LayerSkipConfig, SkipLayerGuidance

    skipped = LayerSkipConfig([1], fqn="single_transformer_blocks")
    skips = SkipLayerGuidance(
        guidance_scale=3.5, skip_layer_config=skipped, skip_layer_guidance_start=0, skip_layer_guidance_stop=1
    )
    pipe = pipeline(skips)
    with dit_sparse.apply(pipe, WINDOW, schedule="always") as session:
        assert run(pipe).isfinite().all()
        rows = session.report().rows
    assert {row.where.branch for row in rows} == {"pred_cond", "pred_uncond", "pred_cond_skip"}
    skipping = {row.where.name for row in rows if row.where.branch == "pred_cond_skip"}
    assert {row.where.name for row in rows} - skipping == {"single_transformer_blocks.1.attn"}


def test_refiner() -> None:
    from diffusers import (
        AutoencoderKLHunyuanImageRefiner,
        FlowMatchEulerDiscreteScheduler,
        HunyuanImageRefinerPipeline,
    )

    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanImageRefiner(
        latent_channels=2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    pipe = HunyuanImageRefinerPipeline(
        transformer=tiny.transformer("HunyuanImageTransformer2DModel", **REFINER),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        text_encoder=tiny_text.llama(16),
        tokenizer=tiny_text.tokenizer(),
    )
    report = sparse_run(shortened(pipe), lambda pipe: run(pipe, image=tiny.PICTURE))
    assert branches(report) == {"pred_cond"}
    assert FAMILY.pipeline_class({"_class_name": "HunyuanImageRefinerPipeline"}, True)


@torch.no_grad()
def test_padding_of_a_prompt_changes_nothing() -> None:
    pipe, latents = pipeline(**DISTILLED), []
    with dit_sparse.apply(pipe, WINDOW, schedule="always") as session:
        for pipe.tokenizer_max_length, pipe.tokenizer_2_max_length in ((8, 6), (12, 8)):
            latents.append(run(pipe))
        assert 0 < session.report().sparse_density < 0.9
    torch.testing.assert_close(*latents, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_compiled_in_regions_equals_eager() -> None:
    torch._dynamo.reset()
    case = CASES["hunyuanimage"]
    model = case.model()
    inputs = case.inputs(model, 2, case.grid, 0)
    with dit_sparse.apply(model, WINDOW, schedule="layers 0") as session:
        eager = model(**inputs)[0]
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(**inputs)[0], eager, atol=1e-5, rtol=1e-5)
        assert {row.calls for row in session.report().sparse_rows} == {2}


def test_default_sizes_fit_the_models() -> None:
    for checkpoint, ratio in zip(FAMILY.checkpoints.values(), (32, 32, 16), strict=True):
        patch = checkpoint.config.get("patch_size", (1, 1))
        f, h, w = FAMILY.pixels({"patch_size": patch}, {"spatial_compression_ratio": ratio})
        d = checkpoint.defaults
        assert checkpoint.tokens is not None
        assert checkpoint.tokens.grid == (f, d["height"] // h, d["width"] // w)
