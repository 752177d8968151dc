"""TokenLayout: counts and positions against a sequence written out token by token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.layout import TokenLayout

SIZES = st.integers(0, 5)


@given(st.tuples(*[st.integers(1, 5)] * 3), SIZES, st.booleans(), SIZES, SIZES)
def test_positions(grid, text, text_first, prefix, suffix):
    layout = TokenLayout(grid, text=text, text_first=text_first, prefix=prefix, suffix=suffix)
    f, h, w = grid
    body = ["prefix"] * prefix + ["grid"] * (f * h * w) + ["suffix"] * suffix
    sequence = ["text"] * text + body if text_first else body + ["text"] * text
    assert layout.sequence == len(sequence)
    assert layout.tokens == sequence.count("grid")
    assert layout.frame == h * w
    assert layout.extra == len(sequence) - sequence.count("grid")
    assert layout.grid_start == sequence.index("grid")
    if text:
        assert layout.text_start == sequence.index("text")


def test_a_list_becomes_a_tuple():
    layout = TokenLayout([2, 3, 4])
    assert layout.grid == (2, 3, 4)
    assert hash(layout) == hash(TokenLayout((2, 3, 4)))


@pytest.mark.parametrize("grid", [(2, 3), (2, 3, 4, 5), (0, 3, 4), (2, -1, 4), (2, 3.0, 4), "abc", ()])
def test_refuses_what_is_no_grid(grid):
    with pytest.raises(ValueError, match=r"three positive integers \(frames, height, width\), got"):
        TokenLayout(grid)


@pytest.mark.parametrize("name", ["text", "prefix", "suffix"])
@pytest.mark.parametrize("value", [-1, 1.5, None])
def test_refuses_what_is_no_count(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a token count >= 0, got {value}"):
        TokenLayout((1, 2, 3), **{name: value})
