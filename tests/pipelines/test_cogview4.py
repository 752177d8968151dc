"""CogView4, with and without control, and CogView3-Plus in their own pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from offline.cogview4 import CASES, pipeline
from PIL import Image

import dit_sparse
from dit_sparse import DraftProcessor, Phase, Report, TokenLayout
from dit_sparse.pipelines.cogview3plus import FAMILY as COGVIEW3
from dit_sparse.pipelines.cogview4 import FAMILY as COGVIEW4

DRAFT = DraftProcessor(density=0.3, pool=(2, 3))


def compared(pipe: Any, **changes: Any) -> Report:
    """The report of an attached run of 4 steps, which differs from the stock run before and after it."""

    def run() -> torch.Tensor:
        torch.manual_seed(0)  # the control pipeline draws from the global generator
        settings = {
            "prompt": "a cat runs",
            "negative_prompt": "a dog " * 10,
            "generator": torch.Generator().manual_seed(0),
            "num_inference_steps": 4,
            "height": 160,
            "width": 192,
            "output_type": "latent",
        }
        return pipe(**{**settings, **changes})[0]

    stock = run()
    with dit_sparse.apply(pipe, DRAFT, schedule="dense 0-25%; layers 0") as session:
        out = run()
        report = session.report()
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert torch.equal(run(), stock)
    assert {row.where.reason for row in report.rows} == {"", "schedule"}
    assert {(r.where.step, r.where.layer) for r in report.sparse_rows} == {
        (step, layer) for step in (1, 2, 3) for layer in (1, 2)
    }
    assert 0 < report.sparse_density < 1
    return report


def tokens_of(report: Report) -> dict[str, set[float]]:
    """Tokens of the calls of each branch, with a batch of one."""
    branches = {row.where.branch for row in report.rows}
    return {b: {row.every[0] ** 0.5 for row in report.rows if row.where.branch == b} for b in branches}


def test_two_passes_with_texts_of_their_own_length() -> None:
    pipe = pipeline("cogview4", "CogView4Pipeline", "FlowMatchEulerDiscreteScheduler")
    assert tokens_of(compared(pipe)) == {"cond": {120 + 16}, "uncond": {120 + 32}}


def test_control_comes_as_channels_in_passes_without_a_name() -> None:
    pipe = pipeline("cogview4-control", "CogView4ControlPipeline", "FlowMatchEulerDiscreteScheduler")
    report = compared(pipe, control_image=Image.new("RGB", (192, 160), (200, 80, 20)))
    assert tokens_of(report) == {"cond": {120 + 16}, "uncond": {120 + 32}}


@pytest.mark.parametrize("scheduler", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_one_batch_without_a_step_index(scheduler: str) -> None:
    report = compared(
        pipeline("cogview3plus", "CogView3PlusPipeline", scheduler),
        max_sequence_length=16,
    )
    assert {row.where.branch for row in report.rows} == {"cond_uncond"}
    assert {row.every[0] for row in report.rows} == {2 * (120 + 16) ** 2}


def test_a_mask_that_hides_nothing_stays_dense() -> None:
    case = CASES["cogview4"]
    model = case.model()
    inputs = case.inputs(model, 1, case.grid, 0)
    mask = torch.ones(1, 12)
    mask[:, :5] = 0
    stock, unmasked = model(**inputs, attention_mask=mask)[0], model(**inputs)[0]
    hidden = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    hidden["encoder_hidden_states"][:, :5] += 1
    # In diffusers 0.42.1 the tokens that are masked still have an effect. Should this fail, the mask hides.
    assert not torch.equal(stock, unmasked)
    assert not torch.allclose(model(**hidden, attention_mask=mask)[0], stock, atol=1e-5)
    with dit_sparse.apply(model, DRAFT, schedule="always") as session:
        assert torch.equal(model(**inputs, attention_mask=mask)[0], stock)
        rows = session.report().rows
    assert {row.where.phase for row in rows} == {Phase.DENSE}
    assert {row.where.reason for row in rows} == {
        "diffusers adds CogView4's attention_mask to the scores as 0 and 1, which hides no token"
    }


@pytest.mark.parametrize("case", CASES)
def test_layers_and_layout(case: str) -> None:
    model, family = CASES[case].model(), CASES[case].family
    found = family.layers(model)
    assert [layer.name for layer in found] == [f"transformer_blocks.{i}.attn1" for i in range(3)]
    assert {(layer.heads, layer.head_dim, layer.dim) for layer in found} == {(2, 16, 32)}
    args = CASES[case].inputs(model, 2, (1, 7, 5), 0)
    assert family.layout(model, args) == TokenLayout((1, 7, 5), text_first=True)


@pytest.mark.parametrize("name", [*COGVIEW4.checkpoints, *COGVIEW3.checkpoints])
def test_checkpoints(name: str) -> None:
    family = COGVIEW4 if name in COGVIEW4.checkpoints else COGVIEW3
    checkpoint = family.checkpoints[name]
    _, height, width = family.pixels({"patch_size": 2}, {"block_out_channels": (128, 512, 1024, 1024)})
    made = checkpoint.defaults
    assert checkpoint.tokens is not None
    assert checkpoint.tokens.grid == (1, made["height"] // height, made["width"] // width)
    assert family.preset_size({"_class_name": checkpoint.transformer, **checkpoint.config}, 1) == (
        checkpoint.size
    )
