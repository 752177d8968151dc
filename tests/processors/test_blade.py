"""BLADE: the authors' curve, pooling, masks and outputs; ASA_GT as one softmax; the draw; its properties."""

import hashlib
import json
from dataclasses import replace
from itertools import product
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.order import Order, gilbert
from dit_sparse.plan import Plan
from dit_sparse.processors import blade
from dit_sparse.processors.blade import BladeProcessor, asa_importance, energy_mask, summarise

VECTORS = Path(__file__).parents[1] / "vectors" / "blade"
CASES = json.loads((VECTORS / "blade.json").read_text())["cases"]
STORED = {name: torch.from_numpy(x) for name, x in np.load(VECTORS / "blade.npz").items()}


def named(kind: str) -> list[str]:
    return [name for name in CASES if name.startswith(kind)]


def randn(*shape: int, seed: int = 0, **options) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("name", named("gilbert_"))
def test_matches_the_authors_curve(name):
    case = CASES[name]
    order = gilbert((case["d"], case["h"], case["w"]))
    assert hashlib.sha256(order.numpy().astype("<i8").tobytes()).hexdigest() == case["sha256_int64"]
    assert len(order) == case["n"]
    assert order[:16].tolist() == case["first16"]
    assert order[-8:].tolist() == case["last8"]
    if name in STORED:
        assert torch.equal(order, STORED[name])
    z, y, x = order // (case["w"] * case["h"]), order // case["w"] % case["h"], order % case["w"]
    steps = sum(axis.diff().abs() for axis in (x, y, z))
    assert steps.max() == case["max_L1_step"]
    assert (steps > 1).sum() == case["num_non_unit_steps"]


def test_matches_the_authors_rearrangement():
    layout = TokenLayout((2, 3, 5), text=4, text_first=True)
    x = torch.arange(34.0)[None, None, :, None]
    order = BladeProcessor(block=1, samples=1).order(Call.standalone(layout))
    assert torch.equal(order.apply(x).flatten(), STORED["rearranger_5x3x2_text4_out"])
    assert torch.equal(order.undo(order.apply(x)), x)
    curve = order.index[0, :30] - 4
    assert torch.equal(curve, STORED["rearranger_5x3x2_o2g"])
    assert torch.equal(curve.argsort(), STORED["rearranger_5x3x2_g2o"])


@pytest.mark.parametrize("name", named("mask_"))
def test_matches_the_authors_masks(name):
    case = CASES[name]
    mask = energy_mask(
        STORED[f"{name}_P"],
        case["energy_threshold"],
        case["min_retain_ratio"],
        case["max_retain_ratio"],
        inclusive=False,
    )
    assert torch.equal(mask, STORED[f"{name}_mask"])
    assert [mask.sum(-1).min(), mask.sum(-1).max()] == case["kept_per_row_minmax"]


@pytest.mark.parametrize("name", named("pool_"))
def test_matches_the_authors_pooling(name, monkeypatch):
    q, k, block = STORED[f"{name}_q"], STORED[f"{name}_k"], CASES[name]["block"]
    every = torch.arange(block)[None, None]
    pooled = asa_importance(q, k, block, (every, every))
    torch.testing.assert_close(pooled, STORED[f"{name}_pooled"], atol=1e-6, rtol=1e-6)
    monkeypatch.setattr(blade, "SCORES", 1)
    torch.testing.assert_close(asa_importance(q, k, block, (every, every)), pooled, atol=1e-7, rtol=1e-6)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    largest = scores.unflatten(-1, (-1, block)).amax(-1).unflatten(2, (-1, block)).amax(3)
    torch.testing.assert_close(asa_importance(q, k, block, (every, every), "softmax_max"), largest)


