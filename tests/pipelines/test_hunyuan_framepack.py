"""Framepack in its own pipeline: what really ran is read off the report."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_hunyuan as tiny
import torch
from families import Pipe, at_step, cases
from offline.hunyuan_framepack import pipeline
from torch import Tensor
from whole_runs import WINDOW, branches, sparse_run, tokens

import dit_sparse
from dit_sparse import Phase, TokenLayout
from dit_sparse.pipelines.hunyuan_framepack import FAMILY

CASE = cases()["framepack"]
SECTION, IMAGE = 3 * 4 * 6, 4
HISTORY = 2 * 4 * 6 + 1 * 2 * 3 + 4 * 1 * 2  # 1 + 1 whole frames, 2 at half, 16 at a quarter


def run(pipe: Any, **changes: Any) -> Tensor:
    """The latents of all sections, of 3 latent frames each."""
    settings = {
        "image": tiny.PICTURE,
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "latent_window_size": 3,
        "max_sequence_length": 16,
        "prompt_template": {"template": "{}", "crop_start": 0},
        "output_type": "latent",
    }
    return torch.cat(pipe(**{**settings, **changes})[0], dim=2)


@pytest.mark.parametrize("sides", [(8, 12), (6, 10), (10, 14)])
def test_history_stands_before_the_grid(sides: tuple[int, int]) -> None:
    """What the layout says is what the model makes, also of sizes its kernels do not divide."""
    model = CASE.model()
    height, width = (n // 2 for n in sides)
    inputs = CASE.inputs(model, 1, (3, height, width), 0)
    for name in ("latents_history_4x", "indices_latents_history_4x"):
        axis = 2 if inputs[name].ndim == 5 else 0
        inputs[name] = inputs[name].narrow(axis, 0, 3)
    expected = 2 * height * width + -(-height // 2) * -(-width // 2) + -(-height // 4) * -(-width // 4)
    assert FAMILY.layout(model, inputs) == TokenLayout((3, height, width), prefix=expected)
    text = 3 + int(inputs["encoder_attention_mask"].sum())
    with torch.no_grad(), dit_sparse.apply(model, WINDOW, schedule="layers 0", strict=True) as session:
        model(**inputs)
        assert tokens(session.report()) == {3 * height * width + expected + text}


@pytest.mark.parametrize("sampling", ["inverted_anti_drifting", "vanilla"])
def test_image_to_video_in_two_passes(sampling: str) -> None:
    call = {"prompt": "a cat runs", "negative_prompt": "a", "true_cfg_scale": 2.0, "sampling_type": sampling}
    report = sparse_run(pipeline(), lambda pipe: run(pipe, **call))
    assert branches(report) == {"cond", "uncond"}
    # A single prompt is trimmed: each branch has a sequence of its own.
    assert tokens(report) == {SECTION + HISTORY + IMAGE + n for n in (4, 2)}


def test_every_section_counts_its_steps_anew() -> None:
    """Two sections: the first step of both is dense, and a layer searches once in each."""
    report = sparse_run(pipeline(), lambda pipe: run(pipe, prompt="a cat runs", num_frames=18))
    assert {row.calls for row in report.rows} == {2}
    pipe = pipeline()
    with dit_sparse.apply(pipe, "adaspa", block=8, schedule="dense 0-1%; layers 0") as session:
        run(pipe, prompt="a cat runs", num_frames=18)
        rows = session.report().sparse_rows
    searches = [row for row in rows if row.where.phase is Phase.REFRESH and row.where.step == 1]
    assert [row.calls for row in searches] == [2, 2, 2]


def test_a_last_image_is_part_of_the_history() -> None:
    report = sparse_run(pipeline(), lambda pipe: run(pipe, prompt="a dog", last_image=tiny.PICTURE))
    assert tokens(report) == {SECTION + HISTORY + IMAGE + 3}


@torch.no_grad()
def test_a_prompt_that_changes_during_a_run_starts_anew() -> None:
    """Text is trimmed, so another prompt makes another sequence: nothing remembered of the first fits it."""
    model = CASE.model()
    pipe = Pipe(model)
    with dit_sparse.apply(pipe, "adaspa", block=8, schedule="always") as session:
        for step, item in ((0, 0), (1, 0), (2, 1), (3, 1)):
            with at_step(pipe, "cond", step):
                model(**CASE.inputs(model, 1, CASE.grid, item))
        phases = {row.where.step: row.where.phase.name for row in session.report().rows}
    assert phases == {0: "REFRESH", 1: "SPARSE", 2: "REFRESH", 3: "SPARSE"}
