"""Linear attention: every backend against float64, the authors' numbers, and what the op promises beyond.

The Triton backend takes part on a GPU (``-m gpu``), and on the CPU in a process under TRITON_INTERPRET=1:
``test_triton_under_the_interpreter`` starts one.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreter import INTERPRETED, run_under_interpreter

from dit_sparse.kernels import linear_attention
from dit_sparse.plan import Plan

CUDA = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
TRITON = [
    *([pytest.param("triton", "cpu", id="triton")] if INTERPRETED else []),
    pytest.param("triton", "cuda", id="triton-cuda", marks=GPU),
]
TESTED = [pytest.param("cpu", "cpu", id="cpu"), *TRITON]
REFERENCE = pytest.param("reference", "cpu", id="reference")
VECTORS = Path(__file__).parents[1] / "vectors" / "sla"
# RMS of the error over RMS of the result, against float64. A gradient is a product of more rounded numbers.
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRAD_BOUND = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 16e-3}


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison; ``plan`` and ``valid`` are the (batch, heads) of those two."""

    feature_map: str
    queries: int
    keys: int
    head_dim: int
    block: tuple[int, int] | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    plan: tuple[int, int] = (1, 1)
    valid: tuple[int, int] | None = None
    weights: tuple[int, int] | None = None

    def __str__(self):
        block = "all" if self.block is None else f"rest{self.block[0]}x{self.block[1]}"
        heads = f"{self.heads}of{self.kv_heads}"
        return (
            f"{self.feature_map}-{self.queries}x{self.keys}-D{self.head_dim}-{block}-B{self.batch}-H{heads}"
        )


CASES = [
    Case("softmax", 63, 63, 16),
    Case("elu", 520, 300, 40, valid=(1, 2)),
    Case("hedgehog", 100, 200, 96, kv_heads=1, weights=(2, 2)),
    Case("relu", 40, 50, 160, kv_heads=1, valid=(1, 2)),
    Case("softmax", 500, 500, 64, (64, 64), plan=(1, 2)),
    Case("softmax", 200, 63, 128, (64, 32), heads=4, valid=(1, 2)),
    Case("elu", 63, 127, 24, (32, 32), batch=2, heads=4, plan=(2, 4), valid=(2, 1)),
    Case("relu", 128, 192, 48, (32, 64), batch=2, kv_heads=1, plan=(2, 1), valid=(2, 2)),
    Case("hedgehog", 300, 200, 32, (128, 24), plan=(1, 2), valid=(1, 1), weights=(2, 1)),
    Case("hedgehog", 12, 96, 3, (1, 16), heads=1, kv_heads=1, weights=(1, 1)),
    Case("softmax", 96, 96, 160, (48, 96), heads=1, kv_heads=1, plan=(1, 1)),
]


