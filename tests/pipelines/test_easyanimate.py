"""EasyAnimate's three pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from families.easyanimate import CASES
from offline.easyanimate import pipeline
from PIL import Image

import dit_sparse
from dit_sparse import RadialProcessor, Report, TokenLayout
from dit_sparse.pipelines.easyanimate import FAMILY, pixels

RADIAL = RadialProcessor(block=8, decay=0.2, decimate_below=16)
NAME = "EasyAnimateTransformer3DModel"


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    """Latents of 4 steps; grid (5, 4, 6), 256 tokens of text."""
    settings: dict[str, Any] = {
        "prompt": "a cat runs",
        "negative_prompt": "a dog",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "height": 64,
        "width": 96,
        "num_frames": 17,
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


def compared(pipe: Any, **changes: Any) -> Report:
    """The report of an attached run, which differs from the stock run before and after it."""
    stock = run(pipe, **changes)
    with dit_sparse.apply(pipe, RADIAL, schedule="dense 0-25%; layers 0") as session:
        out = run(pipe, **changes)
        report = session.report()
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert torch.equal(run(pipe, **changes), stock)
    assert {row.where.branch for row in report.rows} == {"cond_uncond"}
    assert {row.where.reason for row in report.rows} == {"", "schedule"}
    assert {row.every[0] for row in report.rows} == {2 * (120 + 256) ** 2}
    assert {(r.where.step, r.where.layer) for r in report.sparse_rows} == {
        (step, layer) for step in (1, 2, 3) for layer in (1, 2)
    }
    assert 0 < report.sparse_density < 1
    return report


def test_text_to_video() -> None:
    compared(pipeline())


def test_an_image_is_a_frame_that_inpainting_is_given() -> None:
    from diffusers.pipelines.easyanimate.pipeline_easyanimate_inpaint import get_image_to_video_latent

    picture = Image.new("RGB", (96, 64), (200, 80, 20))
    video, mask = get_image_to_video_latent(picture, None, 17, (64, 96))
    compared(pipeline("EasyAnimateInpaintPipeline", in_channels=9), video=video, mask_video=mask)


def test_control_and_reference() -> None:
    video = torch.rand(1, 3, 17, 64, 96, generator=torch.Generator().manual_seed(0))
    pipe = pipeline("EasyAnimateControlPipeline", in_channels=12)
    encode = pipe.encode_prompt
    # diffusers 0.42.1 calls it with an argument it does not take.
    pipe.encode_prompt = lambda text_encoder_index=0, **given: encode(**given)
    compared(pipe, control_video=video, ref_image=video[:, :, :1])


@pytest.mark.parametrize("case", CASES)
def test_layers_layout_and_anchors(case: str) -> None:
    model = CASES[case].model()
    found = FAMILY.layers(model)
    assert [layer.name for layer in found] == [f"transformer_blocks.{i}.attn1" for i in range(3)]
    assert {(layer.heads, layer.head_dim, layer.dim) for layer in found} == {(2, 16, 32)}
    args = CASES[case].inputs(model, 2, (3, 7, 5), 0)
    assert FAMILY.layout(model, args) == TokenLayout((3, 7, 5), text_first=True)
    assert FAMILY.anchors(model, args) == int(case == "easyanimate-inp")


def test_text_of_both_encoders_is_counted() -> None:
    case = CASES["easyanimate"]
    model = case.model()
    with dit_sparse.apply(model, tiny.Diagonal(block=8), schedule="always") as session:
        model(**case.inputs(model, 1, case.grid, 0))
        assert {row.every[0] for row in session.report().rows} == {(120 + 12 + 5) ** 2}


@pytest.mark.parametrize("name", FAMILY.checkpoints)
def test_checkpoints(name: str) -> None:
    checkpoint = FAMILY.checkpoints[name]
    made = checkpoint.defaults
    frames, height, width = pixels({"patch_size": 2}, {"block_out_channels": (128, 256, 512, 512)})
    assert checkpoint.tokens is not None
    assert checkpoint.tokens.grid == (
        1 + (made["num_frames"] - 1) // frames,
        made["height"] // height,
        made["width"] // width,
    )
    assert FAMILY.preset_size({"_class_name": NAME, **checkpoint.config}, 1) == "12b"
