"""CogVideoX and ConsisID in their own pipelines, whose schedulers know no step index."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from families import Pipe, at_step
from families.cogvideox import CASES
from offline.cogvideox import pipeline
from tiny_images import picture

import dit_sparse
from dit_sparse import METHODS, Phase, RadialProcessor, Report, Schedule, TokenLayout
from dit_sparse.pipelines.cogvideox import FAMILY, PRESETS, pipeline_class, pixels

RADIAL = RadialProcessor(block=8, decay=0.2, decimate_below=16)


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    """Latents of 4 steps; grid (5, 4, 6) by default. None leaves a keyword out."""
    settings: dict[str, Any] = {
        "prompt": "a cat runs",
        "negative_prompt": "a dog",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "height": 64,
        "width": 96,
        "num_frames": 17,
        "max_sequence_length": 12,
        "output_type": "latent",
    }
    return pipe(**{k: v for k, v in {**settings, **changes}.items() if v is not None})[0]


def compared(pipe: Any, schedule: str = "dense 0-25%; layers 0", **changes: Any) -> Report:
    """The report of an attached run, which differs from the stock run before and after it."""
    stock = run(pipe, **changes)
    with dit_sparse.apply(pipe, RADIAL, schedule=schedule) as session:
        out = run(pipe, **changes)
        report = session.report()
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert torch.equal(run(pipe, **changes), stock)
    assert {row.where.reason for row in report.rows} <= {"", "schedule"}
    assert 0 < report.sparse_density < 1
    return report


def tokens_of(report: Report) -> set[int]:
    """Tokens of the calls, read off the pairs of one call and head."""
    return {round((row.every[0] / row.calls / 2) ** 0.5) for row in report.rows}


@pytest.mark.parametrize("scheduler", ["DDIM", "DPM"])
def test_the_step_is_found_without_a_step_index(scheduler: str) -> None:
    report = compared(pipeline(scheduler=scheduler))
    assert {row.where.branch for row in report.rows} == {"cond_uncond"}
    assert {row.where.step for row in report.rows} == {0, 1, 2, 3}
    assert {(r.where.step, r.where.layer) for r in report.sparse_rows} == {
        (step, layer) for step in (1, 2, 3) for layer in (1, 2)
    }
    assert tokens_of(report) == {5 * 4 * 6 + 12}


def test_video_to_video_begins_in_the_middle() -> None:
    pipe = pipeline(cls="CogVideoXVideoToVideoPipeline")
    report = compared(
        pipe, schedule="dense 0-25%", video=[picture(96, 64)] * 17, strength=0.75, num_frames=None
    )
    assert [row.where.step for row in report.rows if row.where.layer == 0] == [1, 2, 3]
    assert all(row.where.phase is Phase.SPARSE for row in report.rows)


def test_an_image_is_the_first_frame_of_version_1_5() -> None:
    """17 frames are 5 latent frames, which the pipeline makes 6: 3 token frames."""
    pipe = pipeline("cogvideox1.5-i2v", "CogVideoXImageToVideoPipeline")
    report = compared(pipe, "always", image=picture(96, 64))
    assert tokens_of(report) == {3 * 4 * 6 + 12}
    assert {row.where.step for row in report.sparse_rows} == {0, 1, 2, 3}


def test_a_control_video_comes_as_channels() -> None:
    import diffusers

    pipe = pipeline(cls="CogVideoXFunControlPipeline")
    pipe.transformer = diffusers.CogVideoXTransformer3DModel(
        **{**FAMILY.transformers["CogVideoXTransformer3DModel"], "in_channels": 8}
    ).eval()
    report = compared(pipe, "always", control_video=[picture(96, 64)] * 17, num_frames=None)
    assert tokens_of(report) == {5 * 4 * 6 + 12}


def test_consisid_names_no_branch_and_is_one_batch() -> None:
    pytest.importorskip("cv2", reason="ConsisIDPipeline needs OpenCV")
    pipe = pipeline("consisid", "ConsisIDPipeline", "DPM")
    config = pipe.transformer.config
    report = compared(
        pipe,
        image=picture(96, 64),
        id_cond=tiny.randn(1, config.LFE_id_dim),
        id_vit_hidden=[tiny.randn(1, 9, config.LFE_vit_dim, seed=i) for i in range(config.LFE_num_scale)],
    )
    assert {row.where.branch for row in report.rows} == {"cond_uncond"}
    assert {row.where.step for row in report.rows} == {0, 1, 2, 3}


@pytest.mark.parametrize("case", CASES)
def test_layers_are_the_joint_attention_of_every_block(case: str) -> None:
    found = FAMILY.layers(CASES[case].model())
    assert [layer.name for layer in found] == [f"transformer_blocks.{i}.attn1" for i in range(3)]
    assert {(layer.heads, layer.head_dim, layer.dim) for layer in found} == {(2, 16, 32)}


@pytest.mark.parametrize("case", CASES)
def test_layout_and_anchors(case: str) -> None:
    model = CASES[case].model()
    for batch, grid in ((1, (5, 4, 6)), (2, (3, 7, 5))):
        args = CASES[case].inputs(model, batch, grid, 0)
        assert FAMILY.layout(model, args) == TokenLayout(grid, text_first=True)
        assert FAMILY.anchors(model, args) == int(case in ("cogvideox1.5-i2v", "consisid"))


def test_the_given_frame_is_a_key_of_every_query() -> None:
    """Blocks of 8: the method reads the diagonal and the first block, and with an image the whole frame."""

    def pairs(case: str) -> set[int]:
        model = CASES[case].model()
        with dit_sparse.apply(model, tiny.Diagonal(block=8), schedule="always") as session:
            model(**CASES[case].inputs(model, 1, (5, 4, 6), 0))
            return {row.pairs[0] for row in session.report().sparse_rows}

    # 15 blocks of the grid, 3 to a frame, and 2 of text, of 8 and 4 tokens.
    assert pairs("cogvideox") == {132 * 8 + 15 * 64 + 4 * 4}
    assert pairs("cogvideox1.5-i2v") == pairs("consisid") == {132 * 24 + 13 * 64 + 4 * 4}


def test_fused_projections() -> None:
    """Fusing replaces every processor; what is attached afterwards stands on that."""
    case = CASES["cogvideox"]
    outs = []
    for fused in (False, True):
        model = case.model()
        if fused:
            model.fuse_qkv_projections()
        with dit_sparse.apply(model, RADIAL, schedule="always") as session:
            outs.append(model(**case.inputs(model, 1, case.grid, 0))[0])
            assert len(session.report().sparse_rows) == 3
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prompt_may_change_on_the_way() -> None:
    """What was remembered for a text of another length is of no use: the method begins anew."""
    case = CASES["cogvideox"]
    model = case.model()
    inputs = case.inputs(model, 1, case.grid, 0)
    pipe, text = Pipe(model), inputs["encoder_hidden_states"]
    with dit_sparse.apply(pipe, tiny.Cached(block=8, keep=3), schedule="always") as session:
        for step, length in enumerate((12, 12, 9, 9)):
            with at_step(pipe, "cond_uncond", step):
                out = model(**{**inputs, "encoder_hidden_states": text[:, :length]})[0]
        phases = {row.where.step: row.where.phase.value for row in session.report().rows}
    assert out.isfinite().all()
    assert phases == {0: "refresh", 1: "sparse", 2: "refresh", 3: "sparse"}


@torch.no_grad()
def test_compiled_as_one_graph_equals_eager() -> None:
    torch._dynamo.reset()
    case = CASES["cogvideox"]
    model = case.model()
    inputs = case.inputs(model, 2, case.grid, 0)
    with dit_sparse.apply(model, RADIAL, schedule="always") as session:
        eager = model(**inputs)[0]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs)[0], eager, atol=1e-5, rtol=1e-5)
        assert {row.calls for row in session.report().sparse_rows} == {2}


@pytest.mark.parametrize("name", FAMILY.checkpoints)
def test_checkpoints(name: str) -> None:
    checkpoint = FAMILY.checkpoints[name]
    transformer = {"patch_size": 2, "patch_size_t": None, **checkpoint.config}
    vae = {"temporal_compression_ratio": 4, "block_out_channels": (128, 256, 256, 512)}
    frames, height, width = pixels(transformer, vae)
    made = checkpoint.defaults
    assert checkpoint.tokens is not None
    assert (made["num_frames"] - 1) % frames == 0
    assert checkpoint.tokens.grid == (
        1 + (made["num_frames"] - 1) // frames,
        made["height"] // height,
        made["width"] // width,
    )
    assert FAMILY.preset_size({"_class_name": checkpoint.transformer, **checkpoint.config}, 1) == (
        checkpoint.size
    )


def test_pipeline_classes() -> None:
    for name, image in (
        ("CogVideoXPipeline", False),
        ("CogVideoXImageToVideoPipeline", True),
        ("ConsisIDPipeline", True),
    ):
        assert pipeline_class({"_class_name": name}, image) == name
        with pytest.raises(ValueError, match="takes no image" if not image else "needs an image"):
            pipeline_class({"_class_name": name}, not image)


@pytest.mark.parametrize(("key", "intent"), [(k, i) for k in PRESETS for i in PRESETS[k]])
def test_presets_are_settings_that_exist(key: tuple[str, str], intent: str) -> None:
    method, size = key
    preset = PRESETS[key][intent]
    METHODS[method](**preset.parameters)
    assert Schedule.parse(preset.schedule).phase(40, 50, 5, 40) is Phase.SPARSE
    assert preset.source
    assert size in {checkpoint.size for checkpoint in FAMILY.checkpoints.values()}
