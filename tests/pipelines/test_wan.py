"""Wan's variants end to end in their own pipelines: what really ran is read off the report."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import tiny_models as models
import torch
from tiny_images import picture

import dit_sparse
from dit_sparse import METHODS, Phase, RadialProcessor, Report, Schedule, TokenLayout
from dit_sparse.method import Call
from dit_sparse.pipelines.load import checkpoints
from dit_sparse.pipelines.wan import FAMILY, layers, multiples
from dit_sparse.pipelines.wan_presets import PRESETS

RADIAL = RadialProcessor(block=8, decay=0.2, decimate_below=16)


def branches(report: Report) -> set[tuple[str, str]]:
    return {(row.where.model, row.where.branch) for row in report.sparse_rows}


def steps(report: Report, model: str) -> list[int | None]:
    return sorted({row.where.step for row in report.rows if row.where.model == model})


def wan_image_pipeline(both: bool) -> Any:
    """Image to video: as Wan2.2 A14B (image latents are channels), or TI2V (a timestep for each token)."""
    from diffusers import WanImageToVideoPipeline

    base = models.wan_pipeline()
    pipe = WanImageToVideoPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        # 4 latent channels, 4 of the mask (one for each frame of a latent), 4 of the image.
        transformer=base.transformer if both else models.wan(in_channels=12),
        vae=base.vae,
        scheduler=base.scheduler,
        expand_timesteps=both,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_text_to_video_runs_sparse_in_both_branches() -> None:
    pipe = models.wan_pipeline()
    stock = models.run_wan(pipe)
    with dit_sparse.apply(pipe, RADIAL, schedule="dense 0-25%; layers 0") as session:
        out = models.run_wan(pipe)
        report = session.report()
    assert branches(report) == {("transformer", "cond"), ("transformer", "uncond")}
    assert {(r.where.step, r.where.layer) for r in report.sparse_rows} == {
        (s, n) for s in (1, 2, 3) for n in (1, 2)
    }
    assert 0 < report.sparse_density < 1
    assert not torch.equal(out, stock)
    assert torch.equal(models.run_wan(pipe), stock)


def test_frames_that_fill_no_whole_blocks() -> None:
    """As at 480p, where a frame has 1,560 tokens: 24 of them in blocks of 16 leave holes in the order."""
    pipe = models.wan_pipeline()
    method = RadialProcessor(block=16, decay=0.2, decimate_below=16)
    with dit_sparse.apply(pipe, method, schedule="always") as session:
        out = models.run_wan(pipe, steps=2)
        report = session.report()
    assert out.isfinite().all()
    assert 0 < report.sparse_density < 1


def test_two_experts_share_one_clock() -> None:
    pipe = models.wan_pipeline(two=True)
    with dit_sparse.apply(pipe, RADIAL, schedule="dense 0-25%") as session:
        models.run_wan(pipe, steps=8)
        report = session.report()
    first, second = steps(report, "transformer"), steps(report, "transformer_2")
    assert first
    assert second
    assert first + second == list(range(8))
    assert branches(report) == {(m, b) for m in ("transformer", "transformer_2") for b in ("cond", "uncond")}
    assert {row.where.step for row in report.sparse_rows} == set(range(2, 8))
    assert report.sparse_density < 1


def test_one_timestep_a_token() -> None:
    """Wan2.2 TI2V, from text."""
    pipe = models.wan_pipeline()
    pipe.register_to_config(expand_timesteps=True)
    with dit_sparse.apply(pipe, RADIAL, schedule="always") as session:
        out = models.run_wan(pipe)
        report = session.report()
    assert out.isfinite().all()
    assert steps(report, "transformer") == [0, 1, 2, 3]
    assert report.density == report.sparse_density < 1


@pytest.mark.parametrize("both", [False, True])
def test_image_to_video_runs_sparse(both: bool) -> None:
    pipe = wan_image_pipeline(both)
    with dit_sparse.apply(pipe, RADIAL, schedule="always") as session:
        out = models.run_wan(pipe, image=picture(96, 64))
        report = session.report()
    assert out.isfinite().all()
    assert report.sparse_density < 1
    assert all(row.where.phase is not Phase.DENSE for row in report.rows)


def test_the_given_frame_is_a_key_of_every_query() -> None:
    """The method reads the diagonal and the first block; for image to video the first frame comes on top."""
    method = models.Diagonal(block=8)
    frames, tokens = 5, 24
    blocks = frames * tokens // 8

    def pairs(model: Any, inputs: dict[str, Any]) -> set[int]:
        with dit_sparse.apply(model, method, schedule="always") as session:
            model(**inputs)
            rows = session.report().sparse_rows
        return {sum(row.pairs) // len(row.pairs) for row in rows}

    text = pairs(models.wan(), models.wan_inputs())
    image = pairs(models.wan_i2v(), models.wan_i2v_inputs())
    assert text == {(2 * blocks - 1) * 64}  # the diagonal and the first block
    per_token = {
        **models.wan_inputs(),
        "timestep": models.wan_inputs()["timestep"].expand(1, frames * tokens),
    }
    assert pairs(models.wan(), per_token) == image  # TI2V
    of_frame = ceil(tokens / 8)
    assert image == {(blocks * of_frame + blocks - of_frame) * 64}


def test_image_cross_attention_is_left_alone() -> None:
    """Wan2.1 image to video: image tokens enter by cross-attention, whose processors stay as they are."""
    model = models.wan(in_channels=10, image_dim=16, added_kv_proj_dim=24)
    before = {n: p for n, p in model.attn_processors.items() if ".attn2." in n}
    inputs = {**models.wan_i2v_inputs(), "encoder_hidden_states_image": models.randn(1, 257, 16, seed=3)}
    with dit_sparse.apply(model, RADIAL, schedule="always") as session:
        after = model.attn_processors
        assert before
        assert all(after[n] is p for n, p in before.items())
        model(**inputs)
        report = session.report()
    assert {row.where.name for row in report.rows} == {f"blocks.{i}.attn1" for i in range(3)}
    assert report.sparse_density < 1


def test_vace_covers_its_control_blocks() -> None:
    model = models.wan_vace()
    assert [layer.name for layer in layers(model)] == [
        *(f"blocks.{i}.attn1" for i in range(3)),
        *(f"vace_blocks.{i}.attn1" for i in range(2)),
    ]
    with dit_sparse.apply(model, RADIAL, schedule="layers 2") as session:
        model(**models.wan_vace_inputs())
        report = session.report()
    dense = {row.where.name for row in report.rows if row.where.phase is Phase.DENSE}
    assert dense == {"blocks.2.attn1", "vace_blocks.1.attn1"}
    assert {row.where.name for row in report.sparse_rows} == {
        "blocks.0.attn1",
        "blocks.1.attn1",
        "vace_blocks.0.attn1",
    }
    assert report.sparse_density < 1


def test_vace_pipeline_with_a_reference_image() -> None:
    """The reference comes as one more latent frame, which the grid follows."""
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    base = models.wan_pipeline()
    torch.manual_seed(0)
    # Control channels: 4 of the inactive, 4 of the reactive part, 64 of the mask's 8x8 pixels.
    config = {**models.WAN, "vace_layers": [0, 2], "vace_in_channels": 72}
    transformer = WanVACETransformer3DModel(**config).eval()
    pipe = WanVACEPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        transformer=transformer,
        vae=base.vae,
        scheduler=base.scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    with dit_sparse.apply(pipe, RADIAL, schedule="always") as session:
        models.run_wan(pipe, reference_images=[picture(96, 64)], steps=2)
        report = session.report()
    tokens = {row.every[0] for row in report.rows}
    assert tokens == {(6 * 4 * 6) ** 2}
    assert len({row.where.name for row in report.sparse_rows}) == 5


def pipeline_with_image_encoder(cls: Any, transformer: Any) -> Any:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    base = models.wan_pipeline()
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=16,
    )  # fmt: skip
    pipe = cls(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
        transformer=transformer,
        vae=base.vae,
        scheduler=base.scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def built(cls: str, **changes: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, cls)(**{**FAMILY.transformers[cls], **changes}).eval()


def assert_sparse_and_back(
    pipe: Any, branches: set[str], steps: int = 4, method: Any = RADIAL, **call: Any
) -> Report:
    """Runs stock, sparse and stock again; every step, layer and branch was sparse between."""
    stock = models.run_wan(pipe, steps=steps, **call)
    with dit_sparse.apply(pipe, method, schedule="always", strict=True) as session:
        out = models.run_wan(pipe, steps=steps, **call)
        report = session.report()
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert torch.equal(models.run_wan(pipe, steps=steps, **call), stock)
    assert {(row.where.step, row.where.name, row.where.branch) for row in report.sparse_rows} == {
        (step, f"blocks.{i}.attn1", branch) for step in range(steps) for i in range(3) for branch in branches
    }
    assert report.density == report.sparse_density < 1
    return report


def test_animate_reads_its_reference_frame() -> None:
    """The grid has a frame more than the 17 of the video make, and the face's attention is not ours."""
    from diffusers import WanAnimatePipeline

    transformer = built("WanAnimateTransformer3DModel", image_dim=16, added_kv_proj_dim=24)
    pipe = pipeline_with_image_encoder(WanAnimatePipeline, transformer)
    layout = FAMILY.layout(transformer, {"hidden_states": torch.empty(1, 12, 6, 8, 12)})
    assert layout == TokenLayout((6, 4, 6))
    assert FAMILY.anchors(transformer, {"timestep": torch.zeros(1)}) == 1
    video = [picture(96, 64)] * 17
    call = {"image": picture(96, 64), "pose_video": video, "face_video": video, "max_sequence_length": 512}
    frames = {"num_frames": None, "segment_frame_length": 17, "output_type": "pt"}
    report = assert_sparse_and_back(AsWan(pipe), {"cond", "uncond"}, **call, **frames)
    assert {row.every[0] for row in report.rows} == {(6 * 4 * 6) ** 2}


