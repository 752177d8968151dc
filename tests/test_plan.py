"""Plan and the selections methods share, against definitions written out block by block, token by token."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dit_sparse.layout import TokenLayout
from dit_sparse.order import Order, fill_counts
from dit_sparse.plan import Plan, blocks_of, pool, top_k, top_mass, with_text

SEEDS = st.integers(0, 2**31)
SMALL = st.integers(1, 5)


@dataclass(frozen=True)
class Near:
    """A rule: positions at most ``reach`` apart."""

    reach: int

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).abs() <= self.reach


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coin(seed: int, *shape: int, share: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=random(seed)) < share


def tokens_of(keep: Tensor, block: tuple[int, int], q_len: int, k_len: int) -> Tensor:
    """bool [..., q_len, k_len]: a block mask token by token."""
    q, k = torch.arange(q_len) // block[0], torch.arange(k_len) // block[1]
    return keep[..., q, :][..., k]


@given(st.tuples(st.integers(1, 2), st.integers(1, 3), SMALL, st.integers(1, 19)), st.integers(2, 4), SEEDS)
def test_blocks_come_back(shape, axes, seed):
    keep = coin(seed, *shape[4 - axes :], share=torch.rand((), generator=random(seed)).item())
    plan = Plan.from_blocks(keep, (2, 3))
    full = keep[(None,) * (4 - axes)]
    assert torch.equal(plan.to_blocks(), full)
    assert plan.indices.dtype == plan.counts.dtype == torch.int32
    assert plan.keys == shape[3]
    assert plan.indices.shape[-1] == full.sum(-1).max()
    for row, listed, count in zip(
        full.flatten(0, 2), plan.indices.flatten(0, 2), plan.counts.flatten(), strict=True
    ):
        assert listed[:count].tolist() == row.nonzero().flatten().tolist()
        assert not listed[count:].any()


@given(st.tuples(st.integers(1, 2), st.integers(1, 3), SMALL, st.integers(1, 19)), SEEDS)
def test_packed_and_saved_plans_are_the_same(tmp_path_factory, shape, seed):
    plan = Plan.from_blocks(coin(seed, *shape), (4, 8))
    packed = plan.pack()
    assert packed.bits.shape == (*shape[:3], -(-shape[3] // 8))
    assert packed.unpack().same(plan)
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded.same(plan)
    assert loaded.block == (4, 8)
    assert [p.name for p in path.parent.iterdir()] == ["plan.safetensors"]


def test_bits_are_most_significant_first():
    keep = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 0, 1]]).bool()
    assert Plan.from_blocks(keep, 8).pack().bits[0, 0, 0].tolist() == [128, 64]


def test_a_rule_travels_with_bits_but_not_to_a_file(tmp_path):
    plan = Plan.from_blocks(torch.ones(2, 2).bool(), 4, Near(3))
    assert plan.pack().unpack().same(plan)
    with pytest.raises(ValueError, match=r"rule Near\(reach=3\) is code"):
        plan.save(tmp_path / "plan.safetensors")


def test_same():
    keep = coin(0, 3, 5)
    plan = Plan.from_blocks(keep, 4)
    assert plan.same(Plan.from_blocks(keep.expand(2, 3, 3, 5), 4))
    # The width of the lists is no content.
    wide = torch.nn.functional.pad(plan.indices, (0, plan.keys - plan.indices.shape[-1]))
    assert plan.same(Plan(wide, plan.counts, (4, 4), 5))
    flipped = keep.clone()
    flipped[1, 2] ^= True
    for other in (
        Plan.from_blocks(flipped, 4),
        Plan.from_blocks(keep, (4, 2)),
        Plan.from_blocks(keep[:2], 4),
        Plan.from_blocks(keep[:, :4], 4),
        Plan.from_blocks(keep, 4, Near(1)),
    ):
        assert not plan.same(other)


def test_plans_of_different_head_counts_are_not_the_same():
    a, b = (Plan.from_blocks(coin(0, heads, 3, 5), 4) for heads in (2, 3))
    assert not a.same(b)


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(1, 4)] * 3),
    st.integers(0, 5),
    st.sampled_from([(2, 2), (3, 2), (1, 4), (4, 3)]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
    st.sampled_from([None, "shared", "batch"]),
    SEEDS,
)
def test_pairs_and_density_count_tokens(grid, text, block, batch, heads, validity, seed):
    layout = TokenLayout(grid, text=text)
    order = Order.tiles(layout, (2, 2, 2), 8)
    rows = {None: 0, "shared": 1, "batch": 2}[validity]
    valid = coin(seed, rows, layout.sequence, share=0.7) if rows else None
    keep = coin(seed + 1, batch, heads, blocks_of(order.slots, block[0]), blocks_of(order.slots, block[1]))
    plan = Plan.from_blocks(keep, block)
    queries, keys = order.valid(), order.valid(valid)
    allowed = tokens_of(keep, block, order.slots, order.slots) & queries[..., None] & keys[..., None, :]
    every = (queries[..., None] & keys[..., None, :]).expand(allowed.shape)
    fq, fk = order.filled(block[0]), order.filled(block[1], valid)
    pairs = plan.pairs(fq, fk)
    assert pairs.dtype == torch.int64
    assert torch.equal(pairs.expand(allowed.shape[:2]), allowed.sum((-2, -1)))
    expected = allowed.sum() / every.sum().clamp(min=1)
    assert plan.density(fq, fk) == pytest.approx(expected.item(), abs=1e-6)
    if valid is None:
        near = Near(3)(order.index[0, :, None], order.index[0]) & allowed
        ruled = Plan.from_blocks(keep, block, Near(3)).pairs(fq, fk, order.index, keys)
        assert torch.equal(ruled.expand(near.shape[:2]), near.sum((-2, -1)))


def test_a_rule_counts_queries_that_are_no_keys():
    keep = torch.ones(3, 3).bool()
    order = Order.raster(TokenLayout((1, 3, 4)))
    valid = torch.arange(12) < 9
    fq, fk = order.filled(4), order.filled(4, valid)
    plain = Plan.from_blocks(keep, 4).pairs(fq, fk)
    always = Plan.from_blocks(keep, 4, Near(99)).pairs(fq, fk, order.index, order.valid(valid))
    assert plain.item() == 12 * 9
    assert always.item() == plain.item()


def test_a_rule_counts_around_holes():
    order = Order.tiles(TokenLayout((1, 3, 3)), (1, 2, 2))
    plan = Plan.from_blocks(torch.ones(4, 4).bool(), 4, Near(99))
    assert plan.pairs(order.filled(4), order.filled(4), order.index).item() == 81


def test_pairs_with_grouped_heads():
    layout = TokenLayout((3, 4, 5))
    order = Order.stack([Order.axes(layout, a) for a in ("fhw", "hwf")])
    keep = coin(0, 1, 4, 8, 8)
    pairs = Plan.from_blocks(keep, 8).pairs(order.filled(8), order.filled(8))
    filled = fill_counts(torch.ones(60, dtype=torch.bool), 8)
    assert pairs[0].tolist() == [int((keep[0, h] * filled[:, None] * filled).sum()) for h in range(4)]


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.nan_to_num(scores.softmax(-1)) @ v


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([(16, 16), (8, 4), (4, 8)]),
    st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_block_mask_is_the_masked_softmax(slots, block, shape, holes, ruled, seed):
    keep = coin(seed, *shape, blocks_of(slots, block[0]), blocks_of(slots, block[1]))
    keep[..., 0] = True
    valid = coin(seed + 1, 2, 1, slots, share=0.8) if holes else None
    if valid is not None:
        valid[..., 0] = True
    positions = torch.randperm(slots, generator=random(seed))[None] if ruled else None
    rule = Near(5) if ruled else None
    q, k, v = torch.randn(3, 2, 2, slots, 16, generator=random(seed))
    mask = Plan.from_blocks(keep, block, rule).to_block_mask(slots, slots, valid, positions)
    allowed = tokens_of(keep, block, slots, slots).expand(2, 2, slots, slots)
    if valid is not None:
        allowed = allowed & valid[..., None, :]
    if rule is not None:
        allowed = allowed & rule(positions[0, :, None], positions[0])
    out = flex_attention(q, k, v, block_mask=mask)
    seen = allowed.any(-1)
    expected = masked_softmax(q, k, v, allowed)
    torch.testing.assert_close(out[seen], expected[seen], rtol=1e-4, atol=1e-5)


def test_block_mask_lists_are_as_wide_as_the_keys():
    keep = torch.zeros(3, 5).bool()
    keep[0, 2] = True
    mask = Plan.from_blocks(keep, 16).to_block_mask(48, 80)
    assert mask.kv_indices.shape == (1, 1, 3, 5)
    assert mask.kv_num_blocks.tolist() == [[[1, 0, 0]]]
    assert mask.full_kv_num_blocks is None


def test_refuses():
    plan = Plan.from_blocks(coin(0, 3, 5), 4)
    with pytest.raises(ValueError, match="fk must count 5 blocks, got 4"):
        plan.pairs(torch.ones(1, 1, 3).long(), torch.ones(1, 1, 4).long())
    with pytest.raises(ValueError, match="keep must be bool"):
        Plan.from_blocks(torch.ones(3, 5), 4)
    with pytest.raises(ValueError, match="positive number of tokens, got"):
        Plan.from_blocks(coin(0, 3, 5), (4, 0))
    with pytest.raises(ValueError, match=r"indices \[B, H, Q, Kmax\]"):
        Plan(plan.indices[0], plan.counts, (4, 4), 5)
    with pytest.raises(ValueError, match="only 1"):
        Plan(plan.indices, plan.counts, (4, 4), 1)


def test_a_foreign_file_is_no_plan(tmp_path):
    from safetensors.torch import save_file

    save_file({"bits": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is not a saved plan"):
        Plan.load(tmp_path / "x.safetensors")


@given(st.integers(1, 13), st.integers(1, 5), st.sampled_from([None, (1, 1), (2, 1), (1, 3), (2, 3)]), SEEDS)
def test_pool_is_the_mean_of_valid_tokens(slots, block, shape, seed):
    x = torch.randn(2, 3, slots, 4, generator=random(seed))
    valid = None if shape is None else coin(seed, *shape, slots)
    pooled = pool(x, block, valid)
    allowed = torch.ones(2, 3, slots).bool() if valid is None else valid.expand(2, 3, slots)
    for b, h in ((0, 0), (1, 2)):
        for i in range(blocks_of(slots, block)):
            rows = slice(i * block, (i + 1) * block)
            inside = x[b, h, rows][allowed[b, h, rows]]
            expected = inside.mean(0) if len(inside) else torch.zeros(4)
            torch.testing.assert_close(pooled[b, h, i], expected)


def test_pool_sums_in_float32():
    x = torch.full((1, 1, 2048, 1), 1.0, dtype=torch.bfloat16)
    pooled = pool(x, 2048)
    assert pooled.dtype == torch.bfloat16
    assert pooled.item() == 1.0


@given(st.tuples(st.integers(1, 2), SMALL, st.integers(1, 8)), st.integers(-1, 9), st.booleans(), SEEDS)
def test_top_k(shape, k, restricted, seed):
    scores = torch.randint(0, 4, shape, generator=random(seed)).float()  # many ties
    eligible = coin(seed, *shape) if restricted else None
    per_row = torch.randint(0, 5, shape[:2], generator=random(seed))
    for wanted in (k, per_row):
        keep = top_k(scores, wanted, eligible)
        for i in range(shape[0]):
            for j in range(shape[1]):
                count = max(1, int(wanted if isinstance(wanted, int) else wanted[i, j]))
                choice = [c for c in range(shape[2]) if eligible is None or eligible[i, j, c]]
                best = sorted(choice, key=lambda c, row=scores[i, j]: (-row[c], c))[:count]
                assert keep[i, j].nonzero().flatten().tolist() == sorted(best)


def test_top_k_keeps_at_least_one_eligible_block():
    scores = torch.full((1, 3), float("-inf"))
    assert top_k(scores, 1, torch.tensor([[False, True, True]])).tolist() == [[False, True, False]]


@given(
    st.tuples(st.integers(1, 2), SMALL, st.integers(1, 8)),
    st.sampled_from([1, 4, 8, 13, 16]),
    st.booleans(),
    SEEDS,
)
def test_top_mass(shape, sixteenths, restricted, seed):
    # Small integers: sums are exact, ties are common.
    mass = torch.randint(0, 5, shape, generator=random(seed)).float()
    eligible = coin(seed, *shape) if restricted else None
    keep = top_mass(mass, sixteenths / 16, eligible)
    for i in range(shape[0]):
        for j in range(shape[1]):
            row = [int(m) for m in mass[i, j]]
            choice = [c for c in range(shape[2]) if eligible is None or eligible[i, j, c]]
            total, expected, held = sum(row[c] for c in choice), [], 0
            for c in sorted(choice, key=lambda c, row=row: (-row[c], c)):
                if expected and held * 16 >= total * sixteenths:
                    break
                expected.append(c)
                held += row[c]
            if total:
                assert keep[i, j].nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("empty", [0, 450])
def test_top_mass_of_everything_is_every_block_with_mass(empty):
    mass = torch.randn(200, 900, generator=random(0)).mul(2).softmax(-1)
    mass[:, 900 - empty :] = 0
    assert torch.equal(top_mass(mass, 1.0), mass > 0)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_top_mass_refuses(share):
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
        top_mass(torch.ones(1, 2), share)


@given(st.tuples(st.integers(1, 2), SMALL, SMALL), st.integers(0, 3), st.integers(0, 3), SEEDS)
def test_with_text_adds_dense_rows_and_columns(shape, rows, columns, seed):
    keep = coin(seed, *shape)
    whole = with_text(keep, shape[1] + rows, shape[2] + columns)
    assert whole.shape == (shape[0], shape[1] + rows, shape[2] + columns)
    assert torch.equal(whole[:, : shape[1], : shape[2]], keep)
    assert whole[:, shape[1] :].all()
    assert whole[:, :, shape[2] :].all()


def test_with_text_refuses_to_cut():
    with pytest.raises(ValueError, match=r"\(3, 5\) blocks does not fit into \(2, 5\)"):
        with_text(coin(0, 3, 5), 2, 5)
