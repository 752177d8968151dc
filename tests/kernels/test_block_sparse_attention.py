"""One conformance suite over every backend, and what each of them promises beyond it.

The Triton backend takes part on a GPU (``-m gpu``), and on the CPU in a process under TRITON_INTERPRET=1:
``test_triton_under_the_interpreter`` starts one.
"""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CASES, Case, make, rms
from interpreter import INTERPRETED, run_under_interpreter

from dit_sparse.kernels import block_sparse_attention
from dit_sparse.kernels.ops import BACKENDS, resolve_backend
from dit_sparse.plan import Plan

CUDA = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
TESTED = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("gathered", "cpu", id="gathered"),
    pytest.param("flex", "cpu", id="flex"),
    *([pytest.param("triton", "cpu", id="triton")] if INTERPRETED else []),
    pytest.param("flex", "cuda", id="flex-cuda", marks=GPU),
    pytest.param("triton", "cuda", id="triton-cuda", marks=GPU),
]
ON_CPU = ["cpu", "gathered"]
# Eager FlexAttention, on the CPU, has no gradients.
DIFFERENTIABLE = [p for p in TESTED if p.values != ("flex", "cpu")]
REFERENCE = pytest.param("reference", "cpu", id="reference")
# RMS of the error over RMS of the result, against float64. One bound per dtype, from its unit roundoff.
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LSE_BOUND = {torch.float32: 5e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN, so a backend that forgets to write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


def skip_odd_blocks(backend, device, case):
    if backend == "flex" and device == "cuda" and (case.block[0] % 16 or case.block[1] % 16):
        pytest.skip("flex on a GPU needs blocks of a multiple of 16 tokens")


def check(backend, device, case, dtype):
    skip_odd_blocks(backend, device, case)
    q, k, v, plan, valid = make(case, dtype, device)
    truth, truth_lse = block_sparse_attention(
        q.double(), k.double(), v.double(), plan, valid=valid, backend="reference"
    )
    out, lse = block_sparse_attention(q, k, v, plan, valid=valid, backend=backend)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert lse.shape == q.shape[:3]
    assert lse.dtype == torch.float32
    empty = truth_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert not out[empty].any()
    assert rms(out - truth) <= BOUND[dtype] * rms(truth)
    assert rms((lse - truth_lse)[~empty]) <= LSE_BOUND[dtype] * rms(truth_lse[~empty])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
def test_agrees_with_float64(backend, device, case, poisoned):
    check(backend, device, case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_low_precision(backend, device, dtype, poisoned):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter has no bfloat16 product")
    check(backend, device, CASES[5], dtype)
    check(backend, device, CASES[6], dtype)


@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
def test_full_plan_is_dense_attention(backend, device):
    q, k, v, _, _ = make(CASES[1], device=device)
    plan = Plan.from_blocks(torch.ones(4, 4, dtype=torch.bool), 32).to(device)
    out, lse = block_sparse_attention(q, k, v, plan, scale=0.3, backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.3), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, (q @ k.mT * 0.3).logsumexp(-1), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
@pytest.mark.parametrize("cause", ["plan", "valid"])
def test_nothing_to_read(backend, device, cause):
    q, k, v, plan, _ = make(CASES[0], device=device)
    valid = torch.full((1, 1, 63), cause == "plan", device=device)
    if cause == "plan":
        plan = Plan.from_blocks(torch.zeros(4, 4, dtype=torch.bool), 16).to(device)
    out, lse = block_sparse_attention(q, k, v, plan, valid=valid, backend=backend)
    assert not out.any()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_takes_strided_inputs_and_aliases_none(backend, device):
    q, k, v, plan, _ = make(CASES[0], device=device)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out, lse = block_sparse_attention(*strided, plan, backend=backend)
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, plan, backend=backend)[0])
    assert out.is_contiguous()
    assert lse.is_contiguous()
    inputs = {x.untyped_storage().data_ptr() for x in strided}
    assert not inputs & {out.untyped_storage().data_ptr(), lse.untyped_storage().data_ptr()}


@dataclass(frozen=True)
class Near:
    """A rule for tests: |q - k| <= reach on original positions."""

    reach: int

    def __call__(self, q, k):
        return (q - k).abs() <= self.reach


@pytest.mark.parametrize("backend", ["gathered", "flex"])
@pytest.mark.parametrize("heads", [1, 2])
def test_rule_on_original_positions(backend, heads):
    q, k, v, plan, valid = make(CASES[3])
    plan = Plan(plan.indices, plan.counts, plan.block, plan.keys, rule=Near(40))
    g = torch.Generator().manual_seed(1)
    positions = torch.stack([torch.randperm(300, generator=g) for _ in range(heads)])
    want, want_lse = block_sparse_attention(
        q, k, v, plan, valid=valid, positions=positions, backend="reference"
    )
    out, lse = block_sparse_attention(q, k, v, plan, valid=valid, positions=positions, backend=backend)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=5e-6, rtol=1e-5)


