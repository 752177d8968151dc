"""The compiled CPU kernels beyond what every backend promises: how they are built, and that they are ops."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_sparse.kernels import block_sparse_attention, build
from dit_sparse.kernels.ops import resolve_backend
from dit_sparse.plan import Plan

PROGRAM = """
import torch
from dit_sparse.kernels import block_sparse_attention, build
from dit_sparse.kernels.ops import resolve_backend
from dit_sparse.plan import Plan
plan = Plan.from_blocks(torch.ones(2, 2, dtype=torch.bool), 16)
q = torch.randn(1, 1, 32, 8)
out, _ = block_sparse_attention(q, q, q, plan)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))
print(*resolve_backend("cpu"))
try:
    block_sparse_attention(q, q, q, plan, backend="cpu")
except ValueError as error:
    print(error)
"""


def make(queries: int, head_dim: int, block: tuple[int, int], seed: int = 0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, queries, head_dim, generator=g, dtype=dtype) for _ in range(3))
    keep = torch.rand(2, -(-queries // block[0]), -(-queries // block[1]), generator=g) < 0.5
    return q, k, v, Plan.from_blocks(keep, block)


def run_in(cache: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_is_built_once(tmp_path):
    assert "cpu tensors are on the CPU: kernels compiled by c++" in run_in(tmp_path)
    (built,) = (tmp_path / "dit_sparse").iterdir()
    assert built.suffix == ".so"
    made = built.stat().st_mtime_ns
    run_in(tmp_path)
    assert list((tmp_path / "dit_sparse").iterdir()) == [built]
    assert built.stat().st_mtime_ns == made


def test_without_a_compiler_gathered_blocks_serve_and_say_so(tmp_path):
    printed = run_in(tmp_path, CXX="no-such-compiler")
    assert "gathered" in printed
    assert "for there is no C++ compiler 'no-such-compiler' (set CXX to name another)" in printed
    assert "the cpu backend cannot run" in printed
    assert "use 'gathered'" in printed


def test_a_rule_compiles_nothing(monkeypatch):
    monkeypatch.setattr(build, "compiled", lambda: pytest.fail("compiled kernels that cannot serve"))
    name, why = resolve_backend("cpu", rule=lambda q, k: q == k)
    assert name == "gathered"
    assert "rule" in why


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'error: out of patience' >&2\nexit 1\n")
    broken.chmod(0o755)
    printed = run_in(tmp_path, CXX=str(broken))
    assert "could not compile cpu.cpp: error: out of patience" in printed


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "dit_sparse").write_text("a file, not a folder")
    assert "cannot be kept or loaded" in run_in(tmp_path)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names an x86 instruction set")
@pytest.mark.parametrize("instructions", ["haswell", "x86-64"])
def test_narrower_vectors_give_the_same(monkeypatch, tmp_path, instructions):
    """What a machine without AVX-512, or without AVX, compiles."""
    q, k, v, plan = make(200, 40, (64, 24))

    def everything():
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = block_sparse_attention(*tensors, plan, backend="cpu")
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), tensors)

    native = everything()
    flags = [f"-march={instructions}" if f.startswith("-march") else f for f in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    try:
        narrow = everything()
        assert len(list((tmp_path / "dit_sparse").iterdir())) == 1
    finally:
        build.load.cache_clear()
    for a, b in zip(native, narrow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("block", [(32, 32), (24, 40), (1, 16), (64, 3)])
def test_bits_read_as_lists(block):
    q, k, v, plan = make(200, 24, block)
    for a, b in zip(
        block_sparse_attention(q, k, v, plan, backend="cpu"),
        block_sparse_attention(q, k, v, plan.pack(), backend="cpu"),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing_but_the_order_of_sums(threads):
    q, k, v, plan = make(200, 24, (32, 32))
    tensors = [x.requires_grad_() for x in (q, k, v)]

    def everything():
        out, lse = block_sparse_attention(*tensors, plan, backend="cpu")
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), tensors)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        want = everything()
        assert all(torch.equal(a, b) for a, b in zip(want, everything(), strict=True))
        torch.set_num_threads(threads)
        for a, b in zip(want, everything(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_large_scores_stay_exact():
    """Scores of several hundreds: weights span hundreds of powers of two."""
    q, k, v, plan = make(200, 24, (32, 32))
    q = q * 60
    want, want_lse = block_sparse_attention(q.double(), k.double(), v.double(), plan, backend="reference")
    out, lse = block_sparse_attention(q, k, v, plan, backend="cpu")
    assert lse.abs().max() > 100
    torch.testing.assert_close(out.double(), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-5)


def test_keys_that_do_not_exist_are_not_read():
    q, k, v, plan = make(200, 24, (32, 32))
    valid = torch.rand(1, 1, 200, generator=torch.Generator().manual_seed(1)) < 0.6
    want, _ = block_sparse_attention(q, k, v, plan, valid=valid, backend="cpu")
    for x in (k, v):
        x[:, :, ~valid[0, 0]] = float("nan")
    out, _ = block_sparse_attention(q, k, v, plan, valid=valid, backend="cpu")
    assert torch.equal(out, want)


def test_nan_is_not_hidden():
    q, k, v, plan = make(63, 24, (16, 16))
    q[0, 0, 5, 3] = float("nan")
    out, _ = block_sparse_attention(q, k, v, plan, backend="cpu")
    assert out[0, 0, 5].isnan().all()
    assert out.isnan().sum() <= 24


@pytest.mark.parametrize("block", [(1, 16), (3, 40), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_query_blocks(block, dtype):
    """Per-token routing: queries are gathered by the key block they list, so one meets several groups."""
    q, k, v, plan = make(200, 24, block, dtype=dtype)
    tensors = [x.requires_grad_() for x in (q, k[:, :1].clone(), v[:, :1].clone())]
    valid = torch.rand(1, 2, 200, generator=torch.Generator().manual_seed(1)) < 0.7

    def everything(backend, *tensors):
        out, lse = block_sparse_attention(*tensors, plan, valid=valid, backend=backend)
        loss = out.square().sum() + lse.masked_fill(lse == float("-inf"), 0).sum()
        return out, lse, *torch.autograd.grad(loss, tensors)

    wants = everything("reference", *(x.detach().double().requires_grad_() for x in tensors))
    bound = 5e-6 if dtype == torch.float32 else 1e-13
    for got, want in zip(everything("cpu", *tensors), wants, strict=True):
        assert torch.equal(got == float("-inf"), want == float("-inf"))
        error = (got.double() - want).nan_to_num(0).square().mean().sqrt()
        assert error <= bound * want.masked_fill(want == float("-inf"), 0).square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_a_well_behaved_op(dtype):
    q, k, v, plan = make(63, 24, (16, 16), dtype=dtype)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    valid = torch.rand(1, 1, 63) < 0.8
    for lists, counts in ((plan.indices, plan.counts), (plan.pack().bits, None)):
        arguments = (*tensors, lists, counts, [16, 16], plan.keys, valid, 0.2)
        torch.library.opcheck(torch.ops.dit_sparse.block_sparse_attention_cpu.default, arguments)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_compiles_into_one_graph(backend):
    q, k, v, plan = make(63, 24, (16, 16))

    def run(q, k, v):
        out, lse = block_sparse_attention(q * 2, k, v, plan, backend=backend)
        return out.sin(), lse

    def gradients(call):
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = call(*tensors)
        return out, lse, *torch.autograd.grad(out.sum() + lse.cos().sum(), tensors)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(run), gradients(compiled), strict=True):
        torch.testing.assert_close(a, b)


def test_auto_says_what_was_compiled():
    name, why = resolve_backend("cpu")
    assert name == "cpu"
    assert "compiled by" in why
