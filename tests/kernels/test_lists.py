"""Block lists on the device against the lists spelled out in Python.

The kernels run on a GPU (``-m gpu``), and on the CPU in the process ``test_under_the_interpreter`` starts.
"""

from dataclasses import dataclass

import pytest
import torch
from interpreter import INTERPRETED, run_under_interpreter

from dit_sparse.plan import Plan

pytest.importorskip("triton")

from dit_sparse.kernels.lists import column_lists, expand, row_lists, transpose

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=GPU)]


@dataclass(frozen=True)
class Case:
    """``plan`` and ``valid`` are the (batch, heads) of those two; ``keys`` are tokens."""

    rows: int
    keys: int
    block: tuple[int, int]
    plan: tuple[int, int] = (1, 1)
    valid: tuple[int, int] | None = None

    @property
    def blocks(self):
        return -(-self.keys // self.block[1])


CASES = [
    Case(7, 280, (64, 32)),
    Case(7, 256, (64, 32), plan=(1, 2)),
    Case(1, 5, (64, 32), valid=(1, 1)),
    Case(130, 1120, (1, 16), plan=(2, 1), valid=(1, 3)),
    Case(300, 229, (1, 7), plan=(1, 3), valid=(2, 1)),
    Case(5, 2400, (8, 4), plan=(2, 3), valid=(2, 3)),
]


def make(case, device, valid):
    """A plan whose row 1 is empty and last row full, and validity with whole, partial and empty blocks."""
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(*case.plan, case.rows, case.blocks, generator=g) < 0.3
    keep[:, :, 1:2] = False
    keep[:, :, -1] = True
    exists = None
    if valid and case.valid is not None:
        exists = torch.rand(*case.valid, case.keys, generator=g) < 1 - 0.5 / case.block[1]
        exists[0, 0, : case.block[1]] = False
    plan = Plan.from_blocks(keep, case.block).to(device)
    return keep, plan, None if exists is None else exists.to(device)


def whole_blocks(case, valid):
    """bool [B, H, K] in Python: each token of the block is inside the keys and valid."""
    valid = torch.ones(1, 1, case.keys, dtype=torch.bool) if valid is None else valid.cpu()
    size = case.block[1]
    ends = [(j + 1) * size for j in range(case.blocks)]
    return torch.stack([(valid[..., e - size : e].all(-1)) & (e <= case.keys) for e in ends], -1)


def check_rows(lists, keep, whole, width):
    batch, heads = torch.broadcast_shapes(keep.shape[:2], whole.shape[:2])
    assert lists.indices.shape == (batch, heads, keep.shape[2], width)
    assert lists.full.shape == lists.counts.shape == (batch, heads, keep.shape[2])
    assert {x.dtype for x in lists} == {torch.int32}
    keep, whole = keep.expand(batch, heads, -1, -1), whole.expand(batch, heads, -1)
    for b in range(batch):
        for h in range(heads):
            for i in range(keep.shape[2]):
                kept = [j for j, k in enumerate(keep[b, h, i].tolist()) if k]
                first = [j for j in kept if whole[b, h, j]]
                rest = [j for j in kept if not whole[b, h, j]]
                want = first + rest + [0] * (width - len(kept))
                assert lists.indices[b, h, i].tolist() == want
                assert lists.full[b, h, i] == len(first)
                assert lists.counts[b, h, i] == len(kept)


def check_columns(columns, keep):
    batch, heads, _, blocks = keep.shape
    assert columns.starts.shape == columns.counts.shape == (batch, heads, blocks)
    assert {x.dtype for x in columns} == {torch.int32}
    for b in range(batch):
        for h in range(heads):
            for j in range(blocks):
                at, size = columns.starts[b, h, j].item(), columns.counts[b, h, j].item()
                want = keep[b, h, :, j].nonzero().flatten().tolist()
                assert columns.indices[b, h, at : at + size].tolist() == want


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True], ids=["lists", "bits"])
@pytest.mark.parametrize("valid", [False, True], ids=["", "valid"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows(case, valid, packed, device):
    keep, plan, exists = make(case, device, valid)
    lists = row_lists(plan.pack() if packed else plan, case.keys, exists)
    check_rows(lists, keep, whole_blocks(case, exists), case.blocks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True], ids=["lists", "bits"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns(case, packed, device):
    keep, plan, _ = make(case, device, False)
    check_columns(column_lists(plan.pack() if packed else plan), keep)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_lists_and_rows_in_any_order(device):
    keep, plan, exists = make(CASES[4], device, True)
    odd = Plan(plan.indices.repeat_interleave(2, -1)[..., ::2], plan.counts, plan.block, plan.keys)
    lists = row_lists(odd, CASES[4].keys, exists)
    check_rows(lists, keep, whole_blocks(CASES[4], exists), plan.keys)
    check_columns(column_lists(odd), keep)
    ordered = row_lists(plan, CASES[4].keys, exists[:1])
    check_columns(transpose(ordered.indices, ordered.counts, plan.keys), keep)


@pytest.mark.parametrize("device", DEVICES)
def test_bits_as_narrow_as_the_widest_row(device):
    case = CASES[0]
    keep, _, _ = make(case, device, False)
    keep[:, :, -1] = False
    bits = Plan.from_blocks(keep, case.block).to(device).pack().bits
    width = int(keep.sum(-1).max())
    assert width < case.blocks
    check_rows(expand(bits, width, case.block[1], case.keys, None), keep, whole_blocks(case, None), width)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True], ids=["lists", "bits"])
def test_a_plan_that_keeps_nothing(packed, device):
    keep = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    plan = Plan.from_blocks(keep, 16).to(device)
    lists = row_lists(plan.pack() if packed else plan, 64, torch.ones(1, 1, 64, dtype=torch.bool).to(device))
    check_rows(lists, keep, torch.ones(1, 1, 4, dtype=torch.bool), 4 if packed else 1)
    check_columns(column_lists(plan.pack() if packed else plan), keep)


def test_lists_are_not_copied_where_none_changes():
    _, plan, _ = make(CASES[1], "cpu", False)
    lists = row_lists(plan, 256)
    assert lists.indices is plan.indices
    assert lists.full is lists.counts is plan.counts
    assert row_lists(plan, 255).indices is plan.indices


@pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")
def test_under_the_interpreter():
    run_under_interpreter(__file__)