def make(case, dtype=torch.float32, device="cpu", seed=0):
    """Differentiable inputs, and the other arguments. Row 0 of the plan lists all blocks, row 1 none."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(case.batch, case.heads, case.queries, case.head_dim, generator=g)
    k = torch.randn(case.batch, case.kv_heads, case.keys, case.head_dim, generator=g)
    v = torch.randn(case.batch, case.kv_heads, case.keys, case.head_dim, generator=g)
    inputs = [q, k, v]
    if case.weights is not None:
        shape = (case.head_dim, case.head_dim)
        inputs += [torch.randn(n, *shape, generator=g) / case.head_dim**0.5 for n in case.weights]
    plan = valid = None
    if case.block is not None:
        rows, columns = -(-case.queries // case.block[0]), -(-case.keys // case.block[1])
        keep = torch.rand(*case.plan, rows, columns, generator=g) < 0.5
        if rows > 1:
            keep[0, 0, 0], keep[0, 0, 1] = True, False
        plan = Plan.from_blocks(keep, case.block).to(device)
    if case.valid is not None:
        valid = torch.rand(*case.valid, case.keys, generator=g) < 0.8
        valid[0, :, case.keys // 4 : case.keys // 2] = False
        valid = valid.to(device)
    inputs = [x.to(device, dtype).requires_grad_() for x in inputs]
    return inputs, {"plan": plan, "valid": valid, "feature_map": case.feature_map}


def run(inputs, arguments, backend):
    """out and the gradients of all inputs under a fixed loss."""
    q, k, v, *weights = inputs
    out = linear_attention(q, k, v, **arguments, weights=tuple(weights) or None, backend=backend)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=g).to(out.device, out.dtype)
    return out, *torch.autograd.grad(out, inputs, grad)


def double(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def rms(x):
    return x.double().square().mean().sqrt().item()


def compare(got, want, dtype, slack=1.0):
    """Names the tensors that differ by more than the dtype's bounds times ``slack``."""
    names = ("out", "q", "k", "v", "weights of q", "weights of k")
    bounds = [BOUND[dtype], *[GRAD_BOUND[dtype]] * 5]
    wrong = {}
    for name, bound, a, b in zip(names, bounds, got, want, strict=False):
        assert a.shape == b.shape
        assert a.dtype == dtype
        error = rms(a - b) / rms(b)
        if not error <= slack * bound:
            wrong[name] = error
    assert not wrong


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN, so a backend that forgets to write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
def test_agrees_with_float64(backend, device, case, poisoned):
    inputs, arguments = make(case, device=device)
    want = run(double(inputs), arguments, "reference")
    got = run(inputs, arguments, backend)
    assert got[0].is_contiguous()
    compare(got, want, torch.float32)


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4], CASES[7]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_low_precision(backend, device, dtype, case, poisoned):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter has no bfloat16 product")
    inputs, arguments = make(case, dtype, device)
    want = run(double(inputs), arguments, "reference")
    compare(run(inputs, arguments, backend), want, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_a_mean_of_v_does_not_drown_the_gradients(backend, device, dtype):
    """Only how values differ matters to q and k; rounded sums of values, mean included, would lose it."""
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter has no bfloat16 product")
    for block in (None, (64, 128)):
        inputs, arguments = make(Case("softmax", 128, 2048, 32, block, heads=1, kv_heads=1), dtype, device)
        with torch.no_grad():
            inputs[2] += 4
        want = run(double(inputs), arguments, "reference")
        compare(run(inputs, arguments, backend), want, dtype)


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
def test_eps_is_added_to_the_denominator(backend, device, case):
    inputs, arguments = make(case, device=device)
    by_name = "reference" if backend == "cpu" else "cpu"
    want = run(double(inputs), arguments | {"eps": 0.5}, by_name)
    compare(run(inputs, arguments | {"eps": 0.5}, backend), want, torch.float32)
    default = 1e-5 if case.block is None else 0.0
    q, k, v = inputs
    implied = linear_attention(q, k, v, **arguments, backend=backend)
    assert torch.equal(implied, linear_attention(q, k, v, **arguments, eps=default, backend=backend))


def authors():
    arrays = np.load(VECTORS / "sla.npz")
    assert json.loads((VECTORS / "sla.json").read_text())["cases"]["attn_a"]["block"] == 64
    return {n.removeprefix("attn_a_"): torch.from_numpy(arrays[n]) for n in arrays if n.startswith("attn_a")}


@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
def test_matches_the_authors_numbers(backend, device):
    """SLA, both variants; its gradients of features are pulled through their softmax here."""
    given = {name: x.to(device) for name, x in authors().items()}
    q, k, v = (given[n].requires_grad_() for n in "qkv")
    plan = Plan.from_blocks(given["map"].bool(), 64)
    close = {"atol": 2e-6, "rtol": 1e-4}
    torch.testing.assert_close(linear_attention(q, k, v, backend=backend), given["o_l_all"], **close)
    out = linear_attention(q, k, v, plan, backend=backend)
    torch.testing.assert_close(out, given["o_l_unselected"], **close)
    grads = torch.autograd.grad(out, (q, k, v), given["dl"])
    for x, grad, name in ((q, grads[0], "dphiq_sla1"), (k, grads[1], "dphik_sla1")):
        phi = x.detach().softmax(-1)
        pulled = phi * (given[name] - (phi * given[name]).sum(-1, keepdim=True))
        torch.testing.assert_close(grad, pulled, **close)
    torch.testing.assert_close(grads[2], given["dv_both_sla1"] - given["dv_s"], **close)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu", "hedgehog"])
def test_reference_is_a_weighted_mean(feature_map):
    """The definition itself, spelled out token by token."""
    case = Case(feature_map, 63, 60, 5, (16, 12), 2, 4, 2, (2, 4), (2, 1))
    (q, k, v), arguments = make(case)
    w = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    weights = (w[0], w[1, :2]) if feature_map == "hedgehog" else None
    out = linear_attention(q, k, v, **arguments, weights=weights, eps=0.01, backend="reference")
    listed = arguments["plan"].to_blocks()

    def phi(x, weight):
        if feature_map == "hedgehog":
            return torch.cat([(x @ weight).softmax(-1), (-x @ weight).softmax(-1)])
        return {"softmax": x.softmax(-1), "elu": torch.where(x > 0, x + 1, x.exp()), "relu": x.clamp(0)}[
            feature_map
        ]

    for b, h, i in [(0, 0, 0), (0, 0, 40), (1, 3, 62), (1, 2, 17)]:
        keys = [j for j in range(60) if not listed[b, h, i // 16, j // 12] and arguments["valid"][b, 0, j]]
        feature = phi(q[b, h, i], w[0, h])
        shares = [feature @ phi(k[b, h // 2, j], w[1, h // 2]) for j in keys]
        want = sum((s * v[b, h // 2, j] for s, j in zip(shares, keys, strict=True)), torch.zeros(5))
        torch.testing.assert_close(out[b, h, i], want / (sum(shares) + 0.01), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu", "hedgehog"])
@pytest.mark.parametrize("block", [None, (4, 3)])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend, block, feature_map):
    weights = (2, 1) if feature_map == "hedgehog" else None
    case = Case(feature_map, 9, 11, 3, block, 1, 2, 1, (1, 2), (1, 1), weights)
    inputs, arguments = make(case, torch.float64)

    def attend(q, k, v, *weights):
        return linear_attention(q, k, v, **arguments, weights=weights or None, eps=0.1, backend=backend)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("left", ["no blocks", "holes", "no keys"])
@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
def test_nothing_left(backend, device, left):
    """0 and no gradient, exactly: a difference of two equal sums, divided by another, would be anything."""
    inputs, arguments = make(Case("softmax", 100, 320, 16, (32, 32)), device=device)
    keep = torch.zeros(4, 10, dtype=torch.bool)
    valid = torch.ones(1, 1, 320, dtype=torch.bool)
    if left == "no blocks":
        keep[:] = True
    elif left == "holes":
        keep[:, :3] = True
        valid[..., 96:] = False
    else:
        valid[:] = False
    arguments |= {"plan": Plan.from_blocks(keep, 32).to(device), "valid": valid.to(device)}
    assert not any(x.any() for x in run(inputs, arguments, backend))
    if left == "no keys":
        assert not any(x.any() for x in run(inputs, arguments | {"plan": None}, backend))


@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_what_is_left_of_little(backend, device):
    """Listed keys with 100 times the mass of all others cost two digits where sums are subtracted."""
    inputs, arguments = make(Case("elu", 64, 640, 16, (32, 32)), device=device)
    keep = torch.zeros(2, 20, dtype=torch.bool)
    keep[:, :2] = True
    with torch.no_grad():
        inputs[1][:, :, :64] = inputs[1][:, :, :64].abs() * 1000
    arguments["plan"] = Plan.from_blocks(keep, 32).to(device)
    want = run(double(inputs), arguments, "reference")
    compare(run(inputs, arguments, backend)[:1], want[:1], torch.float32, 1 if backend == "cpu" else 100)


@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
def test_a_feature_only_listed_keys_have(backend, device):
    """What is left of its sums is the rounding of float32, and counts as nothing."""
    inputs, arguments = make(Case("relu", 16, 640, 16, (16, 32), heads=8, kv_heads=8), device=device)
    listed = torch.arange(20) % 3 == 0
    with torch.no_grad():
        inputs[0][..., 1:] = -1
        inputs[1][:, :, ~listed.repeat_interleave(32), 0] = -1
    arguments["plan"] = Plan.from_blocks(listed[None], (16, 32)).to(device)
    assert not any(x.any() for x in run(inputs, arguments, backend))


@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_takes_strided_inputs_and_aliases_none(backend, device):
    inputs, arguments = make(CASES[4], device=device)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    out = linear_attention(*strided, **arguments, backend=backend)
    torch.testing.assert_close(out, linear_attention(*inputs, **arguments, backend=backend))
    assert out.is_contiguous()
    assert out.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in strided}
    # The gradient that comes in may be broadcast.
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert grad.isfinite().all()


@pytest.mark.parametrize(("backend", "device"), TRITON)
def test_equal_inputs_give_equal_bits(backend, device):
    inputs, arguments = make(CASES[4], device=device)
    first, second = (run(inputs, arguments, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_takes_packed_plans(backend):
    inputs, arguments = make(CASES[6])
    want = linear_attention(*inputs, **arguments, backend=backend)
    arguments["plan"] = arguments["plan"].pack()
    assert torch.equal(linear_attention(*inputs, **arguments, backend=backend), want)


def test_cpu_cuts_work_to_its_memory_budget(monkeypatch):
    monkeypatch.setattr("dit_sparse.kernels.cpu_linear.CHUNK_BYTES", 1)
    inputs, arguments = make(CASES[6])
    compare(run(inputs, arguments, "cpu"), run(double(inputs), arguments, "reference"), torch.float32)


SMALL = [Case("hedgehog", 20, 30, 8, weights=(2, 2)), Case("softmax", 20, 30, 8, (8, 8))]


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_op_is_registered_well(backend, device, case):
    (q, k, v, *_), arguments = make(case, device=device)
    plan = arguments["plan"]
    lists, block = ((None, None), [20, 30]) if plan is None else ((plan.indices, plan.counts), [8, 8])
    linear_attention(q, k, v, backend=backend)  # loads the backend
    op = getattr(torch.ops.dit_sparse, f"linear_attention_{backend}").default
    torch.library.opcheck(op, (q, k, v, *lists, None, block, case.feature_map, 0.1))


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_compiles_whole(backend, device, case):
    inputs, arguments = make(case, device=device)

    def attend(q, k, v, *weights):
        return linear_attention(q, k, v, **arguments, weights=weights or None, backend=backend)

    torch._dynamo.reset()
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(out, attend(*inputs))
    grads = torch.autograd.grad(out.square().sum(), inputs)
    for got, want in zip(grads, torch.autograd.grad(attend(*inputs).square().sum(), inputs), strict=True):
        torch.testing.assert_close(got, want)


@dataclass(frozen=True)
class Near:
    """A rule for tests: |q - k| <= reach on original positions."""

    reach: int

    def __call__(self, q, k):
        return (q - k).abs() <= self.reach


BLOCKS = torch.ones(4, 4, dtype=torch.bool)
ERRORS = {
    "feature map": ({"feature_map": "taylor"}, "unknown feature_map 'taylor', known are softmax, elu, relu"),
    "no weights": ({"feature_map": "hedgehog"}, "'hedgehog' takes weights .* without weights"),
    "weights": ({"weights": (torch.ones(1, 16, 16),) * 2}, "got 'softmax' with weights"),
    "weights' shape": (
        {"feature_map": "hedgehog", "weights": (torch.ones(1, 16, 16), torch.ones(3, 16, 16))},
        r"weights of keys must be \[1 or 2 or 2, 16, 16\], got \(3, 16, 16\)",
    ),
    "plan": ({"plan": Plan.from_blocks(BLOCKS[:3], 16)}, "3 query blocks of 16, but 63 .* fill 4"),
    "rule": ({"plan": Plan.from_blocks(BLOCKS, 16, Near(3))}, r"the plan has the rule Near\(reach=3\)"),
    "valid": ({"valid": torch.ones(63, dtype=torch.bool)}, r"valid must be bool \[1 or 1, 1 or 2 or 2, 63\]"),
    "eps": ({"eps": -1.0}, "zero or above, got -1.0"),
    "backend": ({"backend": "flex"}, "unknown backend 'flex', known are auto, reference, cpu, triton"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_came_and_what_was_expected(name):
    arguments, message = ERRORS[name]
    inputs, _ = make(CASES[0])
    with pytest.raises(ValueError, match=message):
        linear_attention(*inputs, **arguments)


@pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")
def test_triton_under_the_interpreter():
    pytest.importorskip("triton")
    run_under_interpreter(__file__, "-k", "triton")


@pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")
def test_triton_refuses_cpu_tensors():
    pytest.importorskip("triton")
    inputs, _ = make(CASES[0])
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu"):
        linear_attention(*inputs, backend="triton")


def test_works_on_a_bare_installation():
    program = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from dit_sparse.kernels import linear_attention\n"
        "q = torch.randn(1, 1, 32, 8)\n"
        "phi = q.softmax(-1)\n"
        "want = phi @ (phi.mT @ q) / (phi @ phi.sum(2)[..., None] + 1e-5)\n"
        "torch.testing.assert_close(linear_attention(q, q, q), want)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
