"""Neighborhood and sliding tile: NATTEN's windows, masks, orders and tile counts, plain loops, properties."""

import json
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_sparse
from dit_sparse.kernels.reference import token_mask
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.order import Order
from dit_sparse.plan import Plan
from dit_sparse.processors.neighborhood import (
    Axis,
    NeighborhoodProcessor,
    Neighbors,
    SlidingTileProcessor,
    gna_window,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "gna"
HUNYUAN, COSMOS, FLUX = TokenLayout((30, 48, 80)), TokenLayout((16, 44, 80)), TokenLayout((1, 256, 256))
Method = NeighborhoodProcessor | SlidingTileProcessor


def select(method: Method, layout: TokenLayout, heads: int = 1) -> Plan:
    q = torch.zeros(1, heads, layout.sequence, 1)
    return method.select(q, q, Call.standalone(layout, heads=heads))


def visible(method: Method, layout: TokenLayout, heads: int = 1) -> np.ndarray:
    """bool [heads or 1, S, S]: which token reads which, in model order."""
    call = Call.standalone(layout, heads=heads)
    order = method.order(call)
    seen = token_mask(
        select(method, layout, heads), order.slots, order.slots, heads, order.valid(), order.index
    )[0]
    return order.undo(order.undo(seen[None].mT.contiguous()).mT.contiguous())[0].numpy()


def density(method: Method, layout: TokenLayout, heads: int = 1) -> float:
    return float(np.mean(visible(method, layout, heads)))


def loops(length: int, window: int, stride: int, dilation: int, causal: bool) -> np.ndarray:
    """GNA along one axis, query by query."""
    seen = np.zeros((length, length), dtype=bool)
    for x in range(length):
        group = [y for y in range(length) if y % dilation == x % dilation]
        place = group.index(x)
        run = place // stride * stride
        leader = min(run + (stride - 1 if causal else stride // 2), len(group) - 1)
        if causal:
            seen[x, group[max(leader - window + 1, 0) : place + 1]] = True
        else:
            start = min(max(leader - window // 2, 0), len(group) - window)
            seen[x, group[start : start + window]] = True
    return seen


def everywhere(axes: list[np.ndarray], layout: TokenLayout) -> np.ndarray:
    """The product of masks of the axes, dense around the grid."""
    mask = axes[0]
    for axis in axes[1:]:
        mask = np.kron(mask, axis)
    seen = np.ones((layout.sequence,) * 2, dtype=bool)
    grid = slice(layout.grid_start, layout.grid_start + layout.tokens)
    seen[grid, grid] = mask
    return seen


def to_3d(values: list, one: object) -> tuple:
    return (*[one] * (3 - len(values)), *values)


CASES = [
    (path.stem, case)
    for path in sorted(VECTORS.glob("gna_?d.json"))
    for case in json.loads(path.read_text())["cases"]
]


def stored(name: str) -> dict[str, np.ndarray]:
    with np.load(VECTORS / f"{name}.npz") as file:
        return dict(file)


def of_case(case: dict, **more: object) -> NeighborhoodProcessor:
    return NeighborhoodProcessor(
        window=to_3d(case["window"], 1),
        stride=to_3d(case["stride"], 1),
        dilation=to_3d(case["dilation"], 1),
        causal=to_3d(case["causal"], False),
        **more,
    )


def test_windows_are_nattens():
    assert len(CASES) >= 734 + 60
    arrays = {name: stored(name) for name in {name for name, _ in CASES}}
    for name, case in CASES:
        keys = ("shape", "window", "stride", "dilation", "causal")
        for axis, given_ in enumerate(zip(*(case[key] for key in keys), strict=True)):
            for part, found in zip(("start", "end", "group"), gna_window(*given_), strict=True):
                expected = arrays[name][f"{case['id']}_{part}{axis}"]
                np.testing.assert_array_equal(found.numpy(), expected, err_msg=str(case))


def test_masks_are_nattens():
    arrays, tiles = {name: stored(name) for name in {name for name, _ in CASES}}, [(1, 1, 4), (2, 2, 2)]
    masked = 0
    for i, (name, case) in enumerate(CASES):
        key, layout = f"{case['id']}_mask", TokenLayout(to_3d(case["shape"], 1))
        seen = visible(of_case(case, tile=tiles[i % 2]), layout)[0]
        assert seen.sum() == case["nnz"]
        if key in arrays[name]:
            np.testing.assert_array_equal(np.packbits(seen.reshape(-1)), arrays[name][key])
            masked += 1
    assert masked >= 60


def test_orders_are_nattens():
    arrays = stored("token_permute")
    cases = json.loads((VECTORS / "token_permute.json").read_text())["cases"]
    for case in cases:
        shape, tile, dilation = (to_3d(case[key], 1) for key in ("shape", "tile", "dilation"))
        groups = prod(dilation)
        if not case["flip_tiled_dims"]:
            index = Order.tiles(TokenLayout(shape), tile, dilation=dilation).index[0].view(groups, -1)
        else:  # NATTEN's CUTLASS kernels: the order of the transposed grid
            flipped = Order.tiles(TokenLayout(shape[::-1]), tile[::-1], dilation=dilation[::-1]).index[0]
            source = torch.arange(prod(shape)).view(shape).permute(2, 1, 0).flatten()
            index = torch.where(flipped < 0, -1, source[flipped]).view(groups, -1)
        assert index.shape == (case["groups"], case["padded_len"])
        np.testing.assert_array_equal(index.numpy(), arrays[case["id"]])
    assert len(cases) == 16
    with pytest.raises(ValueError, match="dilation must be three positive sizes"):
        Order.tiles(HUNYUAN, (2, 8, 8), dilation=(1, 0, 1))


def test_tile_counts_are_those_of_the_papers_simulator():
    cases = json.loads((VECTORS / "gna_tiles.json").read_text())
    for case in cases:
        counts = []
        for axis, ranges in enumerate(case["tile_ranges"]):
            length, window, stride = (case[key][axis] for key in ("shape", "window", "stride"))
            first, stop, _ = Axis(length, window, stride).visited(case["q_tile"][axis], case["kv_tile"][axis])
            assert torch.stack((first, stop - first), -1)[0].tolist() == ranges
            counts.append((stop - first)[0].double())
        total = prod(-(-n // t) for n, t in zip(case["shape"], case["kv_tile"], strict=True))
        worst, mean = prod(float(c.max()) for c in counts), prod(float(c.mean()) for c in counts)
        flops = prod(case["shape"]) / prod(case["window"])
        share, bound = case["sa_share"], round(total / worst, 3)  # rounded, as it is there
        found = {
            "kv_tiles_total": total, "worst": worst, "mean": mean, "speedup_worst": bound,
            "speedup_mean": total / mean, "flop_speedup": flops,
            "e2e_from_sa_share": 1 / (1 - share + share / bound),
        }  # fmt: skip
        assert {key: round(value, 3) for key, value in found.items()} == {key: case[key] for key in found}
    assert len(cases) == 31


@pytest.mark.parametrize(
    ("layout", "window", "stride", "tile", "kept"),
    [
        (HUNYUAN, (18, 24, 24), (16, 8, 8), (2, 8, 8), 1 - 0.91),
        (HUNYUAN, (18, 24, 24), (2, 8, 8), (2, 8, 8), 1 - 0.91),
        (HUNYUAN, (30, 40, 40), (1, 32, 8), (2, 8, 8), 1 - 0.583),
        (HUNYUAN, (-1, 40, 40), (2, 8, 8), (2, 8, 8), 1 - 0.583),
        (COSMOS, (16, 32, 48), (1, 8, 16), (4, 4, 8), 1 - 0.564),
        (COSMOS, (16, 24, 16), (1, 8, 16), (4, 4, 8), 1 - 0.891),
        (FLUX, (1, 80, 80), (1, 16, 16), (1, 16, 8), 1 - 0.902),
    ],
)
def test_published_settings_read_whole_tiles_and_their_sparsity(layout, window, stride, tile, kept):
    plan = select(NeighborhoodProcessor(window=window, stride=stride, tile=tile), layout)
    assert plan.rule is None
    assert plan.block == (128, 128)
    assert (plan.counts == plan.counts[0, 0, 0]).all()
    exact = prod(n if w < 0 else w for w, n in zip(window, layout.grid, strict=True)) / layout.tokens
    # Cosmos has 44 rows and tiles of 4, so nothing is ragged: blocks and tokens have one density.
    assert float(plan.counts[0, 0, 0]) / plan.keys == exact
    assert round(exact, 2) == round(kept, 2)


SIZES = st.tuples(*[st.integers(1, 6)] * 3)
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9))
WINDOWS = st.tuples(*[st.sampled_from([-1, 1, 2, 3, 4, 5])] * 3)
LAYOUTS = st.builds(
    TokenLayout,
    grid=GRIDS,
    text=st.sampled_from([0, 0, 5]),
    text_first=st.booleans(),
    prefix=st.sampled_from([0, 3]),
    suffix=st.sampled_from([0, 2]),
)
METHODS = st.builds(
    NeighborhoodProcessor,
    window=WINDOWS,
    stride=st.tuples(*[st.integers(1, 4)] * 3),
    dilation=st.tuples(*[st.integers(1, 3)] * 3),
    causal=st.tuples(*[st.sampled_from([False, False, True])] * 3),
    tile=st.tuples(*[st.integers(1, 4)] * 3),
)


@settings(max_examples=200, deadline=None)
@given(METHODS, LAYOUTS)
def test_equals_plain_loops(method, layout):
    (axes,) = method.axes(layout.grid)
    expected = everywhere([loops(a.length, a.window, a.stride, a.dilation, a.causal) for a in axes], layout)
    np.testing.assert_array_equal(visible(method, layout)[0], expected)
    # Whole tiles: exactly those that hold a pair, and no rule is kept that hides nothing.
    coarse = replace(method, exact=False)
    order = method.order(Call.standalone(layout))
    plan, (block, _) = select(coarse, layout), select(coarse, layout).block
    grid = (order.slots - layout.extra) // block
    here = order.valid()[0, 0]
    pairs = torch.zeros(order.slots, order.slots, dtype=torch.bool)
    pairs[here[:, None] & here] = torch.from_numpy(expected)[order.index[0, here]][
        :, order.index[0, here]
    ].flatten()
    held = pairs[: grid * block, : grid * block].unflatten(1, (grid, block)).unflatten(0, (grid, block))
    assert torch.equal(plan.to_blocks()[0, 0, :grid, :grid], held.any(3).any(1))
    assert plan.rule is None
    superset = visible(coarse, layout)[0]
    assert (superset | ~expected).all()
    assert (select(method, layout).rule is None) == bool((superset == expected).all())


@settings(max_examples=100, deadline=None)
@given(METHODS, GRIDS)
def test_every_query_reads_itself_and_one_size_of_window(method, grid):
    method = replace(method, causal=(False, False, False))
    seen = visible(method, TokenLayout(grid))[0]
    assert seen.diagonal().all()
    (axes,) = method.axes(grid)
    assert (seen.sum(1) == prod(axis.window for axis in axes)).all()


def test_causal_axes_read_nothing_later():
    layout = TokenLayout((6, 4, 4))
    method = NeighborhoodProcessor(
        window=(3, 4, 4), stride=(1, 1, 1), causal=(True, False, False), tile=(1, 4, 4)
    )
    plan = select(method, layout)
    assert plan.rule is None  # a tile is a frame, so even this is made of whole tiles
    assert [plan.indices[0, 0, i, :n].tolist() for i, n in enumerate(plan.counts[0, 0])] == [
        [0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5],
    ]  # fmt: skip


def test_1d_causal_with_a_whole_window_is_causal_attention():
    seen = visible(
        NeighborhoodProcessor(window=(1, 1, -1), causal=(False, False, True), tile=(1, 1, 4)),
        TokenLayout((1, 1, 11)),
    )
    np.testing.assert_array_equal(seen[0], np.tril(np.ones((11, 11), dtype=bool)))


def test_stride_equal_to_the_window_is_blocked_attention():
    seen = visible(
        NeighborhoodProcessor(window=(2, 2, 3), stride=(2, 2, 3), tile=(1, 2, 3)), TokenLayout((4, 4, 6))
    )[0]
    where = np.stack(np.unravel_index(np.arange(96), (4, 4, 6)), -1) // (2, 2, 3)
    np.testing.assert_array_equal(seen, (where[:, None] == where).all(-1))


def test_whole_windows_are_dense():
    layout = TokenLayout((3, 5, 7), text=4)
    plan = select(NeighborhoodProcessor(window=(99, -1, 7), stride=(3, 2, 5)), layout)
    assert plan.rule is None
    assert visible(NeighborhoodProcessor(window=(99, -1, 7)), layout).all()


def test_scales_with_the_grid_as_cosmos_predict2():
    method = NeighborhoodProcessor(
        window=(-1, 4, 16), stride=(1, 3, 3), dilation=(1, 11, 5), base=(-1, 44, 80), tile=(4, 4, 8)
    )
    for grid in ((16, 44, 80), (24, 30, 52), (5, 22, 40), (7, 88, 160), (1, 9, 100)):
        (axes,) = method.axes(grid)
        expected = [Axis(grid[0], grid[0], 1)]
        for n, b, w, s, d in ((grid[1], 44, 4, 3, 11), (grid[2], 80, 16, 3, 5)):
            ratio = n / b
            window = min(max(2, round(w * ratio)), n)
            stride = min(max(1, round(s * ratio)), window)
            expected.append(Axis(n, window, stride, min(max(1, round(d * ratio)), n // window)))
        assert list(axes) == expected
    # Dilation groups are tiled on their own: at the base grid a tile reads 1 of 11 x 5 groups, whole.
    plan = select(method, COSMOS)
    assert plan.keys == 4 * 11 * 10
    assert plan.counts.max() == 4 * 1 * 2
    assert plan.counts.unique().tolist() == [8]
    assert plan.rule is None


@pytest.mark.parametrize(
    ("window", "stride", "dilation", "percent"),
    [
        ((-1, 4, 16), (1, 1, 1), (1, 11, 5), 98),
        ((-1, 12, 16), (1, 4, 1), (1, 1, 5), 95),
        ((-1, 12, 24), (1, 4, 8), (1, 1, 1), 92),
        ((-1, 20, 40), (1, 4, 8), (1, 1, 1), 77),
        ((-1, 28, 56), (1, 4, 8), (1, 1, 1), 55),
    ],
)
def test_layers_of_cosmos_predict2_read_whole_tiles(window, stride, dilation, percent):
    method = NeighborhoodProcessor(
        window=window, stride=stride, dilation=dilation, base=(-1, 44, 80), tile=(4, 4, 8)
    )
    plan = select(method, TokenLayout((24, 44, 80)))
    assert plan.rule is None
    assert int(100 * (1 - float(plan.counts.double().mean()) / plan.keys) + 0.5) == percent


def released(n: int, k: int) -> np.ndarray:
    """STA's rule along one axis of tiles: at most k // 2 from a centre held off the border by as much."""
    tile = np.arange(n)
    centre = np.minimum(np.maximum(tile, k // 2), n - 1 - k // 2)
    return np.abs(centre[:, None] - tile) <= k // 2


@settings(max_examples=100, deadline=None)
@given(LAYOUTS, st.lists(SIZES, min_size=1, max_size=3), st.tuples(*[st.integers(1, 3)] * 3))
def test_sliding_tiles_are_the_released_rule_for_every_head(layout, windows, tile):
    heads = len(windows)
    method = SlidingTileProcessor(window=tuple(windows), tile=tile)
    seen = visible(method, layout, heads)
    for head, window in enumerate(windows):
        axes = []
        for n, t, k in zip(layout.grid, tile, window, strict=True):
            of_tile = np.arange(n) // min(t, 1 << (n - 1).bit_length())
            axes.append(released(of_tile[-1] + 1, k)[of_tile][:, of_tile])
        np.testing.assert_array_equal(seen[head], everywhere(axes, layout))
    assert select(method, layout, heads).rule is None


def test_sliding_tile_is_a_neighborhood_of_whole_tiles():
    sliding = select(SlidingTileProcessor(window=(3, 3, 3)), HUNYUAN)
    assert sliding.block == (384, 384)
    assert sliding.counts.unique().tolist() == [27]
    gna = NeighborhoodProcessor(window=(18, 24, 24), stride=(6, 8, 8), tile=(6, 8, 8))
    assert sliding.same(select(gna, HUNYUAN))
    # As token masks whatever the tile of the neighborhood: on a small grid with a finer one.
    layout = TokenLayout((6, 8, 10))
    gna = NeighborhoodProcessor(window=(6, 6, 6), stride=(2, 2, 2), tile=(1, 2, 2))
    np.testing.assert_array_equal(
        visible(gna, layout), visible(SlidingTileProcessor(window=(3, 3, 3), tile=(2, 2, 2)), layout)
    )


def test_an_even_sliding_window_reads_one_tile_more():
    layout = TokenLayout((1, 1, 10))
    plans = [select(SlidingTileProcessor(window=(1, 1, k), tile=(1, 1, 1)), layout) for k in (4, 5)]
    assert plans[0].same(plans[1])
    assert plans[0].counts.unique().tolist() == [5]


def test_an_image_does_not_fill_its_tiles_with_holes():
    layout = TokenLayout((1, 64, 64))
    for method in (NeighborhoodProcessor(), SlidingTileProcessor()):
        assert method.order(Call.standalone(layout)).slots == layout.tokens
        assert select(method, layout).rule is None
        assert select(method, layout).counts.max() < 64


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize(
    "method",
    [
        NeighborhoodProcessor(window=(3, 5, 5), stride=(1, 2, 2), tile=(1, 2, 2)),
        NeighborhoodProcessor(window=(-1, 4, 4), stride=(2, 2, 3), tile=(2, 2, 2)),
        NeighborhoodProcessor(window=(3, 2, 3), stride=(1, 1, 2), dilation=(1, 2, 2), tile=(1, 2, 2)),
        NeighborhoodProcessor(
            window=(3, 4, 4), stride=(1, 2, 2), causal=(True, False, False), tile=(1, 2, 2)
        ),
    ],
)
def test_at_density_is_the_nearest(method, text, exact):
    layout, method = TokenLayout((5, 6, 9), text=text), replace(method, exact=exact)
    (now,) = method.axes(layout.grid)
    # Every window on the way from one stride to the whole: the axis grows that is nearest to its next size.
    least = [axis.stride for axis in now]
    ladders = [
        [*range(a.stride, a.length // a.dilation, 2 * t), a.length // a.dilation]
        for a, t in zip(now, method.tile, strict=True)
    ]
    path, at = [tuple(least)], [0, 0, 0]
    while any(i + 1 < len(ladder) for i, ladder in zip(at, ladders, strict=True)):
        _, grows = min(
            ((ladder[i] + ladder[i + 1]) / now[axis].window, axis)
            for axis, (i, ladder) in enumerate(zip(at, ladders, strict=True))
            if i + 1 < len(ladder)
        )
        at[grows] += 1
        path.append(tuple(ladder[i] for i, ladder in zip(at, ladders, strict=True)))
    fixed = {name: tuple(getattr(axis, name) for axis in now) for name in ("stride", "dilation")}
    every = [density(replace(method, window=window, **fixed), layout) for window in path]
    assert every == sorted(every)
    assert len(set(every)) > 4
    for wanted in np.linspace(every[0], every[-1], 9):
        found = method.at_density(float(wanted), layout)
        assert found == replace(method, window=found.window, **fixed)
        assert found.window in path
        reached = density(found, layout)
        assert abs(reached - wanted) <= min(abs(d - wanted) for d in every) + 1e-9
    with pytest.raises(ValueError, match=r"floor 0\.\d+ and the ceiling .* got 0\.0: use a smaller stride"):
        method.at_density(0.0, layout)


@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize("window", [(3, 3, 3), (5, 4, 2), ((1, 3, 3), (3, 3, 1))])
def test_sliding_at_density_is_the_nearest(window, text):
    layout, method = TokenLayout((7, 7, 11), text=text), SlidingTileProcessor(window=window, tile=(2, 2, 2))
    heads = len(method.axes(layout.grid))
    reached = set()
    for wanted in np.linspace(0.3, 1, 15):
        found = method.at_density(float(wanted), layout)
        assert len(found.axes(layout.grid)) == heads
        reached.add(density(found, layout, heads))
    assert len(reached) > 4
    for wanted in np.linspace(0.3, 1, 15):
        near = density(method.at_density(float(wanted), layout), layout, heads)
        assert abs(near - wanted) <= min(abs(d - wanted) for d in reached) + 1e-9
    with pytest.raises(ValueError, match=r"floor 0\.\d+"):
        method.at_density(0.0, layout)


def test_at_density_keeps_whole_tiles_and_proportions():
    found = NeighborhoodProcessor().at_density(0.2, HUNYUAN)
    plan = select(found, HUNYUAN)
    assert plan.rule is None
    assert abs(float(plan.counts.double().mean()) / plan.keys - 0.2) < 0.03
    with pytest.raises(ValueError, match=r"ceiling 0\.2500.*smaller dilation"):
        NeighborhoodProcessor(dilation=(1, 2, 2), window=(2, 2, 2)).at_density(0.5, TokenLayout((4, 8, 8)))


@pytest.mark.parametrize("backend", ["reference", "gathered", "flex"])
def test_backends_compute_the_windows_of_the_loops(backend):
    layout = TokenLayout((3, 5, 6), text=4, text_first=True)
    method = NeighborhoodProcessor(window=(2, 3, 4), stride=(1, 2, 1), dilation=(1, 1, 1), tile=(2, 2, 4))
    valid = torch.ones(2, layout.sequence, dtype=torch.bool)
    valid[1, :2] = False
    q, k, v = (tiny.randn(2, n, layout.sequence, 8, seed=n) for n in (4, 2, 2))
    call = Call.standalone(layout, heads=4, kv_heads=2, valid=valid)
    order = method.order(call)
    call = call.at(order=order, backend=backend)
    assert select(method, layout).rule is not None
    out = order.undo(method.attend(*(order.apply(x) for x in (q, k, v)), call))
    axes = [loops(a.length, a.window, a.stride, a.dilation, a.causal) for a in method.axes(layout.grid)[0]]
    seen = torch.from_numpy(everywhere(axes, layout)) & valid[:, None, None]
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), attn_mask=seen, enable_gqa=True
    )
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_reports_the_backend_that_honours_the_rule():
    model = tiny.wan()
    method = NeighborhoodProcessor(window=(3, 3, 3), stride=(1, 1, 1), tile=(1, 4, 4))
    session = dit_sparse.apply(model, method, schedule="always")
    model(**tiny.wan_inputs())
    report = session.report()
    assert report.sparse_density == pytest.approx(27 / 120)
    assert "gathered on cpu" in str(report)
    assert "token-level rule" in str(report)
    dit_sparse.apply(model, method, schedule="always", backend="cpu")
    with pytest.raises(ValueError, match=r"'cpu' cannot honour the rule Neighbors.*use one of flex"):
        model(**tiny.wan_inputs())
    session = dit_sparse.apply(model, replace(method, exact=False), schedule="always", backend="cpu")
    model(**tiny.wan_inputs())
    assert 27 / 120 < session.report().sparse_density < 0.9


@torch.no_grad()
def test_the_given_image_is_read_by_all_whatever_the_rule(monkeypatch):
    model, plans = tiny.wan_i2v(), []
    method = NeighborhoodProcessor(window=(2, 3, 3), stride=(1, 1, 1), tile=(2, 2, 2))
    execute = Call._execute
    monkeypatch.setattr(Call, "_execute", lambda self, q, k, v, plan, *rest: (
        plans.append((plan, self.order)), execute(self, q, k, v, plan, *rest)
    )[1])  # fmt: skip
    dit_sparse.apply(model, method, schedule="always")
    model(**tiny.wan_i2v_inputs())
    plan, order = plans[0]
    seen = order.undo(
        order.undo(token_mask(plan, order.slots, order.slots, 1, order.valid(), order.index).mT.contiguous())
        .mT.contiguous()
    )[0, 0]  # fmt: skip
    expected = visible(method, TokenLayout((5, 4, 6)))[0]
    expected[:, :24] = True
    np.testing.assert_array_equal(seen.numpy(), expected)


def test_the_rule_is_a_value():
    one, other = (
        select(NeighborhoodProcessor(window=(3, 3, 3)), TokenLayout((4, 5, 6))).rule for _ in range(2)
    )
    assert isinstance(one, Neighbors)
    assert one == other
    assert hash(one) == hash(other)
    assert "window=3" in repr(one)


def test_the_rule_is_traced_as_flex_attention_traces_it():
    rule = Neighbors((Axis(5, 3, 2), Axis(9, 3, 2, 2), Axis(11, 4, 3, 1, True)), start=7)
    slots = torch.cat((torch.randperm(505, generator=torch.Generator().manual_seed(0)), torch.tensor([-1])))

    def mask(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return rule(slots[q], slots[k])

    each = torch.vmap(torch.vmap(mask, in_dims=(None, 0)), in_dims=(0, None))
    i = torch.arange(506)
    expected = rule(slots[:, None], slots)
    assert torch.equal(each(i, i), expected)
    assert torch.equal(torch.compile(each, backend="eager", fullgraph=True)(i, i), expected)
    assert 0.03 < expected.double().mean() < 0.2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_one_axis_at_more_lengths(length, window, stride, dilation, causal):
    if not (stride <= window and window * dilation <= length):
        with pytest.raises(ValueError, match="stride <= window"):
            gna_window(length, window, stride, dilation, causal)
        return
    start, end, group = (x.numpy() for x in gna_window(length, window, stride, dilation, causal))
    y = np.arange(length)
    found = (
        (y % dilation == group[:, None]) & (start[:, None] <= y // dilation) & (y // dilation < end[:, None])
    )
    np.testing.assert_array_equal(found, loops(length, window, stride, dilation, causal))
    for query_tile, key_tile in product((1, 3, 8), (1, 4)):
        axis = Axis(length, window, stride, dilation, causal)
        first, stop, whole = axis.visited(query_tile, key_tile)
        for g, i in np.ndindex(*first.shape):
            queries = y[(y % dilation == g) & (y // dilation // query_tile == i)]
            tiles = {(int(key) // dilation // key_tile) for q in queries for key in y[found[q]]}
            assert tiles == set(range(int(first[g, i]), int(stop[g, i])))
            keys = [key for key in y if key % dilation == g and key // dilation // key_tile in tiles]
            assert not whole or found[np.ix_(queries, keys)].all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": (3, 3)}, r"window must be a tuple \(frames, height, width\)"),
        ({"window": (0, 3, 3)}, r"positive \(or -1\) sizes, got \(0, 3, 3\)"),
        ({"window": [3, 3, 3]}, "window must be a tuple"),
        ({"stride": (-1, 3, 3)}, "stride must be .* of positive sizes"),
        ({"dilation": (1, 1, 0)}, "dilation must be"),
        ({"base": (-1, 0, 3)}, "base must be"),
        ({"tile": 128}, "tile must be .* got 128"),
        ({"tile": (2.0, 8, 8)}, "tile must be"),
        ({"causal": (1, 0, 0)}, "causal must be a tuple of three booleans"),
        ({"causal": True}, "causal must be"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodProcessor(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": (3, 3)}, "window must be"),
        ({"window": (-1, 3, 3)}, "window must be"),
        ({"window": ()}, "window must be"),
        ({"window": ((3, 3, 3), (3, 3))}, r"window must be .* got \(3, 3\)"),
        ({"tile": (6, 8, 0)}, "tile must be"),
    ],
)
def test_sliding_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        SlidingTileProcessor(**wrong)


def test_sliding_refuses_windows_for_other_heads():
    with pytest.raises(ValueError, match="windows for 2 heads where there are 3"):
        select(SlidingTileProcessor(window=((3, 3, 3), (1, 1, 1))), TokenLayout((4, 8, 8)), heads=3)