class AsWan:
    """A pipeline whose call has another name for the number of frames, or none."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.components = pipe, pipe.components
        self.scheduler = pipe.scheduler

    def __call__(self, num_frames: int | None, **call: Any) -> Any:
        return self.pipe(**call).frames


def test_chronoedit() -> None:
    from diffusers import ChronoEditPipeline, UniPCMultistepScheduler

    transformer = built("ChronoEditTransformer3DModel", image_dim=16, added_kv_proj_dim=24)
    assert FAMILY.anchors(transformer, {"timestep": torch.zeros(1)}) == 1
    pipe = pipeline_with_image_encoder(ChronoEditPipeline, transformer)
    call = {"image": picture(96, 64), "max_sequence_length": 512}
    method = models.Diagonal(block=8)  # frames are two, and neighbours, of which Radial leaves nothing out
    report = assert_sparse_and_back(pipe, {"cond", "uncond"}, method=method, num_frames=5, **call)
    assert {row.every[0] for row in report.rows} == {(2 * 4 * 6) ** 2}
    # Temporal reasoning drops the frames between after some steps: another grid in the same run.
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with dit_sparse.apply(pipe, method, schedule="always", strict=True) as session:
        models.run_wan(pipe, enable_temporal_reasoning=True, num_temporal_reasoning_steps=2, **call)
        report = session.report()
    tokens = {step: {row.every[0] for row in report.rows if row.where.step == step} for step in range(4)}
    assert tokens == {step: {((5 if step < 2 else 2) * 4 * 6) ** 2} for step in range(4)}


def skyreels_pipeline(cls: Any) -> Any:
    from diffusers import UniPCMultistepScheduler

    base = models.wan_pipeline()
    pipe = cls(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        transformer=built("SkyReelsV2Transformer3DModel"),
        vae=base.vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_skyreels_text_to_video() -> None:
    from diffusers import SkyReelsV2Pipeline

    assert_sparse_and_back(skyreels_pipeline(SkyReelsV2Pipeline), {"cond", "uncond"})


@pytest.mark.parametrize("image", [False, True])
def test_diffusion_forcing_counts_steps_by_the_noisiest_frame(image: bool) -> None:
    """Each frame has a scheduler of its own; a given frame has the timestep 0."""
    from diffusers import SkyReelsV2DiffusionForcingImageToVideoPipeline, SkyReelsV2DiffusionForcingPipeline

    cls = SkyReelsV2DiffusionForcingImageToVideoPipeline if image else SkyReelsV2DiffusionForcingPipeline
    pipe = skyreels_pipeline(cls)
    given = {"image": picture(96, 64)} if image else {}
    report = assert_sparse_and_back(pipe, {"cond", "uncond"}, **given)
    assert {row.calls for row in report.rows} == {1}


def test_diffusion_forcing_in_causal_blocks_stays_dense() -> None:
    from diffusers import SkyReelsV2DiffusionForcingPipeline

    pipe = skyreels_pipeline(SkyReelsV2DiffusionForcingPipeline)
    call = {"causal_block_size": 2, "ar_step": 1, "num_frames": 13}
    stock = models.run_wan(pipe, **call)
    with dit_sparse.apply(pipe, RADIAL, schedule="always") as session:
        assert torch.equal(models.run_wan(pipe, **call), stock)
        reasons = {row.where.reason for row in session.report().rows}
    assert reasons == {"blocks of 2 frames read only themselves and those before them"}


def test_pipelines_by_what_is_given() -> None:
    def of(name: str, image: bool) -> str:
        return FAMILY.pipeline_class({"_class_name": name}, image)

    assert of("SkyReelsV2DiffusionForcingPipeline", False) == "SkyReelsV2DiffusionForcingPipeline"
    assert of("SkyReelsV2DiffusionForcingPipeline", True) == "SkyReelsV2DiffusionForcingImageToVideoPipeline"
    for name in ("WanPipeline", "SkyReelsV2Pipeline"):
        with pytest.raises(ValueError, match="takes no image"):
            of(name, True)
    for name in ("ChronoEditPipeline", "WanAnimatePipeline"):
        with pytest.raises(ValueError, match="needs an image"):
            of(name, False)


def test_fine_tuned_copies_take_the_presets_of_their_size() -> None:
    def size(cls: str, heads: int, layers: int, experts: int = 1) -> str | None:
        config = {"_class_name": cls, "num_attention_heads": heads, "num_layers": layers}
        return FAMILY.preset_size(config, experts)

    assert size("WanTransformer3DModel", 12, 30) == size("WanVACETransformer3DModel", 12, 30) == "1.3b"
    assert size("WanTransformer3DModel", 40, 40) == "14b"
    assert size("WanTransformer3DModel", 40, 40, 2) == "a14b"
    assert size("WanTransformer3DModel", 8, 8) is None
    assert size("ChronoEditTransformer3DModel", 40, 40) is None


@pytest.mark.parametrize(("key", "intent"), [(k, i) for k in PRESETS for i in PRESETS[k]])
def test_presets_are_settings_that_exist(key: tuple[str, str], intent: str) -> None:
    method, size = key
    preset = PRESETS[key][intent]
    METHODS[method](**preset.parameters)
    schedule = Schedule.parse(preset.schedule)
    assert preset.source
    sizes = {c.size: c.defaults for c in checkpoints().values()}
    assert size in sizes
    assert schedule.phase(0, 50, 5, 40) is (Phase.DENSE if schedule.dense else Phase.SPARSE)
    assert schedule.phase(40, 50, 5, 40) is Phase.SPARSE


def test_every_method_has_presets_for_the_bundled_model() -> None:
    assert {name for name, size in PRESETS if size == "tiny"} == set(METHODS) - {"dense"}
    assert all(list(intents) == ["quality", "balanced", "fast"] for intents in PRESETS.values())


@pytest.mark.parametrize(
    ("size", "grid", "densities"),
    [
        ("1.3b", (21, 30, 52), (0.46, 0.37, 0.28)),
        ("14b", (21, 45, 80), (0.41, 0.27, 0.27)),
        ("a14b", (21, 45, 80), (0.39, 0.35, 0.35)),
        ("5b", (31, 22, 40), (0.31, 0.27, 0.27)),
        ("tiny", (33, 8, 16), (0.36, 0.25, 0.23)),
    ],
)
def test_preset_densities_are_those_of_the_docstring(
    size: str, grid: tuple[int, int, int], densities: tuple[float, ...]
) -> None:
    call = Call.standalone(TokenLayout(grid))
    for intent, expected in zip(("quality", "balanced", "fast"), densities, strict=True):
        method = RadialProcessor(**PRESETS["radial", size][intent].parameters)
        order = method.order(call)
        empty = torch.empty(1, 1, order.slots, 0)
        filled = order.filled(method.block)
        density = method.plan(empty, empty, call.at(order=order)).density(filled, filled)
        assert density == pytest.approx(expected, abs=0.005), intent


def test_tiny_balanced_keeps_neighbouring_frames_whole() -> None:
    method = RadialProcessor(**PRESETS["radial", "tiny"]["balanced"].parameters)
    call = Call.standalone(TokenLayout((33, 8, 16)))
    order = method.order(call)
    empty = torch.empty(1, 1, order.slots, 0)
    keep = method.plan(empty, empty, call.at(order=order)).to_blocks()[0, 0]
    per_frame = keep.view(33, 4, 33, 4).transpose(1, 2).flatten(2).all(2)
    frames = torch.arange(33)
    assert per_frame[(frames[:, None] - frames).abs() <= 1].all()
    assert per_frame[:, 0].all()


def test_multiples_of_old_and_new_configs() -> None:
    patches = {"patch_size": [1, 2, 2]}
    assert multiples(patches, {}) == (4, 16, 16)
    assert multiples(patches, {"scale_factor_temporal": 4, "scale_factor_spatial": 16}) == (4, 32, 32)
    assert multiples(patches, {"scale_factor_temporal": 2, "scale_factor_spatial": 4}) == (2, 16, 16)


def test_default_sizes_fit_the_models() -> None:
    for name, checkpoint in FAMILY.checkpoints.items():
        side = 32 if checkpoint.size == "5b" else 16
        d = checkpoint.defaults
        frames = d["segment_frame_length" if name == "wan2.2-animate" else "num_frames"]
        assert (frames - 1) % 4 == d["height"] % side == d["width"] % side == 0, name
