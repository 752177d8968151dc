"""Draft: the authors' masks bit for bit, a plain-loop construction on any grid, the rule's properties."""

import hashlib
import json
from dataclasses import replace
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.order import Order
from dit_sparse.plan import Plan
from dit_sparse.processors.draft import DraftProcessor

VECTORS = Path(__file__).parents[1] / "vectors" / "draft"
CASES = sorted(VECTORS.glob("d*.json"))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def load(path: Path, dtype: torch.dtype = torch.float32):
    """(method, layout, q and k [1, H, S, D], json, npz) of a vector."""
    case, stored = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    about = case["inputs"]
    grid = (about["latent_frames"], about["latent_h"], about["latent_w"])
    method = DraftProcessor(
        density=1 - about["sparsity_ratio"], pool=(about["pool_h"], about["pool_w"]), variant="official"
    )
    q, k = (torch.from_numpy(stored[x]).to(dtype).transpose(0, 1)[None] for x in ("q", "k"))
    return method, TokenLayout(grid, text=about["text_tokens"]), q, k, case, stored


def select(method: DraftProcessor, layout: TokenLayout, seed: int = 0, **options) -> Plan:
    heads, kv_heads = 4, 2
    q = randn(2, heads, layout.sequence, 6, seed=seed)
    k = randn(2, kv_heads, layout.sequence, 6, seed=seed + 1000)
    return method.select(q, k, Call.standalone(layout, heads=heads, kv_heads=kv_heads, **options))


def density(method: DraftProcessor, layout: TokenLayout, seed: int = 0) -> float:
    filled = method.order(Call.standalone(layout)).filled(method.block)
    return select(method, layout, seed).density(filled, filled)


def regions(layout: TokenLayout, pool: tuple[int, int]) -> list[list[int]]:
    """The model positions of each region's tokens."""
    f, h, w = layout.grid
    return [
        [
            layout.grid_start + (t * h + y) * w + x
            for y in range(top, min(top + pool[0], h))
            for x in range(left, min(left + pool[1], w))
        ]
        for t in range(f)
        for top in range(0, h, pool[0])
        for left in range(0, w, pool[1])
    ]


def slow_cells(
    method: DraftProcessor, layout: TokenLayout, q: np.ndarray, k: np.ndarray, valid: np.ndarray, scale: float
) -> np.ndarray:
    """The kept cells of one head out of float64 loops over regions; valid [S]."""
    tokens = regions(layout, method.pool)
    per_frame = len(tokens) // layout.grid[0]
    read = [[t for t in region if valid[t]] for region in tokens]
    cells = [j for j, region in enumerate(read) if region]
    scores = np.full((len(tokens), len(tokens)), -np.inf)
    for i, rows in enumerate(read):
        mean = q[rows].mean(0) if rows else np.zeros(q.shape[1])
        for j in cells:
            scores[i, j] = scale * mean @ k[read[j]].mean(0)
    probability = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    rank = probability if method.variant == "official" else scores
    first = {
        (i, j)
        for i in range(len(tokens))
        for j in cells
        if (method.sink and j < per_frame) or (method.same_frame and i // per_frame == j // per_frame)
    }
    for cell in first:
        rank[cell] = np.inf
    if method.variant == "row":
        keep = np.zeros_like(rank, dtype=bool)
        for i in range(len(tokens)):
            count = max(1, round(method.density * len(cells)), sum(cell[0] == i for cell in first))
            keep[i, sorted(cells, key=lambda j: (-rank[i, j], j))[:count]] = True
        return keep
    every = sorted(rank[i, j] for i in range(len(tokens)) for j in cells)
    k_th = int((1 - method.density) * len(every))
    least = every[max(0, k_th - 1) if method.variant == "official" else k_th]
    return (rank >= least) & np.isin(np.arange(len(tokens)), cells)


METHODS = st.builds(
    DraftProcessor,
    density=st.sampled_from([0.02, 0.1, 0.25, 0.4, 0.73, 1.0]),
    pool=st.sampled_from([(1, 1), (2, 3), (3, 2), (4, 4)]),
    variant=st.sampled_from(["row", "official", "paper"]),
    sink=st.booleans(),
    same_frame=st.booleans(),
)
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 5))
TEXTS = st.sampled_from([(0, False), (5, False), (7, True)])
TEXTS = st.sampled_from([(0, False), (5, False), (7, True)])


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_matches_the_authors_masks(path):
    method, layout, q, k, case, stored = load(path)
    plan = method.select(q, k, Call.standalone(layout, heads=q.shape[1]))
    keep = plan.to_blocks()[0].numpy()
    for mask, about in (
        (keep, case["whole_sequence"]),
        (keep[:, : stored["draft_map"].shape[1], : stored["draft_map"].shape[2]], case["video_only"]),
    ):
        assert list(mask.shape) == about["shape"]
        assert hashlib.sha256(np.packbits(mask.reshape(-1)).tobytes()).hexdigest() == about["sha256_packed"]
        rows = mask.sum(-1).astype("<i4").tobytes()
        assert hashlib.sha256(rows).hexdigest() == about["row_counts_sha256_int32_le"]
    np.testing.assert_array_equal(np.packbits(keep.reshape(-1)), stored["mask_packed"])
    np.testing.assert_array_equal(plan.counts[0].numpy(), stored["row_counts"])


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_threshold_is_the_kth_smallest_of_a_head(path):
    """The rule alone, on the authors' draft; its softmax undone by a logarithm."""
    method, *_, case, stored = load(path)
    draft = torch.from_numpy(stored["draft_map"])[None]
    n = draft.shape[-1]
    keep = method.choose(draft.log(), torch.ones(1, 1, 1, n, dtype=torch.bool), torch.zeros(n, n).bool())
    for h, about in enumerate(case["per_head"]):
        assert int((1 - method.density) * n * n) == about["excluded_k"]
        kth = np.sort(stored["draft_map"][h], axis=None)[about["excluded_k"] - 1]
        assert kth == np.float32(about["threshold"])
        np.testing.assert_array_equal(keep[0, h].numpy(), stored["draft_map"][h] >= kth)
        assert int(keep[0, h].sum()) == about["kept"] == n * n - about["excluded_k"] + 1


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_matches_the_authors_permutation(path):
    method, layout, *_, stored = load(path)
    order = method.order(Call.standalone(layout))
    np.testing.assert_array_equal(order.index[0].numpy(), stored["reorder"])
    slots = torch.arange(order.slots).view(1, 1, -1, 1)
    np.testing.assert_array_equal(order.undo(slots).flatten().numpy(), stored["restore"])


