"""Whole runs of an offline pipeline, stock and attached, and what holds of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import dit_sparse
from dit_sparse import Phase, Report, WindowProcessor

WINDOW = WindowProcessor(block=8, density=0.3)


def sparse_run(
    pipe: Any, run: Callable[[Any], Tensor], *, steps: Sequence[int] = range(4), reasons: Sequence[str] = ()
) -> Report:
    """The report of a run whose step 0 and first layer are dense; the model is stock before and after.

    Args:
        run: The pipeline -> its latents.
        steps: Those it takes; from an image, the first are left out.
        reasons: For calls left dense beside the schedule, all of which must occur.
    """
    stock = run(pipe)
    with dit_sparse.apply(pipe, WINDOW, schedule="dense 0-1%; layers 0") as session:
        out = run(pipe)
        report = session.report()
        layers = {at.layer.name: at.layer.index for part in session.parts for at in part.layers}
    assert out.isfinite().all()
    assert not torch.equal(out, stock)
    assert torch.equal(run(pipe), stock)
    assert {row.where.step for row in report.rows} == set(steps)
    assert {row.where.name for row in report.rows} == set(layers)
    assert {(row.where.step, row.where.name) for row in report.sparse_rows} == {
        (step, name) for step in steps for name, index in layers.items() if step and index
    }
    assert {r.where.reason for r in report.rows if r.where.phase is Phase.DENSE} == {"schedule", *reasons}
    assert all(sum(row.pairs) < sum(row.every) for row in report.sparse_rows)
    return report


def branches(report: Report) -> set[str]:
    return {row.where.branch for row in report.rows}


def tokens(report: Report, batch: int = 1) -> set[int]:
    """Sequence lengths of the calls that ran sparse, each with ``batch`` items."""
    return {round((row.every[0] / batch) ** 0.5) for row in report.sparse_rows}