@pytest.mark.parametrize("name", named("asa_gt_"))
def test_matches_the_authors_attention(name):
    case = CASES[name]
    q, k, v = (STORED[f"{name}_{x}"] for x in "qkv")
    tokens, block = q.shape[2], case["block"]
    torch.manual_seed(1234)
    offsets = [torch.rand(*q.shape[:2], 1, block).topk(case["num_keep"]).indices[:, :, 0] for _ in "qk"]
    scores = asa_importance(q, k, block, offsets)
    torch.testing.assert_close(scores, STORED[f"{name}_P"], atol=1e-6, rtol=1e-5)
    method = BladeProcessor(
        energy=case["energy_threshold"],
        least=case["min_retain_ratio"],
        most=case["max_retain_ratio"],
        summary=case["sample_gap"],
        inclusive=False,
    )
    mask = energy_mask(scores, method.energy, method.least, method.most, inclusive=False)
    assert torch.equal(mask, STORED[f"{name}_mask"])
    reported = 1 - mask.float().mean() - 1 / case["sample_gap"]
    assert reported == pytest.approx(case["reported_sparsity"], abs=1e-6)
    layout = TokenLayout((1, 1, tokens))
    call = Call.standalone(layout, heads=q.shape[1]).at(
        order=Order.raster(layout, block), plan_cache=lambda *_: Plan.from_blocks(mask, block)
    )
    out = method.attend(q, k, v, call)
    torch.testing.assert_close(out[:, :, :4], STORED[f"{name}_out_first4"], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(out.double().sum(2), STORED[f"{name}_out_sum"], atol=1e-4, rtol=1e-5)


def test_every_vector_is_there():
    assert [len(named(kind)) for kind in ("gilbert_", "mask_", "pool_", "asa_gt_")] == [7, 2, 2, 1]


GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7))
EXTRAS = st.sampled_from([{}, {"text": 5}, {"text": 4, "text_first": True, "prefix": 2, "suffix": 3}])


