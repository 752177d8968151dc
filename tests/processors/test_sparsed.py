"""SparseD: the authors' masks bit for bit, both rules from token-level softmaxes, a plan for a whole run."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dit_sparse
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call
from dit_sparse.plan import blocks_of
from dit_sparse.processors.dense import DenseProcessor
from dit_sparse.processors.sparsed import SparseDProcessor
from dit_sparse.schedule import Phase, Schedule

VECTORS = Path(__file__).parents[1] / "vectors" / "sparsed"
LAYOUT = TokenLayout((3, 5, 7), text=20, text_first=True, prefix=4)


def qk(layout: TokenLayout, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, seed: int = 0):
    shapes = [(batch, n, layout.sequence, 12) for n in (heads, kv_heads)]
    return [1.5 * tiny.randn(*shape, seed=2 * seed + i) for i, shape in enumerate(shapes)]


def attend(method, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Model order in and out."""
    order = method.order(call)
    return order.undo(method.attend(*(order.apply(x) for x in (q, k, v)), call.at(order=order)))


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*_L*.json")), ids=lambda path: path.stem)
def test_vectors(path):
    case, stored = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    given_ = case["inputs"]
    q, k = (torch.tensor(stored[name], dtype=torch.float32).transpose(0, 1)[None] for name in "qk")
    method = SparseDProcessor(
        density=given_["select"],
        block=given_["block_size"],
        variant="code",
        logit_scale={"1/sqrt(head_dim)": "head_dim", "1/sqrt(q_heads)": "heads"}[given_["logit_scale"]],
        generated=given_["generated_tokens"],
    )
    layout = TokenLayout((1, 1, given_["total_tokens"]))
    call = Call.standalone(layout, heads=given_["q_heads"], kv_heads=given_["kv_heads"])
    keep = method.select(q, k, call).to_blocks()[0].numpy()
    packed = np.packbits(keep.reshape(-1))
    np.testing.assert_array_equal(packed, stored["mask_packed"])
    np.testing.assert_array_equal(keep.sum(-1), stored["row_counts"])
    assert hashlib.sha256(packed.tobytes()).hexdigest() == case["mask"]["sha256_packed"]
    given_blocks = keep[..., : case["first_generation_block"]].sum(-1)
    assert [given_blocks.min(), given_blocks.max()] == case["prefill_row_counts_min_max"]
    assert method.schedule(given_["steps"], given_["skip"]) == f"dense 0-{case['first_sparse_step'] - 2}"


@pytest.mark.parametrize("case", json.loads((VECTORS / "schedule.json").read_text()), ids=str)
def test_vectors_of_the_schedule(case):
    steps, skip = case["steps"], case["skip"]
    for variant, expected in (
        ("code", case["dense_steps"]),
        ("paper", case["paper_dense_steps_inclusive"]),
    ):
        schedule = Schedule.parse(SparseDProcessor(variant=variant).schedule(steps, skip))
        phases = [schedule.phase(step, steps, 0, 1) for step in range(steps)]
        assert phases.count(Phase.DENSE) + 1 == expected  # and the first sparse one, which makes the plan
        assert phases == sorted(phases, key=lambda phase: phase is not Phase.DENSE)
        if variant == "code":
            assert phases.count(Phase.DENSE) == case["pattern_step"]
            assert phases.count(Phase.SPARSE) - 1 == case["sparse_steps"]


def test_every_vector_is_there():
    assert len(list(VECTORS.glob("*.json"))) == 5


def test_no_skip_is_no_dense_head():
    assert SparseDProcessor().schedule(20, skip=0.0) == "always"


