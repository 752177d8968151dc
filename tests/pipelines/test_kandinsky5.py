"""Kandinsky 5 in its own pipelines: what really ran is read off the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_kandinsky import fractal_flatten
from offline.kandinsky5 import CASES, pipeline
from PIL import Image
from torch import Tensor
from whole_runs import WINDOW, branches, sparse_run, tokens

import dit_sparse
from dit_sparse import Phase, TokenLayout
from dit_sparse.pipelines.kandinsky5 import FAMILY, in_squares

NAMES = [f"visual_transformer_blocks.{i}.self_attention" for i in range(3)]


def run(pipe: Any, **changes: Any) -> Tensor:
    """Latents of one run, with prompts of different lengths."""
    embeds = {}
    for negative, length in (("", 12), ("negative_", 7)):
        generator = torch.Generator().manual_seed(length)
        embeds[f"{negative}prompt_embeds_qwen"] = torch.randn(1, length, 16, generator=generator)
        embeds[f"{negative}prompt_embeds_clip"] = torch.randn(1, 8, generator=generator)
        embeds[f"{negative}prompt_cu_seqlens"] = torch.tensor([0, length])
    settings = {
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "height": 64,
        "width": 96,
        "num_frames": 17,
        "output_type": "latent",
        "return_dict": False,
    }
    return pipe(**{**embeds, **settings, **changes})[0]


def test_layers_are_the_self_attention_of_the_video() -> None:
    model = CASES["kandinsky5"].model()
    assert [layer.name for layer in FAMILY.layers(model)] == NAMES
    others = {n: p for n, p in model.attn_processors.items() if n.removesuffix(".processor") not in NAMES}
    assert len(others) == 4
    with dit_sparse.apply(model, WINDOW):
        assert all(model.attn_processors[n] is p for n, p in others.items())


@pytest.mark.parametrize("size", [(5, 8, 12), (1, 6, 10), (3, 9, 7)])
@pytest.mark.parametrize("batch", [1, 2])
def test_layout_is_of_whole_patches(size: tuple[int, int, int], batch: int) -> None:
    model = CASES["kandinsky5-i2v"].model()
    call = {"hidden_states": torch.zeros(batch, *size, 9)}
    assert FAMILY.layout(model, call) == TokenLayout((size[0], size[1] // 2, size[2] // 2))
    assert FAMILY.positions(model, call) is None
    assert FAMILY.anchors(model, call) == int(size[0] > 1)  # one frame is an image to edit
    assert FAMILY.anchors(CASES["kandinsky5"].model(), call) == 0


@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 16, 8), (2, 8, 24), (4, 16, 16)])
def test_positions_undo_the_models_own_order(grid: tuple[int, int, int]) -> None:
    raster = torch.arange(grid[0] * grid[1] * grid[2]).view(1, *grid, 1)
    ordered, _ = fractal_flatten(raster, raster, (1, *grid), block_mask=True)
    assert torch.equal(ordered.flatten()[in_squares(grid)], raster.flatten())


def test_text_to_video() -> None:
    report = sparse_run(pipeline("kandinsky5"), run)
    assert branches(report) == {"cond", "uncond"}
    assert tokens(report) == {5 * 4 * 6}
    assert report.sparse_density < 0.4
    assert branches(sparse_run(pipeline("kandinsky5"), lambda p: run(p, guidance_scale=1.0))) == {"cond"}


def test_image_to_video_reads_its_image() -> None:
    pipe = pipeline("kandinsky5-i2v", "Kandinsky5I2VPipeline")
    image = Image.new("RGB", (96, 64), (200, 80, 20))
    report = sparse_run(pipe, lambda pipe: run(pipe, image=image))
    assert branches(report) == {"cond", "uncond"}
    assert report.sparse_density > 0.4


def test_a_method_takes_the_place_of_nabla() -> None:
    pipe = pipeline("kandinsky5-nabla")
    for name, value in {"P": 0.9, "wT": 11, "wH": 3, "wW": 3}.items():
        pipe.transformer.register_to_config(**{f"attention_{name}": value})
    report = sparse_run(pipe, lambda pipe: run(pipe, height=128, width=256))
    assert tokens(report) == {5 * 8 * 16}
    assert branches(report) == {"cond", "uncond"}
    assert report.sparse_density < 0.4


@torch.no_grad()
def test_what_a_schedule_leaves_dense_is_full_attention_and_other_layers_keep_nabla() -> None:
    case = CASES["kandinsky5-nabla"]
    model = case.model()
    inputs = case.inputs(model, 1, case.grid, 0)
    full = model(**{**inputs, "sparse_params": None})
    own = dict(model.attn_processors)
    with dit_sparse.apply(model, WINDOW, schedule="layers 0-100%") as session:
        torch.testing.assert_close(model(**inputs), full, atol=1e-5, rtol=1e-5)
        assert {row.where.reason for row in session.report().rows} == {"schedule"}
    one = {f"{NAMES[1]}.processor": WINDOW}
    with dit_sparse.apply(model, one, schedule="always") as session:
        replaced = {n for n, p in model.attn_processors.items() if p is not own[n]}
        assert replaced == set(one)
        assert model(**inputs).isfinite().all()
        assert {(row.where.name, row.where.phase) for row in session.report().rows} == {
            (NAMES[1], Phase.SPARSE)
        }


@torch.no_grad()
def test_the_order_of_nabla_changes_nothing_else() -> None:
    """The same video in raster order and in squares: a method sees the same grid."""
    case = CASES["kandinsky5-nabla"]
    model = case.model()
    inputs = case.inputs(model, 2, case.grid, 0)
    with dit_sparse.apply(model, WINDOW, schedule="always", strict=True):
        squares, raster = (model(**{**inputs, "sparse_params": p}) for p in (inputs["sparse_params"], None))
    torch.testing.assert_close(squares, raster, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_compiled_in_the_order_of_nabla() -> None:
    case = CASES["kandinsky5-nabla"]
    model = case.model()
    inputs = case.inputs(model, 1, case.grid, 0)
    with dit_sparse.apply(model, WINDOW, schedule="always", strict=True):
        eager = model(**inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs), eager, atol=1e-5, rtol=1e-5)


def test_sizes_in_pixels() -> None:
    vae = {"temporal_compression_ratio": 4, "spatial_compression_ratio": 8}
    config = {"patch_size": [1, 2, 2], "attention_type": "regular"}
    assert FAMILY.multiples is not None
    assert FAMILY.pixels(config, vae) == FAMILY.multiples(config, vae) == (4, 16, 16)
    assert FAMILY.multiples({**config, "attention_type": "nabla"}, vae) == (4, 128, 128)


def test_copies_have_the_size_of_their_configuration() -> None:
    for name, checkpoint in FAMILY.checkpoints.items():
        config = {"_class_name": checkpoint.transformer, **checkpoint.config}
        assert FAMILY.preset_size(config, 1) == checkpoint.size, name