def slow_importance(
    q: Tensor, k: Tensor, block: int, offsets: list[Tensor], valid: Tensor, importance: str
) -> Tensor:
    """The definition for one item and head, block by block: [Q, K] in float64."""
    blocks = [torch.arange(len(q))[i : i + block] for i in range(0, len(q), block)]
    blocks = [tokens[valid[tokens]].tolist() for tokens in blocks]
    drawn_q, drawn_k = (
        [[tokens[min(int(o), len(tokens) - 1)] for o in of if tokens] for tokens in blocks] for of in offsets
    )
    out = torch.zeros(len(blocks), len(blocks), dtype=torch.float64)
    keys = [j for tokens in drawn_k for j in tokens]
    for a, b in product(range(len(blocks)), repeat=2):
        for i in drawn_q[a] if drawn_k[b] else []:
            score = {j: float(q[i].double() @ k[j].double()) * q.shape[-1] ** -0.5 for j in keys}
            best = np.exp(max(score[j] for j in drawn_k[b]))
            whole = (
                sum(np.exp(score[j]) for j in keys) if importance != "relmax" else np.exp(max(score.values()))
            )
            out[a, b] = max(out[a, b], best / whole)
    return out / out.sum(-1, keepdim=True).clamp(min=1e-12) if importance == "relmax" else out


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 20),
    st.sampled_from([3, 4, 8]),
    st.sampled_from(["relmax", "softmax_max"]),
    st.integers(0, 99),
    st.sampled_from([1, 40, 1 << 26]),
)
def test_importance_equals_the_loop(tokens, block, importance, seed, scores):
    q, k = randn(2, 4, tokens, 6, seed=seed), randn(2, 2, tokens, 6, seed=seed + 100)
    valid = randn(2, 1, tokens, seed=seed + 200) > -0.5
    offsets = [randn(1, heads, block, seed=seed + heads).topk(3).indices for heads in (4, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blade, "SCORES", scores)
        found = asa_importance(q, k, block, offsets, importance, valid=valid)
    for item, head in product(range(2), range(4)):
        mine = [offsets[0][0, head], offsets[1][0, head // 2]]
        slow = slow_importance(q[item, head], k[item, head // 2], block, mine, valid[item, 0], importance)
        rows = [i for i in range(found.shape[2]) if valid[item, 0, i * block : (i + 1) * block].any()]
        torch.testing.assert_close(found[item, head][rows].double(), slow[rows], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("inclusive", [True, False])
def test_mask_equals_the_loop(inclusive):
    scores, eligible = randn(2, 3, 9, 14).mul(2).softmax(-1), randn(2, 1, 1, 14, seed=1) > -0.5
    mask = energy_mask(scores, 0.8, 0.2, 0.6, inclusive, eligible)
    for item, head, row in product(range(2), range(3), range(9)):
        there = eligible[item, 0, 0].nonzero().flatten().tolist()
        best = sorted(there, key=lambda j: -float(scores[item, head, row, j]))
        total, count, mass = float(scores[item, head, row, there].sum()), 0, 0.0
        while mass + float(scores[item, head, row, best[count]]) < 0.8 * total:
            mass += float(scores[item, head, row, best[count]])
            count += 1
        kept = best[: min(max(count + inclusive, 2), 8)]  # 0.2 and 0.6 of 14
        assert mask[item, head, row].nonzero().flatten().tolist() == sorted(kept)


def oracle(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, groups: list[list[int]], heads: int) -> Tensor:
    """One dense softmax over keys where ``tokens`` [.., S, S] and means with ln n, by autograd."""
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    means = [torch.stack([x[:, :, group].mean(2) for group in groups], 2) for x in (k, v)]
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~tokens, -torch.inf)
    of_means = q @ means[0].mT * q.shape[-1] ** -0.5 + log(len(groups[0]))
    return torch.cat((scores, of_means), -1).softmax(-1) @ torch.cat((v, means[1]), 2)


@settings(max_examples=15, deadline=None)
@given(GRIDS, EXTRAS, st.sampled_from([1, 3, 4, 30]), st.booleans())
def test_keys_and_means_are_one_softmax_with_its_gradients(grid, extra, n, padded):
    layout = TokenLayout(grid, **extra)
    method = BladeProcessor(block=8, samples=4, least=0.3, most=0.3, summary=n)
    q, do = (randn(1, 4, layout.sequence, 6, seed=i, dtype=torch.float64) for i in (0, 3))
    k, v = (randn(1, 2, layout.sequence, 6, seed=i, dtype=torch.float64) for i in (1, 2))
    valid = torch.ones(1, layout.sequence, dtype=torch.bool)
    if padded and layout.sequence > 3:
        valid[0, layout.sequence // 3 : layout.sequence // 2] = False
    call = Call.standalone(layout, heads=4, kv_heads=2, valid=valid)
    order = method.order(call)
    call = call.at(order=order)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = order.undo(method.attend(*map(order.apply, (q, k, v)), call))
    found = torch.autograd.grad(out, (q, k, v), do)

    plan = method.select(q.detach(), k.detach(), call)
    tokens = plan.to_blocks().repeat_interleave(8, -2).repeat_interleave(8, -1)
    tokens = tokens[..., : order.slots, : order.slots] & order.valid(valid)[..., None, :]
    tokens = order.undo(order.undo(tokens).mT.contiguous()).mT
    line = [i for i in order.index[0].tolist() if i >= 0 and valid[0, i]]
    line += line[-1:] * (-len(line) % n)
    groups = [line[i : i + n] for i in range(0, len(line), n)]
    expected = oracle(q, k, v, tokens, groups, 4)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
    for x, y in zip(found, torch.autograd.grad(expected, (q, k, v), do), strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-5)


def test_means_take_valid_tokens_in_order_and_repeat_the_last():
    x = torch.arange(10.0)[None, None, :, None].expand(2, 1, -1, 1)
    valid = torch.ones(2, 1, 10, dtype=torch.bool)
    valid[0, 0, [1, 5, 9]] = False
    means = summarise(x, 4, valid)[:, 0, :, 0]
    np.testing.assert_allclose(means[0], [(0 + 2 + 3 + 4) / 4, (6 + 7 + 8 + 8) / 4, 8])
    np.testing.assert_allclose(means[1], [1.5, 5.5, (8 + 9 * 3) / 4])


@settings(max_examples=20, deadline=None)
@given(GRIDS, EXTRAS, st.booleans())
def test_every_block_and_no_means_is_dense(grid, extra, padded):
    layout = TokenLayout(grid, **extra)
    q, k, v = (randn(2, 2, layout.sequence, 8, seed=i) for i in range(3))
    valid = randn(2, layout.sequence, seed=9) > -1 if padded else torch.ones(2, layout.sequence).bool()
    valid[:, 0] = True
    call = Call.standalone(layout, heads=2, valid=valid)
    for method in (
        BladeProcessor(block=8, samples=8, least=1, most=1, summary=None),
        BladeProcessor(block=8, samples=8, energy=1, least=0, most=1, summary=None, importance="softmax_max"),
    ):
        order = method.order(call)
        out = order.undo(method.attend(*map(order.apply, (q, k, v)), call.at(order=order)))
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, valid[:, None, None])
        torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


def test_draws_depend_on_seed_layer_and_step_only():
    layout = TokenLayout((5, 6, 8))
    method = BladeProcessor(block=8, samples=2, most=0.3)
    q, k = randn(2, 2, layout.sequence, 8), randn(2, 2, layout.sequence, 8, seed=1)
    call = Call.standalone(layout, layer=1, layers=4, step=3, steps=9, heads=2)
    plan = method.select(q, k, call)
    assert (
        plan.density(call.at(order=method.order(call)).filled(8), call.at(order=method.order(call)).filled(8))
        < 0.4
    )
    for same in (call, call.at(branch="uncond"), call.at(steps=20)):
        assert method.select(q, k, same).same(plan)
    one = method.select(q[1:], k[1:], call).to_blocks()
    assert torch.equal(one[0], plan.to_blocks()[1])
    for other in (call.at(layer=2), call.at(step=4), call.at(seed=1)):
        assert not method.select(q, k, other).same(plan)
    even = replace(method, sampling="even")
    assert even.select(q, k, call).same(even.select(q, k, call.at(layer=2, step=4, seed=1)))
    assert not even.select(q, k, call).same(plan)


def test_a_head_draws_queries_and_keys_apart(monkeypatch):
    seen = {}
    importance = blade.asa_importance

    def spy(q: Tensor, k: Tensor, block: int, offsets: list[Tensor], *rest, **options) -> Tensor:
        seen["offsets"] = offsets
        return importance(q, k, block, offsets, *rest, **options)

    monkeypatch.setattr(blade, "asa_importance", spy)
    layout = TokenLayout((2, 8, 8))
    q, k = randn(1, 4, 128, 4), randn(1, 2, 128, 4)
    call = Call.standalone(layout, heads=4, kv_heads=2)
    BladeProcessor(block=64, samples=16).select(q, k, call)
    drawn = torch.cat([offset[0] for offset in seen["offsets"]]).sort(-1).values
    assert drawn.shape == (6, 16)
    assert len(drawn.unique(dim=0)) == 6  # heads differ, and so do queries and keys
    assert (drawn.diff(dim=-1) > 0).all()  # without replacement
    BladeProcessor(block=64, samples=4, sampling="even").select(q, k, call)
    assert seen["offsets"][0].flatten().tolist() == [8, 24, 40, 56]


def test_finds_the_block_that_queries_look_for():
    """Each query block of a curve block looks for one far key block, as strongly as its own is weak."""
    layout, block = TokenLayout((4, 8, 8)), 32
    order = Order.curve(layout, block)
    blocks = layout.tokens // block
    target = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
    signs = torch.eye(blocks).repeat_interleave(block, 0)[None, None] * 20
    q, k = order.undo(signs[:, :, target.repeat_interleave(block) * block]), order.undo(signs)
    for importance in ("relmax", "softmax_max"):
        method = BladeProcessor(block=block, samples=4, least=0, most=0, importance=importance)
        keep = method.select(q, k, Call.standalone(layout)).to_blocks()[0, 0]
        assert torch.equal(keep.int().argmax(-1), target)
        assert keep.sum() == blocks


@pytest.mark.parametrize("summary", [None, 30])
@pytest.mark.parametrize(
    "layout", [TokenLayout((5, 8, 16)), TokenLayout((5, 7, 9), text=11), TokenLayout((1, 30, 40))]
)
def test_at_density_is_the_nearest(layout, summary):
    method = BladeProcessor(block=16, samples=4, summary=summary)
    q, k = randn(1, 2, layout.sequence, 8), randn(1, 2, layout.sequence, 8, seed=1)
    call = Call.standalone(layout, heads=2)
    order, blocks = method.order(call), -(-layout.tokens // 16)

    def density(kept: float) -> float:
        plan = replace(method, least=kept, most=kept).select(q, k, call)
        means = 0 if summary is None else -(-layout.sequence // summary) / layout.sequence
        return plan.density(order.filled(16), order.filled(16)) + means

    every = [density(min(1.0, (i + 1.5) / blocks)) for i in range(blocks)]
    for wanted in np.linspace(every[0], 1, 6):
        found = method.at_density(float(wanted), layout)
        assert found == replace(method, least=found.least, most=found.least)
        # Whether the ragged last block is read is up to q and k.
        assert abs(density(found.most) - wanted) <= min(abs(d - wanted) for d in every) + 0.01


def test_at_density_names_its_floor():
    with pytest.raises(ValueError, match=r"floor 0\.0372.*smaller block or summary=None"):
        BladeProcessor().at_density(0.03, TokenLayout((21, 30, 52)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"energy": 0.0}, r"energy must lie in \(0, 1\]"),
        ({"least": 0.3}, "least <= most"),
        ({"most": 1.2}, "most <= 1"),
        ({"samples": 129}, r"1\.\.block"),
        ({"summary": 0}, "None or >= 1"),
        ({"sampling": "grid"}, "'random' or 'even'.*got .*'grid'"),
        ({"importance": "mass"}, "'relmax' or 'softmax_max', got .*'mass'"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        BladeProcessor(**wrong)
