"""torch.compile keeps whole graphs around the opaque attention op; training leaves the graph, and says so."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch._dynamo.utils import counters

import dit_sparse
from dit_sparse import Phase, RadialProcessor

pytestmark = pytest.mark.filterwarnings("ignore:.*outside a pipeline run")

RADIAL = RadialProcessor(block=8, decay=0.3, decimate_below=32)


def compiled(model: Any, how: str, backend: str) -> Any:
    if how == "whole":
        return torch.compile(model, fullgraph=True, backend=backend)
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    return model


def run(attached: bool, how: str | None, backend: str = "aot_eager") -> tuple[Any, int, Any]:
    """(output, graphs by dynamo's counters, report) of two forwards of a 4-layer model."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny.wan(num_layers=4)
    session = dit_sparse.apply(model, RADIAL, schedule="layers 1") if attached else None
    call = compiled(model, how, backend) if how else model
    with torch.no_grad():
        out = call(**tiny.wan_inputs(2))[0]
        assert torch.equal(call(**tiny.wan_inputs(2))[0], out)
    return out, counters["stats"]["unique_graphs"], session.report() if session else None


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("how", ["whole", "regional"])
def test_compiled_equals_eager_in_as_many_graphs_as_stock(how: str, backend: str) -> None:
    eager, _, _ = run(True, None)
    _, stock_graphs, _ = run(False, how, "eager")
    out, graphs, report = run(True, how, backend)
    torch.testing.assert_close(out, eager, atol=1e-5, rtol=1e-5)
    assert graphs == stock_graphs == 1
    sparse = {r.where.layer: r.calls for r in report.sparse_rows}
    assert sparse == {0: 2, 2: 2, 3: 2}
    assert report.sparse_density < 0.7
    assert [r.where.reason for r in report.rows if r.where.phase is Phase.DENSE] == ["schedule"]


@torch.no_grad()
def test_a_compiled_transformer_may_be_attached_and_restored() -> None:
    torch._dynamo.reset()
    model = tiny.wan()
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    stock = call(**tiny.wan_inputs())[0]
    session = dit_sparse.apply(call, RADIAL, schedule="always")
    sparse = call(**tiny.wan_inputs())[0]
    assert len(session.report().sparse_rows) == 3
    assert (sparse - stock).abs().max() > 1e-4
    session.remove()
    torch.testing.assert_close(call(**tiny.wan_inputs())[0], stock, atol=1e-6, rtol=1e-6)


def test_the_clock_ticks_in_a_compiled_pipeline() -> None:
    torch._dynamo.reset()
    pipe = tiny.wan_pipeline()
    session = dit_sparse.apply(pipe, RADIAL)
    eager = tiny.run_wan(pipe)
    rows = session.report().to_dict()["rows"]
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tiny.run_wan(pipe), eager, atol=1e-4, rtol=1e-4)
    assert session.report().to_dict()["rows"] == rows


def test_training_compiles_but_not_as_one_graph() -> None:
    torch._dynamo.reset()
    model = tiny.wan(num_layers=2).train()
    dit_sparse.apply(model, RADIAL, schedule="always")
    model(**tiny.wan_inputs())[0].square().mean().backward()
    eager = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(**tiny.wan_inputs())[0].square().mean().backward()
    for name, p in model.named_parameters():
        if eager[name] is not None:
            torch.testing.assert_close(p.grad, eager[name], atol=1e-6, rtol=1e-4)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"compile with fullgraph=False to train"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(**tiny.wan_inputs())


def test_the_op_passes_opcheck() -> None:
    model = tiny.wan()
    dit_sparse.apply(model, RADIAL, schedule="always")
    with torch.no_grad():
        model(**tiny.wan_inputs())
        q, k, v = (tiny.randn(1, 2, 120, 12, seed=i) for i in range(3))
        handle = model.blocks[1].attn1.processor._handle
        torch.library.opcheck(
            torch.ops.dit_sparse.core.default,
            (q, k, v, None, handle, None, 0.0, [True, False, False, True, False]),
        )
