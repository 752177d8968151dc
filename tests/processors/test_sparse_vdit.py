"""Sparse-vDiT: each mode token by token, the decision rule, the search on heads of known kinds, one call."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.calibration import Calibration
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.order import Order
from dit_sparse.plan import blocks_of
from dit_sparse.processors.sparse_vdit import MODES, SparseVDiTProcessor
from dit_sparse.schedule import Phase


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(method: SparseVDiTProcessor, layout: TokenLayout, modes: list[str], stripes: Tensor) -> Any:
    """The method with a calibration that says so for a standalone layer of ``len(modes)`` heads."""
    found = Calibration(
        method="sparse_vdit", models={}, source="a test", grid=layout.grid, heads=len(modes), steps=1,
        prompts=("a",), seeds=(0,), settings={"block": method.block, "share": method.share},
        layers={"0": {"modes": modes}}, tensors={"0/stripes": stripes},
    )  # fmt: skip
    return SparseVDiTProcessor(calibration=found)


def read_pairs(method: SparseVDiTProcessor, call: Call) -> Tensor:
    """bool [H, S, S] in model order: what the plan lets each token read."""
    q = randn(1, call.heads, call.layout.sequence, 4)
    order, plan = method.order(call), method.select(q, q, call)
    keep = plan.to_blocks()[0].repeat_interleave(method.block, -1).repeat_interleave(method.block, -2)
    keep = keep[:, : order.slots, : order.slots]
    out = torch.zeros(call.heads, call.layout.sequence, call.layout.sequence, dtype=torch.bool)
    for head in range(call.heads):
        index = order.index[head if len(order.index) > 1 else 0]
        slots = (index >= 0).nonzero()[:, 0]
        out[head, index[slots][:, None], index[slots]] = keep[head, slots[:, None], slots]
    return out


def slow_pairs(mode: str, layout: TokenLayout, block: int, w: int, stripes: list[int]) -> Tensor:
    """bool [S, S]: the definition of a mode."""
    frames, height, width = layout.grid
    out = torch.zeros(layout.sequence, layout.sequence, dtype=torch.bool)
    places = {}
    for f, h, x in itertools.product(range(frames), range(height), range(width)):
        raster = (f * height + h) * width + x
        by_position = (h * width + x) * frames + f
        places[raster + layout.grid_start] = (by_position if mode == "multi_diagonal" else raster) // block
    for q, k in itertools.product(range(layout.sequence), repeat=2):
        if mode in ("dense", "skip"):
            out[q, k] = mode == "dense"
        elif q not in places or k not in places:
            out[q, k] = True
        elif mode == "stripe":
            out[q, k] = places[k] in stripes
        else:
            out[q, k] = abs(places[q] - places[k]) <= w
    return out


LAYOUTS = [
    TokenLayout((3, 4, 5)),
    TokenLayout((3, 3, 5), text=7),
    TokenLayout((5, 2, 3), text=3, text_first=True, prefix=2, suffix=4),
    TokenLayout((1, 5, 7), text=4),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("share", [0.01, 0.35, 0.6, 1.0])
def test_modes_token_by_token(layout: TokenLayout, share: float) -> None:
    block, n = 4, blocks_of(layout.tokens, 4)
    shares = [((2 * w + 1) * n - w * (w + 1)) / n**2 for w in range(n)]
    w = min(range(n), key=lambda w: abs(shares[w] - share))
    columns = torch.zeros(5, n, dtype=torch.bool)
    columns[:, [0, n - 1]] = True
    method = calibrated(SparseVDiTProcessor(block=block, share=share), layout, list(MODES), columns)
    found = read_pairs(method, Call.standalone(layout, heads=5))
    for head, mode in enumerate(MODES):
        assert torch.equal(found[head], slow_pairs(mode, layout, block, w, [0, n - 1])), mode


def test_multi_diagonals_are_one_frame_apart() -> None:
    """A block of all frames and no neighbours: exactly the diagonals at multiples of height * width."""
    layout = TokenLayout((6, 3, 4))
    method = calibrated(
        SparseVDiTProcessor(block=6, share=0.01),
        layout,
        ["multi_diagonal"],
        torch.zeros(1, 12, dtype=torch.bool),
    )
    token = torch.arange(72)
    expected = (token[:, None] - token) % 12 == 0
    assert torch.equal(read_pairs(method, Call.standalone(layout))[0], expected)


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("eps", [0.0, 0.3, 1.0])
def test_decision_rule(lam: float, eps: float) -> None:
    """Section 3.2 of the paper: dense where every loss exceeds eps, else the least loss."""
    errors, costs = randn(40, 5).abs(), torch.tensor([1.0, 0.0, 0.3, 0.25, 0.2])
    found = SparseVDiTProcessor(lam=lam, eps=eps)._choose(errors, costs)
    for head in range(40):
        losses = {i: float(errors[head, i].double() + lam * costs[i]) for i in range(1, 5)}
        expected = 0 if all(x > eps for x in losses.values()) else min(losses, key=lambda i: losses[i])
        assert found[head] == expected


GRID = (4, 4, 4)


def heads_of(kinds: list[str], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, H, 64, 64] of heads that look at what their kinds say, over the grid ``GRID``."""
    looks = {
        "diagonal": torch.eye(64) + torch.eye(64).roll(1, 1),
        "multi_diagonal": (torch.arange(64)[:, None] - torch.arange(64)) % 16 == 0,
        "stripe": ((torch.arange(64) >= 20) & (torch.arange(64) < 28)).expand(64, 64),
        "skip": torch.eye(64),
        # Equal weights: the mean of a few random values is far from the mean of all.
        "dense": torch.zeros(64, 64),
    }
    loud = {"skip": 1e-3, "dense": 8.0}
    q = torch.stack([60.0 * looks[kind] for kind in kinds])[None]
    v = torch.stack([loud.get(kind, 1) * randn(64, 64, seed=seed + i) for i, kind in enumerate(kinds)])[None]
    return q, torch.eye(64).expand_as(q).contiguous(), v


