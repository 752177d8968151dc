"""torch.compile of families beyond Wan: as many graphs as stock, whole and by repeated blocks."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from families import Pipe, cases
from torch._dynamo.utils import counters

import dit_sparse
from dit_sparse import RadialProcessor
from dit_sparse.method import SparseProcessor

pytestmark = pytest.mark.filterwarnings("ignore:.*outside a pipeline run")

RADIAL = RadialProcessor(block=8, decay=0.3, decimate_below=32)


def run(name: str, how: str, method: SparseProcessor | None, backend: str = "aot_eager") -> Any:
    """(output, graphs) of two forwards."""
    torch._dynamo.reset()
    counters.clear()
    case = cases()[name]
    model = case.model()
    session = None if method is None else dit_sparse.apply(Pipe(model), method, schedule="layers 0")
    call = model
    if how == "whole":
        call = torch.compile(model, fullgraph=True, backend=backend)
    elif how == "regional":
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    inputs = case.inputs(model, 2, case.grid, 0)
    with torch.no_grad():
        out = case.output(call(**inputs))
        torch.testing.assert_close(case.output(call(**inputs)), out, atol=1e-6, rtol=1e-6)
    if session is not None:
        report = session.report()
        assert len({r.where.name for r in report.sparse_rows}) == len(report.rows) - 1
        assert {r.where.reason for r in report.rows} == {"", "schedule"}
    return out, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("method", [RADIAL, tiny.Cached(keep=2)], ids=["static", "step-cached"])
@pytest.mark.parametrize(
    ("name", "how"),
    [("flux", "whole"), ("flux", "regional"), ("hunyuan", "regional"), ("cogvideox", "whole")],
)
def test_graphs_are_as_many_as_stock(name: str, how: str, method: SparseProcessor) -> None:
    """CogVideoX and its generation have no repeated blocks to compile."""
    if method is RADIAL and not cases()[name].family.video:
        method = tiny.TopK(keep=2)
    eager, _ = run(name, "eager", method)
    _, stock_graphs = run(name, how, None)
    out, graphs = run(name, how, method)
    torch.testing.assert_close(out, eager, atol=1e-5, rtol=1e-5)
    assert graphs == stock_graphs > 0


@torch.no_grad()
def test_a_compiled_model_may_be_fused() -> None:
    """The processors change under the compiled graph, which is made again for them."""
    torch._dynamo.reset()
    case = cases()["cogvideox"]
    model = case.model()
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = case.inputs(model, 1, case.grid, 0)
    session = dit_sparse.apply(Pipe(model), RADIAL, schedule="always")
    sparse = case.output(call(**inputs))
    with pytest.warns(UserWarning, match="attached again"):
        model.fuse_qkv_projections()
    torch.testing.assert_close(case.output(call(**inputs)), sparse, atol=1e-5, rtol=1e-5)
    assert len(session.report().sparse_rows) == 3
    assert {r.calls for r in session.report().sparse_rows} == {2}
