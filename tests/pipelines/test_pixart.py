"""PixArt end to end in its pipelines, and the presets of Re-ttention."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from families.pixart import CASES, inputs
from offline.pixart import pipeline
from tiny_images import run
from whole_runs import branches, sparse_run, tokens

from dit_sparse import METHODS, Order, Phase, Schedule, TokenLayout
from dit_sparse.method import Call
from dit_sparse.pipelines.load import find
from dit_sparse.pipelines.pixart import PRESETS, layers, layout

plain = partial(run, use_resolution_binning=False, clean_caption=False)


def test_layers_are_self_attentions() -> None:
    found = layers(CASES["pixart"].model())
    assert [(layer.index, layer.name) for layer in found] == [
        (i, f"transformer_blocks.{i}.attn1") for i in range(3)
    ]


@pytest.mark.parametrize("grid", [(1, 9, 7), (1, 3, 16)])
def test_layout(grid: tuple[int, int, int]) -> None:
    model = CASES["pixart"].model()
    assert layout(model, inputs(model, 2, grid, 0)) == TokenLayout(grid)


@pytest.mark.parametrize("name", ["PixArtSigmaPipeline", "PixArtAlphaPipeline"])
@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "DDIMScheduler"])
def test_text_to_image(name: str, scheduler: str) -> None:
    """DDIM does not count its steps."""
    report = sparse_run(pipeline(name, scheduler), plain)
    assert branches(report) == {"cond_uncond"}
    assert tokens(report, batch=2) == {120}


def test_without_guidance() -> None:
    assert tokens(sparse_run(pipeline(), partial(plain, guidance_scale=1.0))) == {120}


def test_fused_projections() -> None:
    """The model then has other processors."""
    pipe = pipeline()
    pipe.transformer.fuse_qkv_projections()
    assert tokens(sparse_run(pipe, plain), batch=2) == {120}


@pytest.mark.parametrize(("intent", "reach"), [("quality", 128), ("balanced", 64), ("fast", 64)])
def test_presets_are_the_schedule_and_the_windows_of_the_paper(intent: str, reach: int) -> None:
    """Of 20 steps 0 to 4 are dense and 5, 10 and 15 refreshed; windows are 256 and 128 tokens wide."""
    preset = PRESETS["rettention", "xl"][intent]
    method = METHODS["rettention"](**preset.parameters)
    schedule = Schedule.parse(preset.schedule).with_refresh(method.refresh)
    phases = [schedule.phase(step, 20, 3, 28) for step in range(20)]
    assert phases[:5] == [Phase.DENSE] * 5
    assert [step for step, phase in enumerate(phases) if phase is Phase.REFRESH] == [5, 10, 15]
    empty, order = torch.empty(1, 1, 4096, 0), Order.raster(TokenLayout((1, 64, 64)))
    plan = method.plan(empty, empty, Call.standalone(TokenLayout((1, 64, 64))).at(order=order))
    blocks = torch.arange(64)
    assert torch.equal(plan.to_blocks()[0, 0], (blocks[:, None] - blocks).abs() <= reach // 64)


def test_the_old_name_of_the_class_is_found(tmp_path: Path) -> None:
    """The models on the Hub name ``Transformer2DModel``, which diffusers replaces as it loads them."""
    parts = {"transformer": ["diffusers", "Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline", **parts}))
    configs = {
        "transformer": {"patch_size": 2, "caption_channels": 4096, "use_additional_conditions": False},
        "vae": {"block_out_channels": [128, 256, 512, 512]},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    source = find(str(tmp_path))
    assert source.family.name == "pixart"
    assert source.size == "xl"
    assert source.grid(1, 1024, 512) == (1, 64, 32)