@pytest.mark.parametrize("name", json.loads((VECTORS / "permutations_real_shapes.json").read_text()))
def test_matches_the_authors_permutations_of_real_shapes(name):
    case = json.loads((VECTORS / "permutations_real_shapes.json").read_text())[name]
    layout = TokenLayout((case["frames"], case["h"], case["w"]), text=case["text"])
    order = DraftProcessor().order(Call.standalone(layout))
    index, slots = order.index[0], torch.arange(order.slots).view(1, 1, -1, 1)
    for positions, digest in (
        (index, case["sha256_reorder_int32_le"]),
        (order.undo(slots).flatten(), case["sha256_restore_int32_le"]),
    ):
        assert hashlib.sha256(positions.numpy().astype("<i4").tobytes()).hexdigest() == digest
    assert len(index) == case["length"]
    assert index[:8].tolist() == case["first_8"]
    places = [int(index[i]) for i in (16, 128, -1)]
    assert places == [case["pos_16"], case["pos_128"], case["pos_last"]]


def test_every_vector_is_there():
    assert [path.name[:2] for path in CASES] == ["d1", "d3", "d4"]


@pytest.mark.parametrize(("sparsity", "known"), [(0.75, "sp0.75"), (0.9, "sp0.9")])
def test_bfloat16_models_keep_what_float32_ones_do(sparsity, known):
    """The released code pooled in bfloat16 keeps more, as cells tie; here scores are float32."""
    study = json.loads((VECTORS / "precision_study.json").read_text())
    _, layout, q, k, *_ = load(CASES[-1], torch.bfloat16)
    method = DraftProcessor(density=1 - sparsity, variant="official")
    kept = method.select(q, k, Call.standalone(layout)).to_blocks().double().mean().item()
    assert kept == pytest.approx(study[f"smooth0.8_float32_{known}"]["density"], abs=1e-7)
    assert kept < study[f"smooth0.8_bfloat16_{known}"]["density"]


