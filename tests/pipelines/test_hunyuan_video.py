"""HunyuanVideo in its own pipelines: what really ran is read off the report."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_hunyuan as tiny
import torch
from families import cases
from offline.hunyuan_video import pipeline
from torch import Tensor
from whole_runs import WINDOW, branches, sparse_run

import dit_sparse
from dit_sparse import METHODS, TokenLayout
from dit_sparse.method import Call
from dit_sparse.pipelines.hunyuan_video import FAMILY
from dit_sparse.pipelines.hunyuan_video_presets import PRESETS

CASES = cases()
GRID = 5 * 4 * 6
NAMES = [f"{stack}.{i}.attn" for stack in ("transformer_blocks", "single_transformer_blocks") for i in (0, 1)]


def run(pipe: Any, **changes: Any) -> Tensor:
    """Latents of one run; grid (5, 4, 6), and no second pass."""
    settings = {
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "guidance_scale": 6.0,
        "height": 64,
        "width": 96,
        "num_frames": 17,
        "max_sequence_length": 16,
        "prompt_template": {"template": "{}", "crop_start": 0},
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


def test_layers_are_both_stacks_and_no_refiner() -> None:
    model = CASES["hunyuan"].model()
    layers = FAMILY.layers(model)
    assert [layer.name for layer in layers] == NAMES
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    refiners = {n: p for n, p in model.attn_processors.items() if n.startswith("context_embedder")}
    assert refiners
    with dit_sparse.apply(model, WINDOW):
        assert all(model.attn_processors[n] is p for n, p in refiners.items())


@pytest.mark.parametrize("size", [(5, 8, 12), (1, 6, 10), (3, 9, 7)])
def test_layout_is_of_whole_patches(size: tuple[int, int, int]) -> None:
    model = CASES["hunyuan"].model()
    for batch in (1, 2):
        found = FAMILY.layout(model, {"hidden_states": torch.zeros(batch, 4, *size)})
        assert found == TokenLayout((size[0], size[1] // 2, size[2] // 2))


@pytest.mark.parametrize(
    ("changes", "frames"),
    [
        ({}, 0),
        ({"image_condition_type": "token_replace"}, 1),
        ({"image_condition_type": "latent_concat", "in_channels": 9}, 1),
        ({"in_channels": 8}, 1),  # SkyReels
    ],
)
def test_every_query_reads_the_given_image(changes: dict[str, Any], frames: int) -> None:
    model = tiny.transformer("HunyuanVideoTransformer3DModel", **changes)
    assert FAMILY.anchors(model, {}) == frames


def test_text_to_video() -> None:
    report = sparse_run(pipeline(), lambda pipe: run(pipe, prompt="a cat runs"))
    assert branches(report) == {"cond"}
    # Keys are counted that may be read: 4 of 16 tokens of text.
    assert {row.every[0] for row in report.rows} == {(GRID + 4) * (GRID + 16)}


def test_true_guidance_in_two_passes_of_two_prompts_each() -> None:
    prompts = {
        "prompt": ["a cat runs", "a dog"],
        "negative_prompt": ["a bird", "the blue cat sits"],
        "true_cfg_scale": 2.0,
    }
    report = sparse_run(pipeline(), lambda pipe: run(pipe, **prompts))
    assert branches(report) == {"cond", "uncond"}
    # A call of two items counts the pairs of both, each with its own text.
    lengths = {"cond": (4, 3), "uncond": (3, 5)}
    for row in report.rows:
        assert row.every[0] == sum(GRID + n for n in lengths[row.where.branch]) * (GRID + 16)


@torch.no_grad()
def test_padding_of_a_prompt_changes_nothing() -> None:
    pipe = pipeline()
    with dit_sparse.apply(pipe, WINDOW, schedule="always") as session:
        short, long = (run(pipe, prompt="a cat runs", max_sequence_length=n) for n in (4, 16))
        assert 0 < session.report().sparse_density < 0.9
    torch.testing.assert_close(short, long, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["token_replace", "latent_concat"])
def test_image_to_video(kind: str) -> None:
    concat = {"in_channels": 9, "guidance_embeds": False} if kind == "latent_concat" else {}
    pipe = pipeline(
        "HunyuanVideoImageToVideoPipeline", {"image_processor": None}, image_condition_type=kind, **concat
    )
    call = {"image": tiny.PICTURE, "true_cfg_scale": 2.0, **tiny.embeddings()}
    report = sparse_run(pipe, lambda pipe: run(pipe, **call))
    assert branches(report) == {"cond", "uncond"}


def test_skyreels_image_to_video() -> None:
    pipe = pipeline("HunyuanSkyreelsImageToVideoPipeline", in_channels=8)
    call = {"image": tiny.PICTURE, "prompt": "a cat runs", "negative_prompt": "a", "true_cfg_scale": 6.0}
    report = sparse_run(pipe, lambda pipe: run(pipe, **call))
    assert branches(report) == {"cond", "uncond"}


@torch.no_grad()
def test_compiled_in_regions_equals_eager() -> None:
    torch._dynamo.reset()
    pipe = pipeline()
    with dit_sparse.apply(pipe, WINDOW, schedule="dense 0-1%; layers 0") as session:
        eager = run(pipe, prompt="a cat runs")
        rows = session.report().to_dict()["rows"]
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(pipe, prompt="a cat runs"), eager, atol=1e-4, rtol=1e-4)
        assert session.report().to_dict()["rows"] == rows


@pytest.mark.parametrize(
    ("method", "densities"),
    [
        ("radial", (0.32, 0.27, 0.22)),
        ("neighborhood", (0.47, 0.29, 0.10)),
        ("sliding_tile", (0.37, 0.23, 0.08)),
    ],
)
def test_preset_densities_are_those_of_the_docstring(method: str, densities: tuple[float, ...]) -> None:
    call = Call.standalone(TokenLayout((33, 45, 80), text=256))
    for intent, expected in zip(("quality", "balanced", "fast"), densities, strict=True):
        chosen = METHODS[method](**PRESETS[method, "13b"][intent].parameters)
        order = chosen.order(call)
        empty = torch.empty(1, 1, order.slots, 0)
        plan = chosen.plan(empty, empty, call.at(order=order))
        density = plan.density(*(order.filled(block) for block in plan.block))
        assert density == pytest.approx(expected, abs=0.005), intent


def test_default_sizes_fit_the_models() -> None:
    for checkpoint in FAMILY.checkpoints.values():
        d = checkpoint.defaults
        f, h, w = FAMILY.pixels({"patch_size": 2, "patch_size_t": 1}, {})
        assert checkpoint.tokens is not None
        assert checkpoint.tokens.grid == ((d["num_frames"] - 1) // f + 1, d["height"] // h, d["width"] // w)


def test_pipelines_ask_for_an_image_or_take_none() -> None:
    t2v, i2v = ({"_class_name": f"HunyuanVideo{x}Pipeline"} for x in ("", "ImageToVideo"))
    assert FAMILY.pipeline_class(t2v, False) == "HunyuanVideoPipeline"
    assert FAMILY.pipeline_class(i2v, True) == "HunyuanVideoImageToVideoPipeline"
    for index, image, why in ((t2v, True, "takes no image"), (i2v, False, "needs an image")):
        with pytest.raises(ValueError, match=why):
            FAMILY.pipeline_class(index, image)
