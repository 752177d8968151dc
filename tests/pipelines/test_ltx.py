"""LTX-Video and LTX-2 in their own pipelines: what really ran is read off the report."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from families.ltx import coordinates
from offline.ltx import CASES, joint_pipeline, pipeline
from packaging.version import Version
from tiny_images import picture
from torch import Tensor
from whole_runs import WINDOW, branches, sparse_run

import dit_sparse
from dit_sparse import Report, TokenLayout
from dit_sparse.pipelines.ltx import FAMILY, located, pixels

FRAME, FRAMES = 4 * 6, 5  # 64x96 pixels and 17 frames, of 16x16 pixels and 4 frames a token


def run(pipe: Any, **changes: Any) -> Tensor:
    """Latents of one run."""
    settings = {
        "prompt": "a cat runs",
        "negative_prompt": "a dog",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 96,
        "num_frames": 17,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


def anchored(report: Report) -> bool:
    """Whether every query block read the first frame of the grid: more than the window's 0.3 of all pairs."""
    return report.sparse_density > 0.4


def test_layers_are_those_of_the_video_alone() -> None:
    for name in ("ltx", "ltx2"):
        model = CASES[name].model()
        layers = FAMILY.layers(model)
        assert [layer.name for layer in layers] == [f"transformer_blocks.{i}.attn1" for i in range(3)]
        others = {n: p for n, p in model.attn_processors.items() if ".attn1." not in n}
        assert len(others) == (3 if name == "ltx" else 15)
        with dit_sparse.apply(model, WINDOW):
            assert all(model.attn_processors[n] is p for n, p in others.items())