@settings(max_examples=150, deadline=None)
@given(METHODS, GRIDS, TEXTS, st.booleans(), st.integers(0, 99))
def test_equals_the_plain_loops(method, grid, texts, hidden, seed):
    text, text_first = texts
    layout = TokenLayout(grid, text=text, text_first=text_first, prefix=2 * (text > 0))
    q, k = (randn(2, 2, layout.sequence, 5, seed=seed + i).double() for i in (0, 1000))
    valid = torch.ones(2, layout.sequence, dtype=torch.bool)
    if hidden:
        start = layout.grid_start
        valid[1, start : start + layout.tokens // 2] = False
        valid[1, layout.text_start : layout.text_start + layout.text] = False
    call = Call.standalone(layout, heads=2, valid=valid if hidden else None)
    plan = method.select(q, k, call.at(scale=0.6))
    n, extra = len(regions(layout, method.pool)), -(-layout.extra // method.block)
    keep = plan.to_blocks().expand(2, 2, -1, -1).numpy()
    assert keep.shape[-1] == n + extra
    readable = plan_filled(method, layout, valid) > 0
    for b in range(2):
        for h in range(2):
            cells = slow_cells(method, layout, q[b, h].numpy(), k[b, h].numpy(), valid[b].numpy(), 0.6)
            np.testing.assert_array_equal(keep[b, h, :n, :n], cells)
        dense = np.broadcast_to(readable[b], (n + extra, n + extra))
        assert (keep[b, :, n:] == dense[n:]).all()
        assert (keep[b, :, :, n:] == dense[:, n:]).all()


def plan_filled(method: DraftProcessor, layout: TokenLayout, valid: torch.Tensor) -> np.ndarray:
    """Readable tokens per block, [B, blocks]."""
    return method.order(Call.standalone(layout)).filled(method.block, valid)[:, 0].numpy()


@pytest.mark.parametrize("variant", ["row", "official", "paper"])
def test_keeps_everything_at_density_1(variant):
    layout = TokenLayout((3, 7, 9), text=5)
    assert select(DraftProcessor(density=1.0, pool=(4, 4), variant=variant), layout).to_blocks().all()


@settings(max_examples=40, deadline=None)
@given(METHODS, GRIDS, st.floats(0.01, 1))
def test_monotone_in_density(method, grid, other):
    less, more = (
        select(replace(method, density=d), TokenLayout(grid)).to_blocks()
        for d in sorted((method.density, other))
    )
    assert (more | ~less).all()


@settings(max_examples=40, deadline=None)
@given(METHODS, GRIDS)
def test_rows_are_never_empty_and_all_of_one_count(method, grid):
    method = replace(method, variant="row", sink=False, same_frame=False)
    counts = select(method, TokenLayout(grid)).counts
    n = counts.shape[-1]
    assert (counts == max(1, round(method.density * n))).all()


def test_flat_heads_leave_rows_empty_by_the_official_rule():
    """Means of 128 random tokens: nearly uniform attention."""
    layout = TokenLayout((3, 16, 32))
    q, k = randn(1, 1, layout.sequence, 16), randn(1, 1, layout.sequence, 16, seed=1)
    plans = {
        variant: DraftProcessor(density=0.1, variant=variant).select(q, k, Call.standalone(layout))
        for variant in ("official", "row")
    }
    assert int(plans["official"].counts.sum()) == 144 - int(0.9 * 144) + 1
    assert (plans["official"].counts == 0).any()
    assert (plans["row"].counts == 1).all()


def test_the_official_rule_keeps_one_cell_more_than_the_paper():
    layout = TokenLayout((9, 4, 4))
    q, k = randn(1, 3, 144, 8), randn(1, 3, 144, 8, seed=1)
    kept = {}
    for variant in ("official", "paper"):
        method = DraftProcessor(density=0.3, pool=(4, 4), variant=variant)
        kept[variant] = method.select(q, k, Call.standalone(layout, heads=3)).to_blocks()
    assert (kept["paper"].sum((-2, -1)) == ceil(0.3 * 81)).all()
    assert (kept["official"].sum((-2, -1)) == ceil(0.3 * 81) + 1).all()


def test_ties_all_stay_by_the_official_rule_and_none_by_row():
    layout = TokenLayout((2, 4, 8))
    q = torch.zeros(1, 1, 64, 4)
    call = Call.standalone(layout)
    method = DraftProcessor(density=0.5, pool=(4, 4), variant="official")
    assert method.select(q, q, call).to_blocks().all()
    assert (replace(method, variant="row").select(q, q, call).counts == 2).all()


def test_sink_and_same_frame_come_first_and_count():
    layout = TokenLayout((5, 6, 6))
    method = DraftProcessor(density=0.6, pool=(3, 3), sink=True, same_frame=True)
    keep = select(method, layout).to_blocks().view(2, 4, 5, 4, 5, 4)
    assert keep[..., 0, :].all()
    assert all(keep[:, :, t, :, t].all() for t in range(5))
    assert (keep.sum((-2, -1)) == 12).all()
    tight = replace(method, density=0.01)
    assert (select(tight, layout).counts.view(2, 4, 5, 4) == torch.tensor([4, 8, 8, 8, 8])[:, None]).all()


def test_every_batch_item_and_head_is_on_its_own():
    layout, method = TokenLayout((3, 5, 9), text=4), DraftProcessor(pool=(2, 4))
    q, k = randn(2, 4, layout.sequence, 8), randn(2, 2, layout.sequence, 8, seed=1)
    together = method.select(q, k, Call.standalone(layout, heads=4, kv_heads=2)).to_blocks()
    for b in range(2):
        for h in range(4):
            one = method.select(
                q[b : b + 1, h : h + 1], k[b : b + 1, h // 2 : h // 2 + 1], Call.standalone(layout)
            )
            assert torch.equal(one.to_blocks()[0, 0], together[b, h])


def test_a_region_out_of_the_grid_is_the_mean_of_its_own_tokens():
    """Zero padding would shrink the mean of a ragged region, and with it its score."""
    layout = TokenLayout((1, 3, 5))
    order = Order.tiles(layout, (1, 2, 4))
    k = torch.zeros(1, 1, 15, 1)
    k[0, 0, 14] = 1.0  # alone in the last region
    k[0, 0, 0] = 7.9  # one of eight in the first
    q = torch.ones(1, 1, 15, 1)
    assert order.filled(8)[0, 0].tolist() == [8, 2, 4, 1]
    plan = DraftProcessor(density=0.25, pool=(2, 4)).select(q, k, Call.standalone(layout))
    assert plan.indices[0, 0, :, 0].tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("variant", ["row", "official", "paper"])
@pytest.mark.parametrize("options", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("text", [0, 9])
def test_at_density_is_the_nearest(variant, options, text):
    layout = TokenLayout((5, 6, 8), text=text)
    method = DraftProcessor(pool=(3, 4), variant=variant, sink=options[0], same_frame=options[1])
    every = sorted({density(replace(method, density=(c + 0.25) / 800), layout) for c in range(1, 800, 2)})
    assert len(every) > 5
    for wanted in np.linspace(every[0], every[-1], 13):
        found = method.at_density(float(wanted), layout)
        assert found == replace(method, density=found.density)
        assert abs(density(found, layout) - wanted) <= min(abs(d - wanted) for d in every) + 1e-6


@pytest.mark.parametrize("grid", [(5, 7, 9), (1, 13, 17), (3, 4, 4)])
@pytest.mark.parametrize("text", [0, 11])
def test_at_density_on_ragged_grids_is_met_on_average(grid, text):
    """For content that does not know of ragged regions: one key per region."""
    layout, method = TokenLayout(grid, text=text), DraftProcessor(pool=(3, 2))
    q, k = torch.zeros(64, 4, layout.sequence, 6), torch.zeros(64, 4, layout.sequence, 6)
    for i, region in enumerate(regions(layout, method.pool)):
        q[:, :, region], k[:, :, region] = randn(2, 64, 4, 1, 6, seed=i)
    filled = method.order(Call.standalone(layout)).filled(method.block)
    for wanted in (0.4, 0.7):
        found = method.at_density(wanted, layout)
        reached = found.select(q, k, Call.standalone(layout, heads=4)).density(filled, filled)
        assert abs(reached - wanted) < 0.5 / filled.shape[-1] + 0.01


def test_at_density_names_its_floor():
    layout = TokenLayout((4, 16, 32))
    with pytest.raises(ValueError, match=r"floor 0\.0625.*got 0\.01: use a smaller pool"):
        DraftProcessor().at_density(0.01, layout)
    with pytest.raises(ValueError, match=r"floor 0\.2500"):
        DraftProcessor(sink=True).at_density(0.2, layout)
    with pytest.raises(ValueError, match=r"ceiling 1\.0000, got 1\.5"):
        DraftProcessor().at_density(1.5, layout)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variant": "head"}, "'row', 'official' or 'paper', got 'head'"),
        ({"density": 0.0}, r"\(0, 1\], got 0\.0"),
        ({"density": 1.5}, r"\(0, 1\], got 1\.5"),
        ({"pool": (8, 0)}, r"two positive sizes \(height, width\), got \(8, 0\)"),
        ({"pool": (1, 8, 16)}, "two positive sizes"),
        ({"pool": 8}, "two positive sizes"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        DraftProcessor(**wrong)
