"""VMoBA: the authors' partitions, selections, outputs and gradients; a loop over queries; its properties."""

import json
from dataclasses import replace
from itertools import product
from math import ceil, prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.kernels import block_sparse_attention
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.plan import Plan, pool
from dit_sparse.processors.vmoba import VMoBAProcessor, select_chunks

VECTORS = Path(__file__).parents[1] / "vectors" / "vmoba"
CASES = json.loads((VECTORS / "vmoba.json").read_text())["cases"]
STORED = np.load(VECTORS / "vmoba.npz")
KINDS = {"1d": "temporal", "2d": "spatial", "3d": "volume"}


def named(kind: str) -> list[str]:
    return [name for name in CASES if name.startswith(kind)]


def configured(name: str, **settings) -> tuple[VMoBAProcessor, int]:
    """The method with the chunk of a vector, and a layer that uses it."""
    kind, size = name.split("_")[1], CASES[name]["chunk_size"]
    size = tuple(size) if isinstance(size, list) else size
    return VMoBAProcessor(**{KINDS[kind]: size}, **settings), list(KINDS).index(kind)


def randn(*shape: int, seed: int = 0, **options) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("name", named("part_"))
def test_matches_the_authors_partitions(name):
    case = CASES[name]
    method, layer = configured(name)
    layout = TokenLayout(tuple(case["THW"]))
    order = method.order(Call.standalone(layout, layer=layer, layers=3))
    perm = order.index[0]
    assert perm[:12].tolist() == case["first12"]
    assert prod(method.chunk(layout, layer)) == case["chunk_tokens"]
    assert ceil(len(perm) / case["chunk_tokens"]) == case["num_chunks"]
    if name in STORED:
        np.testing.assert_array_equal(perm, STORED[name])


@pytest.mark.parametrize(
    ("name", "competition"), list(product(named("sel_"), ["query_head", "block", "overall", "head_global"]))
)
def test_matches_the_authors_selections(name, competition):
    gate, own = (torch.from_numpy(STORED[f"{name}_{x}"]).permute(1, 2, 0)[None] for x in ("gate", "self"))
    every = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    kept = select_chunks(gate, own, every, competition, 0, CASES[name]["threshold"])[0].permute(2, 0, 1)
    np.testing.assert_array_equal(kept, STORED[f"{name}_{competition}_mask"])
    assert kept.float().mean() == pytest.approx(CASES[name]["density"][competition])


