"""LinVideo: both branches against their definitions, mixing and its gradients, its parameters in a model."""

import warnings

import pytest
import tiny_models as tiny
import torch
from torch.nn import functional as F

import dit_sparse
from dit_sparse import Phase
from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.method import Call
from dit_sparse.processors.linvideo import HedgehogMixture, LinVideoProcessor

LAYOUTS = [TokenLayout((3, 5, 7)), TokenLayout((1, 9, 11), text=5, text_first=True, suffix=3)]
UNTRAINED = pytest.mark.filterwarnings("ignore:.*outside a pipeline run", "ignore:.*untrained parameters")


def qkv(layout, kv_heads=2):
    sizes = (4, kv_heads, kv_heads)
    return [tiny.randn(2, h, layout.sequence, 6, seed=i).double() for i, h in enumerate(sizes)]


def some_valid(layout):
    return tiny.randn(2, layout.sequence, seed=9) > -0.5


def attend(method, q, k, v, call):
    call = call.at(order=method.order(call))
    return call.order.undo(method.attend(*map(call.order.apply, (q, k, v)), call))


def random_part(r):
    part = HedgehogMixture(4, 6, r).double()
    with torch.no_grad():
        part.query += tiny.randn(4, 6, 6, seed=5)
        part.key += tiny.randn(4, 6, 6, seed=6)
    return part


