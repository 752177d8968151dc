"""The probes against sums over single tokens in float64, on every backend.

The Triton backend takes part on a GPU (``-m gpu``), and on the CPU in a process under TRITON_INTERPRET=1:
``test_triton_under_the_interpreter`` starts one.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from interpreter import INTERPRETED, run_under_interpreter

from dit_sparse.kernels import block_mass, block_sparse_attention, block_statistics, pooled_scores
from dit_sparse.kernels.mass_ops import BACKENDS, resolve_probe
from dit_sparse.plan import Plan, blocks_of, pool

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TESTED = [
    pytest.param("cpu", "cpu", id="cpu"),
    *([pytest.param("triton", "cpu", id="triton")] if INTERPRETED else []),
    pytest.param("triton", "cuda", id="triton-cuda", marks=GPU),
]
REFERENCE = pytest.param("reference", "cpu", id="reference")
# RMS of the error over RMS of the result, against float64; inputs are rounded to the dtype before.
BOUND = 2e-6
SMALL = 0.02


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison; ``valid`` is the (batch, heads) of the keys' validity."""

    queries: int
    keys: int
    head_dim: int
    block: tuple[int, int]
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    valid: tuple[int, int] | None = None

    def __str__(self):
        heads = f"{self.heads}of{self.kv_heads}" if self.heads != self.kv_heads else str(self.heads)
        valid = "" if self.valid is None else f"-valid{self.valid[0]}x{self.valid[1]}"
        size = f"{self.queries}x{self.keys}-D{self.head_dim}-block{self.block[0]}x{self.block[1]}"
        return f"{size}-B{self.batch}-H{heads}{valid}"


CASES = [
    Case(63, 127, 16, (16, 32)),
    Case(127, 200, 40, (64, 64), batch=2, heads=4, kv_heads=2, valid=(2, 1)),
    Case(200, 300, 64, (24, 40), valid=(1, 2)),
    Case(40, 96, 3, (1, 12)),
    Case(96, 40, 32, (12, 1), valid=(1, 1)),
    Case(300, 500, 24, (200, 128), batch=2, heads=4, kv_heads=1, valid=(2, 4)),
    Case(500, 300, 128, (500, 300), heads=1, kv_heads=1, valid=(1, 1)),
    Case(256, 256, 64, (64, 128)),
    Case(70, 90, 160, (32, 16), heads=2, kv_heads=1),
]


