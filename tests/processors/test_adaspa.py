"""AdaSpa: plans against a dense oracle, the search at its steps, what the levels promise."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_sparse
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.plan import Plan
from dit_sparse.processors.adaspa import AdaSpaProcessor
from dit_sparse.schedule import Phase, Schedule


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads_apart(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random queries [B, H, S, D] whose attention is sharp in the last head and flat in the first."""
    return randn(*shape, seed=seed) * torch.linspace(0.3, 5, shape[1]).view(-1, 1, 1)


def blocks(layout: TokenLayout, block: int) -> tuple[list[list[int]], int]:
    """Model positions of the tokens in each block, and how many blocks are the grid's."""
    grid = range(layout.grid_start, layout.grid_start + layout.tokens)
    text = range(layout.text_start, layout.text_start + layout.text)
    others = [i for i in range(layout.sequence) if i not in grid and i not in text]
    parts = [
        [list(part[i : i + block]) for i in range(0, len(part), block)] for part in (grid, [*others, *text])
    ]
    return parts[0] + parts[1], len(parts[0])


def slow_mass(
    layout: TokenLayout,
    block: int,
    q: torch.Tensor,
    k: torch.Tensor,
    valid: torch.Tensor,
    lse=None,
    scale=None,
) -> np.ndarray:
    """[B, H, blocks, blocks] out of the whole attention matrix, float64; lse [B, H, S] or the true one."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.double() @ k.double().mT * scale).masked_fill(~valid[:, None, None], -torch.inf)
    p = (scores - (scores.logsumexp(-1) if lse is None else lse)[..., None]).exp()
    p = p.masked_fill(~valid[:, None, :, None], 0)
    members = torch.zeros(len(blocks(layout, block)[0]), layout.sequence, dtype=torch.float64)
    for i, tokens in enumerate(blocks(layout, block)[0]):
        members[i, tokens] = 1
    return (members @ p @ members.mT).numpy()


def slow_plan(
    method: AdaSpaProcessor, layout: TokenLayout, mass: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """The block mask of one batch item out of its mass [H, blocks, blocks], loop by loop."""
    members, grid = blocks(layout, method.block)
    read = [j for j, tokens in enumerate(members) if valid[tokens].any()]
    video = [j for j in read if j < grid]

    def keep(h: int, share: float) -> np.ndarray:
        mask = np.zeros(mass.shape[1:], dtype=bool)
        for i in range(len(members)):
            best = sorted(video, key=lambda j: -mass[h, i, j])[: max(1, round(share * len(video)))]
            mask[i, read if i >= grid else best + [j for j in read if j >= grid]] = True
        return mask

    heads = len(mass)
    recall = [(mass[h] * keep(h, method.density)).sum() / mass[h].sum() for h in range(heads)]
    moved = min(sum(r > method.recall for r in recall), heads // 2)
    ranked, shares = sorted(range(heads), key=lambda h: recall[h]), [method.density] * heads
    for h in range(heads):
        if h in ranked[:moved]:
            shares[h] += method.density / 2
        if h in ranked[heads - moved :]:
            shares[h] -= method.density / 2
    return np.stack([keep(h, shares[h]) for h in range(heads)])


def attend(
    method: AdaSpaProcessor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
) -> torch.Tensor:
    order = method.order(call)
    return order.undo(method.attend(*(order.apply(x) for x in (q, k, v)), call.at(order=order)))


def masked_softmax(
    layout: TokenLayout, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Attention over what a plan keeps, token by token, float64."""
    members, _ = blocks(layout, plan.block[0])
    of = torch.zeros(layout.sequence, dtype=torch.long)
    for i, tokens in enumerate(members):
        of[tokens] = i
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~plan.to_blocks()[:, :, of][..., of], -torch.inf).softmax(-1) @ v


METHODS = st.builds(
    AdaSpaProcessor,
    density=st.sampled_from([0.05, 0.2, 0.3, 0.5]),
    block=st.sampled_from([2, 3, 5]),
    recall=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
)
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
TEXTS = st.sampled_from([(0, False), (4, False), (7, True)])


