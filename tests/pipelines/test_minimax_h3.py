"""MiniMax-H3 in diffusers' own denoising loop: what really ran is read off the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.modular_pipelines import PipelineState
from families import cases
from families.minimax_h3 import inputs
from torch import Tensor
from whole_runs import WINDOW, branches, sparse_run, tokens

import dit_sparse
from dit_sparse import TokenLayout
from dit_sparse.pipelines.minimax_h3 import FAMILY

CASES = cases()
ROWS = "token_tags", "position_ids", "video_indices", "audio_indices", "text_indices"


def pipeline() -> Any:
    from diffusers import MiniMaxH3Scheduler
    from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3DenoiseStep

    pipe = MiniMaxH3DenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=CASES["minimax-h3"].model(),
        scheduler=MiniMaxH3Scheduler(),
        audio_scheduler=MiniMaxH3Scheduler(),
    )
    return pipe


def run(pipe: Any) -> Tensor:
    """Four steps, between five times, with the first frame given: it keeps the timestep 0.95."""
    call = inputs(pipe.transformer, 1, (5, 4, 6), 0, keyframes=(0.0,))
    for scheduler in (pipe.scheduler, pipe.audio_scheduler):
        scheduler.set_timesteps(5)
    timesteps = pipe.scheduler.timesteps
    plan = [(torch.stack([t, torch.tensor(0.95)]), call["timestep_indices"]) for t in timesteps]
    state = PipelineState()
    for name in ROWS:
        state.set(name, call[name], "denoiser_input_fields")
    return pipe(
        state,
        latents=call["hidden_states"][0].clone(),
        audio_latents=call["audio_hidden_states"][0].clone(),
        prompt_embeds=call["encoder_hidden_states"],
        row_timestep_plan=plan,
        timesteps=timesteps,
        audio_timesteps=pipe.audio_scheduler.timesteps,
        num_condition_video_rows=24,
        output="latents",
    )


def test_layers_are_the_blocks_and_no_refiner() -> None:
    model = CASES["minimax-h3"].model()
    names = [layer.name for layer in FAMILY.layers(model)]
    assert names == [f"transformer_blocks.{i}.attn" for i in range(3)]
    refiner = {n: p for n, p in model.attn_processors.items() if n.startswith("token_refiner")}
    assert refiner
    with dit_sparse.apply(model, WINDOW):
        assert all(model.attn_processors[n] is p for n, p in refiner.items())


@pytest.mark.parametrize("grid", [(5, 4, 6), (7, 3, 5), (2, 8, 4)])
@pytest.mark.parametrize("keyframes", [(), (0.0,), (30.0,), (0.0, 30.0)])
def test_what_is_given_stands_before_the_grid(
    grid: tuple[int, int, int], keyframes: tuple[float, ...]
) -> None:
    model = CASES["minimax-h3"].model()
    call = inputs(model, 2, grid, 0, keyframes)
    given = len(keyframes) * grid[1] * grid[2] + call["audio_hidden_states"].shape[1]
    assert FAMILY.layout(model, call) == TokenLayout(grid, text_first=True, prefix=given)


def test_frames_that_are_no_frames_stay_dense() -> None:
    model = CASES["minimax-h3"].model()
    call = inputs(model, 1, (5, 4, 6), 0)
    points = call["position_ids"].clone()
    points[-1, 1:] = points[-2, 1:] + 0.5
    found = FAMILY.layout(model, {**call, "position_ids": points})
    assert found == "the last 24 tokens, of one time, are no frame of 5x7"


def test_keyframe_to_video() -> None:
    report = sparse_run(pipeline(), run)
    assert branches(report) == {"cond"}
    assert tokens(report) == {12 + 24 + 50 + 120}
