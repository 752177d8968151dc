"""Pictures of patterns show what the plans say, token by token."""

import itertools

import pytest
import tiny_models as tiny
import torch

from dit_sparse import Order, RadialProcessor, SparseProcessor, TokenLayout
from dit_sparse.eval.patterns import (
    WIDTHS,
    alike,
    chosen,
    draw,
    mass_kept,
    picture,
    tokens_read,
    toy_attention,
)
from dit_sparse.method import Call
from dit_sparse.plan import Plan

LAYOUT = TokenLayout((4, 5, 6), text=9, text_first=True)


def test_the_toys_heads_fall_with_distance_as_they_say() -> None:
    """The attention to a neighbour over that to oneself is larger along axes a head reaches farther over."""
    layout = TokenLayout((5, 9, 9))
    q, k = toy_attention(layout)
    mass = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)[0]
    place = torch.cartesian_prod(*(torch.arange(n) for n in layout.grid))
    away = (place[:, None] - place).abs()
    own = mass[:, away.sum(-1) == 0].mean(-1)
    for head, widths in enumerate(WIDTHS):
        ratios = []
        for axis in range(3):
            neighbours = (away[..., axis] == 1) & (away.sum(-1) == 1)
            ratios.append(float(mass[head][neighbours].mean() / own[head]))
        for a, b in itertools.combinations(range(3), 2):
            if widths[a] != widths[b]:
                assert (ratios[a] > ratios[b]) == (widths[a] > widths[b])


METHODS = [tiny.TopK(keep=3), tiny.Cached(keep=3), RadialProcessor(block=8, decay=0.3)]


@pytest.mark.parametrize("method", METHODS)
def test_tokens_read_are_those_of_the_plan(method: SparseProcessor) -> None:
    q, k = toy_attention(LAYOUT)
    plan, order = chosen(method, q, k, LAYOUT)
    bq, bk = plan.block
    tokens = plan.to_blocks().repeat_interleave(bq, 2).repeat_interleave(bk, 3)
    tokens = tokens[:, :, : order.slots, : order.slots]
    in_model_order = order.undo(order.undo(tokens.float()).transpose(2, 3)).transpose(2, 3).bool()
    start = LAYOUT.grid_start
    for head, query in ((0, 0), (plan.counts.shape[1] - 1, 77)):
        row = in_model_order[0, head, start + query, start : start + LAYOUT.tokens]
        assert torch.equal(tokens_read(plan, order, LAYOUT, query, head).flatten(), row)


def test_the_mass_kept_is_the_softmaxs() -> None:
    q, k = toy_attention(LAYOUT)
    order = Order.raster(LAYOUT, 16)
    plan = Plan.from_blocks(torch.eye(-(-order.slots // 16), dtype=torch.bool), 16)
    mass = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    slots = torch.empty(LAYOUT.sequence, dtype=torch.int64)
    slots[order.index[0][order.index[0] >= 0]] = (order.index[0] >= 0).nonzero()[:, 0]
    own = slots[:, None] // 16 == slots // 16
    expected = (mass * own).sum() / mass.sum()
    assert mass_kept(plan, order, q, k) == pytest.approx(float(expected), rel=1e-4)
    assert mass_kept(Plan.full(order.slots, order.slots, 16), order, q, k) == pytest.approx(1)


def test_a_figure_has_a_row_a_head() -> None:
    q, k = toy_attention(LAYOUT)
    assert len(draw(tiny.TopK(keep=3), LAYOUT, q, k).axes) == 8
    assert len(draw(RadialProcessor(block=8), LAYOUT, q, k).axes) == 2
    assert chosen(tiny.Cached(keep=3), q, k, LAYOUT)[0].counts.shape[1] == 4


def test_heads_with_equal_plans_share_a_row() -> None:
    keep = torch.zeros(5, 4, 4, dtype=torch.bool)
    keep[:, 0, 0] = True
    keep[[1, 3], 2, 3] = True
    keep[4, 2, 1] = True
    plan, order = Plan.from_blocks(keep, 32), Order.raster(TokenLayout((4, 5, 6)))
    assert alike(plan, order) == [[0, 2], [1, 3], [4]]
    figure = picture(plan, order, TokenLayout((4, 5, 6)), "title", heads=2)
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["heads 0,2", "heads 1,3"]
    assert figure.get_suptitle() == "title\nand 1 more plan of other heads"


def test_more_heads_repeat_the_toys_four() -> None:
    q, _ = toy_attention(LAYOUT, heads=6)
    assert q.shape[1] == 6
    four, same = toy_attention(LAYOUT)[0], toy_attention(LAYOUT, heads=4)[0]
    assert torch.equal(four, same)


def test_a_method_is_asked_at_a_place_in_the_run() -> None:
    """Linear layers of LinVideo compute no pair, the others all."""
    from dit_sparse import LinVideoProcessor

    q, k = toy_attention(LAYOUT)
    method = LinVideoProcessor(linear_layers=(2,))
    for layer, kept in ((1, True), (2, False)):
        call = Call.standalone(LAYOUT, heads=4, layer=layer, layers=3, step=1, steps=2)
        plan, _ = chosen(method, q, k, LAYOUT, call)
        assert bool(plan.to_blocks().all()) == kept
        assert bool(plan.to_blocks().any()) == kept


def test_no_pyplot_figure_stays_open_behind_a_picture() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plan = Plan.full(120, 120, 16)
    picture(plan, Order.raster(TokenLayout((4, 5, 6))), TokenLayout((4, 5, 6)), "title")
    assert plt.get_fignums() == before