def slow_blocks(method: SparseDProcessor, q: Tensor, k: Tensor, call: Call) -> tuple[np.ndarray, float]:
    """The rule from token-level softmaxes, row by row, and how near it came to another choice."""
    order, block = method.order(call), method.block
    q, k = (order.apply(x).double() for x in (q, k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = q.shape[1] ** -0.5 if method.logit_scale == "heads" else q.shape[-1] ** -0.5
    there = order.valid(call.valid).expand(q.shape[0], 1, -1)[:, 0]
    blocks = blocks_of(order.slots, block)
    index = np.arange(blocks)
    if method.generated is None:
        generated = index < blocks_of(call.layout.tokens, block)
    else:
        left = call.layout.tokens - index * block
        generated = (left <= method.generated) | (index == blocks - 1)
    keep = np.zeros((*q.shape[:2], blocks, blocks), dtype=bool)
    gap = math.inf

    def best(mass: np.ndarray, count: int, among: np.ndarray) -> list[int]:
        nonlocal gap
        ranked = sorted(index[among], key=lambda j: (-mass[j], j))
        count = min(max(1, count), len(ranked))
        if 0 < count < len(ranked) and mass[ranked[0]] > 0:
            gap = min(gap, (mass[ranked[count - 1]] - mass[ranked[count]]) / mass[ranked[0]])
        return ranked[:count]

    def share(count: int) -> int:
        kept = method.density * count
        return round(kept) if method.variant == "paper" else int(kept) + 1

    for b, h in np.ndindex(*q.shape[:2]):
        valid = there[b]
        filled = torch.nn.functional.pad(valid, (0, -len(valid) % block)).view(-1, block).any(1).numpy()
        scores = q[b, h] @ k[b, h].T * scale

        def masses(keys: Tensor, scores: Tensor = scores, valid: Tensor = valid) -> np.ndarray:
            """Mass of each block in the softmax over ``keys``."""
            p = scores.masked_fill(~keys, -math.inf).softmax(-1).nan_to_num(0) * valid[:, None]
            pad = -p.shape[0] % block
            p = torch.nn.functional.pad(p, (0, pad, 0, pad))
            return p.view(blocks, block, blocks, block).sum((1, 3)).numpy()

        everything = masses(valid)
        alone = masses(valid & torch.tensor(generated).repeat_interleave(block)[: len(valid)])
        for i in range(blocks):
            ours, rest = filled & generated, filled & ~generated
            if method.variant == "paper":
                chosen = [best(everything[i], share(int(side.sum())), side) for side in (ours, rest)]
            else:
                first = best(everything[i], share(int(filled.sum())), filled)
                second = best(alone[i], share(int(ours.sum())), ours)
                chosen = [[j for j in first if rest[j]], second]
            keep[b, h, i, [j for side in chosen for j in side]] = True
    return keep, gap


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["paper", "code"]),
    st.sampled_from(["head_dim", "heads"]),
    st.sampled_from([0.1, 0.3, 0.5, 1.0]),
    st.sampled_from([4, 8, 16]),
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    st.sampled_from([0, 7, 16]),
    st.booleans(),
    st.integers(0, 5),
)
def test_equals_the_rule_token_by_token(variant, logit_scale, density, block, grid, text, is_masked, seed):
    layout = TokenLayout(grid, text=text, text_first=bool(seed % 2), suffix=seed)
    method = SparseDProcessor(variant=variant, logit_scale=logit_scale, density=density, block=block)
    valid = torch.ones(2, layout.sequence, dtype=torch.bool)
    if is_masked:
        valid[0, layout.text_start + 2 : layout.text_start + text] = False
        valid[1, : layout.sequence // 3] = False
    call = Call.standalone(layout, heads=4, kv_heads=2, valid=valid if is_masked else None)
    q, k = qk(layout, seed=seed)
    expected, gap = slow_blocks(method, q, k, call)
    found = method.select(q, k, call).to_blocks().expand(expected.shape)
    if gap > 1e-5:  # else float32 may choose the other of two equals
        np.testing.assert_array_equal(found.numpy(), expected)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["paper", "code"]), st.integers(1, 100), st.integers(1, 100), st.sampled_from([0.3, 1.0])
)
def test_equals_the_rule_in_a_sequence_with_a_prompt(variant, tokens, generated, density):
    generated = min(generated, tokens)
    method = SparseDProcessor(variant=variant, density=density, block=8, generated=generated)
    call = Call.standalone(TokenLayout((1, 1, tokens)), heads=4, kv_heads=2)
    q, k = qk(call.layout, seed=tokens)
    expected, gap = slow_blocks(method, q, k, call)
    if gap > 1e-5:
        np.testing.assert_array_equal(method.select(q, k, call).to_blocks().numpy(), expected)


