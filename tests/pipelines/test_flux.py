"""FLUX.1, LongCat-Image and Ovis-Image end to end, and what position ids are understood as."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import pytest
import tiny_images
import torch
from families.flux import CASES, flux, ids
from offline.flux import TINY, pipeline
from tiny_images import picture
from whole_runs import WINDOW, branches, sparse_run, tokens

import dit_sparse
from dit_sparse import METHODS, Phase, Schedule, TokenLayout
from dit_sparse.method import Call
from dit_sparse.pipelines.flux import FAMILY, PRESETS, grid_of, layers, pipeline_class


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    """Latents of 12 x 10 tokens after 16 of text."""
    settings: dict[str, Any] = {
        "prompt": "a cat runs",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "height": 48,
        "width": 40,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


def test_layers_are_those_of_both_kinds_of_blocks() -> None:
    found = layers(CASES["flux"].model())
    assert [(layer.index, layer.name) for layer in found] == [
        (0, "transformer_blocks.0.attn"),
        (1, "transformer_blocks.1.attn"),
        (2, "single_transformer_blocks.0.attn"),
        (3, "single_transformer_blocks.1.attn"),
    ]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
@pytest.mark.parametrize("grid", [(1, 7, 5), (1, 3, 1), (1, 1, 4), (1, 300, 301)])
def test_ids_tell_the_grid(grid: tuple[int, int, int], dtype: torch.dtype) -> None:
    """bfloat16 has not every integer above 256."""
    layout = TokenLayout(grid, text_first=True)
    assert grid_of(ids(grid).to(dtype)) == layout
    assert grid_of(ids(grid, axes=4)[None].expand(2, -1, -1).to(dtype)) == layout
    references = ids(grid, (1, 3, 2), (1, 5, 1)).to(dtype)
    assert grid_of(references) == TokenLayout(grid, text_first=True, suffix=11)


def test_ids_are_read_once_for_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append(self) or cpu(self))
    given = ids((1, 4, 6))
    assert grid_of(given) is grid_of(given)
    assert grid_of(given.clone()) == grid_of(given)
    assert len(reads) == 2


IMAGE = ids((1, 10, 12))
UNLIKE = {
    "columns first": IMAGE[:, [0, 2, 1]],
    "shuffled": IMAGE[torch.randperm(120, generator=torch.Generator().manual_seed(0))],
    "from within a row": IMAGE.roll(5, 0),
    "a reference in between": ids((1, 10, 12), (1, 1, 1))[[*range(60), 120, *range(60, 119)]],
    "rows of unequal length": IMAGE[[*range(59), *range(60, 120), 119]],
}


@pytest.mark.parametrize("name", UNLIKE)
def test_ids_of_something_else_leave_the_call_dense(name: str) -> None:
    model = CASES["flux"].model()
    with dit_sparse.apply(model, WINDOW, schedule="always") as session, torch.no_grad():
        model(**{**flux(model, 1, (1, 10, 12), 0), "img_ids": UNLIKE[name]})
        reasons = {row.where.reason for row in session.report().rows}
    assert reasons == {"the image ids do not begin with the rows of one image"}


def test_text_to_image() -> None:
    report = sparse_run(pipeline(), run)
    assert branches(report) == {"cond"}
    assert tokens(report) == {16 + 120}


def test_true_guidance_and_a_batch() -> None:
    two = partial(run, prompt=["a cat runs", "the blue dog"], negative_prompt="a dog", true_cfg_scale=3.0)
    assert branches(sparse_run(pipeline(), two)) == {"cond", "uncond"}


def test_kontext() -> None:
    """The image given comes after the one that is made."""
    sized = partial(run, image=picture(24, 32), _auto_resize=False, max_area=40 * 48)
    report = sparse_run(pipeline("FluxKontextPipeline"), sized)
    assert tokens(report) == {16 + 120 + 8 * 6}
    assert branches(report) == {"cond"}
    guided = partial(sized, negative_prompt="a dog", true_cfg_scale=3.0)
    assert branches(sparse_run(pipeline("FluxKontextPipeline"), guided)) == {"cond", "uncond"}


def test_image_to_image() -> None:
    changed = partial(run, image=picture(40, 48), strength=0.75)
    report = sparse_run(pipeline("FluxImg2ImgPipeline"), changed, steps=[1, 2, 3])
    assert tokens(report) == {16 + 120}


def test_tools_add_channels_and_no_tokens() -> None:
    fill = pipeline("FluxFillPipeline", {"in_channels": 4 + 4 + 16, "out_channels": 4})
    filled = partial(run, image=picture(40, 48), mask_image=picture(40, 48).convert("L"))
    assert tokens(sparse_run(fill, filled)) == {16 + 120}
    control = pipeline("FluxControlPipeline", {"in_channels": 8, "out_channels": 4})
    assert tokens(sparse_run(control, partial(run, control_image=picture(40, 48)))) == {16 + 120}


def test_control_net() -> None:
    """It is a model of its own and stays as it is."""
    from diffusers import FluxControlNetModel

    torch.manual_seed(0)
    net = FluxControlNetModel(**{**TINY, "guidance_embeds": True}).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    pipe = pipeline("FluxControlNetPipeline", controlnet=net)
    report = sparse_run(pipe, partial(run, control_image=picture(40, 48), controlnet_conditioning_scale=0.7))
    assert tokens(report) == {16 + 120}


def other(name: str, transformer: str, channels: int, **parts: Any) -> Any:
    """A pipeline of LongCat-Image or Ovis-Image without its text encoder."""
    import diffusers

    torch.manual_seed(0)
    config = {**FAMILY.transformers[transformer], "in_channels": 4 * channels}
    pipe = getattr(diffusers, name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
        transformer=getattr(diffusers, transformer)(**config).eval(),
        vae=tiny_images.vae(channels),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Processor:
    """What LongCat-Image's editing pipeline asks for when it is made."""

    image_processor = None


def embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, 14, 16, generator=torch.Generator().manual_seed(seed))


def test_ovis_image() -> None:
    pipe = other("OvisImagePipeline", "OvisImageTransformer2DModel", 1)
    given = {"prompt_embeds": embeds(0), "negative_prompt_embeds": embeds(1)}
    report = sparse_run(pipe, partial(run, prompt=None, negative_prompt=None, **given))
    assert branches(report) == {"cond", "uncond"}
    assert tokens(report) == {14 + 120}


@pytest.mark.parametrize("edits", [False, True])
def test_longcat_image(monkeypatch: pytest.MonkeyPatch, edits: bool) -> None:
    """Its editing brings an image to a megapixel, here to 48 x 40."""
    name = "LongCatImageEditPipeline" if edits else "LongCatImagePipeline"
    pipe = other(name, "LongCatImageTransformer2DModel", 16, text_processor=Processor())
    module = import_module(type(pipe).__module__)

    def encode_prompt(prompt: str, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return embeds(len(prompt)), module.prepare_pos_ids(0, "text", (0, 0), 14)

    pipe.encode_prompt = encode_prompt
    call: dict[str, Any] = {
        "prompt": "a cat runs",
        "num_inference_steps": 4,
        "output_type": "latent",
    }
    if edits:
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (40, 48))
        call["image"] = picture(40, 48)
    else:
        call |= {"height": 48, "width": 40, "enable_prompt_rewrite": False}
    report = sparse_run(pipe, lambda pipe: pipe(**{**call, "generator": torch.Generator().manual_seed(0)})[0])
    assert branches(report) == {"cond", "uncond"}
    assert tokens(report) == {14 + 120 + 120 * edits}


def test_ip_adapter() -> None:
    """The second attention of a layer, over image prompts, is left to the model."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = CASES["flux"].model()
    torch.manual_seed(0)
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 16))
    state = list(model.state_dict())
    model.encoder_hid_proj = lambda embeds: embeds
    call = {
        **flux(model, 2, (1, 10, 12), 0),
        "joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.randn(2, 4, 16)]},
    }

    def forward() -> torch.Tensor:
        given = {**call, "joint_attention_kwargs": dict(call["joint_attention_kwargs"])}
        with torch.no_grad():
            return model(**given)[0]

    stock = forward()
    with dit_sparse.apply(model, WINDOW, schedule="always", strict=True) as session:
        out = forward()
        report = session.report()
        assert list(model.state_dict()) == state
    assert not torch.equal(out, stock)
    assert torch.equal(forward(), stock)
    assert {row.where.name for row in report.sparse_rows} == {layer.name for layer in layers(model)}
    assert all(row.where.reason in ("", "120 queries read 4 keys of another sequence") for row in report.rows)


def test_the_pipeline_that_takes_what_is_given() -> None:
    dev, kontext = {"_class_name": "FluxPipeline"}, {"_class_name": "FluxKontextPipeline"}
    assert [pipeline_class(dev, image) for image in (False, True)] == ["FluxPipeline", "FluxImg2ImgPipeline"]
    assert {pipeline_class(kontext, image) for image in (False, True)} == {"FluxKontextPipeline"}
    with pytest.raises(ValueError, match="FluxFillPipeline needs a mask: call it in Python"):
        pipeline_class({"_class_name": "FluxFillPipeline"}, True)
    with pytest.raises(ValueError, match="OvisImagePipeline takes no image"):
        pipeline_class({"_class_name": "OvisImagePipeline"}, True)


def test_published_windows() -> None:
    """arXiv 2504.16922: 90.2 % sparse at 4096 x 4096 pixels, 9 of 28 steps dense."""
    call = Call.standalone(TokenLayout((1, 256, 256)))
    densities = []
    for preset in PRESETS["neighborhood", "12b"].values():
        method = METHODS["neighborhood"](**preset.parameters)
        order = method.order(call)
        empty = torch.empty(1, 1, order.slots, 0)
        plan = method.plan(empty, empty, call.at(order=order))
        assert plan.rule is None
        densities.append(plan.density(*[order.filled(128)] * 2))
    assert densities == pytest.approx([0.191, 0.098, 0.098], abs=1e-3)
    schedule = Schedule.parse(PRESETS["neighborhood", "12b"]["balanced"].schedule)
    assert [schedule.phase(i, 28, 5, 57) for i in range(28)] == [Phase.DENSE] * 9 + [Phase.SPARSE] * 19
