"""Helios in its own pipelines, chunk after chunk and stage after stage: what really ran is in the report."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from offline.helios import CASES, pipeline
from PIL import Image
from torch import Tensor
from whole_runs import WINDOW, branches, sparse_run, tokens

import dit_sparse
from dit_sparse import TokenLayout
from dit_sparse.pipelines.helios import FAMILY

HISTORY = 8 + 6 + 2 * 24
"""Tokens of 16, 2 and 2 frames of 8x12 latents."""


def run(pipe: Any, **changes: Any) -> Tensor:
    """Latents of two chunks of 3 frames of latents."""
    settings = {
        "prompt": "a cat runs",
        "negative_prompt": "a dog",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "height": 64,
        "width": 96,
        "num_frames": 18,
        "num_latent_frames_per_chunk": 3,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


def test_layers_are_self_attention() -> None:
    model = CASES["helios"].model()
    assert [layer.name for layer in FAMILY.layers(model)] == [f"blocks.{i}.attn1" for i in range(3)]


@pytest.mark.parametrize("batch", [1, 2])
def test_histories_are_a_prefix_of_whole_patches(batch: int) -> None:
    model = CASES["helios"].model()
    call = CASES["helios"].inputs(model, batch, (5, 4, 6), 0)
    assert FAMILY.layout(model, call) == TokenLayout((5, 4, 6), prefix=HISTORY)
    odd = CASES["helios"].inputs(model, batch, (2, 3, 5), 0)  # 6x10 latents: padded to 8x12 and 8x16
    assert FAMILY.layout(model, odd) == TokenLayout((2, 3, 5), prefix=4 * 2 + 2 * 3 + 2 * 15)
    for name in ("long", "mid"):
        call[f"latents_history_{name}"] = None
    assert FAMILY.layout(model, call) == TokenLayout((5, 4, 6), prefix=2 * 24)
    alone = {"hidden_states": call["hidden_states"]}
    assert FAMILY.layout(model, alone) == TokenLayout((5, 4, 6))


def test_every_chunk_is_in_the_report() -> None:
    report = sparse_run(pipeline(), run)
    assert branches(report) == {"cond", "uncond"}
    assert {row.calls for row in report.rows} == {2}
    assert {row.every[0] for row in report.rows} == {2 * (HISTORY + 3 * 24) ** 2}


def test_a_chunk_remembers_nothing_of_the_one_before() -> None:
    """A method that looks once does so at the first step of every chunk."""
    pipe = pipeline()
    with dit_sparse.apply(pipe, tiny_models.Cached(), schedule="always") as session:
        run(pipe)
        phases = {(r.where.step, r.where.phase.value): r.calls for r in session.report().rows}
    assert phases == {(0, "refresh"): 2, (1, "sparse"): 2, (2, "sparse"): 2, (3, "sparse"): 2}


def test_a_report_is_of_one_run_also_after_one_that_was_broken_off() -> None:
    pipe = pipeline()

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with dit_sparse.apply(pipe, WINDOW, schedule="always") as session:
        run(pipe)
        run(pipe)
        assert {row.calls for row in session.report().rows} == {2}
        with pytest.raises(KeyboardInterrupt):
            run(pipe, callback_on_step_end=stop)
        run(pipe)
        assert {row.calls for row in session.report().rows} == {2}


def test_image_to_video() -> None:
    image = Image.new("RGB", (96, 64), (200, 80, 20))
    report = sparse_run(pipeline(), lambda pipe: run(pipe, image=image))
    assert tokens(report) == {round(2**0.5 * (HISTORY + 3 * 24))}


def pyramid(distilled: bool) -> Any:
    import diffusers

    # With its default gamma of 1/3 the pipeline's noise has a covariance that is only just positive.
    sizes = {"stages": 2, "stage_range": [0, 1 / 2, 1], "gamma": 0.3}
    if distilled:
        scheduler = diffusers.HeliosDMDScheduler(**sizes)
        return pipeline("HeliosPyramidPipeline", scheduler, is_distilled=True)
    return pipeline("HeliosPyramidPipeline", diffusers.HeliosScheduler(**sizes))


@pytest.mark.parametrize("distilled", [False, True])
def test_every_stage_of_every_chunk_is_in_the_report(distilled: bool) -> None:
    """Stages of 2x3 and of 4x6 tokens a frame, each of which counts its steps from 0."""

    def run_pyramid(pipe: Any) -> Tensor:
        given = {"pyramid_num_inference_steps_list": [4, 4]}
        settings = {"num_frames": 18, "num_latent_frames_per_chunk": 3, "max_sequence_length": 16}
        return pipe(
            "a cat runs",
            negative_prompt="a dog",
            generator=torch.Generator().manual_seed(0),
            guidance_scale=1.0 if distilled else 5.0,
            height=64,
            width=96,
            output_type="latent",
            **settings,
            **given,
        )[0]

    report = sparse_run(pyramid(distilled), run_pyramid)
    assert branches(report) == ({"cond"} if distilled else {"cond", "uncond"})
    assert {row.calls for row in report.rows} == {4}
    pairs = 2 * (HISTORY + 3 * 6) ** 2 + 2 * (HISTORY + 3 * 24) ** 2
    assert {row.every[0] for row in report.rows} == {pairs}