def test_neither_side_crowds_out_the_other():
    """Where one side draws all attention the other still keeps its share; in the release it may not."""
    layout = TokenLayout((4, 4, 8), text=64)
    for loud in (slice(0, 128), slice(128, 192)):
        q, k = torch.ones(1, 1, 192, 8), tiny.randn(1, 1, 192, 8)
        k[:, :, loud] += 3
        call = Call.standalone(layout)
        kept = SparseDProcessor(density=0.25, block=8).select(q, k, call).to_blocks()
        assert (kept[..., :16].sum(-1) == 4).all()
        assert (kept[..., 16:].sum(-1) == 2).all()
        released = SparseDProcessor(density=0.25, block=8, variant="code")
        released = released.select(q, k, call.at(cache={})).to_blocks()
        assert (released[..., :16].sum(-1) == 5).all()
        assert (released[..., 16:].sum(-1) == (0 if loud.start == 0 else 7)).all()


def test_the_first_sparse_step_is_dense_and_makes_the_plan_of_the_run():
    call = Call.standalone(LAYOUT, heads=4, kv_heads=2, steps=20)
    method = SparseDProcessor(block=8)
    plans = []
    for step, phase in enumerate([Phase.SPARSE] * 3 + [Phase.REFRESH] + [Phase.SPARSE] * 2, start=4):
        (q, k), here = qk(LAYOUT, seed=step), call.at(step=step, phase=phase)
        v = tiny.randn(*k.shape, seed=99)
        out = attend(method, q, k, v, here)
        dense = attend(DenseProcessor(block=8), q, k, v, call)
        if step in (4, 7):
            torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)
            assert here.made_at("sparsed") == step
        else:
            assert (out - dense).abs().max() > 0.01
        plans.append(method.select(q, k, here.at(phase=Phase.SPARSE)))
        assert plans[-1].same(method.select(q, k, call.at(cache={}))) == (step in (4, 7))
    assert plans[0].same(plans[1])
    assert plans[0].same(plans[2])
    assert plans[3].same(plans[5])
    assert not plans[0].same(plans[3])


def test_the_plan_is_that_of_the_dense_calls_statistics():
    """Measured by attend, by select without statistics and by select with given ones: the same."""
    order_free = Call.standalone(LAYOUT, heads=4, kv_heads=2)
    (q, k), method = qk(LAYOUT), SparseDProcessor(block=8)
    k_all = k.repeat_interleave(2, 1)
    lse = (q @ k_all.mT / math.sqrt(12)).logsumexp(-1)
    plans = [
        method.select(q, k, order_free.at(cache={})),
        method.select(q, k, order_free.at(cache={}, lse=lse)),
    ]
    attend(method, q, k, k, ran := order_free.at(cache={}))
    plans.append(method.select(q, k, ran))
    assert all(plan.same(plans[0]) for plan in plans)


def test_every_head_and_batch_item_chooses_for_itself():
    call = Call.standalone(LAYOUT, heads=4, kv_heads=2)
    (q, k), method = qk(LAYOUT), SparseDProcessor(block=8)
    both = method.select(q, k, call.at(cache={})).to_blocks()
    assert both.shape[:2] == (2, 4)
    assert len({keep.numpy().tobytes() for keep in both.flatten(0, 1)}) == 8
    for item in range(2):
        alone = method.select(q[item : item + 1], k[item : item + 1], call.at(cache={})).to_blocks()
        assert torch.equal(alone[0], both[item])


