"""Cosmos end to end in its own pipelines: what really ran is read off the report."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as models
import torch
from families import cases
from offline.cosmos import built, cosmos1, pipeline
from tiny_images import picture

import dit_sparse
from dit_sparse import Phase, RadialProcessor, TokenLayout
from dit_sparse.pipelines.cosmos import FAMILY, PRESETS, TINY, layers, pixels
from dit_sparse.pipelines.family import Preset

RADIAL = RadialProcessor(block=8, decay=0.2, decimate_below=16)


def predict2_5() -> Any:
    """Like Transfer2.5, without the image context."""
    import diffusers

    torch.manual_seed(0)
    changes = {**cases()["cosmos-transfer2.5"].changes, "img_context_dim_in": None}
    return diffusers.CosmosTransformer3DModel(**{**TINY, **changes}).eval()


def predict2(cls: Any, case: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return pipeline(
        cls, built(case), models.wan_pipeline().vae, FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    )


def run(pipe: Any, **call: Any) -> torch.Tensor:
    settings: dict[str, Any] = {
        "prompt": "a cat runs",
        "negative_prompt": "a dog",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "output_type": "latent",
        "return_dict": False,
        "max_sequence_length": 16,
    }
    return pipe(**{**settings, **call})[0]


def assert_sparse_and_back(pipe: Any, grid: tuple[int, int, int], method: Any = RADIAL, **call: Any) -> None:
    """Runs stock, sparse and stock again; every step, layer and branch was sparse between."""
    stock = run(pipe, **call)
    with dit_sparse.apply(pipe, method, schedule="always", strict=True) as session:
        out = run(pipe, **call)
        report = session.report()
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert torch.equal(run(pipe, **call), stock)
    assert {(row.where.step, row.where.name, row.where.branch) for row in report.sparse_rows} == {
        (step, f"transformer_blocks.{i}.attn1", branch)
        for step in range(4)
        for i in range(3)
        for branch in ("cond", "uncond")
    }
    assert report.density == report.sparse_density < 1
    assert {row.every[0] for row in report.rows} == {TokenLayout(grid).tokens ** 2}
    assert {row.calls for row in report.rows} == {1}


def test_layers_and_layouts() -> None:
    model = built("cosmos-transfer2.5")
    found = layers(model)
    assert [layer.name for layer in found] == [f"transformer_blocks.{i}.attn1" for i in range(3)]
    assert [(layer.heads, layer.head_dim, layer.dim) for layer in found] == [(2, 16, 32)] * 3
    for size, grid in (((5, 8, 12), (5, 4, 6)), ((3, 9, 7), (3, 4, 3)), ((1, 8, 8), (1, 4, 4))):
        assert FAMILY.layout(model, {"hidden_states": torch.empty(2, 4, *size)}) == TokenLayout(grid)


def test_given_frames_are_anchors() -> None:
    """The method reads the diagonal and the first block; the first frame comes on top."""
    model, case = built("cosmos-given"), cases()["cosmos-given"]
    inputs = case.inputs(model, 1, case.grid, 0)
    assert FAMILY.anchors(model, inputs) == 1
    assert FAMILY.anchors(model, {}) == 0
    with dit_sparse.apply(model, models.Diagonal(block=8), schedule="always") as session:
        model(**inputs)
        rows = session.report().sparse_rows
    assert {row.pairs[0] for row in rows} == {(15 * 3 + 12) * 64}  # 15 blocks, of which 3 are the first frame


def test_cross_attention_is_left_alone() -> None:
    """Also that of 2.5, whose processor makes a second call over the image context."""
    model = built("cosmos-transfer2.5")
    before = {n: m.processor for n, m in model.named_modules() if n.endswith(".attn2")}
    with dit_sparse.apply(model, RADIAL, schedule="always", strict=True) as session:
        assert all(model.get_submodule(n).processor is p for n, p in before.items())
        case = cases()["cosmos-transfer2.5"]
        model(**case.inputs(model, 2, case.grid, 0))
        names = {row.where.name for row in session.report().rows}
    assert names == {f"transformer_blocks.{i}.attn1" for i in range(3)}


def test_text_to_world() -> None:
    from diffusers import CosmosTextToWorldPipeline

    pipe = cosmos1(CosmosTextToWorldPipeline, "cosmos")
    assert_sparse_and_back(pipe, (5, 4, 6), height=32, width=48, num_frames=17)


def test_video_to_world() -> None:
    from diffusers import CosmosVideoToWorldPipeline

    pipe = cosmos1(CosmosVideoToWorldPipeline, "cosmos-given")
    assert_sparse_and_back(pipe, (5, 4, 6), height=32, width=48, num_frames=17, image=picture(96, 64))


def test_predict2() -> None:
    from diffusers import Cosmos2VideoToWorldPipeline

    pipe = predict2(Cosmos2VideoToWorldPipeline, "cosmos-given")
    assert_sparse_and_back(pipe, (5, 4, 6), height=64, width=96, num_frames=17, image=picture(96, 64))


def test_predict2_makes_images() -> None:
    from diffusers import Cosmos2TextToImagePipeline

    pipe = predict2(Cosmos2TextToImagePipeline, "cosmos")
    assert_sparse_and_back(pipe, (1, 8, 12), models.Diagonal(block=8), height=128, width=192)


def test_predict2_5_from_text_and_from_an_image() -> None:
    """Its text encoder is given as what it would make: hidden states of all layers."""
    from diffusers import Cosmos2_5_PredictBasePipeline, UniPCMultistepScheduler

    pipe = pipeline(
        Cosmos2_5_PredictBasePipeline,
        predict2_5(),
        models.wan_pipeline().vae,
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    text = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": models.randn(1, 12, 24),
        "negative_prompt_embeds": models.randn(1, 12, 24, seed=1),
    }
    for given in ({}, {"image": picture(96, 64)}):
        assert_sparse_and_back(pipe, (5, 4, 6), height=64, width=96, num_frames=17, **text, **given)


@pytest.mark.parametrize("preset", PRESETS["neighborhood", "7b"].values())
def test_presets_have_the_density_of_the_paper(preset: Preset) -> None:
    """56.4 and 89 % sparse on the grid of 720p: windows and strides are of whole tiles."""
    from dit_sparse.method import Call

    method = dit_sparse.NeighborhoodProcessor(**preset.parameters)
    call = Call.standalone(TokenLayout((16, 44, 80)))
    order = method.order(call)
    empty = torch.empty(1, 1, order.slots, 0)
    filled = order.filled(128)
    density = method.plan(empty, empty, call.at(order=order)).density(filled, filled)
    assert 1 - density == pytest.approx(0.564 if method.window[1] == 32 else 0.89, abs=0.003)


def test_twelve_of_35_steps_are_dense() -> None:
    schedule = dit_sparse.Schedule.parse(PRESETS["neighborhood", "7b"]["quality"].schedule)
    dense = [step for step in range(35) if schedule.phase(step, 35, 5, 28) is Phase.DENSE]
    assert dense == list(range(12))


def test_pixels_of_both_autoencoders() -> None:
    patch = {"patch_size": (1, 2, 2)}
    assert pixels(patch, {"temporal_compression_ratio": 8, "spatial_compression_ratio": 8}) == (8, 16, 16)
    assert pixels(patch, {}) == (4, 16, 16)


def test_pipelines_by_what_is_given() -> None:
    with pytest.raises(ValueError, match="takes no image"):
        FAMILY.pipeline_class({"_class_name": "CosmosTextToWorldPipeline"}, True)
    with pytest.raises(ValueError, match="needs an image"):
        FAMILY.pipeline_class({"_class_name": "Cosmos2VideoToWorldPipeline"}, False)
    both = "Cosmos2_5_PredictBasePipeline"
    assert {FAMILY.pipeline_class({"_class_name": both}, image) for image in (True, False)} == {both}


def test_sizes_are_told_by_the_configuration() -> None:
    def size(**config: Any) -> str | None:
        return FAMILY.preset_size({"_class_name": "CosmosTransformer3DModel", **config}, 1)

    assert size() == size(in_channels=17) == "7b"
    assert size(num_attention_heads=40, num_layers=36, rope_scale=[2.0, 2.0, 2.0]) == "14b"
    assert size(num_attention_heads=24) is None