def make(case, dtype=torch.float32, device="cpu", seed=0):
    """q, k, the lse of an earlier step, and valid. Some queries are left out; key block 1 is all holes."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(case.batch, case.heads, case.queries, case.head_dim, generator=g)
    k = torch.randn(case.batch, case.kv_heads, case.keys, case.head_dim, generator=g)
    lse = math.log(case.keys) + torch.randn(case.batch, case.heads, case.queries, generator=g)
    for value in (math.inf, -math.inf, math.nan):
        lse = lse.masked_fill(torch.rand(lse.shape, generator=g) < 0.03, value)
    valid = None
    if case.valid is not None:
        valid = torch.rand(*case.valid, case.keys, generator=g) < 0.9
        valid[..., : case.keys // 3] = True
        valid[..., case.block[1] : 2 * case.block[1]] = False
        valid = valid.to(device)
    return q.to(device, dtype), k.to(device, dtype), lse.to(device), valid


def definition(q, k, lse, block, valid, scale, small=SMALL):
    """Mass, peak, and bounds on the count that leave out what is too close to ``small`` to tell."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    shape = (batch, heads, blocks_of(queries, block[0]), blocks_of(keys, block[1]))
    mass, peak, least, most = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
    q, k, lse = (x.cpu().double() for x in (q, k, lse))
    valid = torch.ones(1, 1, keys, dtype=torch.bool) if valid is None else valid.cpu()
    for b in range(batch):
        for h in range(heads):
            there = valid[b if len(valid) > 1 else 0, h * valid.shape[1] // heads].nonzero().flatten()
            column = there // block[1]
            for a in lse[b, h].isfinite().nonzero().flatten().tolist():
                terms = (scale * (k[b, h * k.shape[1] // heads, there] @ q[b, h, a]) - lse[b, h, a]).exp()
                row = (b, h, a // block[0])
                mass[row].index_add_(0, column, terms)
                peak[row].scatter_reduce_(0, column, terms, "amax")
                least[row].index_add_(0, column, (terms < small * (1 - 1e-5)).double())
                most[row].index_add_(0, column, (terms < small * (1 + 1e-5)).double())
    return mass, peak, least, most


def rms(x):
    return x.double().square().mean().sqrt().item()


def close(got, want, bound=BOUND):
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert got.is_contiguous()
    assert rms(got.cpu() - want) <= bound * rms(want)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN, so a backend that forgets to write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(float("nan") if x.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


def check(backend, device, case, dtype):
    q, k, lse, valid = make(case, dtype, device)
    scale = 1.2 * case.head_dim**-0.5
    mass, peak, least, most = definition(q, k, lse, case.block, valid, scale)
    close(block_mass(q, k, lse, case.block, valid=valid, scale=scale, backend=backend), mass)
    got = block_statistics(q, k, lse, case.block, SMALL, valid=valid, scale=scale, backend=backend)
    close(got[0], mass)
    close(got[1], peak)
    assert got[2].dtype == torch.int32
    count = got[2].cpu()
    assert (least <= count).all()
    assert (count <= most).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
def test_agrees_with_single_tokens(backend, device, case, poisoned):
    check(backend, device, case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_low_precision(backend, device, dtype, poisoned):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the Triton interpreter has no bfloat16 product")
    check(backend, device, CASES[1], dtype)


@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
def test_rows_of_the_true_lse_add_up_to_their_queries(backend, device):
    """With the lse that attention returned, as methods use it."""
    q, k, _, valid = make(CASES[1], device=device)
    plan = Plan.from_blocks(torch.ones(2, 4, dtype=torch.bool), CASES[1].block).to(device)
    _, lse = block_sparse_attention(q, k, torch.zeros_like(k), plan, valid=valid, backend="reference")
    lse[0, :, 100:] = math.inf  # holes among the queries
    mass = block_mass(q, k, lse, CASES[1].block, valid=valid, backend=backend)
    expected = torch.tensor([[64, 36], [64, 63]], device=device)[:, None].expand(2, 4, 2).float()
    torch.testing.assert_close(mass.sum(-1), expected, atol=0, rtol=1e-5)
    assert not mass[..., 1].any()


@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
@pytest.mark.parametrize("off", [60.0, -60.0, 400.0, -400.0])
def test_a_wrong_lse_gives_no_nan(backend, device, off):
    q, k, lse, _ = make(CASES[0], device=device)
    mass, peak, count = block_statistics(q, k, lse - off, CASES[0].block, SMALL, backend=backend)
    assert not mass.isnan().any()
    assert not peak.isnan().any()
    if off == 60:
        # Its exponential is beyond 2 ** 24: float32 products of scale and lse round it to about 1e-5.
        want = block_mass(q, k, lse, CASES[0].block, backend="reference") * math.exp(off)
        assert rms(mass - want) <= 2e-5 * rms(want)
        assert not count.any()
    if off == 400:
        assert (mass == math.inf).all()
    if off == -400:
        assert not mass.any()


@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
def test_what_does_not_count_may_be_nan(backend, device):
    q, k, lse, valid = make(CASES[2], device=device)
    arguments = {"valid": valid, "backend": backend}
    want = block_statistics(q, k, lse, CASES[2].block, SMALL, **arguments)
    q = q.masked_fill(~lse.isfinite()[..., None], math.nan)
    k = k.masked_fill(~valid[..., None], math.nan)
    for got, expected in zip(
        block_statistics(q, k, lse, CASES[2].block, SMALL, **arguments), want, strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
def test_nothing_counts(backend, device):
    q, k, lse, valid = make(CASES[4], device=device)
    gone = torch.zeros_like(valid)
    for got in block_statistics(q, k, lse, CASES[4].block, SMALL, valid=gone, backend=backend):
        assert not got.any()
    for got in block_statistics(q, k, lse * math.nan, CASES[4].block, SMALL, backend=backend):
        assert not got.any()


@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_takes_strided_inputs(backend, device):
    q, k, lse, valid = make(CASES[1], device=device)
    want = block_mass(q, k, lse, 64, valid=valid, backend=backend)
    q, k, lse = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, lse))
    torch.testing.assert_close(block_mass(q, k, lse, 64, valid=valid, backend=backend), want)
    q, k, valid = q.mT.contiguous().mT, k.mT.contiguous().mT, valid.mT.contiguous().mT
    torch.testing.assert_close(block_mass(q, k, lse, 64, valid=valid, backend=backend), want)


@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_has_no_gradient(backend, device):
    q, k, lse, _ = make(CASES[0], device=device)
    q.requires_grad_()
    assert not block_mass(q, k, lse, 16, backend=backend).requires_grad
    assert not pooled_scores(q, k, 16, backend=backend).requires_grad


@pytest.mark.parametrize(("backend", "device"), [*TESTED, REFERENCE])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pooled_scores(backend, device, case, poisoned):
    q, k, _, valid = make(case, device=device)
    g = torch.Generator().manual_seed(1)
    query_valid = (torch.rand(case.batch, case.kv_heads, case.queries, generator=g) < 0.8).to(device)
    query_valid[..., : case.block[0]] = False
    means = []
    for x, there, block in ((q, query_valid, case.block[0]), (k, valid, case.block[1])):
        x = x.cpu().double().repeat_interleave(case.heads // x.shape[1], 1)
        there = torch.ones(1, 1, x.shape[2], dtype=torch.bool) if there is None else there.cpu()
        there = there.repeat_interleave(case.heads // there.shape[1], 1).expand(x.shape[:3])
        mean = torch.zeros(*x.shape[:2], blocks_of(x.shape[2], block), x.shape[3], dtype=torch.float64)
        for b, h, i in torch.cartesian_prod(*map(torch.arange, mean.shape[:3])).tolist():
            inside = slice(i * block, (i + 1) * block)
            chosen = x[b, h, inside][there[b, h, inside]]
            mean[b, h, i] = chosen.mean(0) if len(chosen) else 0
        means.append(mean)
    got = pooled_scores(q, k, case.block, valid=valid, query_valid=query_valid, scale=0.3, backend=backend)
    close(got, 0.3 * means[0] @ means[1].mT)
    assert not got[:, :, 0].any()


@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_pooled_scores_are_not_rounded(backend, device):
    dtype = torch.float16 if backend == "triton" and device == "cpu" else torch.bfloat16
    q, k, _, _ = make(CASES[1], dtype, device)
    want = pooled_scores(q.double(), k.double(), 64, backend="reference")
    close(pooled_scores(q, k, 64, backend=backend), want.cpu())


def test_resolve_probe():
    pytest.importorskip("triton")
    for device, backend in (("cpu", "cpu"), ("cuda:1", "triton"), ("mps", "reference")):
        name, why = resolve_probe(device)
        assert name == backend
        assert name in BACKENDS
        assert why


def test_compiles_whole():
    q, k, lse, valid = make(CASES[1])

    def run(q, k, lse, valid):
        mass = block_mass(q, k, lse, 64, valid=valid) * 2
        _, peak, count = block_statistics(q, k, lse, 64, SMALL, valid=valid)
        return mass + peak + count, pooled_scores(q, k, 64, valid=valid)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for got, want in zip(compiled(q, k, lse, valid), run(q, k, lse, valid), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("backend", "device"), TESTED)
def test_opcheck(backend, device):
    q, k, lse, valid = make(CASES[4], device=device)
    ops = torch.ops.dit_sparse
    block_mass(q, k, lse, 4, backend=backend)  # registers them
    names = (f"block_mass_{backend}", f"block_statistics_{backend}")
    for name, rest in zip(names, ((), (SMALL,)), strict=True):
        for there in (None, valid):
            torch.library.opcheck(getattr(ops, name).default, (q, k, lse, there, [12, 5], 0.3, *rest))
    if backend == "triton":
        torch.library.opcheck(ops.block_means_triton.default, (k, valid, 7, torch.float32))


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[6]], ids=str)
def test_cpu_cuts_blocks_larger_than_a_tile(case, monkeypatch):
    monkeypatch.setattr("dit_sparse.kernels.cpu_mass.QUERIES_PER_THREAD", 7)
    monkeypatch.setattr("dit_sparse.kernels.cpu_mass.KEYS", 50)
    check("cpu", "cpu", case, torch.float32)


def test_cpu_temporaries_do_not_grow_with_the_product(monkeypatch):
    """The largest of them has a tile's size, or a head's: not Sq x Sk, nor all heads of a copy."""
    monkeypatch.setattr("dit_sparse.kernels.cpu_mass.QUERIES_PER_THREAD", 128)
    monkeypatch.setattr("dit_sparse.kernels.cpu_mass.KEYS", 128)
    tokens, head_dim = 2048, 8
    q, k = (torch.randn(1, 2, tokens, head_dim, dtype=torch.bfloat16) for _ in range(2))
    lse = torch.full((1, 2, tokens), 8.0)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        block_statistics(q, k, lse, 64, 1e-3, backend="cpu")
    largest = max(e.cpu_memory_usage for e in p.events())
    tile = 128 * torch.get_num_threads() * 128 * 4
    assert 0 < largest <= max(tile, tokens * head_dim * 4)


ERRORS = {
    "axes": (lambda a: a.update(q=a["q"][0]), "q must have 4 axes"),
    "lse shape": (lambda a: a.update(lse=a["lse"][..., :5]), r"lse must be float32 \(1, 2, 63\), got .* 5\)"),
    "lse dtype": (lambda a: a.update(lse=a["lse"].half()), "lse must be float32 .* got torch.float16"),
    "valid": (
        lambda a: a.update(valid=torch.ones(1, 1, 63, dtype=torch.bool)),
        r"valid must be bool \[1 or 1, 1 or 2 or 2, 127\]",
    ),
    "block": (lambda a: a.update(block=0), "block must be a positive number of tokens, got 0"),
    "scale": (lambda a: a.update(scale=0.0), "above zero, got 0.0"),
    "backend": (lambda a: a.update(backend="flex"), "unknown backend 'flex', known are auto, reference, cpu"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_came_and_what_was_expected(name):
    break_it, message = ERRORS[name]
    q, k, lse, _ = make(CASES[0])
    arguments = {"q": q, "k": k, "lse": lse, "block": 16}
    break_it(arguments)
    with pytest.raises(ValueError, match=message):
        block_mass(**arguments)
    with pytest.raises(ValueError, match=message):
        block_statistics(**arguments, small=SMALL)
    if "lse" not in name:
        del arguments["lse"]
        with pytest.raises(ValueError, match=message):
            pooled_scores(**arguments)


def test_pooled_scores_names_the_validity_that_is_wrong():
    q, k, _, _ = make(CASES[0])
    with pytest.raises(ValueError, match=r"query_valid must be bool \[1 or 1, 1 or 2 or 2, 63\]"):
        pooled_scores(q, k, 16, query_valid=torch.ones(1, 1, 127, dtype=torch.bool))


@pytest.mark.skipif(not INTERPRETED, reason="runs where the Triton backend takes CPU tensors")
@pytest.mark.parametrize(
    ("slots", "block", "head_dim", "heads"),
    [(63, 16, 40, 1), (200, 7, 130, 3), (500, 200, 3, 3), (9, 1, 1, 1)],
)
def test_triton_pools_as_the_plan_does(slots, block, head_dim, heads, poisoned):
    from dit_sparse.kernels.mass import block_means

    x = torch.randn(2, slots, 3, head_dim).half().transpose(1, 2)
    valid = torch.rand(2, heads, slots) < 0.7
    valid[..., :block] = False
    for there in (None, valid):
        torch.testing.assert_close(block_means(x, block, there, torch.float16), pool(x, block, there))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pool_on_a_gpu_agrees_with_the_cpu():
    x, valid = torch.randn(2, 3, 500, 72), torch.rand(2, 1, 500) < 0.7
    torch.testing.assert_close(pool(x.cuda(), 64, valid.cuda()).cpu(), pool(x, 64, valid))
    x = x.cuda().requires_grad_()
    (grad,) = torch.autograd.grad(pool(x, 64, valid.cuda()).sum(), x)
    assert grad.any()


@pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")
def test_triton_refuses_cpu_tensors():
    pytest.importorskip("triton")
    q, k, lse, _ = make(CASES[0])
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu"):
        block_mass(q, k, lse, 16, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="this process is the one under the interpreter")
def test_triton_under_the_interpreter():
    pytest.importorskip("triton")
    run_under_interpreter(__file__, "-k", "triton")
