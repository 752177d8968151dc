"""Mochi, which calls attention once for each batch item, with the text of that item alone."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from families import Pipe, at_step
from offline.mochi import CASE, pipeline

import dit_sparse
from dit_sparse import Phase, RadialProcessor, ReTtentionProcessor, SparseProcessor, TokenLayout, VSAProcessor
from dit_sparse.pipelines.mochi import FAMILY, pixels

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*outside a pipeline run",
    "ignore:In CPU autocast",
    "ignore:Re-ttention keeps",
    "ignore:.*untrained parameters",
)

GRID = (5, 4, 6)
RADIAL = RadialProcessor(block=8, decay=0.2, decimate_below=16)
RETTENTION = ReTtentionProcessor(inner=RADIAL, residual="float32")
VSA = VSAProcessor(keep=0.3, tile=(2, 2, 2), gate=True)


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    """Latents of 4 steps; grid (5, 4, 6)."""
    settings: dict[str, Any] = {
        "prompt": "a cat runs the dog",
        "negative_prompt": "a dog",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 4,
        "height": 64,
        "width": 96,
        "num_frames": 25,
        "max_sequence_length": 12,
        "output_type": "latent",
    }
    return pipe(**{**settings, **changes})[0]


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({}, (6, 3)),
        ({"guidance_scale": 1.0}, (6,)),
        ({"prompt": ["a cat", "a blue bird sits"], "negative_prompt": ["", "a"]}, (3, 5, 1, 2)),
    ],
)
def test_every_item_has_a_call_of_its_own_length(settings: dict[str, Any], texts: tuple[int, ...]) -> None:
    pipe = pipeline()
    stock = run(pipe, **settings)
    with dit_sparse.apply(pipe, RADIAL, schedule="dense 0-25%; layers 0") as session:
        out = run(pipe, **settings)
        report = session.report()
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert torch.equal(run(pipe, **settings), stock)
    assert {(row.where.step, row.where.layer) for row in report.rows} == {
        (step, layer) for step in range(4) for layer in range(3)
    }
    assert {row.where.branch for row in report.rows} == {"cond_uncond"}
    assert {row.where.reason for row in report.rows} == {"", "schedule"}
    assert {row.calls for row in report.rows} == {len(texts)}
    assert {row.every[0] for row in report.rows} == {sum((120 + text) ** 2 for text in texts)}
    assert 0 < report.sparse_density < 1


def test_an_empty_prompt_may_have_no_text_at_all() -> None:
    pipe = pipeline(force_zeros_for_empty_prompt=True)
    with dit_sparse.apply(pipe, RADIAL, schedule="always") as session:
        assert run(pipe, negative_prompt="").isfinite().all()
        report = session.report()
    assert {row.every[0] for row in report.rows} == {120**2 + 126**2}
    assert report.density == report.sparse_density < 1


def test_padding_of_the_prompt_changes_nothing() -> None:
    pipe = pipeline()
    with dit_sparse.apply(pipe, RADIAL, schedule="always"):
        short, long = run(pipe, max_sequence_length=6), run(pipe, max_sequence_length=12)
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


class Run:
    """A model with a method, called at one step after the other with other latents."""

    def __init__(self, method: SparseProcessor, schedule: str = "refresh 0, 3") -> None:
        self.model = CASE.model()
        self.pipe = Pipe(self.model)
        self.session = dit_sparse.apply(self.pipe, method, schedule=schedule)
        generator = torch.Generator().manual_seed(5)
        for module in self.session.sparse_modules().values():
            for parameter in module.parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))

    def __call__(self, step: int, batch: int = 2, first: int = 0, call: Any = None) -> torch.Tensor:
        inputs = CASE.inputs(self.model, batch, GRID, first)
        inputs["hidden_states"] = inputs["hidden_states"] + 0.5 * tiny.randn(
            *inputs["hidden_states"].shape[1:], seed=step
        )
        with at_step(self.pipe, "cond_uncond", step, 10):
            return (self.model if call is None else call)(**inputs)[0]


METHODS = [tiny.Cached(block=8, keep=3), RETTENTION, VSA]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@torch.no_grad()
def test_items_remember_and_are_given_what_is_their_own(method: SparseProcessor) -> None:
    steps = range(5)
    both = Run(method)
    together = torch.stack([both(step) for step in steps])
    assert {row.calls for row in both.session.report().rows} == {2}
    apart = []
    for item in range(2):
        alone = Run(method)
        apart.append(torch.stack([alone(step, 1, item) for step in steps]))
    torch.testing.assert_close(torch.cat(apart, dim=1), together, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_gate_reads_the_item_s_hidden_states() -> None:
    whole, grid = Run(VSA), CASE.inputs(CASE.model(), 2, GRID, 0)
    gated = whole(0)
    for module in whole.session.sparse_modules().values():
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
    assert (whole(0) - gated).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3
    assert grid["encoder_attention_mask"].sum(1).tolist() == [9, 12]
    assert all(at.hidden is None for at in whole.session.parts[0].layers)


@torch.no_grad()
def test_a_batch_that_loses_an_item_keeps_their_memories_apart() -> None:
    """As under FasterCache, which runs some steps without the unconditional half."""
    run_, alone = Run(tiny.Cached(block=8, keep=3)), Run(tiny.Cached(block=8, keep=3))
    run_(0)
    torch.testing.assert_close(run_(1, 1, 1), alone(1, 1, 1))
    phases = {row.where.step: row.where.phase for row in run_.session.report().rows}
    assert phases == {0: Phase.REFRESH, 1: Phase.REFRESH}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_gradients_of_a_batch_survive_checkpointing(method: SparseProcessor) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        run_ = Run(method)
        run_.model.train()
        if checkpointing:
            run_.model.enable_gradient_checkpointing()
        losses = [run_(step).square().mean() for step in range(4)]
        rows = run_.session.report().rows
        sum(losses).backward()
        assert run_.session.report().rows == rows  # recomputation is not counted
        return [p.grad for p in run_.model.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 50
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS[::2], ids=lambda method: type(method).__name__)
@torch.no_grad()
def test_compiled_equals_eager(method: SparseProcessor) -> None:
    """In several graphs: the processor asks its mask for the length of the text."""
    torch._dynamo.reset()
    eager, compiled = Run(method), Run(method)
    call = torch.compile(compiled.model, backend="aot_eager")
    for step in range(4):
        torch.testing.assert_close(compiled(step, call=call), eager(step), atol=1e-5, rtol=1e-5)
    assert compiled.session.report().rows == eager.session.report().rows


def test_layers_and_layout() -> None:
    model = CASE.model()
    found = FAMILY.layers(model)
    assert [layer.name for layer in found] == [f"transformer_blocks.{i}.attn1" for i in range(3)]
    assert {(layer.heads, layer.head_dim, layer.dim) for layer in found} == {(2, 12, 24)}
    args = CASE.inputs(model, 2, (3, 7, 5), 0)
    assert FAMILY.layout(model, args) == TokenLayout((3, 7, 5))
    assert FAMILY.items(model, args) == 2


def test_default_size() -> None:
    checkpoint = FAMILY.checkpoints["mochi"]
    frames, height, width = pixels({"patch_size": 2}, {})
    made = checkpoint.defaults
    assert checkpoint.tokens is not None
    assert checkpoint.tokens.grid == (
        1 + (made["num_frames"] - 1) // frames,
        made["height"] // height,
        made["width"] // width,
    )
