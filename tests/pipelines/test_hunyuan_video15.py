"""HunyuanVideo 1.5: its mask of S x S is never made, and what really ran in its pipelines."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest
import tiny_hunyuan as tiny
import torch
from families import Pipe, at_step, cases
from offline.hunyuan_video15 import pipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from whole_runs import WINDOW, branches, sparse_run, tokens

import dit_sparse
from dit_sparse import DenseProcessor, TokenLayout
from dit_sparse.pipelines.hunyuan_video15 import FAMILY, keys_only

CASES = cases()
GRID = 5 * 4 * 6


class Largest(TorchDispatchMode):
    """The most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(x):
                self.elements = max(self.elements, x.numel())
        return out


@torch.no_grad()
def test_no_tensor_of_all_pairs_is_made() -> None:
    """Neither where a method runs nor in dense calls; the stock processor makes one of B * S * S in every."""
    model = CASES["hunyuan15"].model()
    inputs = CASES["hunyuan15"].inputs(model, 2, (4, 20, 30), 0)
    pairs = (4 * 20 * 30 + 12 + 7 + 4) ** 2
    with Largest() as stock:
        model(**inputs)
    assert stock.elements >= 2 * pairs
    with dit_sparse.apply(model, "window", density=0.2, block=64, schedule="layers 0") as session:
        with Largest() as largest:
            model(**inputs)
        assert {row.where.reason for row in session.report().rows} == {"schedule", ""}
    assert largest.elements < pairs


@torch.no_grad()
@pytest.mark.parametrize("name", ["hunyuan15", "hunyuan15-i2v"])
@pytest.mark.parametrize("schedule", ["always", "dense 0-100%"])
def test_the_video_is_that_of_the_stock_mask(name: str, schedule: str) -> None:
    """Padded queries, which that mask lets read nothing, here read what all do: nothing reads them."""
    case = CASES[name]
    model = case.model()
    inputs = case.inputs(model, 2, case.grid, 0)
    stock = model(**inputs)[0]
    pipe = Pipe(model)
    session = dit_sparse.apply(pipe, DenseProcessor(block=16), schedule=schedule)
    session.full_plan_is_dense = False
    with at_step(pipe, "pred_cond", 0):
        torch.testing.assert_close(model(**inputs)[0], stock, atol=1e-5, rtol=1e-5)
    assert {row.where.reason for row in session.report().rows} == {"" if schedule == "always" else "schedule"}


def test_another_source_of_the_mask_is_refused() -> None:
    (call,) = ast.parse("def __call__(self, attn):\n    attention_mask = attention_mask.bool()").body
    assert isinstance(call, ast.FunctionDef)
    with pytest.raises(ValueError, match="was expected to have the lines"):
        keys_only(call)


def test_layers_layout_and_anchors() -> None:
    model = CASES["hunyuan15"].model()
    layers = FAMILY.layers(model)
    assert [layer.name for layer in layers] == [f"transformer_blocks.{i}.attn" for i in range(3)]
    for size in ((5, 4, 6), (1, 3, 7)):
        for batch in (1, 2):
            found = FAMILY.layout(model, {"hidden_states": torch.zeros(batch, 9, *size)})
            assert found == TokenLayout(size)
    assert FAMILY.anchors(model, {}) == 0
    assert FAMILY.anchors(CASES["hunyuan15-i2v"].model(), {}) == 1


def compiled_regions(model: Any) -> None:
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")


def compiled_whole(model: Any) -> None:
    model.compile(backend="aot_eager")


@torch.no_grad()
@pytest.mark.parametrize("compiled", [compiled_regions, compiled_whole])
def test_compiled_equals_eager(compiled: Callable[[Any], None]) -> None:
    """As a whole it is several graphs, also stock: it asks whether there is an image."""
    torch._dynamo.reset()
    case = CASES["hunyuan15-i2v"]
    model = case.model()
    inputs = case.inputs(model, 2, case.grid, 0)
    with dit_sparse.apply(model, WINDOW, schedule="layers 0") as session:
        eager = model(**inputs)[0]
        compiled(model)
        torch.testing.assert_close(model(**inputs)[0], eager, atol=1e-5, rtol=1e-5)
        sparse = {row.where.name: row.calls for row in session.report().sparse_rows}
    assert sparse == {"transformer_blocks.1.attn": 2, "transformer_blocks.2.attn": 2}


