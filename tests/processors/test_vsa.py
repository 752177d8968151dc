"""VSA: the authors' tiles, a token-level definition with gradients, the gate in a model."""

import hashlib
import json
import warnings
from dataclasses import replace
from fractions import Fraction
from math import ceil, prod
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch

import dit_sparse
from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.method import Call
from dit_sparse.processors.vsa import VSAProcessor

VECTORS = Path(__file__).parents[1] / "vectors" / "vsa"
CASES = json.loads((VECTORS / "vsa.json").read_text())["cases"]
ARRAYS = np.load(VECTORS / "vsa.npz")

TILE = (2, 2, 3)
LAYOUTS = [
    TokenLayout((3, 5, 7)),
    TokenLayout((1, 9, 11), text=5, text_first=True),
    TokenLayout((4, 4, 6), text=9, prefix=3, suffix=4),
]


def qkv(layout, heads=4, kv_heads=2, batch=2, dim=6):
    sizes = (heads, kv_heads, kv_heads)
    return [tiny.randn(batch, h, layout.sequence, dim, seed=i) for i, h in enumerate(sizes)]


def some_valid(layout):
    valid = tiny.randn(2, layout.sequence, seed=9) > -0.5
    valid[1, layout.grid_start : layout.grid_start + layout.tokens // 2] = False  # tiles without a key
    return valid


def attend(method, q, k, v, call):
    call = call.at(order=method.order(call))
    return call.order.undo(method.attend(*map(call.order.apply, (q, k, v)), call))


def tile_of(layout, tile):
    """int64 [S]: the tile of each token in the model's sequence, -1 outside the grid."""
    counts = [ceil(n / t) for n, t in zip(layout.grid, tile, strict=True)]
    where = np.stack(np.unravel_index(np.arange(layout.tokens), layout.grid)) // np.array(tile)[:, None]
    tiles = torch.full((layout.sequence,), -1)
    start = layout.grid_start
    tiles[start : start + layout.tokens] = torch.from_numpy(np.ravel_multi_index(tuple(where), counts))
    return tiles


def definition(method, q, k, v, call, gate=None):
    """The method in model order on dense matrices, one batch item and head after the other; differentiable.

    Returns the output [B, H, S, D] and which token reads which, bool [B, H, S, S].
    """
    tiles = tile_of(call.layout, method.tile)
    valid = torch.ones(len(q), call.layout.sequence, dtype=torch.bool) if call.valid is None else call.valid
    outs, reads = torch.zeros_like(q), torch.zeros(*q.shape[:3], q.shape[2], dtype=torch.bool)
    for b, h in np.ndindex(*q.shape[:2]):
        mine = q[b, h], *(x[b, h * k.shape[1] // q.shape[1]] for x in (k, v))
        inside = (tiles == torch.arange(int(tiles.max()) + 1)[:, None]) & valid[b]
        means = [inside.to(x.dtype) @ x / inside.sum(1, keepdim=True).clamp(min=1) for x in mine]
        scores = means[0] @ means[1].T / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~inside.any(1), -torch.inf)
        share = Fraction(method.keep).limit_denominator(1000)
        best = scores.argsort(dim=1, descending=True, stable=True)[
            :, : max(1, ceil(share * int(inside.any(1).sum())))
        ]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        grid = tiles >= 0
        reads[b, h] = (chosen[tiles][:, tiles] | ~grid | ~grid[:, None]) & valid[b]
        fine = (mine[0] @ mine[1].T / q.shape[-1] ** 0.5).masked_fill(~reads[b, h], -torch.inf)
        out = fine.softmax(-1) @ mine[2]
        if gate is not None:
            out = out + (scores.softmax(-1) @ means[2])[tiles] * grid[:, None] * gate[b, h]
        outs[b, h] = out
    return outs, reads


@pytest.mark.parametrize("case", sorted(CASES))
def test_matches_the_authors_tiles(case):
    info = CASES[case]
    method = VSAProcessor(tile=tuple(info["tile"]))
    order = method.order(Call.standalone(TokenLayout(tuple(info["THW"]))))
    index = order.index[0].numpy()
    perm, sizes = index[index >= 0], order.filled(method.block)[0, 0].numpy()
    assert hashlib.sha256(perm.astype("<i8").tobytes()).hexdigest() == info["perm_sha256"]
    assert len(sizes) == info["n_blocks"]
    assert [sizes.min(), sizes.max()] == info["sizes_minmax"]
    if f"{case}_perm" in ARRAYS:
        np.testing.assert_array_equal(perm, ARRAYS[f"{case}_perm"])
        np.testing.assert_array_equal(np.argsort(perm), ARRAYS[f"{case}_rev"])
        np.testing.assert_array_equal(sizes, ARRAYS[f"{case}_sizes"])
        np.testing.assert_array_equal(np.flatnonzero(index >= 0), ARRAYS[f"{case}_nonpad"])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("keep", [0.1, 0.4])
def test_output_and_gradients_equal_the_definition(layout, keep, masked, gated):
    method = VSAProcessor(keep=keep, tile=TILE, gate=gated)
    inputs = [x.double().requires_grad_() for x in qkv(layout)]
    hidden = tiny.randn(2, layout.sequence, 10, seed=4).double()
    part, parameters, gate = method.module(Layer(0, "", 1, 4, 6, 10)), [], None
    if gated:
        part = part.double()
        with torch.no_grad():
            part.weight += tiny.randn(24, 10, seed=5)
            part.bias += tiny.randn(24, seed=6)
        parameters = list(part.parameters())
        gate = (hidden @ part.weight.T + part.bias).view(2, -1, 4, 6).transpose(1, 2)
    call = Call.standalone(layout, heads=4, kv_heads=2, valid=some_valid(layout) if masked else None)
    call = call.at(part=part, hidden=hidden)
    got = attend(method, *inputs, call)
    wanted, reads = definition(method, *inputs, call, gate)
    grad = tiny.randn(*got.shape, seed=5).double()
    grads = [torch.autograd.grad(out, inputs + parameters, grad, retain_graph=True) for out in (got, wanted)]
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    order = method.order(call)
    plan = method.select(inputs[0].detach(), inputs[1].detach(), call)
    every = order.filled(method.block), order.filled(method.block, call.valid)
    assert torch.equal(plan.pairs(*every).expand(2, 4), reads.sum((2, 3)))
    assert keep > 0.1 or reads.double().mean() < 0.7


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_gradient_goes_through_the_selection(layout):
    """With one tile read per row, the coarse branch is all that lets queries know other tiles' keys."""
    method = VSAProcessor(keep=0.01, tile=TILE)
    q, k, v = (x.requires_grad_() for x in qkv(layout))
    call = Call.standalone(layout, heads=4, kv_heads=2).at(order=method.order(Call.standalone(layout)))
    coarse = method.coarse(*map(call.order.apply, (q, k, v)), call)
    grads = torch.autograd.grad(call.order.undo(coarse).square().sum(), (q, k, v))
    grid = tile_of(layout, TILE) >= 0
    for grad in grads:
        assert grad[:, :, grid].abs().amin(-1).min() > 0
        assert not grad[:, :, ~grid].any()


@pytest.mark.parametrize(
    ("keep", "tiles", "wanted"), [(0.1, 30, 3), (0.1, 31, 4), (0.2, 455, 91), (0.01, 30, 1)]
)
def test_the_share_is_rounded_up(keep, tiles, wanted):
    q, k, _ = qkv(layout := TokenLayout((1, 1, 2 * tiles)))
    plan = VSAProcessor(keep=keep, tile=(1, 1, 2)).select(q, k, Call.standalone(layout, heads=4, kv_heads=2))
    assert (plan.counts == wanted).all()


def test_everything_kept_is_dense_attention():
    for layout in LAYOUTS:
        q, k, v = qkv(layout)
        out = attend(VSAProcessor(keep=1.0, tile=TILE), q, k, v, Call.standalone(layout, heads=4, kv_heads=2))
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        torch.testing.assert_close(out, dense)


def test_a_batch_item_without_any_key_gives_zeros():
    layout = LAYOUTS[0]
    method, (q, k, v) = VSAProcessor(tile=TILE), qkv(layout)
    valid = torch.zeros(2, layout.sequence, dtype=torch.bool)
    valid[0] = True
    call = Call.standalone(layout, heads=4, kv_heads=2, valid=valid)
    call = call.at(order=method.order(call))
    ordered = [call.order.apply(x) for x in (q, k, v)]
    for out in (method.attend(*ordered, call), method.coarse(*ordered, call)):
        assert out[0].any()
        assert not out[1].any()


@pytest.mark.parametrize(
    "layout",
    [TokenLayout((8, 8, 12)), TokenLayout((8, 8, 12), text=50), TokenLayout((7, 9, 11), text=3)],
    ids=str,
)
def test_at_density_is_the_nearest(layout):
    method = VSAProcessor(tile=(2, 4, 2))
    # Equal tokens in a tile: means of small tiles would stick out otherwise, and be read more often.
    q, k, _ = (x[:, :, tile_of(layout, method.tile)] for x in qkv(layout, batch=1))
    call = Call.standalone(layout, heads=4, kv_heads=2)
    filled = method.order(call).filled(method.block)
    tiles = prod(ceil(n / t) for n, t in zip(layout.grid, method.tile, strict=True))
    every = [
        replace(method, keep=n / tiles).select(q, k, call).density(filled, filled)
        for n in range(1, tiles + 1)
    ]
    # Where tiles stick out of the grid, how full those are that are read is up to the data.
    slack = 1e-6 if layout.tokens == tiles * method.block else 0.03
    for wanted in np.linspace(every[0] + slack, 1, 13):
        found = method.at_density(float(wanted), layout).select(q, k, call).density(filled, filled)
        assert abs(found - wanted) <= min(abs(d - wanted) for d in every) + slack
    with pytest.raises(ValueError, match=r"floor 0\.\d+ and the ceiling 1, got 0\.001"):
        method.at_density(0.001, layout)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 0.0}, r"keep must lie in \(0, 1\], got 0.0"),
        ({"keep": 1.5}, r"keep must lie in \(0, 1\], got 1.5"),
        ({"tile": (4, 4)}, r"three positive sizes \(frames, height, width\), got \(4, 4\)"),
        ({"tile": (4, 0, 4)}, r"three positive sizes .* got \(4, 0, 4\)"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        VSAProcessor(**wrong)


def gated_model():
    """A tiny Wan with random gates: (model, session, its gates)."""
    model = tiny.wan()
    session = dit_sparse.apply(model, VSAProcessor(keep=0.3, tile=(2, 2, 2), gate=True), schedule="always")
    gates = [block.attn1.sparse_branch for block in model.blocks]
    with torch.no_grad():
        for i, p in enumerate(p for gate in gates for p in gate.parameters()):
            p += tiny.randn(*p.shape, seed=i)
    return model, session, gates


@pytest.mark.filterwarnings("ignore:.*outside a pipeline run", "ignore:.*untrained parameters")
def test_the_gate_reads_the_layers_hidden_states(monkeypatch):
    model, session, gates = gated_model()
    hidden, calls = [], []
    stock = VSAProcessor.attend

    def spy(self, q, k, v, call):
        calls.append((q, k, v, call, stock(self, q, k, v, call)))
        return calls[-1][-1]

    monkeypatch.setattr(VSAProcessor, "attend", spy)
    for block in model.blocks:
        block.attn1.to_q.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.no_grad():
        model(**tiny.wan_inputs(2))
    assert len(calls) == len(hidden) == 3
    for (q, k, v, call, out), x, gate in zip(calls, hidden, gates, strict=True):
        undo = call.order.undo
        by_hand = (x @ gate.weight.T + gate.bias).view(2, 120, 2, 12).transpose(1, 2)
        wanted, _ = definition(session.method, undo(q), undo(k), undo(v), call, by_hand)
        torch.testing.assert_close(undo(out), wanted, atol=1e-5, rtol=1e-5)
    assert all(at.hidden is None for part in session.parts for at in part.layers)  # not kept alive


@pytest.mark.filterwarnings("ignore:.*outside a pipeline run", "ignore:.*untrained parameters")
def test_compiled_equals_eager_with_gradients():
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, _, gates = gated_model()
        call = torch.compile(model, backend="aot_eager") if compiled else model
        with torch.no_grad():
            out = call(**tiny.wan_inputs())[0]
        call(**tiny.wan_inputs())[0].square().mean().backward()
        results.append([out, *(p.grad for gate in gates for p in gate.parameters())])
    assert all(x.abs().sum() > 0 for x in results[0])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*outside a pipeline run")
def test_only_a_gate_needs_training(tmp_path):
    model, inputs, state = tiny.wan(), tiny.wan_inputs(), torch.get_rng_state()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*untrained")
        session = dit_sparse.apply(model, "vsa", keep=0.3, tile=(2, 2, 2), schedule="always")
        fine = model(**inputs)[0]
    assert not session.sparse_modules()
    session = dit_sparse.apply(model, "vsa", keep=0.3, tile=(2, 2, 2), gate=True, schedule="always")
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad(), pytest.warns(UserWarning, match="VSAProcessor.*untrained parameters"):
        assert torch.equal(model(**inputs)[0], fine)  # a gate starts as zero
    model, session, _ = gated_model()
    with torch.no_grad():
        trained = model(**inputs)[0]
    assert (trained - fine).abs().max() > 1e-3
    session.save_pretrained(tmp_path)
    session = dit_sparse.apply(model, session.method, schedule="always")
    session.load_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], trained)
    with pytest.raises(ValueError, match=r"unexpected \['transformer/blocks\.0\.attn1\.bias', "):
        dit_sparse.apply(tiny.wan(), "vsa").load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weight has the shape \(24, 24\), expected \(12, 12\)"):
        dit_sparse.apply(tiny.wan(), "sla").load_pretrained(tmp_path)