@pytest.mark.parametrize("grid", [(5, 4, 6), (1, 3, 5), (7, 5, 3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_layouts(grid: tuple[int, int, int], batch: int) -> None:
    frame = grid[1] * grid[2]
    expected = {
        "ltx": TokenLayout(grid),
        "ltx-i2v": TokenLayout(grid),
        "ltx-condition": TokenLayout(grid, prefix=frame),
        "ltx2": TokenLayout(grid),
        "ltx2-references": TokenLayout(grid, suffix=2 * frame),
    }
    for name, layout in expected.items():
        model = CASES[name].model()
        inputs = CASES[name].inputs(model, batch, grid, 0)
        assert FAMILY.layout(model, inputs) == layout, name
        assert FAMILY.anchors(model, inputs) == int(name not in ("ltx", "ltx2")), name


def test_the_grid_among_coordinates_lies_between_what_is_given() -> None:
    def at(*times: float) -> TokenLayout | str:
        return located(coordinates(list(times), 3, 2)[None])

    assert at(0, 1, 9, 17) == TokenLayout((4, 3, 2))
    assert at(24, 16, 0, 1, 9) == TokenLayout((3, 3, 2), prefix=12)
    # A later window: the tail of the last one at times from 0, a frame at time -1.
    assert at(0, 1, 9, 17, 0, 1, -1) == TokenLayout((4, 3, 2), suffix=18)
    assert at(0) == TokenLayout((1, 3, 2))
    assert at(1, 9) == "the tokens do not stand in the order of their coordinates"
    shuffled = coordinates([0, 1], 3, 2)[None][:, :, [1, 0, *range(2, 12)]]
    assert located(shuffled) == "the tokens do not stand in the order of their coordinates"
    partial = coordinates([0, 1], 3, 2)[None][:, :, :-1]
    assert located(partial) == "11 tokens at 3 heights and 2 widths are no whole frames"


def test_a_call_without_sizes_stays_dense() -> None:
    """LTX-2's pipelines for detail and frame rate give coordinates of tiles only."""
    model = CASES["ltx2"].model()
    inputs = CASES["ltx2"].inputs(model, 1, (5, 4, 6), 0)
    coords = model.rope.prepare_video_coords(1, 5, 4, 6, torch.device("cpu"))
    inputs = {k: v for k, v in inputs.items() if k not in ("num_frames", "height", "width")}
    with dit_sparse.apply(model, WINDOW, schedule="always") as session:
        model(**inputs, video_coords=coords)
        reasons = {row.where.reason for row in session.report().rows}
    assert reasons == {"num_frames, height and width of the latents are not among the arguments"}


def test_text_to_video() -> None:
    report = sparse_run(pipeline(), run)
    assert branches(report) == {"cond_uncond"}
    assert {row.every[0] for row in report.rows} == {2 * (FRAMES * FRAME) ** 2}
    assert not anchored(report)
    assert branches(sparse_run(pipeline(), lambda pipe: run(pipe, guidance_scale=1.0))) == {"cond_uncond"}


def test_image_to_video_reads_its_image() -> None:
    report = sparse_run(pipeline("LTXImageToVideoPipeline"), lambda pipe: run(pipe, image=picture(96, 64)))
    assert branches(report) == {"cond_uncond"}
    assert anchored(report)


def test_conditions_stand_before_the_grid() -> None:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    pipe = pipeline("LTXConditionPipeline")
    conditions = [LTXVideoCondition(image=picture(96, 64), frame_index=i) for i in (0, 8)]
    report = sparse_run(pipe, lambda pipe: run(pipe, conditions=conditions))
    assert branches(report) == {"cond_uncond"}
    assert {row.every[0] for row in report.rows} == {2 * ((1 + FRAMES) * FRAME) ** 2}
    sparse_run(pipe, run)  # and without conditions


def test_windows_of_a_long_video_have_their_conditions_behind() -> None:
    from diffusers import LTXEulerAncestralRFScheduler

    pipe = pipeline("LTXI2VLongMultiPromptPipeline", LTXEulerAncestralRFScheduler())
    windows = {"num_frames": 29, "temporal_tile_size": 20, "temporal_overlap": 8, "num_inference_steps": 5}
    call = {**windows, "cond_image": picture(96, 64), "prompt": "a cat | a dog"}
    with dit_sparse.apply(pipe, WINDOW, schedule="always", strict=True) as session:
        layouts = []
        understand = session._understand

        def spy(*args: Any) -> Any:
            found = understand(*args)
            layouts.append(found[0])
            return found

        session._understand = spy  # type: ignore[method-assign]
        assert run(pipe, **call).isfinite().all()
    # A frame of the image at a negative time, and from the second window on two of the one before.
    assert [layout.suffix for layout in dict.fromkeys(layouts)] == [FRAME, 3 * FRAME]
    assert {layout.grid for layout in layouts} == {(FRAMES, 4, 6)}


def run_joint(pipe: Any, **changes: Any) -> Tensor:
    """Latents of the video."""
    embeds = {
        f"{negative}prompt_embeds": torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(seed))
        for seed, negative in enumerate(("", "negative_"))
    }
    masks = {f"{negative}prompt_attention_mask": torch.ones(1, 8) for negative in ("", "negative_")}
    quiet = {"prompt": None, "negative_prompt": None, "return_dict": False}
    return run(pipe, **embeds, **masks, **quiet, spatio_temporal_guidance_blocks=[1], **changes)


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.40"), reason="LTX2Pipeline names only one of its passes"
)
def test_ltx2_with_all_its_guidance() -> None:
    """One block of the pass named for it skips its self-attention, and so it is not in the report."""
    report = sparse_run(joint_pipeline(), run_joint)
    assert branches(report) == {"cond_uncond", "uncond_stg", "uncond_modality"}
    skipped = {row.where.layer for row in report.rows if row.where.branch == "uncond_stg"}
    assert skipped == {0, 2}
    single = [row for row in report.rows if row.where.branch == "uncond_modality"]
    assert {row.every[0] for row in single} == {(FRAMES * FRAME) ** 2}
    assert not anchored(report)


def test_ltx2_image_to_video_reads_its_image() -> None:
    pipe = joint_pipeline("LTX2ImageToVideoPipeline")
    assert anchored(sparse_run(pipe, lambda pipe: run_joint(pipe, image=picture(96, 64), image_crf=0)))


def test_ltx2_appends_its_keyframes() -> None:
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    pipe = joint_pipeline("LTX2ConditionPipeline")
    conditions = [LTX2VideoCondition(frames=picture(96, 64), index=i, crf=0) for i in (0, 2)]
    report = sparse_run(pipe, lambda pipe: run_joint(pipe, conditions=conditions))
    single = [row for row in report.rows if row.where.branch == "uncond_modality"]
    assert {row.every[0] for row in single} == {((FRAMES + 1) * FRAME) ** 2}


@torch.no_grad()
def test_a_mask_between_tokens_stays_dense() -> None:
    """As of LTX-2's pipeline for references of a strength below 1."""
    model = CASES["ltx2"].model()
    inputs = CASES["ltx2"].inputs(model, 1, (5, 4, 6), 0)
    mask = torch.ones(1, 120, 120)
    mask[:, :, 100:] = 0.5
    stock = model(**inputs, video_self_attention_mask=mask)[0]
    with dit_sparse.apply(model, WINDOW, schedule="always") as session:
        assert torch.equal(model(**inputs, video_self_attention_mask=mask)[0], stock)
        reasons = {row.where.reason for row in session.report().rows}
    assert reasons == {"an attention mask of shape (1, 2, 120, 120) is no key-padding mask of 120 keys"}


def test_pixels_of_a_token() -> None:
    old = {"patch_size": 4, "patch_size_t": 1, "spatio_temporal_scaling": [True, True, True, False]}
    new = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    patch = {"patch_size": 1, "patch_size_t": 1}
    assert pixels(patch, old) == pixels(patch, {**old, **new}) == (8, 32, 32)


@pytest.mark.parametrize(
    ("name", "with_image"),
    [
        ("LTXPipeline", "LTXImageToVideoPipeline"),
        ("LTXConditionPipeline", "LTXConditionPipeline"),
        ("LTX2Pipeline", "LTX2ImageToVideoPipeline"),
    ],
)
def test_pipelines_by_what_is_given(name: str, with_image: str) -> None:
    assert FAMILY.pipeline_class({"_class_name": name}, False) == name
    assert FAMILY.pipeline_class({"_class_name": name}, True) == with_image