def run(pipe: Any, **changes: Any) -> Tensor:
    """Latents of one run, with a glyph text; grid (5, 4, 6) of text to video."""
    settings = {
        "prompt": 'a cat runs "blue dog"',
        "negative_prompt": "a bird",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "num_frames": 9,
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


SIZE = {"height": 16, "width": 24}


def test_text_to_video_under_a_guider() -> None:
    report = sparse_run(pipeline(), lambda pipe: run(pipe, **SIZE))
    assert branches(report) == {"pred_cond", "pred_uncond"}
    # Image tokens, of no image, are hidden, and so is padding; quoted words are text to be drawn as well.
    text = {"pred_cond": 7 + 6, "pred_uncond": 2}
    for row in report.rows:
        assert row.every[0] == (GRID + text[row.where.branch]) * (GRID + 12 + 8 + 4)


def test_two_prompts_of_different_lengths() -> None:
    prompts = {"prompt": ["a cat runs", "a dog"], "negative_prompt": ["a", "the blue bird sits"]}
    report = sparse_run(pipeline(), lambda pipe: run(pipe, **prompts, **SIZE))
    assert branches(report) == {"pred_cond", "pred_uncond"}


def test_without_guidance_there_is_one_branch() -> None:
    from diffusers import ClassifierFreeGuidance

    report = sparse_run(pipeline(guider=ClassifierFreeGuidance(enabled=False)), lambda p: run(p, **SIZE))
    assert branches(report) == {"pred_cond"}


def test_skip_layer_guidance_is_a_branch_of_its_own() -> None:
    """Diffusers can skip feed-forward layers of this model, but neither its attention nor whole blocks."""
    from diffusers import LayerSkipConfig, SkipLayerGuidance

    skipped = LayerSkipConfig([1], fqn="transformer_blocks", skip_attention=False, skip_ff=True)
    guider = SkipLayerGuidance(
        guidance_scale=6.0, skip_layer_config=skipped, skip_layer_guidance_start=0, skip_layer_guidance_stop=1
    )
    report = sparse_run(pipeline(guider=guider), lambda pipe: run(pipe, **SIZE))
    assert branches(report) == {"pred_cond", "pred_uncond", "pred_cond_skip"}


def test_image_to_video() -> None:
    pipe = pipeline(image=True)
    report = sparse_run(pipe, lambda pipe: run(pipe, image=tiny.PICTURE))
    assert branches(report) == {"pred_cond", "pred_uncond"}
    assert len(tokens(report)) == 2


@torch.no_grad()
def test_padding_of_a_prompt_changes_nothing() -> None:
    pipe, latents = pipeline(), []
    with dit_sparse.apply(pipe, WINDOW, schedule="always") as session:
        for pipe.tokenizer_max_length, pipe.tokenizer_2_max_length in ((7, 6), (12, 8)):
            latents.append(run(pipe, **SIZE))
        assert 0 < session.report().sparse_density < 0.9
    torch.testing.assert_close(*latents, atol=1e-4, rtol=1e-4)


def test_default_sizes_fit_the_models() -> None:
    f, h, w = FAMILY.pixels({"patch_size": 1, "patch_size_t": 1}, {})
    for checkpoint in FAMILY.checkpoints.values():
        d = checkpoint.defaults
        assert checkpoint.tokens is not None
        assert checkpoint.tokens.grid[0] == (d["num_frames"] - 1) // f + 1
        if "height" in d:  # image to video takes its size from the image
            assert checkpoint.tokens.grid[1:] == (d["height"] // h, d["width"] // w)