KINDS = ["diagonal", "stripe", "skip", "multi_diagonal", "dense"]


def test_the_search_finds_the_kind_of_each_head() -> None:
    method, call = SparseVDiTProcessor(block=8, share=0.35), Call.standalone(TokenLayout(GRID), heads=5)
    search = method.search()
    order = method.order(call)
    for seed in (0, 100):
        q, k, v = heads_of(KINDS, seed)
        here = call.at(order=order)
        out, lse = here.run_dense(q, k, v)
        search.observe(q, k, v, out, lse, here)
    layers, tensors = search.result()
    assert layers["0"]["modes"] == KINDS
    assert tensors["0/stripes"][1].nonzero().tolist() == [[2], [3]]
    errors = layers["0"]["errors"]
    assert errors["dense"] == [0.0] * 5
    assert errors["skip"][2] < 1e-5
    assert errors["skip"][0] > 0.5


def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Softmax attention in float64 over bool [H, S, S]; 0 for queries that read nothing."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


def ordered_attend(method: Any, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Model-order attention as a session makes it."""
    order: Order = method.order(call)
    return order.undo(method.attend(order.apply(q), order.apply(k), order.apply(v), call.at(order=order)))


def test_each_item_of_a_batch_has_modes_of_its_own() -> None:
    layout = TokenLayout(GRID)
    kinds = [KINDS, KINDS[::-1]]
    q, k, v = (torch.cat(x) for x in zip(*(heads_of(names) for names in kinds), strict=True))
    method = SparseVDiTProcessor(block=8, share=0.35)
    call = Call.standalone(layout, heads=5, steps=3, phase=Phase.REFRESH)
    dense = ordered_attend(method, q, k, v, call)
    everything = torch.ones(5, 64, 64, dtype=torch.bool)
    torch.testing.assert_close(dense.double(), attention(q, k, v, everything, 64**-0.5), atol=1e-5, rtol=0)
    modes, stripes = call.cache["decided"][0]
    assert [MODES[m] for m in modes] == kinds[0] + kinds[1]

    later = call.at(step=1, phase=Phase.SPARSE)
    together = ordered_attend(method, q, k, v, later)
    for item in range(2):
        fixed = calibrated(method, layout, kinds[item], stripes.view(2, 5, -1)[item])
        allowed = read_pairs(fixed, Call.standalone(layout, heads=5))
        one = [x[item : item + 1] for x in (q, k, v)]
        expected = attention(*one, allowed, 64**-0.5)
        torch.testing.assert_close(together[item : item + 1].double(), expected, atol=1e-5, rtol=0)
        alone = Call.standalone(layout, heads=5, steps=3, phase=Phase.REFRESH)
        ordered_attend(method, *one, alone)
        out = ordered_attend(method, *one, alone.at(step=1, phase=Phase.SPARSE))
        torch.testing.assert_close(out, together[item : item + 1], atol=1e-6, rtol=0)
        assert alone.cache["decided"][0][0] == modes[5 * item : 5 * item + 5]


@pytest.mark.parametrize("layout", LAYOUTS[1:3], ids=str)
def test_heads_that_share_keys_share_a_mode_and_hidden_keys_stay_hidden(layout: TokenLayout) -> None:
    batch, heads, kv_heads = 2, 6, 3
    q = randn(batch, heads, layout.sequence, 8)
    k, v = (randn(batch, kv_heads, layout.sequence, 8, seed=s) for s in (1, 2))
    valid = randn(batch, layout.sequence, seed=3) > -0.5
    method = SparseVDiTProcessor(block=4, share=0.3, eps=9.0)
    call = Call.standalone(
        layout, heads=heads, kv_heads=kv_heads, steps=3, phase=Phase.REFRESH, valid=valid
    )  # fmt: skip
    ordered_attend(method, q, k, v, call)
    modes, stripes = call.cache["decided"][0]
    assert len(modes) == len(stripes) == batch * kv_heads
    out = ordered_attend(method, q, k, v, call.at(step=1, phase=Phase.SPARSE))
    n = stripes.shape[1]
    w = int(method._band(n)[0].sum()) - 1
    for item in range(batch):
        rows = range(item * kv_heads, (item + 1) * kv_heads)
        allowed = torch.stack(
            [slow_pairs(MODES[modes[r]], layout, 4, w, stripes[r].nonzero()[:, 0].tolist()) for r in rows]
        ).repeat_interleave(2, 0)
        assert not allowed.all()
        one = [x[item : item + 1] for x in (q, k, v)]
        expected = attention(*one, allowed & valid[item], 8**-0.5)
        torch.testing.assert_close(out[item : item + 1].double(), expected, atol=1e-5, rtol=0)


def test_all_heads_are_one_call_and_skipped_ones_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, plans = TokenLayout(GRID, text=5), []
    columns = torch.zeros(5, 8, dtype=torch.bool)
    columns[:, 2] = True
    method = calibrated(SparseVDiTProcessor(block=8), layout, KINDS, columns)
    run = Call.run
    monkeypatch.setattr(
        Call, "run", lambda self, q, k, v, plan: plans.append((self, plan)) or run(self, q, k, v, plan)
    )
    q = randn(1, 5, layout.sequence, 8)
    out = ordered_attend(method, q, q, q, Call.standalone(layout, heads=5))
    ((call, plan),) = plans
    pairs, every = call.pairs(plan)
    assert pairs[0, KINDS.index("skip")] == 0
    assert pairs[0, KINDS.index("dense")] == every.flatten()[0] == 69 * 69
    assert 0 < pairs[0, KINDS.index("diagonal")] < 69 * 69 / 2
    assert not out[:, KINDS.index("skip")].any()
    assert method.is_static
    assert method.only_plans


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, TokenLayout((13, 8, 16)), TokenLayout((7, 9, 11), text=30)], ids=str
)
@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.8])
def test_at_density(layout: TokenLayout, wanted: float) -> None:
    """A band has the nearest density there is, and a run comes to the budget, or one head's step below."""
    block = 4 if layout.tokens < 100 else 32
    method = SparseVDiTProcessor(block=block)
    n = blocks_of(layout.tokens, block)
    bands = [replace(method, share=((2 * w + 1) * n - w * (w + 1)) / n**2) for w in range(n)]
    densities = [float(band._densities(layout)[2]) for band in bands]
    if densities[0] > wanted:
        with pytest.raises(ValueError, match=f"floor {densities[0]:.4f}.*got {wanted}"):
            method.at_density(wanted, layout)
        return
    found = method.at_density(wanted, layout)
    assert found.budget is not None
    band = float(found._densities(layout)[2])
    assert abs(band - wanted) == pytest.approx(min(abs(d - wanted) for d in densities))
    assert band <= found.budget < band + 0.2
    q, k, v = (randn(1, 6, layout.sequence, 8, seed=s) * 2 for s in range(3))
    call = Call.standalone(layout, heads=6, steps=2, phase=Phase.REFRESH)
    ordered_attend(found, q, k, v, call)
    order, plan = Order.raster(layout, block), found.select(q, k, call.at(phase=Phase.SPARSE))
    filled = order.filled(block)
    reached = plan.density(filled, filled)
    assert found.budget - 1 / 6 <= reached <= found.budget + 0.02


def test_a_larger_budget_has_a_smaller_error() -> None:
    errors = randn(12, 5).abs().cumsum(-1).flip(-1)
    errors[:, 0] = 0
    costs = torch.tensor([1.0, 0.0, 0.3, 0.25, 0.2])
    last = torch.inf
    for budget in (0.1, 0.2, 0.4, 0.8, 1.0):
        modes = SparseVDiTProcessor(budget=budget)._choose(errors, costs)
        assert costs[modes].mean() <= budget + 1e-6
        lost = float(errors.gather(1, modes[:, None]).sum())
        assert lost <= last
        last = lost
    assert last == 0


def test_latency_is_measured_by_the_search() -> None:
    method, layout = SparseVDiTProcessor(block=8, share=0.35, cost="latency"), TokenLayout(GRID)
    call = Call.standalone(layout, heads=5)
    call = call.at(order=method.order(call))
    q, k, v = heads_of(KINDS)
    search = method.search()
    search.observe(q, k, v, *call.run_dense(q, k, v), call)
    assert search.costs[0] == 1
    assert search.costs[1] == 0
    assert (search.costs[2:] > 0).all()
    assert not torch.equal(search.costs, search.densities)
    with pytest.raises(ValueError, match="measured by `dit-sparse calibrate`"):
        ordered_attend(method, q, k, v, call)


def test_a_calibration_fixes_what_it_was_searched_with() -> None:
    layout, stripes = TokenLayout(GRID), torch.zeros(1, 8, dtype=torch.bool)
    method = calibrated(SparseVDiTProcessor(block=8, share=0.4), layout, ["diagonal"], stripes)
    assert (method.block, method.share) == (8, 0.4)
    with pytest.raises(ValueError, match=r"share=0\.3 does not fit a calibration .* share=0\.4"):
        replace(method, share=0.3)
    with pytest.raises(ValueError, match=r"fixes the density: calibrate with budget=0\.3"):
        method.at_density(0.3, layout)


@pytest.mark.parametrize(
    ("modes", "stripes", "message"),
    [
        (["diagonal", "wide"], (2, 8), "needs 2 modes out of"),
        (["diagonal"] * 2, (2, 7), "has no tensor 0/stripes, bool"),
    ],
)
def test_refuses_what_a_calibration_cannot_mean(
    modes: list[str], stripes: tuple[int, int], message: str
) -> None:
    layout = TokenLayout(GRID)
    method = calibrated(SparseVDiTProcessor(block=8), layout, modes, torch.zeros(stripes, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        method.order(Call.standalone(layout, heads=2))
    with pytest.raises(ValueError, match="has 2 heads in 1 layers, not 3 heads"):
        method.order(Call.standalone(layout, heads=3))
    with pytest.raises(ValueError, match=r"is for the token grid \(4, 4, 4\), got \(5, 4, 4\)"):
        method.order(Call.standalone(TokenLayout((5, 4, 4)), heads=2))


def test_there_are_no_modes_before_a_step_was_seen() -> None:
    q = randn(1, 1, 64, 8)
    with pytest.raises(ValueError, match="there are no modes yet"):
        SparseVDiTProcessor(block=8).select(q, q, Call.standalone(TokenLayout(GRID)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block": 0}, "block must be >= 1"),
        ({"share": 0.0}, r"share in \(0, 1\], got 128 and 0.0"),
        ({"lam": -1.0}, "lam and eps must be finite"),
        ({"eps": float("inf")}, "lam and eps must be finite"),
        ({"budget": 1.5}, r"budget must be None or lie in \(0, 1\], got 1.5"),
        ({"metric": "l1"}, "metric must be one of relative, mse"),
        ({"cost": "watts"}, "'flops' or 'latency', got 'relative' and 'watts'"),
    ],
)
def test_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseVDiTProcessor(**wrong)
