"""SLA: the authors' maps and numbers, a token-level definition with gradients, its parameters in a model."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch import nn

import dit_sparse
from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.method import Call
from dit_sparse.plan import pair_of
from dit_sparse.processors.sla import SLAProcessor

VECTORS = Path(__file__).parents[1] / "vectors" / "sla"
CASES = json.loads((VECTORS / "sla.json").read_text())["cases"]
ARRAYS = np.load(VECTORS / "sla.npz")

LAYOUTS = [
    TokenLayout((3, 5, 7)),
    TokenLayout((1, 9, 11), text=5, text_first=True),
    TokenLayout((2, 5, 6), text=9, prefix=3, suffix=4),
]


class Kept(nn.Module):
    """A projection to 0 that keeps what it was given: the linear branch on its own."""

    def forward(self, x):
        self.given = x
        return 0 * x


def vector(case, *names):
    return (torch.from_numpy(ARRAYS[f"{case}_{name}"]) for name in names)


def qkv(layout, heads=4, kv_heads=2, batch=2, dim=6, seed=0):
    sizes = (heads, kv_heads, kv_heads)
    return [tiny.randn(batch, h, layout.sequence, dim, seed=seed + i) for i, h in enumerate(sizes)]


def some_valid(layout, batch=2):
    return tiny.randn(batch, layout.sequence, seed=9) > -0.5


def attend(method, q, k, v, call, part=None):
    order = method.order(call)
    call = call.at(order=order, part=part)
    return order.undo(method.attend(order.apply(q), order.apply(k), order.apply(v), call))


@torch.no_grad()
def classes(method, q, k, call):
    """Plain loops in float64: 1 critical, 0 marginal, -1 skipped or nothing there, int [B, H, Q, K]."""
    order = method.order(call)
    bq, bk = pair_of(method.block)
    text_from = order.slots - call.layout.extra
    here = order.valid(call.valid).expand(len(q), 1, -1)[:, 0]
    qs, ks = order.apply(q).double(), order.apply(k).double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    rows, columns = -(-order.slots // bq), -(-order.slots // bk)
    out = torch.full((*q.shape[:2], rows, columns), -1)
    for b, h, i in np.ndindex(*q.shape[:2], rows):
        mine = slice(i * bq, min((i + 1) * bq, order.slots))
        mean = qs[b, h, mine][here[b, mine]].sum(0) / here[b, mine].sum().clamp(min=1)
        scores = {}
        for j in range(columns):
            keys = slice(j * bk, min((j + 1) * bk, order.slots))
            if not here[b, keys].any():
                continue
            if keys.start >= text_from or mine.start >= text_from:
                out[b, h, i, j] = 1
            else:
                scores[j] = float(mean @ ks[b, h, keys][here[b, keys]].mean(0))
        best = sorted(scores, key=scores.get, reverse=True)
        for rank, j in enumerate(best):
            critical = rank < max(1, int(method.ratio * len(best)))
            out[b, h, i, j] = 1 if critical else 0 if rank < int((1 - method.skip) * len(best)) else -1
    return out


def definition(method, q, k, v, call, part):
    """The whole method on dense matrices, differentiable."""
    order = method.order(call)
    bq, bk = pair_of(method.block)
    group = q.shape[1] // k.shape[1]
    q, k, v = order.apply(q), *(order.apply(x).repeat_interleave(group, 1) for x in (k, v))
    kind = classes(method, order.undo(q), order.undo(k), call)
    kind = kind.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, : order.slots, : order.slots]
    there = order.valid(call.valid)[:, :, None]
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~(there & (kind == 1)), -torch.inf)
    sparse = scores.softmax(-1).nan_to_num(0) @ v
    phi = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: nn.functional.elu(x) + 1, "relu": torch.relu}
    phi = phi[method.feature_map]
    weights = phi(q) @ phi(k).mT * there
    if method.linear == "rest":
        weights = weights * (kind == 0)
    total = weights.sum(-1, keepdim=True) + (1e-5 if method.linear == "all" else 0)
    linear = weights @ v / total.masked_fill(total == 0, 1)
    return order.undo(sparse + linear @ part.weight.mT + part.bias)


@pytest.mark.parametrize("case", sorted(n for n in CASES if n.startswith("map")))
def test_matches_the_authors_maps(case):
    info = CASES[case]
    q, k, wanted = vector(case, "q", "k", "map")
    method = SLAProcessor(ratio=info["topk_ratio"], block=(info["BLKQ"], info["BLKK"]))
    _, heads, tokens, _ = info["BHLD"]
    plan = method.select(q, k, Call.standalone(TokenLayout((1, 1, tokens)), heads=heads))
    assert torch.equal(plan.to_blocks(), wanted.bool())
    assert (plan.counts == info["topk"]).all()


@pytest.mark.parametrize("linear", ["all", "rest"])
def test_matches_the_authors_numbers(linear):
    info = CASES["attn_a"]
    q, k, v, do, dl, wanted = vector("attn_a", "q", "k", "v", "do", "dl", "map")
    method = SLAProcessor(ratio=info["topk_ratio"], block=info["block"], linear=linear)
    call = Call.standalone(TokenLayout((1, 1, 256)))
    assert torch.equal(method.select(q, k, call).to_blocks(), wanted.bool())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    kept = Kept()
    out = attend(method, *inputs, call, kept)
    close = {"atol": 2e-6, "rtol": 1e-4}
    o_s, dq_s, dk_s, dv_s = vector("attn_a", "o_s", "dq_s", "dk_s", "dv_s")
    torch.testing.assert_close(out, o_s, **close)
    grads = torch.autograd.grad(out, inputs, do, retain_graph=True)
    for grad, expected in zip(grads, (dq_s, dk_s, dv_s), strict=True):
        torch.testing.assert_close(grad, expected, **close)
    (o_l,) = vector("attn_a", {"all": "o_l_all", "rest": "o_l_unselected"}[linear])
    torch.testing.assert_close(kept.given, o_l, **close)
    if linear == "all":
        return
    grads = torch.autograd.grad(kept.given, inputs, dl)
    dphiq, dphik, dv_both = vector("attn_a", "dphiq_sla1", "dphik_sla1", "dv_both_sla1")
    for x, grad, of_features in ((q, grads[0], dphiq), (k, grads[1], dphik)):
        phi = x.detach().softmax(-1)
        pulled = phi * (of_features - (phi * of_features).sum(-1, keepdim=True))
        torch.testing.assert_close(grad, pulled, **close)
    torch.testing.assert_close(grads[2] + dv_s, dv_both, **close)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [8, (16, 8), (8, 16), (1, 8)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_plan_equals_plain_loops(layout, block, masked):
    q, k, _ = qkv(layout)
    call = Call.standalone(layout, heads=4, kv_heads=2, valid=some_valid(layout) if masked else None)
    for ratio in (0.01, 0.3, 0.75, 1.0):
        method = SLAProcessor(ratio=ratio, block=block)
        plan = method.select(q, k, call)
        assert torch.equal(plan.to_blocks(), classes(method, q, k, call) == 1)
        assert torch.equal(
            method.select(q + 0, k + 3, call).to_blocks(), plan.to_blocks()
        )  # no centring needed


@pytest.mark.parametrize(
    "method",
    [
        SLAProcessor(ratio=0.2, block=8),
        SLAProcessor(ratio=0.2, block=(16, 8), linear="rest"),
        SLAProcessor(ratio=0.2, block=8, linear="rest", skip=0.4, feature_map="elu"),
        SLAProcessor(ratio=0.5, block=8, linear="rest", skip=0.9, feature_map="relu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_output_and_gradients_equal_the_definition(layout, method, masked):
    part = method.module(Layer(0, "", 1, 4, 6, 24)).double()
    with torch.no_grad():
        part.weight += tiny.randn(6, 6, seed=7)
        part.bias += tiny.randn(6, seed=8)
    valid = some_valid(layout) if masked else None
    call = Call.standalone(layout, heads=4, kv_heads=2, valid=valid)
    inputs = [x.double().requires_grad_() for x in qkv(layout)]
    results = []
    for run in (attend, definition):
        out = run(method, *inputs, call, part)
        loss = (out * tiny.randn(*out.shape, seed=5)).sum()
        results.append((out, *torch.autograd.grad(loss, [*inputs, *part.parameters()])))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-7)


def test_at_init_it_is_block_sparse_attention():
    layout = TokenLayout((3, 5, 7))
    q, k, v = qkv(layout)
    call = Call.standalone(layout, heads=4, kv_heads=2)
    for linear in ("all", "rest"):
        method = SLAProcessor(ratio=0.3, block=8, linear=linear)
        part = method.module(Layer(0, "", 1, 4, 6, 24))
        assert torch.equal(attend(method, q, k, v, call, part), attend(method, q, k, v, call))


def test_the_rest_of_everything_is_nothing():
    layout = TokenLayout((3, 5, 7), text=4)
    q, k, v = qkv(layout)
    kept, call = Kept(), Call.standalone(layout, heads=4, kv_heads=2)
    attend(SLAProcessor(ratio=1.0, block=8, linear="rest"), q, k, v, call, kept)
    assert not kept.given.any()
    attend(SLAProcessor(ratio=1.0, block=8, linear="all"), q, k, v, call, kept)
    assert kept.given.any()


def test_a_batch_item_does_not_know_its_neighbours():
    layout = TokenLayout((3, 5, 7))
    q, k, v = qkv(layout)
    method, valid = SLAProcessor(ratio=0.4, block=8), some_valid(layout)
    valid[0] = True
    both = attend(method, q, k, v, Call.standalone(layout, heads=4, kv_heads=2, valid=valid), Kept())
    for b in range(2):
        call = Call.standalone(layout, heads=4, kv_heads=2, valid=valid[b])
        one = attend(method, q[b : b + 1], k[b : b + 1], v[b : b + 1], call, Kept())
        torch.testing.assert_close(one, both[b : b + 1])


def test_works_in_bfloat16_whatever_the_dtype_of_its_parameters():
    layout = TokenLayout((3, 5, 7))
    call = Call.standalone(layout, heads=4, kv_heads=2)
    method = SLAProcessor(ratio=0.3, block=8)
    part = method.module(Layer(0, "", 1, 4, 6, 24))
    nn.init.eye_(part.weight)
    q, k, v = (x.bfloat16() for x in qkv(layout))
    out = attend(method, q, k, v, call, part)
    assert out.dtype == torch.bfloat16
    exact = attend(method, q.double(), k.double(), v.double(), call, part)
    assert (out - exact).square().mean().sqrt() < 1e-2 * exact.square().mean().sqrt()


@pytest.mark.parametrize(
    "layout",
    [TokenLayout((9, 8, 10)), TokenLayout((9, 8, 10), text=50), TokenLayout((7, 9, 11), text=3)],
    ids=str,
)
@pytest.mark.parametrize("block", [8, (16, 8)])
def test_at_density_is_the_nearest(layout, block):
    method = SLAProcessor(block=block)
    q, k, _ = qkv(layout, batch=1)
    call = Call.standalone(layout, heads=4, kv_heads=2)
    order, (bq, bk) = method.order(call), pair_of(block)

    def density(method):
        return method.select(q, k, call).density(order.filled(bq), order.filled(bk))

    blocks = -(-layout.tokens // bk)
    every = [
        density(SLAProcessor(ratio=min(1, (n + 0.5) / blocks), block=block)) for n in range(1, blocks + 1)
    ]
    for wanted in np.linspace(every[0] + 1e-3, 1, 13):
        found = density(method.at_density(float(wanted), layout))
        # Which rows read the one ragged block is up to the data.
        assert abs(found - wanted) <= min(abs(d - wanted) for d in every) + 2e-3
    with pytest.raises(ValueError, match=r"floor 0\.\d+ and the ceiling 1, got 0\.001"):
        method.at_density(0.001, layout)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\], got 0.0"),
        ({"ratio": 1.1}, r"ratio must lie in \(0, 1\], got 1.1"),
        ({"block": 0}, "positive number of tokens, got 0"),
        ({"block": (96, 64)}, r"a multiple of the other, got \(96, 64\)"),
        ({"linear": "some"}, "'all' or 'rest', got 'some'"),
        ({"linear": "rest", "skip": 1.0}, r"\[0, 1\), .* got 1.0 with 'rest'"),
        ({"skip": 0.1}, "only with linear='rest', got 0.1 with 'all'"),
        ({"feature_map": "hedgehog"}, "'softmax', 'elu' or 'relu', got 'hedgehog'"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        SLAProcessor(**wrong)


@pytest.mark.filterwarnings("ignore:.*outside a pipeline run")
@pytest.mark.parametrize("linear", ["all", "rest"])
def test_its_parameters_are_trained_saved_and_loaded(tmp_path, linear):
    method = SLAProcessor(ratio=0.3, block=(16, 8), linear=linear)
    model, inputs = tiny.wan(), tiny.wan_inputs()
    state = torch.get_rng_state()
    session = dit_sparse.apply(model, method, schedule="always")
    assert torch.equal(torch.get_rng_state(), state)
    parts = session.sparse_modules()
    assert {n: sorted(p.state_dict()) for n, p in parts.items()} == {
        f"transformer/blocks.{i}.attn1": ["bias", "weight"] for i in range(3)
    }
    with torch.no_grad():
        start = model(**inputs)[0]
    optimizer = torch.optim.SGD([p for part in parts.values() for p in part.parameters()], lr=10.0)
    model(**inputs)[0].square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for part in parts.values() for p in part.parameters())
    optimizer.step()
    with torch.no_grad():
        trained = model(**inputs)[0]
    assert (trained - start).abs().max() > 1e-5
    session.save_pretrained(tmp_path)

    session = dit_sparse.apply(model, method, schedule="always")
    with pytest.warns(UserWarning, match="SLAProcessor.*untrained parameters"), torch.no_grad():
        assert torch.equal(model(**inputs)[0], start)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message=".*untrained")
        model(**inputs)
        session = dit_sparse.apply(model, method, schedule="always")
        session.load_pretrained(tmp_path)
        assert torch.equal(model(**inputs)[0], trained)
    other = dit_sparse.apply(tiny.wan(num_layers=4), method)
    with pytest.raises(ValueError, match=r"missing \['transformer/blocks\.3\.attn1\.bias', "):
        other.load_pretrained(tmp_path)
    assert not any(p.any() for part in other.sparse_modules().values() for p in part.parameters())


def test_files_that_do_not_fit_are_refused(tmp_path):
    dit_sparse.apply(tiny.wan(), "sla", ratio=0.3, block=8).save_pretrained(tmp_path)
    dit_sparse.apply(tiny.wan(), "sla", ratio=0.2, block=(16, 8)).load_pretrained(tmp_path)
    other = dit_sparse.apply(tiny.wan(attention_head_dim=16), "sla")
    with pytest.raises(ValueError, match=r"weight has the shape \(12, 12\), expected \(16, 16\)"):
        other.load_pretrained(tmp_path)
    for changed in ({"linear": "rest"}, {"feature_map": "elu"}):
        other = dit_sparse.apply(tiny.wan(), "sla", **changed)
        with pytest.raises(ValueError, match=r"was trained as .*, expected .*SLAProcessor"):
            other.load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing .*attn1\.key.*unexpected .*attn1\.bias"):
        dit_sparse.apply(tiny.wan(), "linvideo").load_pretrained(tmp_path)
