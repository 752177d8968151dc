"""Call: what a method remembers, which keys it may read, what is reported of attentions within one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny_models as tiny
import torch
from torch import Tensor

import dit_sparse
from dit_sparse import Call, Order, Phase, SparseProcessor, TokenLayout
from dit_sparse.kernels import merge
from dit_sparse.method import share_of_grid
from dit_sparse.plan import Plan, pool

LAYOUT = TokenLayout((3, 4, 5), text=7, text_first=True)


def test_what_is_remembered_is_renewed_at_refresh_only() -> None:
    call = Call.standalone(LAYOUT, step=3, steps=10)
    made = iter(range(10))
    assert [call.cached("a", lambda: next(made)) for _ in range(3)] == [0, 0, 0]
    later = call.at(step=5, phase=Phase.REFRESH)
    assert later.cached("a", lambda: next(made)) == 1
    assert later.made_at("a") == 5
    assert later.cached("b", lambda: next(made)) == 2
    assert later.at(step=7).cached("b", lambda: next(made), renew=False) == 2
    assert (call.made_at("b"), call.made_at("c")) == (5, None)
    replay = later.at(replays=True)
    assert replay.cached("a", lambda: next(made)) == 1  # a recomputed call makes nothing again


def test_remembered_plans_come_back_equal_and_values_carry_no_gradient() -> None:
    call = Call.standalone(LAYOUT)
    plan = Plan.from_blocks(torch.eye(5, dtype=torch.bool), 16)
    call.cached("plan", lambda: plan)
    assert call.cached("plan", lambda: pytest.fail("made twice")).same(plan)
    x = torch.ones(2, requires_grad=True)
    assert not call.cached("x", lambda: x * 2).requires_grad


def test_eligible_blocks_are_those_with_a_readable_token() -> None:
    valid = torch.ones(2, LAYOUT.sequence, dtype=torch.bool)
    valid[1, :7] = False  # the text of the second item
    call = Call.standalone(LAYOUT, valid=valid).at(order=Order.tiles(LAYOUT, (2, 2, 4)))
    assert call.grid_blocks(16) == 8
    eligible = call.eligible(16)
    assert eligible.shape == (2, 1, 1, 9)
    assert eligible[0].all()
    assert eligible[1, ..., :8].all()
    assert not eligible[1, ..., 8].any()


def test_an_lse_follows_the_order() -> None:
    lse = torch.arange(float(LAYOUT.sequence)).expand(1, 2, -1)
    order = Order.tiles(LAYOUT, (2, 2, 4))
    call = Call.standalone(LAYOUT, heads=2, lse=lse).at(order=order)
    ordered = call.ordered_lse()
    assert ordered is not None
    assert torch.equal(ordered[0, 0], torch.where(order.index[0] < 0, -torch.inf, order.index[0].float()))
    assert Call.standalone(LAYOUT).at(order=order).ordered_lse() is None


@dataclass(frozen=True, kw_only=True)
class Summarised(SparseProcessor):
    """Own block and the means of all blocks: two attentions in one call."""

    reads: ClassVar[frozenset[str]] = frozenset({"layout"})

    block: int = 16

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        return Plan.from_blocks(torch.eye(-(-k.shape[2] // self.block), dtype=torch.bool), self.block)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        own = call.run(q, k, v, self.planned(q, k, call))
        valid = call.slots_valid()
        whole = call.run_summary(q, pool(k, self.block, valid), pool(v, self.block, valid))
        return merge(*zip(own, whole, strict=True))[0]


@torch.no_grad()
def test_several_attentions_of_a_call_are_one_call_in_the_report() -> None:
    model = tiny.wan()
    session = dit_sparse.apply(model, Summarised(), schedule="always")
    model(**tiny.wan_inputs(2))
    blocks = [16] * 7 + [8]  # 120 tokens
    for row in session.report().rows:
        assert (row.calls, row.where.phase) == (1, Phase.SPARSE)
        assert sum(row.every) == 2 * 2 * 120 * 120
        assert sum(row.pairs) == 2 * 2 * (sum(n * n for n in blocks) + 120 * len(blocks))


def test_summaries_join_the_same_softmax() -> None:
    layout = TokenLayout((1, 4, 8))
    q, k, v = (tiny.randn(1, 2, 32, 8, seed=i).double() for i in range(3))
    call = Call.standalone(layout, heads=2).at(order=Order.raster(layout))
    out = Summarised().attend(q, k, v, call)
    keys, values = (torch.cat([x, pool(x, 16)], 2) for x in (k, v))
    scores = q @ keys.transpose(-1, -2) * 8**-0.5
    own = torch.arange(32)[:, None] // 16 == torch.arange(32) // 16
    scores[..., :32].masked_fill_(~own, -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ values)


def test_an_empty_memory_makes_a_step_cached_method_refresh() -> None:
    pipe = tiny.wan_pipeline()
    session = dit_sparse.apply(pipe, tiny.Cached(), schedule="dense 0-25%")
    tiny.run_wan(pipe, steps=4)
    phases = {(row.where.step, row.where.phase) for row in session.report().rows}
    assert phases == {(0, Phase.DENSE), (1, Phase.REFRESH), (2, Phase.SPARSE), (3, Phase.SPARSE)}


def test_a_method_names_its_own_refresh_steps() -> None:
    class Renewed(tiny.Cached):
        @property
        def refresh(self) -> str:
            return "every 2"

    pipe: Any = tiny.wan_pipeline()
    session = dit_sparse.apply(pipe, Renewed(), schedule="layers 0")
    assert str(session.schedule) == "layers 0; refresh every 2"
    tiny.run_wan(pipe, steps=4)
    refreshed = {row.where.step for row in session.report().rows if row.where.phase is Phase.REFRESH}
    assert refreshed == {0, 2}
    assert str(dit_sparse.apply(pipe, Renewed(), schedule="refresh 1").schedule) == "refresh 1"


@pytest.mark.parametrize("text", [0, 30])
def test_the_share_of_the_grid_makes_the_density(text: int) -> None:
    layout = TokenLayout((2, 5, 7), text=text)
    share = share_of_grid(tiny.TopK(), 0.8, layout)
    grid, everything = layout.tokens**2, layout.sequence**2
    assert share * grid + everything - grid == pytest.approx(0.8 * everything)
    with pytest.raises(ValueError, match="floor"):
        share_of_grid(tiny.TopK(), 0.05, layout, floor=0.1)