@settings(max_examples=100, deadline=None)
@given(METHODS, GRIDS, TEXTS, st.booleans(), st.integers(1, 2), st.integers(0, 99))
def test_equals_the_dense_oracle(method, grid, texts, hidden, kv_heads, seed):
    layout = TokenLayout(grid, text=texts[0], text_first=texts[1], suffix=3 * texts[1])
    # In float64: sharp heads give many masses that are 1 to the precision of float32, which then tie.
    q = heads_apart(2, 4, layout.sequence, 6, seed=seed).double()
    k = randn(2, kv_heads, layout.sequence, 6, seed=seed + 1000).double()
    valid = torch.ones(2, layout.sequence, dtype=torch.bool)
    if hidden:
        valid[1, layout.grid_start : layout.grid_start + layout.tokens // 2] = False
        valid[1, layout.text_start : layout.text_start + layout.text] = False
    call = Call.standalone(layout, heads=4, kv_heads=kv_heads, valid=valid if hidden else None)
    keep = method.select(q, k, call.at(scale=0.6)).to_blocks().numpy()
    mass = slow_mass(layout, method.block, q, k, valid, scale=0.6)
    for b in range(2):
        np.testing.assert_array_equal(keep[b], slow_plan(method, layout, mass[b], valid[b].numpy()))


@settings(max_examples=30, deadline=None)
@given(METHODS, GRIDS, TEXTS)
def test_rows_of_mass_add_up_to_their_queries_at_the_first_search(method, grid, texts):
    layout = TokenLayout(grid, text=texts[0], text_first=texts[1])
    order = method.order(Call.standalone(layout))
    q, k = heads_apart(2, 4, layout.sequence, 6), randn(2, 2, layout.sequence, 6, seed=1)
    call = Call.standalone(layout, heads=4, kv_heads=2).at(order=order)
    mass = method.mass(order.apply(q), order.apply(k), call)
    expected = order.filled(method.block).float()[..., None, :].mT.expand(2, 4, -1, 1)[..., 0]
    torch.testing.assert_close(mass.sum(-1), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        mass.double().numpy(),
        slow_mass(layout, method.block, q, k, torch.ones(2, layout.sequence).bool()),
        atol=1e-5,
        rtol=1e-4,
    )


def test_searches_dense_once_and_then_sparse_with_the_old_log_sum_exp():
    layout, method = TokenLayout((4, 5, 6), text=9), AdaSpaProcessor(block=8)
    shape = (2, 4, layout.sequence, 6)
    every = torch.ones(2, layout.sequence, dtype=torch.bool)
    full = Plan.full(128 + 9, 128 + 9, 8)
    inputs = [
        (heads_apart(*shape, seed=i), randn(*shape, seed=10 + i), randn(*shape, seed=20 + i))
        for i in range(3)
    ]
    first = Call.standalone(layout, heads=4, step=10, steps=50, phase=Phase.REFRESH)
    dense = attend(method, *inputs[0], first)
    torch.testing.assert_close(dense.double(), masked_softmax(layout, full, *inputs[0]), atol=1e-5, rtol=1e-5)
    again = attend(method, *inputs[0], first.at(replays=True))
    assert torch.equal(again, dense)

    cached = first.at(step=11, phase=Phase.SPARSE)
    kept = method.select(*inputs[0][:2], Call.standalone(layout, heads=4))
    assert method.select(*inputs[1][:2], cached).same(kept)
    assert kept.to_blocks().double().mean() < 0.5
    for call in (cached, cached.at(step=10)):  # also where a sampler calls the model twice in a step
        torch.testing.assert_close(
            attend(method, *inputs[1], call).double(),
            masked_softmax(layout, kept, *inputs[1]),
            atol=1e-5,
            rtol=1e-5,
        )

    later = first.at(step=30)
    out = attend(method, *inputs[2], later)
    old = (inputs[0][0].double() @ inputs[0][1].double().mT / 6**0.5).logsumexp(-1)
    mass = slow_mass(layout, 8, *inputs[2][:2], every, old)
    renewed = method.select(*inputs[2][:2], later.at(step=31, phase=Phase.SPARSE))
    for b in range(2):
        np.testing.assert_array_equal(
            renewed.to_blocks()[b].numpy(), slow_plan(method, layout, mass[b], every[b].numpy())
        )
    assert not renewed.same(kept)
    torch.testing.assert_close(
        out.double(), masked_softmax(layout, renewed, *inputs[2]), atol=1e-5, rtol=1e-5
    )


def test_a_given_log_sum_exp_serves_as_well():
    layout, method = TokenLayout((3, 5, 7), text=6, text_first=True), AdaSpaProcessor(block=8)
    q, k = heads_apart(1, 4, layout.sequence, 6), randn(1, 2, layout.sequence, 6, seed=1)
    lse = (q.double() @ k.double().repeat_interleave(2, 1).mT / 6**0.5).logsumexp(-1).float()
    call = Call.standalone(layout, heads=4, kv_heads=2)
    assert method.select(q, k, replace(call, lse=lse, cache={})).same(method.select(q, k, call))


def test_runs_its_searches_at_20_and_60_percent_of_a_run():
    schedule = Schedule.parse("dense 0-20%").with_refresh(AdaSpaProcessor().refresh)
    phases = [schedule.phase(i, 50, 0, 1) for i in range(50)]
    assert [i for i, phase in enumerate(phases) if phase is Phase.REFRESH] == [10, 30]
    assert [i for i, phase in enumerate(phases) if phase is Phase.DENSE] == list(range(10))
    assert AdaSpaProcessor(search_at=(0.0, 0.075)).refresh == "0%, 7.5%"
    assert AdaSpaProcessor(search_at=()).refresh == ""


@torch.no_grad()
def test_the_report_tells_the_dense_search_from_the_sparse_one():
    model = tiny.wan()
    session = dit_sparse.apply(model, AdaSpaProcessor(block=8), schedule="dense 0-20%")
    for step in range(10):
        with model.cache_context("cond", step_index=step, num_inference_steps=10):
            model(**tiny.wan_inputs())
    found = {(row.where.step, row.where.phase, row.density < 1) for row in session.report().rows}
    assert found == {
        *((i, Phase.DENSE, False) for i in range(2)),
        (2, Phase.REFRESH, False),
        *((i, Phase.SPARSE, True) for i in range(3, 10) if i != 6),
        (6, Phase.REFRESH, True),
    }


def levels(method: AdaSpaProcessor, grid: tuple[int, int, int], heads: int = 6) -> torch.Tensor:
    """Blocks per row of each head, [B, H]."""
    layout = TokenLayout(grid)
    q, k = heads_apart(2, heads, layout.tokens, 6), randn(2, heads, layout.tokens, 6, seed=1)
    counts = method.select(q, k, Call.standalone(layout, heads=heads)).counts
    assert (counts == counts[..., :1]).all()
    return counts[..., 0]


@pytest.mark.parametrize(("density", "counts"), [(0.2, [6, 4, 2]), (0.4, [12, 8, 4]), (0.8, [20, 16, 12])])
def test_levels_move_blocks_from_easy_heads_to_hard_ones_and_keep_their_mean(density, counts):
    method = AdaSpaProcessor(density=density, block=8, recall=0.5)
    found = levels(method, (4, 5, 8))
    for row in found.tolist():
        moved = row.count(counts[2])
        assert row == [counts[0]] * moved + [counts[1]] * (6 - 2 * moved) + [counts[2]] * moved
        assert sum(row) == 6 * counts[1]
        assert moved > 0
    assert (levels(replace(method, recall=1.0), (4, 5, 8)) == counts[1]).all()
    half = levels(replace(method, recall=0.0), (4, 5, 8), heads=7)  # every head is easy, half of them move
    assert half.sort(-1, descending=True).values.tolist() == 2 * [
        [counts[0]] * 3 + [counts[1]] + [counts[2]] * 3
    ]


@settings(max_examples=30, deadline=None)
@given(METHODS, GRIDS)
def test_rounding_moves_the_mean_by_half_a_block_at_most(method, grid):
    middle = levels(replace(method, recall=1.0), grid).double()
    assert ((levels(method, grid).double().mean(-1) - middle.mean(-1)).abs() <= 0.5).all()


@settings(max_examples=30, deadline=None)
@given(METHODS, GRIDS, st.floats(0.01, 1))
def test_kept_mass_is_monotone_in_density(method, grid, other):
    layout, method = TokenLayout(grid, text=3), replace(method, recall=1.0)
    q, k = heads_apart(1, 4, layout.sequence, 6), randn(1, 4, layout.sequence, 6, seed=1)
    mass = slow_mass(layout, method.block, q, k, torch.ones(1, layout.sequence).bool())
    less, more = (
        (
            mass
            * replace(method, density=d).select(q, k, Call.standalone(layout, heads=4)).to_blocks().numpy()
        ).sum((2, 3))
        for d in sorted((method.density, other))
    )
    assert (less <= more + 1e-9).all()


def test_keeps_everything_at_density_1():
    layout = TokenLayout((3, 5, 7), text=5)
    q = heads_apart(2, 4, layout.sequence, 6)
    plan = AdaSpaProcessor(density=1.0, block=8).select(q, q, Call.standalone(layout, heads=4))
    assert plan.to_blocks().all()


@pytest.mark.parametrize("grid", [(4, 5, 8), (3, 7, 9), (1, 11, 13)])
@pytest.mark.parametrize("text", [0, 13])
def test_at_density_is_met_to_a_block(grid, text):
    layout = TokenLayout(grid, text=text)
    q, k = heads_apart(2, 6, layout.sequence, 6), randn(2, 6, layout.sequence, 6, seed=1)
    for wanted in (0.35, 0.5, 0.8):
        found = AdaSpaProcessor(block=4).at_density(wanted, layout)
        assert found == AdaSpaProcessor(block=4, density=found.density)
        filled = found.order(Call.standalone(layout)).filled(4)
        reached = found.select(q, k, Call.standalone(layout, heads=6)).density(filled, filled)
        blocks_a_row = -(-layout.tokens // 4)
        assert abs(reached - wanted) <= 1 / blocks_a_row


def test_at_density_names_its_floor():
    layout = TokenLayout((4, 8, 16), text=0)
    with pytest.raises(ValueError, match=r"floor 0\.1250 and the ceiling 1, got 0\.1"):
        AdaSpaProcessor().at_density(0.1, layout)
    assert AdaSpaProcessor().at_density(0.125, layout).density == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\]"),
        ({"density": 1.1}, r"density must lie in \(0, 1\]"),
        ({"recall": 1.1}, r"recall in \[0, 1\]"),
        ({"block": 0}, "positive number of tokens, got 0"),
        ({"search_at": (0.2, 1.0)}, r"tuple of fractions in \[0, 1\), got \(0\.2, 1\.0\)"),
        ({"search_at": 0.2}, "tuple of fractions"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        AdaSpaProcessor(**wrong)
