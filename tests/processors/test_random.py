"""Random: its budget row by row, its own block, its seeds; the control of another method."""

import numpy as np
import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_sparse
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor
from dit_sparse.plan import Plan
from dit_sparse.processors.neighborhood import NeighborhoodProcessor, SlidingTileProcessor
from dit_sparse.processors.radial import RadialProcessor
from dit_sparse.processors.random import RandomProcessor
from dit_sparse.processors.window import WindowProcessor, blocks_per_row

LAYOUTS = st.builds(
    TokenLayout,
    grid=st.tuples(*[st.integers(1, 7)] * 3),
    text=st.sampled_from([0, 0, 5]),
    text_first=st.booleans(),
    suffix=st.sampled_from([0, 3]),
)


def select(method: SparseProcessor, layout: TokenLayout, **about: object) -> Plan:
    call = Call.standalone(layout, **about)
    q = torch.zeros(1, call.heads, layout.sequence, 1)
    return method.select(q, q, call)


@settings(max_examples=100, deadline=None)
@given(LAYOUTS, st.sampled_from([1, 4, 8]), st.floats(0.01, 1))
def test_every_row_has_its_own_block_and_as_many_as_a_window(layout, block, share):
    keep = select(RandomProcessor(density=share, block=block), layout).to_blocks()[0, 0]
    grid = -(-layout.tokens // block)
    assert torch.equal(keep[:grid, :grid].sum(1), blocks_per_row(share, grid))
    assert keep.diagonal().all()
    assert keep[grid:].all()
    assert keep[:, grid:].all()


def test_blocks_are_drawn_uniformly():
    layout, method = TokenLayout((4, 8, 8)), RandomProcessor(density=0.25, block=8)
    total = sum(select(method, layout, step=i).to_blocks()[0, 0].double() for i in range(400))
    others = total[~torch.eye(32, dtype=torch.bool)] / 400
    # 7 of 31 others: mean 0.2258, standard deviation of a block's frequency 0.021.
    assert others.mean() == pytest.approx(7 / 31)
    assert others.std() == pytest.approx(0.0209, rel=0.1)


def test_the_draw_depends_on_seed_layer_and_step_alone():
    layout, method = TokenLayout((4, 8, 8)), RandomProcessor(density=0.25, block=8)
    here = select(method, layout, layer=1, step=2)
    assert here.same(select(method, layout, layer=1, step=2, branch="uncond", heads=4))
    for other in ({"layer": 2, "step": 2}, {"layer": 1, "step": 3}, {"layer": 1, "step": 2, "seed": 1}):
        assert not here.same(select(method, layout, **other))


@torch.no_grad()
def test_layers_and_steps_of_a_run_draw_anew_and_a_new_run_repeats_it(monkeypatch):
    plans: list[tuple[tuple, Plan]] = []
    execute = Call._execute
    monkeypatch.setattr(Call, "_execute", lambda self, q, k, v, plan, *rest: (
        plans.append(((self.layer, self.step, self.branch), plan)), execute(self, q, k, v, plan, *rest)
    )[1])  # fmt: skip
    pipe = tiny.wan_pipeline()
    dit_sparse.apply(pipe, RandomProcessor(density=0.3, block=16), schedule="dense 0")
    outs = [tiny.run_wan(pipe, steps=3) for _ in range(2)]
    assert torch.equal(*outs)
    first = dict(plans[: len(plans) // 2])
    assert len(first) == 3 * 2 * 2  # layers, steps, branches
    for where, plan in first.items():
        for other_where, other in first.items():
            assert plan.same(other) == (where[:2] == other_where[:2])
    assert all(plan.same(first[where]) for where, plan in plans[len(plans) // 2 :])


@pytest.mark.parametrize(
    "like",
    [
        RadialProcessor(block=8, decay=0.3, decimate_below=16),
        SlidingTileProcessor(window=(1, 3, 3), tile=(2, 2, 2)),
        SlidingTileProcessor(window=((1, 3, 3), (3, 1, 1), (1, 1, 5)), tile=(2, 2, 2)),
        NeighborhoodProcessor(
            window=(3, 3, 3), stride=(1, 1, 1), dilation=(1, 2, 1), tile=(1, 2, 2), exact=False
        ),
        WindowProcessor(density=0.3, block=8),
    ],
)
@pytest.mark.parametrize("text", [0, 13])
def test_the_control_of_a_method_reads_as_many_blocks_in_every_row(like, text):
    layout = TokenLayout((7, 5, 6), text=text)
    plan = select(like, layout, heads=3)
    control = select(RandomProcessor(like=like), layout, heads=3)
    assert torch.equal(control.counts.expand(1, 3, -1), plan.counts.expand(1, 3, -1))
    assert not control.same(plan)
    order = like.order(Call.standalone(layout))
    assert torch.equal(RandomProcessor(like=like).order(Call.standalone(layout)).index, order.index)
    block = plan.block[0]
    some = order.filled(block)[0, 0] > 0
    keep = control.to_blocks()[0]
    assert (keep.diagonal(dim1=-2, dim2=-1) | ~some).all()
    assert not keep[..., ~some].any()
    grid = (order.slots - layout.extra) // block
    assert keep[:, some, grid:].all() or not text


def test_the_control_of_rows_of_another_size_than_columns():
    class Tall(RadialProcessor):
        def plan(self, q, k, call):
            keep = torch.zeros(q.shape[2] // 16, k.shape[2] // 4, dtype=torch.bool)
            keep[:, ::5] = True
            return Plan.from_blocks(keep, (16, 4))

    layout = TokenLayout((2, 8, 8))
    keep = select(RandomProcessor(like=Tall(block=16)), layout).to_blocks()[0, 0]
    assert keep.shape == (8, 32)
    assert (keep.sum(1) == 7).all()
    for i in range(8):
        assert keep[i, 4 * i : 4 * i + 4].all()


def test_rows_that_read_nothing_stay_empty():
    class Skip(RadialProcessor):
        def plan(self, q, k, call):
            keep = torch.ones(2, 4, 4, dtype=torch.bool)
            keep[0] = False
            return Plan.from_blocks(keep, 32)

    plan = select(RandomProcessor(like=Skip(block=32)), TokenLayout((2, 8, 8)), heads=2)
    assert plan.counts[0].tolist() == [[0] * 4, [4] * 4]


@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout((4, 8, 8)),
        TokenLayout((4, 8, 8), text=24),
        TokenLayout((5, 7, 9)),
        TokenLayout((5, 7, 9), text=9),
    ],
)
def test_at_density_is_exact_to_a_block_on_average(layout):
    for wanted in np.linspace(0.3, 1, 6):
        method = RandomProcessor(block=8).at_density(float(wanted), layout)
        filled = method.order(Call.standalone(layout)).filled(8)
        found = [select(method, layout, step=i).density(filled, filled) for i in range(64)]
        assert abs(np.mean(found) - wanted) <= 8 * 8 / layout.sequence**2
        if layout.tokens % 8 == 0:
            assert len(set(found)) == 1
    with pytest.raises(ValueError, match=r"floor 0\.\d+"):
        RandomProcessor(block=8).at_density(0.01, layout)


def test_at_density_of_a_control_is_the_methods():
    layout, like = TokenLayout((9, 8, 8)), RadialProcessor(block=8, decimate_below=8)
    method = RandomProcessor(like=like).at_density(0.7, layout)
    assert method == RandomProcessor(like=like.at_density(0.7, layout))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\]"),
        ({"block": 0}, "block be >= 1"),
        ({"like": tiny.TopK()}, "like must be a method whose plan does not depend on q and k, got TopK"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        RandomProcessor(**wrong)


def test_refuses_a_plan_with_a_rule():
    like = NeighborhoodProcessor(window=(3, 3, 3))
    with pytest.raises(ValueError, match=r"reads blocks in part .*ask for a density"):
        select(RandomProcessor(like=like), TokenLayout((4, 9, 9)))
