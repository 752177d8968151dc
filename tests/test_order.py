"""Order: every arrangement is a permutation with holes; apply, undo and counts against slow definitions."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.layout import TokenLayout
from dit_sparse.order import Order, fill_counts, gilbert

SIZES = st.integers(0, 7)
LAYOUTS = st.builds(
    TokenLayout,
    st.tuples(*[st.integers(1, 5)] * 3),
    text=SIZES,
    text_first=st.booleans(),
    prefix=SIZES,
    suffix=SIZES,
)
BLOCKS = st.integers(1, 9)
AXES = st.permutations("fhw").map("".join)
TILES = st.tuples(*[st.integers(1, 4)] * 3)


@st.composite
def orders(draw, layouts=LAYOUTS):
    """(layout, block, order) from every constructor."""
    layout, block = draw(layouts), draw(BLOCKS)
    kind = draw(st.sampled_from(["raster", "frames", "tiles", "axes", "curve"]))
    if kind == "tiles":
        return layout, block, Order.tiles(layout, draw(TILES), block)
    if kind == "axes":
        return layout, block, Order.axes(layout, draw(AXES), block)
    return layout, block, getattr(Order, kind)(layout, block)


@st.composite
def stacks(draw):
    """One order per KV head, of equal length."""
    layout, block = draw(LAYOUTS), draw(BLOCKS)
    axes = draw(st.lists(AXES, min_size=1, max_size=3))
    return layout, block, Order.stack([Order.axes(layout, a, block) for a in axes])


@given(orders())
def test_every_token_once_and_the_grid_first(case):
    layout, block, order = case
    index = order.index[0]
    assert index.dtype == torch.int64
    assert order.tokens == layout.sequence
    assert index[index >= 0].sort().values.tolist() == list(range(layout.sequence))
    grid = (index >= layout.grid_start) & (index < layout.grid_start + layout.tokens)
    after = index[int(grid.nonzero().max()) + 1 :]
    after = after[after >= 0].tolist()
    text = range(layout.text_start, layout.text_start + layout.text)
    prefix = range(layout.grid_start - layout.prefix, layout.grid_start)
    end = layout.grid_start + layout.tokens
    assert after == [*prefix, *range(end, end + layout.suffix), *text]
    if layout.extra:
        assert (order.slots - layout.extra) % block == 0
        assert (index[order.slots - layout.extra :] >= 0).all()
    assert order.identity == (index.tolist() == list(range(layout.sequence)))


@given(orders(), st.sampled_from([(1, 1, 1), (2, 3, 2)]))
def test_undo_is_the_inverse_and_holes_are_zeros(case, shape):
    layout, _, order = case
    batch, heads, dim = shape
    x = torch.randn(batch, heads, layout.sequence, dim)
    ordered = order.apply(x)
    for slot, token in enumerate(order.index[0].tolist()):
        expected = x[:, :, token] if token >= 0 else torch.zeros(batch, heads, dim)
        assert torch.equal(ordered[:, :, slot], expected)
    assert torch.equal(order.undo(ordered), x)
    poisoned = ordered.masked_fill((order.index[0] < 0)[:, None], float("nan"))
    assert torch.equal(order.undo(poisoned), x)


@given(stacks(), st.integers(1, 3))
def test_one_order_per_kv_head_serves_its_group_of_query_heads(case, group):
    layout, _, order = case
    kv_heads = order.index.shape[0]
    heads = kv_heads * group
    x = torch.randn(2, heads, layout.sequence, 2)
    ordered = order.apply(x)
    for head in range(heads):
        alone = Order(order.index[head // group][None], order.tokens)
        assert torch.equal(ordered[:, head : head + 1], alone.apply(x[:, head : head + 1]))
    assert torch.equal(order.undo(ordered), x)


@given(stacks(), st.integers(1, 2), BLOCKS)
def test_batch_items_may_have_orders_of_their_own(case, group, block):
    layout, _, order = case
    other = Order(order.index.flip(0), order.tokens)
    both = Order(torch.stack([order.index, other.index]), order.tokens)
    x = torch.randn(2, order.index.shape[0] * group, layout.sequence, 2)
    validity = torch.rand(2, layout.sequence) < 0.6
    ordered = both.apply(x)
    assert torch.equal(both.undo(ordered), x)
    for b, alone in enumerate((order, other)):
        assert torch.equal(ordered[b : b + 1], alone.apply(x[b : b + 1]))
        for valid in (None, validity[0]):
            assert torch.equal(both.valid(valid)[b : b + 1], alone.valid(valid))
        assert torch.equal(both.filled(block, validity)[b : b + 1], alone.filled(block, validity[b]))


def test_heads_that_no_group_fits_are_refused():
    layout = TokenLayout((2, 2, 3))
    order = Order.stack([Order.axes(layout, a) for a in ("fhw", "hwf")])
    with pytest.raises(ValueError, match="3 heads cannot share 2 per-head orders"):
        order.apply(torch.zeros(1, 3, 12, 1))


@given(orders(), BLOCKS, st.randoms(use_true_random=False))
def test_valid_and_filled_are_counts_of_tokens(case, block, random):
    layout, _, order = case
    batch = random.randint(1, 3)
    validity = torch.tensor([[random.random() < 0.6 for _ in range(layout.sequence)] for _ in range(batch)])
    index = order.index[0].tolist()
    for given_, rows in ((None, [None]), (validity[0], [validity[0]]), (validity, list(validity))):
        slots, counts = order.valid(given_), order.filled(block, given_)
        assert slots.shape == (len(rows), 1, order.slots)
        for b, row in enumerate(rows):
            expected = [token >= 0 and (row is None or bool(row[token])) for token in index]
            assert slots[b, 0].tolist() == expected
            per_block = [sum(expected[i : i + block]) for i in range(0, len(expected), block)]
            assert counts[b, 0].tolist() == per_block
    assert counts.dtype == torch.int64


@given(stacks(), st.integers(1, 2), st.integers(1, 3), st.integers(0, 2**31))
def test_validity_per_head(case, batch, group, seed):
    layout, _, order = case
    kv_heads = order.index.shape[0]
    heads = kv_heads * group
    generator = torch.Generator().manual_seed(seed)
    validity = torch.rand(batch, heads, layout.sequence, generator=generator) < 0.6
    slots = order.valid(validity)
    assert slots.shape == (batch, heads, order.slots)
    for b in range(batch):
        for h in range(heads):
            index = order.index[h // group if kv_heads > 1 else 0].tolist()
            assert slots[b, h].tolist() == [t >= 0 and bool(validity[b, h, t]) for t in index]


@pytest.mark.parametrize(
    "wrong", [torch.ones(5, dtype=torch.bool), torch.ones(12), torch.ones(1, 1, 1, 12).bool()]
)
def test_validity_of_another_shape_is_refused(wrong):
    with pytest.raises(ValueError, match=r"key validity must be bool \[\.\.\., 12\]"):
        Order.raster(TokenLayout((2, 2, 3))).valid(wrong)


@given(LAYOUTS, BLOCKS)
def test_frames_start_on_block_boundaries(layout, block):
    index = Order.frames(layout, block).index[0]
    stride = -(-layout.frame // block) * block
    for i in range(layout.grid[0]):
        start = layout.grid_start + i * layout.frame
        run = index[i * stride : (i + 1) * stride].tolist()
        assert run == [*range(start, start + layout.frame), *[-1] * (stride - layout.frame)]


@given(LAYOUTS, TILES)
def test_tiles_are_runs(layout, tile):
    (f, h, w), (tf, th, tw) = layout.grid, tile
    expected = []
    for a in range(0, f, tf):
        for b in range(0, h, th):
            for c in range(0, w, tw):
                for z in range(a, a + tf):
                    for y in range(b, b + th):
                        for x in range(c, c + tw):
                            inside = z < f and y < h and x < w
                            expected.append(layout.grid_start + (z * h + y) * w + x if inside else -1)
    assert Order.tiles(layout, tile).index[0, : len(expected)].tolist() == expected


@given(LAYOUTS, AXES)
def test_axes_in_the_order_of_their_letters(layout, axes):
    size = dict(zip("fhw", layout.grid, strict=True))
    outer, middle, inner = axes
    expected = []
    for a in range(size[outer]):
        for b in range(size[middle]):
            for c in range(size[inner]):
                at = {outer: a, middle: b, inner: c}
                token = (at["f"] * size["h"] + at["h"]) * size["w"] + at["w"]
                expected.append(layout.grid_start + token)
    assert Order.axes(layout, axes).index[0, : layout.tokens].tolist() == expected


GILBERT = {  # (width, height, frames): sha256 of the int64 order made by the reference implementation
    (4, 4, 4): "d152e6595ff2d518e65d9e30d4437c1250f4e37a1a5a4129da8ee8f32456eb43",
    (5, 3, 2): "410abb64c37d7279b03687f8621e6ede2c4270005228d9cc0ca60dd09c9cd2e6",
    (8, 6, 4): "268133f7c060bd74b901a1f3845ce681aae77ac9f95d89ee2764a1f6a887f26e",
    (2, 2, 9): "19900b5e503b626381d2fa5d794b508c60e95ac1cf05e239eac030bf59822389",
    (45, 30, 13): "b94d634438e5bae676a4594d380a3795a69ca29dfce8f8184b71122a040306e1",
    (52, 30, 21): "aae7e1acc189fde953dcd8cae6a2f97f0011c9977fcf96a015f5121fc6696803",
    (80, 45, 21): "be9a8e957b8f9008cb186513a805f0cf068b8b34f24c0c19c1011c6c03297041",
}


@pytest.mark.parametrize("size", GILBERT, ids=str)
def test_gilbert_is_the_reference_curve(size):
    w, h, f = size
    order = gilbert((f, h, w))
    assert hashlib.sha256(order.numpy().astype("<i8").tobytes()).hexdigest() == GILBERT[size]


def test_gilbert_where_frames_outnumber_rows():
    order = gilbert((41, 30, 52))
    digest = "cf604f41c4fa5a4ac7a5816dd524b040386ee1681ae27ffa716c76adaa04c9bf"
    assert hashlib.sha256(order.numpy().astype("<i8").tobytes()).hexdigest() == digest


@settings(max_examples=60)
@given(st.tuples(*[st.integers(1, 12)] * 3))
def test_gilbert_visits_every_token_and_leaps_only_at_odd_sizes(grid):
    f, h, w = grid
    order = gilbert(grid)
    assert order.sort().values.tolist() == list(range(f * h * w))
    place = torch.stack((order // (h * w), order // w % h, order % w))
    steps = (place[:, 1:] - place[:, :-1]).abs().sum(0)
    assert (steps <= (4 if any(n % 2 for n in grid) else 1)).all()


@given(st.integers(1, 30), st.integers(1, 9))
def test_fill_counts_has_a_ragged_last_block(slots, block):
    counts = fill_counts(torch.ones(2, slots, dtype=torch.bool), block)
    assert counts[1].tolist() == [min(block, slots - i) for i in range(0, slots, block)]


def test_refuses():
    layout = TokenLayout((2, 3, 4))
    order = Order.frames(layout, 8)
    with pytest.raises(ValueError, match="for sequences of 24 tokens, got 5"):
        order.apply(torch.zeros(1, 1, 5, 1))
    with pytest.raises(ValueError, match="has 32 slots, got a sequence of 24"):
        order.undo(torch.zeros(1, 1, 24, 1))
    with pytest.raises(ValueError, match="permutation of 'fhw', got 'fhh'"):
        Order.axes(layout, "fhh")
    with pytest.raises(ValueError, match="three positive sizes"):
        Order.tiles(layout, (2, 0, 4))
    with pytest.raises(ValueError, match="equally long"):
        Order.stack([order, Order.raster(layout)])
    with pytest.raises(ValueError, match="positive number of tokens, got 0"):
        Order.raster(layout, 0)