@torch.no_grad()
def test_each_run_and_branch_of_a_pipeline_has_its_own_plan():
    pipe, method = tiny.wan_pipeline(), SparseDProcessor(density=0.4, block=8)
    with dit_sparse.apply(pipe, method, schedule=f"{method.schedule(10)}; layers 0") as session:
        latents, plans, memory = [], [], {}

        def look(_, step, __, values):
            if step == 8:  # the last step frees what was remembered
                kept = ((key, m.cache) for key, by in session._memory.items() for m in by.values())
                memory.update({key: dict(cache) for key, cache in kept if cache})
            return values

        for prompt in ("a cat runs", "a dog sits", "a cat runs"):
            latents.append(tiny.run_wan(pipe, steps=10, prompt=prompt, callback_on_step_end=look))
            assert all(cache["sparsed"][1] == 2 for cache in memory.values())
            plans.append({(s[0].layer.index, b): c["sparsed"][0].unpack() for (s, b), c in memory.items()})
            for row in session.report().rows:
                if row.where.layer:
                    step = row.where.step
                    expected = (Phase.DENSE, Phase.REFRESH, Phase.SPARSE)[(step > 1) + (step > 2)]
                    assert row.where.phase is expected
                    assert row.density < 0.6 or step < 3
    assert plans[0].keys() == {(layer, branch) for layer in (1, 2) for branch in ("cond", "uncond")}
    assert torch.equal(latents[0], latents[2])
    assert not torch.equal(latents[0], latents[1])
    assert all(plan.same(plans[2][key]) for key, plan in plans[0].items())
    assert not all(plan.same(plans[1][key]) for key, plan in plans[0].items())
    assert not plans[0][1, "cond"].same(plans[0][1, "uncond"])


@pytest.mark.parametrize("layout", [
    TokenLayout((4, 8, 8)), TokenLayout((4, 8, 8), text=32), TokenLayout((3, 7, 9), text=20, prefix=5),
    TokenLayout((1, 11, 13)), TokenLayout((1, 12, 12), text=50, text_first=True),
])  # fmt: skip
@pytest.mark.parametrize("wanted", [0.2, 0.35, 0.5, 0.8, 1.0])
def test_at_density(layout, wanted):
    method = SparseDProcessor(block=8).at_density(wanted, layout)
    assert method == SparseDProcessor(block=8, density=method.density)
    call = Call.standalone(layout, heads=4, kv_heads=2)
    filled = method.order(call).filled(8)
    got = method.select(*qk(layout), call).density(filled, filled)
    # One block of either side, at most: rows keep whole blocks, and of which size is not known before.
    assert abs(got - wanted) < 8 / layout.sequence * 1.01
    if layout.extra == 0:
        code = SparseDProcessor(block=8, variant="code").at_density(wanted, layout)
        assert abs(code.select(*qk(layout), call.at(cache={})).density(filled, filled) - wanted) < (
            8 / layout.sequence * 1.01
        )


def test_at_density_names_its_floor_and_what_it_cannot_know():
    layout = TokenLayout((4, 8, 8), text=32)
    with pytest.raises(ValueError, match=r"floor 0\.0556 .*smaller block"):  # 16 of 288 tokens
        SparseDProcessor(block=8).at_density(0.05, layout)
    assert SparseDProcessor(block=8).at_density(0.0556, layout).density < 0.05
    with pytest.raises(ValueError, match="depends on the data; use 'paper'"):
        SparseDProcessor(block=8, variant="code").at_density(0.3, layout)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\] and block be >= 1, got .*density=0.0"),
        ({"density": 1.1}, r"density must lie in \(0, 1\]"),
        ({"block": 0}, "block be >= 1, got .*block=0"),
        ({"variant": "v1"}, "variant must be 'paper' or 'code', got 'v1'"),
        ({"logit_scale": "dim"}, "logit_scale must be 'head_dim' or 'heads', got 'dim'"),
        ({"generated": 0}, "generated must be a positive number of tokens, got 0"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        SparseDProcessor(**wrong)


@pytest.mark.parametrize("layout", [TokenLayout((1, 1, 9)), TokenLayout((1, 1, 20), text=5)])
def test_refuses_a_prompt_that_is_not_there(layout):
    with pytest.raises(ValueError, match="generated must be some of a grid without text, got 10 of"):
        replace(SparseDProcessor(block=8), generated=10).select(
            *qk(layout), Call.standalone(layout, heads=4, kv_heads=2)
        )