@pytest.mark.parametrize("name", named("attn_"))
def test_matches_the_authors_attention(name):
    """A batch of the authors' is one pool of pairs, without those between items; for us items are apart."""
    case = CASES[name]
    batch, *grid, heads, _ = case["b_T_H_W_heads_D"]
    layout, chunks, c = TokenLayout(tuple(grid)), case["num_chunks"], case["chunk_tokens"]
    threshold = case["threshold"] if case["select_mode"] == "threshold" else None
    method, layer = configured(
        name, competition=case["threshold_type"], threshold=threshold, share=min(1, case["topk"] / chunks)
    )
    call = Call.standalone(layout, layer=layer, layers=3, heads=heads)
    call = call.at(order=method.order(call))
    q, k, v, do = (torch.from_numpy(STORED[f"{name}_{x}"]).transpose(1, 2) for x in ("q", "k", "v", "do"))
    plan = method.select(q, k, call)
    if batch > 1:
        folded = [call.order.apply(x).transpose(0, 1).flatten(1, 2)[None] for x in (q, k)]
        items = torch.arange(batch)
        means = pool(call.order.apply(k), c).transpose(0, 1).flatten(1, 2)[None]
        gate = folded[0] @ means.mT
        of_query = items.repeat_interleave(layout.tokens)[:, None]
        valid = of_query == items.repeat_interleave(gate.shape[-1] // batch)
        place = torch.arange(layout.tokens).repeat(batch)[:, None] // c
        own = valid & (place == torch.arange(gate.shape[-1] // batch).repeat(batch))
        keep = select_chunks(gate, own, valid, method.competition, case["topk"], threshold)[0]
        np.testing.assert_array_equal(keep.permute(2, 0, 1), STORED[f"{name}_mask"])
        per_item = keep.view(heads, batch, layout.tokens, batch, -1).diagonal(dim1=1, dim2=3)
        plan = Plan.from_blocks(per_item.permute(3, 0, 1, 2), (1, c))
    else:
        np.testing.assert_array_equal(plan.to_blocks()[0].permute(2, 0, 1), STORED[f"{name}_mask"])
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = call.order.undo(block_sparse_attention(*map(call.order.apply, (q, k, v)), plan)[0])
    out.backward(do)
    for x, expected in zip((out, q.grad, k.grad, v.grad), ("out", "dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(x.detach().transpose(1, 2), STORED[f"{name}_{expected}"], atol=5e-6)


def slow_selection(q: Tensor, k: Tensor, method: VMoBAProcessor, call: Call) -> Tensor:
    """Which key token each query token may read in query-head top-k, [H, S, S] in model order, by loops."""
    layout, layer, heads = call.layout, call.layer, q.shape[0]
    sizes = method.chunk(layout, layer)
    start, end = layout.grid_start, layout.grid_start + layout.tokens
    places = torch.arange(layout.tokens)
    if len(sizes) == 1:
        ids = places // sizes[0]
    else:
        f, rest = places // layout.frame, places % layout.frame
        h, w = rest // layout.grid[2], rest % layout.grid[2]
        rows = [-(-n // size) for n, size in zip(layout.grid, sizes, strict=True)]
        ids = (f // sizes[0] * rows[1] + h // sizes[1]) * rows[2] + w // sizes[2]
    valid = torch.ones(layout.sequence, dtype=torch.bool) if call.valid is None else call.valid[0]
    chunks = [start + places[ids == i] for i in range(int(ids.max()) + 1)]
    chunks = {i: tokens[valid[tokens]] for i, tokens in enumerate(chunks)}
    means = {i: k[:, tokens].mean(1) for i, tokens in chunks.items() if len(tokens)}
    keep = torch.zeros(heads, layout.sequence, layout.sequence, dtype=torch.bool)
    keep[:, :start] = keep[:, end:] = keep[:, :, :start] = keep[:, :, end:] = True
    count = ceil(round(method.share * len(chunks), 6))
    for head, token in product(range(heads), range(start, end)):
        group = head * k.shape[0] // heads
        score = {i: float(mean[group] @ q[head, token]) for i, mean in means.items()}
        score |= {i: np.inf for i in score if i == ids[token - start]}
        for i in sorted(score, key=score.get, reverse=True)[:count]:
            keep[head, token, chunks[i]] = True
    return keep & valid


GRIDS = st.tuples(st.integers(1, 8), st.integers(1, 5), st.integers(1, 7))


@settings(max_examples=60, deadline=None)
@given(
    GRIDS,
    st.integers(0, 5),
    st.sampled_from([0.01, 0.3, 0.6, 1.0]),
    st.sampled_from([{}, {"temporal": 1.5, "spatial": (2, 3), "volume": (2, 2, 3)}]),
    st.sampled_from([{}, {"text": 5}, {"text": 4, "text_first": True, "prefix": 2, "suffix": 3}]),
    st.booleans(),
)
def test_equals_the_loop_over_queries(grid, layer, share, sizes, extra, padded):
    layout, method = TokenLayout(grid, **extra), VMoBAProcessor(share=share, **sizes)
    q, k = randn(1, 4, layout.sequence, 8), randn(1, 2, layout.sequence, 8, seed=1)
    valid = (randn(layout.sequence, seed=2) > 0.3) if padded else None
    call = Call.standalone(layout, layer=layer, layers=6, heads=4, kv_heads=2, valid=valid)
    order = method.order(call)
    plan = method.select(q, k, call)
    tokens = plan.to_blocks().repeat_interleave(plan.block[1], -1)[..., : order.slots]
    tokens = tokens & order.valid(valid)[..., None, :]
    # Slots to tokens, on both axes.
    tokens = order.undo(order.undo(tokens).mT.contiguous()).mT[0]
    assert torch.equal(tokens, slow_selection(q[0], k[0], method, call))


@pytest.mark.parametrize("competition", ["query_head", "head_global", "overall"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_top_k_with_every_chunk_is_dense(competition, layer):
    layout = TokenLayout((5, 4, 7), text=3)
    q, k, v = (randn(2, 2, layout.sequence, 8, seed=i) for i in range(3))
    method = VMoBAProcessor(share=1.0, competition=competition)
    call = Call.standalone(layout, layer=layer, layers=3, heads=2)
    call = call.at(order=method.order(call))
    out = call.order.undo(method.attend(*map(call.order.apply, (q, k, v)), call))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("competition", ["query_head", "block", "head_global", "overall"])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_own_chunk_is_always_read(competition, threshold, layer):
    if competition == "block" and threshold is None:
        return
    layout = TokenLayout((6, 6, 8))  # whole chunks: no row is a hole
    method = VMoBAProcessor(share=0.01, threshold=threshold, competition=competition)
    q = randn(2, 2, layout.sequence, 8)
    plan = method.select(q, -q, Call.standalone(layout, layer=layer, layers=3, heads=2))
    keep, (_, c) = plan.to_blocks(), plan.block
    assert keep[..., torch.arange(keep.shape[2]), torch.arange(keep.shape[2]) // c].all()
    only_own = keep.sum() == keep[..., 0].numel()
    assert only_own == (threshold is None)
    assert keep.all() == (threshold == 1)


@pytest.mark.parametrize("competition", ["query_head", "block", "head_global", "overall"])
def test_a_threshold_reaches_its_share_and_no_pair_more(competition):
    gate = randn(2, 3, 40, 5)
    own = torch.arange(40)[:, None] // 8 == torch.arange(5)
    kept = select_chunks(gate, own, torch.ones(1, 1, 1, 1, dtype=torch.bool), competition, 0, 0.4)
    axes = {"query_head": (3,), "block": (1, 2), "head_global": (2, 3), "overall": (1, 2, 3)}[competition]
    mass = gate - gate.amin(axes, keepdim=True)
    share = (mass * kept).sum(axes) / mass.sum(axes)
    others = (mass * kept).masked_fill(~(kept & ~own), torch.inf).amin(axes) / mass.sum(axes)
    one = (kept & ~own).sum(axes) == 1
    assert (share >= 0.4 - 1e-5).all()
    assert ((share - others < 0.4) | one).all()


def test_head_global_gives_some_queries_more_than_others():
    layout = TokenLayout((6, 6, 8))
    q, k = randn(1, 2, layout.sequence, 8), randn(1, 2, layout.sequence, 8, seed=1)
    call = Call.standalone(layout, layer=2, layers=3, heads=2)
    alone, together = (
        VMoBAProcessor(competition=c).select(q, k, call) for c in ("query_head", "head_global")
    )
    assert len(alone.counts.unique()) == 1
    assert len(together.counts.unique()) > 3
    assert (together.counts.sum(-1) == alone.counts.sum(-1)).all()


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("competition", ["query_head", "head_global", "overall"])
def test_batch_items_do_not_see_each_other_nor_padding(competition, threshold):
    layout = TokenLayout((3, 4, 5), text=6)
    method = VMoBAProcessor(competition=competition, threshold=threshold)
    q, k = randn(2, 2, layout.sequence, 8), randn(2, 2, layout.sequence, 8, seed=1)
    valid = torch.ones(2, layout.sequence, dtype=torch.bool)
    valid[0, 41:50] = valid[1, -4:] = False
    call = Call.standalone(layout, layer=1, layers=3, heads=2, valid=valid)
    together = method.select(q, k, call).to_blocks()
    order = method.order(call)
    loud = q.masked_fill(~valid[:, None, :, None], 50.0), k.masked_fill(~valid[:, None, :, None], 50.0)
    for i in range(2):
        apart = method.select(q[i : i + 1], k[i : i + 1], call.at(valid=valid[i : i + 1])).to_blocks()
        assert torch.equal(apart[0], together[i])
        rows = order.valid(valid)[i, 0]
        noisy = method.select(*loud, call).to_blocks()[i]
        assert torch.equal(noisy[:, rows], together[i][:, rows])


def test_chunks_cycle_with_depth_and_follow_the_published_sizes():
    small = TokenLayout((21, 30, 52))
    method = VMoBAProcessor()
    assert [method.chunk(small, i) for i in range(4)] == [(4680,), (21, 5, 13), (7, 5, 13), (4680,)]
    counts = [
        method.order(Call.standalone(small, layer=i)).filled(prod(method.chunk(small, i))).shape[-1]
        for i in range(3)
    ]
    assert counts == [7, 24, 72]
    assert [ceil(method.share * n) for n in counts] == [2, 6, 18]
    assert [ceil(method.share * n) for n in (7, 40, 36)] == [2, 10, 9]
    assert VMoBAProcessor(temporal=0.5).chunk(TokenLayout((5, 3, 5)), 0) == (7,)


@pytest.mark.parametrize(
    "layout", [TokenLayout((13, 8, 16)), TokenLayout((5, 7, 9), text=11), TokenLayout((1, 30, 40))]
)
def test_at_density_is_the_nearest(layout):
    q, k = randn(1, 2, layout.sequence, 8), randn(1, 2, layout.sequence, 8, seed=1)

    def density(method: VMoBAProcessor) -> float:
        found = []
        for layer in range(3):
            call = Call.standalone(layout, layer=layer, layers=3, heads=2)
            order, plan = method.order(call), method.select(q, k, call)
            found.append(plan.density(order.filled(1), order.filled(plan.block[1])))
        return sum(found) / 3

    every = [density(VMoBAProcessor(share=s)) for s in np.linspace(0.001, 1, 60)]
    for wanted in np.linspace(min(every), 1, 6):
        method = VMoBAProcessor().at_density(float(wanted), layout)
        assert method == replace(VMoBAProcessor(), share=method.share)
        # Which of several unequal chunks is read is up to q and k.
        assert abs(density(method) - wanted) <= min(abs(d - wanted) for d in every) + 0.01


def test_at_density_names_its_floor_and_refuses_thresholds():
    with pytest.raises(ValueError, match=r"floor 0\.0661.*smaller temporal"):
        VMoBAProcessor().at_density(0.05, TokenLayout((21, 30, 52)))
    with pytest.raises(ValueError, match="depends on q and k"):
        VMoBAProcessor(threshold=0.25).at_density(0.2, TokenLayout((21, 30, 52)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0.0}, r"share must lie in \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold in \[0, 1\]"),
        ({"competition": "head"}, "competition must be one of .*got .*'head'"),
        ({"competition": "block"}, "competition must be one of"),
        ({"spatial": (2, 3, 4)}, "1, 2 and 3 sizes"),
        ({"volume": (2, 0, 4)}, "above 0"),
        ({"temporal": 0.0}, "above 0"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        VMoBAProcessor(**wrong)
