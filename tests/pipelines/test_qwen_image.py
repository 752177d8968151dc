"""Qwen-Image end to end in its pipelines, and what the sizes it is told are understood as."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import pytest
import tiny_text
import torch
from families.qwen_image import CASES, inputs
from offline.qwen_image import pipeline
from tiny_images import picture
from whole_runs import WINDOW, branches, sparse_run, tokens

import dit_sparse
from dit_sparse import TokenLayout
from dit_sparse.pipelines.qwen_image import layers, layout, pipeline_class, pixels


def embeds(seed: int, batch: int = 1, length: int = 14) -> torch.Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, size: tuple[int, ...] = (192, 160), **changes: Any) -> torch.Tensor:
    """Latents of 12 x 10 tokens after 14 and 9 of text."""
    settings: dict[str, Any] = {
        "prompt_embeds": embeds(0),
        "negative_prompt_embeds": embeds(1, length=9),
        "true_cfg_scale": 4.0,
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "output_type": "latent",
        **dict(zip(("height", "width"), size, strict=False)),
    }
    return pipe(**{**settings, **changes})[0]


def test_layers_are_those_of_the_blocks() -> None:
    found = layers(CASES["qwen-image"].model())
    assert [layer.name for layer in found] == [f"transformer_blocks.{i}.attn" for i in range(3)]


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([[(1, 7, 5)]], TokenLayout((1, 7, 5), text_first=True)),
        ([(1, 7, 5)] * 2, TokenLayout((1, 7, 5), text_first=True)),  # as the ControlNet pipelines have it
        ([[(1, 7, 5), (1, 3, 4), (1, 2, 2)]] * 2, TokenLayout((1, 7, 5), text_first=True, suffix=16)),
        ([[(1, 7, 5)], [(1, 5, 7)]], "batch items have images of different sizes"),
    ],
)
def test_sizes_tell_the_layout(shapes: Any, expected: Any) -> None:
    assert layout(CASES["qwen-image"].model(), {"img_shapes": shapes}) == expected


def test_layers_of_an_image_are_frames() -> None:
    model = CASES["qwen-image-layered"].model()
    shapes = [(1, 7, 5)] * 3 + [(1, 4, 6)]
    expected = TokenLayout((3, 7, 5), text_first=True, suffix=24)
    assert layout(model, {"img_shapes": [shapes]}) == expected
    assert layout(model, {"img_shapes": [[*shapes, (1, 2, 2)]]}) == "layers have different sizes"


def test_different_sizes_in_a_batch_stay_dense() -> None:
    model = CASES["qwen-image"].model()
    call = {**inputs(model, 2, (1, 10, 12), 0), "img_shapes": [[(1, 10, 12)], [(1, 12, 10)]]}
    with dit_sparse.apply(model, WINDOW, schedule="always") as session, torch.no_grad():
        model(**call)
        reasons = {row.where.reason for row in session.report().rows}
    assert reasons == {"batch items have images of different sizes"}


def test_text_to_image_in_two_passes() -> None:
    report = sparse_run(pipeline(), run)
    assert branches(report) == {"cond", "uncond"}
    assert tokens(report) == {14 + 120, 9 + 120}


def test_image_to_image() -> None:
    changed = partial(run, image=picture(160, 192), strength=0.75)
    report = sparse_run(pipeline("QwenImageImg2ImgPipeline"), changed, steps=[1, 2, 3])
    assert branches(report) == {"cond", "uncond"}


def smaller(monkeypatch: pytest.MonkeyPatch, name: str, *size: int | None) -> None:
    """The editing pipelines bring images to about a megapixel: here to (width, height, ...)."""
    module = import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{name}")
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: size)


def test_editing_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    smaller(monkeypatch, "edit", 64, 80, None)
    report = sparse_run(
        pipeline("QwenImageEditPipeline", processor=None), partial(run, image=picture(160, 192))
    )
    assert tokens(report) == {14 + 120 + 20, 9 + 120 + 20}
    assert branches(report) == {"cond", "uncond"}


@pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}])
def test_editing_two_images(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    """As Edit-2509 and Edit-2511."""
    smaller(monkeypatch, "edit_plus", 64, 80)
    pipe = pipeline("QwenImageEditPlusPipeline", config, processor=None)
    report = sparse_run(pipe, partial(run, image=[picture(160, 192), picture(160, 192)]))
    assert tokens(report) == {14 + 120 + 40, 9 + 120 + 40}
    assert branches(report) == {"cond", "uncond"}


def test_taking_an_image_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers and their sum, each of 6 x 5 tokens, as the image given."""
    smaller(monkeypatch, "layered", 80, 96)
    config = {"use_additional_t_cond": True, "use_layer3d_rope": True}
    pipe = pipeline("QwenImageLayeredPipeline", config, processor=None)
    pipe.register_modules(text_encoder=tiny_text.t5(16))  # asked for its dtype
    call = {"image": picture(160, 192), "prompt": "a cat", "layers": 3, "size": (), "output_type": "pt"}
    report = sparse_run(pipe, lambda pipe: run(pipe, **call)[0])
    assert tokens(report) == {14 + 4 * 30 + 30, 9 + 4 * 30 + 30}


@torch.no_grad()
def test_a_padded_prompt_is_a_trimmed_one() -> None:
    pipe = pipeline()
    mask = (torch.arange(14) < 8).long()[None]
    with dit_sparse.apply(pipe, WINDOW, schedule="always") as session:
        padded = run(pipe, prompt_embeds_mask=mask)
        assert {row.every[0] for row in session.report().rows} == {134 * 128, 129**2}
        trimmed = run(pipe, prompt_embeds=embeds(0)[:, :8])
    torch.testing.assert_close(padded, trimmed, atol=1e-4, rtol=1e-4)


def test_the_pipeline_that_takes_what_is_given() -> None:
    plain, edit = {"_class_name": "QwenImagePipeline"}, {"_class_name": "QwenImageEditPlusPipeline"}
    assert [pipeline_class(plain, image) for image in (False, True)] == [
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
    ]
    assert pipeline_class(edit, True) == "QwenImageEditPlusPipeline"
    with pytest.raises(ValueError, match="QwenImageEditPlusPipeline needs an image"):
        pipeline_class(edit, False)
    with pytest.raises(ValueError, match="QwenImageLayeredPipeline makes several images"):
        pipeline_class({"_class_name": "QwenImageLayeredPipeline"}, True)


def test_a_token_is_sixteen_pixels() -> None:
    assert pixels({}, {"temperal_downsample": [False, True, True]}) == (1, 16, 16)