def test_reference_is_a_masked_softmax():
    """The definition itself, spelled out token by token."""
    q, k, v, plan, valid = make(CASES[4])
    out, lse = block_sparse_attention(q, k, v, plan, valid=valid, scale=0.2, backend="reference")
    kept = plan.to_blocks()
    for b, h, i in [(0, 0, 0), (0, 0, 40), (1, 3, 62), (1, 2, 17)]:
        keys = [j for j in range(127) if kept[b, h, i // 32, j // 32] and valid[b, 0, j]]
        scores = torch.stack([0.2 * q[b, h, i] @ k[b, h // 2, j] for j in keys]) if keys else torch.empty(0)
        want = scores.softmax(0) @ v[b, h // 2, keys] if keys else torch.zeros(64)
        torch.testing.assert_close(out[b, h, i], want, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(lse[b, h, i], scores.logsumexp(0), atol=2e-6, rtol=1e-5)


def gradients(backend, tensors, plan, valid, positions=None):
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors)
    out, lse = block_sparse_attention(q, k, v, plan, valid=valid, positions=positions, backend=backend)
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.device)
    lse_weight = torch.randn(lse.shape, generator=g, dtype=torch.float64).to(out.device)
    # An empty query's lse is -inf whatever its inputs: it takes no part in a loss.
    finite = torch.where(lse == float("-inf"), 0, lse)
    loss = (out * weight).sum() + (finite * lse_weight).sum()
    return torch.autograd.grad(loss, (q, k, v))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "device"), DIFFERENTIABLE)
def test_gradients(backend, device, case, poisoned):
    skip_odd_blocks(backend, device, case)
    q, k, v, plan, valid = make(case, device=device)
    want = gradients("reference", [x.double() for x in (q, k, v)], plan, valid)
    for name, got, exact in zip("qkv", gradients(backend, (q, k, v), plan, valid), want, strict=True):
        assert got.dtype == torch.float32
        assert got.isfinite().all()
        assert rms(got - exact) <= 5e-6 * rms(exact), f"gradient of {name}"


def test_gradients_under_a_rule():
    q, k, v, plan, valid = make(CASES[3])
    plan = Plan(plan.indices, plan.counts, plan.block, plan.keys, rule=Near(9))
    positions = torch.randperm(300, generator=torch.Generator().manual_seed(3))[None]
    want = gradients("reference", [x.double() for x in (q, k, v)], plan, valid, positions)
    for got, exact in zip(gradients("gathered", (q, k, v), plan, valid, positions), want, strict=True):
        assert rms(got - exact) <= 5e-6 * rms(exact)


@pytest.mark.parametrize(("backend", "device"), DIFFERENTIABLE)
def test_gradients_of_one_output(backend, device):
    q, k, v, plan, _ = make(CASES[0], device=device)
    q.requires_grad_()
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend)
    (a,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    (b,) = torch.autograd.grad(lse[lse > float("-inf")].sum(), q)
    assert a.isfinite().all()
    assert b.isfinite().all()
    assert b.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("backend", "device"), DIFFERENTIABLE)
def test_low_precision_gradients(backend, device, dtype):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter has no bfloat16 product")
    *tensors, plan, _ = make(CASES[1], dtype, device)
    want = gradients("reference", [x.double() for x in tensors], plan, None)
    for got, exact in zip(gradients(backend, tensors, plan, None), want, strict=True):
        assert got.dtype == dtype
        assert rms(got - exact) <= (2e-3 if dtype == torch.float16 else 1e-2) * rms(exact)


@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
def test_gradcheck(backend):
    case = Case(9, 11, 3, (4, 3), heads=2, kv_heads=1, plan=(1, 2), valid=(1, 1))
    q, k, v, plan, valid = make(case)

    def run(q, k, v):
        out, lse = block_sparse_attention(q, k, v, plan, valid=valid, backend=backend)
        return out, torch.where(lse == float("-inf"), 0, lse)

    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", ON_CPU)
def test_sees_a_mask_changed_in_place(backend):
    """The grouping of rows is cached per plan and mask, and must not outlive either's content."""
    q, k, v, plan, valid = make(CASES[3])
    before, _ = block_sparse_attention(q, k, v, plan, valid=valid, backend=backend)
    valid[..., 100:] = False
    out, _ = block_sparse_attention(q, k, v, plan, valid=valid, backend=backend)
    want, _ = block_sparse_attention(q, k, v, plan, valid=valid, backend="reference")
    assert not torch.equal(out, before)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)


def test_gathered_cuts_work_to_its_memory_budget(monkeypatch):
    monkeypatch.setattr("dit_sparse.kernels.gathered.BYTES_PER_THREAD", 1)
    check("gathered", "cpu", CASES[4], torch.float32)


ERRORS = {
    "shared dtype": (lambda a: a.update(k=a["k"].double()), "k is torch.float64"),
    "axes": (lambda a: a.update(q=a["q"][0]), "q must have 4 axes"),
    "kv shapes": (lambda a: a.update(v=a["v"][:, :1]), "k and v must have one shape"),
    "head dim": (lambda a: a.update(q=a["q"][..., :8]), "differ in batch or head dim"),
    "head multiple": (lambda a: a.update(q=a["q"][:, :1]), "multiple of key/value heads, got 1 and 2"),
    "query blocks": (lambda a: a.update(q=a["q"][:, :, :40]), "4 query blocks of 16, but 40 .* fill 3"),
    "key blocks": (
        lambda a: a.update(k=a["k"][:, :, :40], v=a["v"][:, :, :40]),
        "4 key blocks of 16, but 40 .* fill 3",
    ),
    "plan heads": (
        lambda a: a.update(plan=Plan.from_blocks(torch.ones(3, 4, 4, dtype=torch.bool), 16)),
        "3 heads, expected 1 or 1 and 1 or 2",
    ),
    "valid": (
        lambda a: a.update(valid=torch.ones(63, dtype=torch.bool)),
        r"valid must be bool \[1 or 1, 1 or 2 or 2, 63\]",
    ),
    "scale": (lambda a: a.update(scale=-1.0), "above zero, got -1.0"),
    "backend": (lambda a: a.update(backend="cuda"), "unknown backend 'cuda', known are auto, reference, cpu"),
    "wide": (
        lambda a: a.update({n: torch.zeros(1, 2, 63, 257) for n in "qkv"}),
        "head dim must lie in 1..256, got 257",
    ),
    "positions": (
        lambda a: a.update(
            plan=Plan.from_blocks(torch.ones(4, 4, dtype=torch.bool), 16, Near(3)), positions=torch.arange(63)
        ),
        r"positions must be int64 \[1 or 2 or 2, 63\]",
    ),
    "rule": (
        lambda a: a.update(
            plan=Plan.from_blocks(torch.ones(4, 4, dtype=torch.bool), 16, Near(3)), backend="triton"
        ),
        r"'triton' cannot honour the rule Near\(reach=3\).*use one of flex, gathered, reference",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_came_and_what_was_expected(name):
    break_it, message = ERRORS[name]
    q, k, v, plan, _ = make(CASES[0])
    arguments = {"q": q, "k": k, "v": v, "plan": plan, "backend": "cpu"}
    break_it(arguments)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)


def test_flex_refuses_gradients_on_the_cpu():
    q, k, v, plan, _ = make(CASES[0])
    with pytest.raises(ValueError, match="no gradients on the CPU; use backend 'cpu'"):
        block_sparse_attention(q.requires_grad_(), k, v, plan, backend="flex")


@pytest.mark.parametrize(
    ("device", "arguments", "backend"),
    [
        ("cpu", {}, "cpu"),
        ("cpu", {"needs_grad": True, "needs_lse": True}, "cpu"),
        ("cpu", {"needs_grad": True, "rule": Near(1)}, "gathered"),
        ("cuda", {"rule": Near(1)}, "flex"),
        ("cuda", {"needs_grad": True}, "triton"),
        ("cuda:1", {}, "triton"),
        ("mps", {}, "reference"),
    ],
)
def test_resolve_backend(device, arguments, backend):
    pytest.importorskip("triton")
    name, why = resolve_backend(device, **arguments)
    assert name == backend
    assert name in BACKENDS
    assert why


@pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")
def test_triton_under_the_interpreter():
    pytest.importorskip("triton")
    run_under_interpreter(__file__, "-k", "triton")


@pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")
def test_triton_refuses_cpu_tensors():
    pytest.importorskip("triton")
    q, k, v, plan, _ = make(CASES[0])
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu"):
        block_sparse_attention(q, k, v, plan, backend="triton")


def test_works_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from dit_sparse.kernels import block_sparse_attention; from dit_sparse.plan import Plan\n"
        "plan = Plan.from_blocks(torch.ones(2, 2, dtype=torch.bool), 16)\n"
        "q = torch.randn(1, 1, 32, 8); out, _ = block_sparse_attention(q, q, q, plan)\n"
        "torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