def dense_linear(part, q, k, v, valid=None):
    """The matrix of weights phi(q) . phi(k), rows divided by their sums."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k = q @ part.query, k @ part.key
    q, k = (torch.cat((x.softmax(-1), (-x).softmax(-1)), -1) for x in (q, k))
    weights = q @ k.mT
    if valid is not None:
        weights = weights * valid[:, None, None]
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def dense_softmax(q, k, v, valid=None):
    mask = None if valid is None else valid[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("r", [0.0, 0.3, 0.95, 1.0])
def test_mixture_and_gradients_equal_the_definition(layout, masked, r):
    """Also where r is 0 or 1: while it is trained it must have the gradient that moves it away."""
    part, inputs = random_part(r), [x.requires_grad_() for x in qkv(layout)]
    valid = some_valid(layout) if masked else None
    call = Call.standalone(layout, heads=4, kv_heads=2, valid=valid).at(part=part)
    got = attend(LinVideoProcessor(), *inputs, call)
    wanted = part.r * dense_softmax(*inputs, valid) + (1 - part.r) * dense_linear(part, *inputs, valid)
    grad = tiny.randn(*got.shape, seed=7).double()
    leaves = [*inputs, *part.parameters()]
    grads = [torch.autograd.grad(out, leaves, grad, allow_unused=True) for out in (got, wanted)]
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    assert grads[0][-1].abs() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_linear_layers_are_linear_and_others_are_not(layout):
    method, inputs, part = LinVideoProcessor(linear_layers=(2, 5)), qkv(layout), random_part(None)
    call = Call.standalone(layout, heads=4, kv_heads=2, layers=6)
    for layer in range(6):
        here = call.at(layer=layer, part=part if layer in (2, 5) else None)
        wanted = dense_linear(part, *inputs) if layer in (2, 5) else dense_softmax(*inputs)
        torch.testing.assert_close(attend(method, *inputs, here), wanted)
        blocks = method.select(*inputs[:2], here).to_blocks()
        assert blocks.any() == blocks.all() == (layer not in (2, 5)) == method.is_dense(here)


@torch.no_grad()
@pytest.mark.parametrize("r", [0.0, 1.0])
def test_a_branch_without_share_is_skipped(r, monkeypatch):
    skipped = "run_linear" if r else "run_dense"
    monkeypatch.delattr(Call, skipped)
    layout = LAYOUTS[0]
    inputs, part = qkv(layout), random_part(r)
    call = Call.standalone(layout, heads=4, kv_heads=2).at(part=part)
    wanted = dense_softmax(*inputs) if r else dense_linear(part, *inputs)
    torch.testing.assert_close(attend(LinVideoProcessor(), *inputs, call), wanted)


@torch.no_grad()
def test_works_without_a_model_and_in_bfloat16():
    layout = LAYOUTS[0]
    q, k, v = qkv(layout)
    call = Call.standalone(layout, heads=4, kv_heads=2)
    exact = 0.95 * dense_softmax(q, k, v) + 0.05 * dense_linear(HedgehogMixture(4, 6, None).double(), q, k, v)
    out = attend(LinVideoProcessor(), q.bfloat16(), k.bfloat16(), v.bfloat16(), call)
    assert out.dtype == torch.bfloat16
    assert (out - exact).square().mean().sqrt() < 1e-2 * exact.square().mean().sqrt()
    torch.testing.assert_close(
        attend(LinVideoProcessor(), q.float(), k.float(), v.float(), call), exact.float()
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r": 1.1}, r"r must lie in \[0, 1\], got 1.1"),
        ({"linear_layers": (-1, 2)}, r"indices from 0, got \(-1, 2\)"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        LinVideoProcessor(**wrong)


def test_refuses_layers_the_model_does_not_have():
    model = tiny.wan()
    with pytest.raises(ValueError, match=r"linear_layers are \(1, 3\), the model has 3 layers"):
        dit_sparse.apply(model, "linvideo", linear_layers=(3, 1))
    assert dit_sparse.session(model) is None


def test_no_setting_follows_a_density():
    with pytest.raises(ValueError, match="LinVideoProcessor has no setting that follows a density"):
        LinVideoProcessor().at_density(0.5, LAYOUTS[0])


def test_module_has_what_its_layer_needs():
    def shapes(method, index):
        part = method.module(Layer(index, "", 6, 4, 8, 32))
        return part and {n: tuple(p.shape) for n, p in part.named_parameters()}

    weights = {"query": (4, 8, 8), "key": (4, 8, 8)}
    assert shapes(LinVideoProcessor(r=0.9), 2) == {**weights, "r": ()}
    assert shapes(LinVideoProcessor(linear_layers=(2, 5)), 2) == weights
    assert shapes(LinVideoProcessor(linear_layers=(2, 5)), 3) is None


@UNTRAINED
@torch.no_grad()
def test_softmax_layers_are_left_to_the_model_and_linear_ones_reported():
    model, inputs = tiny.wan(), tiny.wan_inputs(2)
    stock = model(**inputs)[0]
    for method in (LinVideoProcessor(r=1.0), LinVideoProcessor(linear_layers=())):
        session = dit_sparse.apply(model, method, schedule="always")
        assert torch.equal(model(**inputs)[0], stock)
        assert [row.where.reason for row in session.report().rows] == ["full plan"] * 3
    session = dit_sparse.apply(model, LinVideoProcessor(linear_layers=(1,)), schedule="always")
    assert (model(**inputs)[0] - stock).abs().max() > 1e-4
    rows = session.report().rows
    assert [(row.where.phase, row.density, row.calls) for row in rows] == [
        (Phase.DENSE, 1, 1),
        (Phase.SPARSE, 0, 1),
        (Phase.DENSE, 1, 1),
    ]
    assert session.report().density == pytest.approx(2 / 3)
    assert session.report().sparse_density == 0


@UNTRAINED
def test_checkpointing_may_leave_layers_to_the_model():
    """A backward recomputes a call that was left to the model: there is no memory of it."""
    grads = []
    for checkpointing in (False, True):
        model = tiny.wan().train()
        dit_sparse.apply(model, LinVideoProcessor(linear_layers=(1,)), schedule="always")
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**tiny.wan_inputs())[0].square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@UNTRAINED
def test_parameters_alone_may_be_trained_in_a_compiled_model():
    """Nothing else asks for gradients, not even q, k and v of the first layer."""
    grads = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = tiny.wan(num_layers=2).requires_grad_(False)
        session = dit_sparse.apply(model, "linvideo", schedule="always")
        for part in session.sparse_modules().values():
            part.requires_grad_(True)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        call(**tiny.wan_inputs())[0].square().mean().backward()
        grads.append([p.grad for part in session.sparse_modules().values() for p in part.parameters()])
    assert all(grad.abs().sum() > 0 for grad in grads[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*outside a pipeline run")
def test_training_decides_then_the_linear_layers_are_kept(tmp_path):
    """r of every layer is trained; what was saved in between and in the end is loaded strictly."""
    model, inputs = tiny.wan(), tiny.wan_inputs()
    state = torch.get_rng_state()
    session = dit_sparse.apply(model, "linvideo", schedule="always")
    assert torch.equal(torch.get_rng_state(), state)
    parts = session.sparse_modules()
    model(**inputs)[0].square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for part in parts.values() for p in part.parameters())
    with torch.no_grad():
        for part, r in zip(parts.values(), (1.0, 0.0, 0.25), strict=True):
            part.r.fill_(r)
            part.key += tiny.randn(*part.key.shape)
        mixed = model(**inputs)[0]
    session.save_pretrained(tmp_path / "mixed")
    session = dit_sparse.apply(model, "linvideo", schedule="always")
    with torch.no_grad(), pytest.warns(UserWarning, match="LinVideoProcessor.*untrained parameters"):
        model(**inputs)
    session.load_pretrained(tmp_path / "mixed")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*untrained")
        assert torch.equal(model(**inputs)[0], mixed)  # read anew, though 0.95 was settled before

    session = dit_sparse.apply(model, "linvideo", linear_layers=(1, 2), schedule="always")
    assert list(session.sparse_modules()) == ["transformer/blocks.1.attn1", "transformer/blocks.2.attn1"]
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['transformer/blocks\.0\.attn1\.key'"):
        session.load_pretrained(tmp_path / "mixed")
    session.save_pretrained(tmp_path / "linear")
    dit_sparse.apply(model, "linvideo", linear_layers=(1, 2)).load_pretrained(tmp_path / "linear")
    other = dit_sparse.apply(model, "linvideo", linear_layers=(0, 2))
    with pytest.raises(ValueError, match=r"missing \['transformer/blocks\.0\.attn1\.key'"):
        other.load_pretrained(tmp_path / "linear")
