"""Window: the nearest blocks, as many as asked, plain loops, text, densities."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.plan import Plan
from dit_sparse.processors.window import WindowProcessor, blocks_per_row

LAYOUTS = st.builds(
    TokenLayout,
    grid=st.tuples(*[st.integers(1, 7)] * 3),
    text=st.sampled_from([0, 0, 5]),
    text_first=st.booleans(),
    suffix=st.sampled_from([0, 3]),
)


def select(method: WindowProcessor, layout: TokenLayout) -> Plan:
    q = torch.zeros(1, 1, layout.sequence, 1)
    return method.select(q, q, Call.standalone(layout))


def density(method: WindowProcessor, layout: TokenLayout) -> float:
    filled = method.order(Call.standalone(layout)).filled(method.block)
    return select(method, layout).density(filled, filled)


@settings(max_examples=100, deadline=None)
@given(LAYOUTS, st.sampled_from([1, 4, 8]), st.floats(0.01, 1))
def test_equals_plain_loops(layout, block, share):
    keep = select(WindowProcessor(density=share, block=block), layout).to_blocks()[0, 0].numpy()
    grid = -(-layout.tokens // block)
    expected = np.ones((grid + -(-layout.extra // block),) * 2, dtype=bool)
    expected[:grid, :grid] = False
    kept = max(grid, round(share * grid**2))
    for i in range(grid):
        many = (i + 1) * kept // grid - i * kept // grid
        expected[i, sorted(range(grid), key=lambda j: (abs(i - j), j))[:many]] = True
    np.testing.assert_array_equal(keep, expected)


@settings(max_examples=100, deadline=None)
@given(LAYOUTS, st.floats(0.01, 1))
def test_a_row_is_one_run_around_its_own_block(layout, share):
    keep = select(WindowProcessor(density=share, block=4), TokenLayout(layout.grid)).to_blocks()[0, 0]
    assert keep.diagonal().all()
    for row in keep:
        first, *rest = row.nonzero()[:, 0].tolist()
        assert rest == list(range(first + 1, first + 1 + len(rest)))


@given(st.floats(0.001, 1), st.integers(1, 200))
def test_rows_are_even_and_exact_to_a_block(share, blocks):
    rows = blocks_per_row(share, blocks)
    assert rows.sum() == max(blocks, round(share * blocks**2))
    assert 1 <= rows.min() <= rows.max() <= rows.min() + 1 <= blocks + 1


@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout((4, 8, 8)),
        TokenLayout((4, 8, 8), text=24),
        TokenLayout((5, 7, 9)),
        TokenLayout((5, 7, 9), text=9),
    ],
)
def test_at_density_is_exact_to_a_block(layout):
    for wanted in np.linspace(0.3, 1, 15):
        found = WindowProcessor(block=8).at_density(float(wanted), layout)
        assert abs(density(found, layout) - wanted) <= 8 * 8 / layout.sequence**2
    with pytest.raises(ValueError, match=r"floor 0\.\d+"):
        WindowProcessor(block=8).at_density(0.01, layout)


def test_at_the_floor_and_at_the_ceiling():
    layout = TokenLayout((4, 8, 8))
    least = select(WindowProcessor(block=8).at_density(1 / 32, layout), layout)
    assert torch.equal(least.to_blocks()[0, 0], torch.eye(32, dtype=torch.bool))
    assert select(WindowProcessor(block=8).at_density(1.0, layout), layout).to_blocks().all()


@pytest.mark.parametrize(
    "wrong", [{"density": 0.0}, {"density": 1.5}, {"block": 0}, {"density": float("nan")}]
)
def test_refuses(wrong):
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\] and block be >= 1, got Window"):
        WindowProcessor(**wrong)
