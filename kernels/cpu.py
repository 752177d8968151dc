"""The CPU backend: ``cpu.cpp``, compiled at first use. Where that is not possible, there is ``gathered.py``.

Letters: B batch, H query heads, KV key/value heads, S tokens (SQ, SK), D head dim, Q and K blocks.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dit_sparse.kernels.build import compiled, load
from dit_sparse.kernels.operands import empty_as, empty_results, exact_dtype, lead_strides, unit_stride
from dit_sparse.plan import PackedPlan, Plan


class _Tensor4(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )


_TENSORS = ("q", "k", "v", "out", "lse", "grad_out", "grad_lse", "grad_q", "grad_k", "grad_v")
_POINTERS = ("indices", "counts", "bits", "valid")
_SIZES = (
    *("list_batch", "list_head", "list_row", "count_batch", "count_head"),
    *("valid_batch", "valid_head", "valid_heads"),
    *("batch", "heads", "kv_heads", "queries", "keys", "dim", "block_q", "block_k", "rows", "columns"),
)


class _Problem(ctypes.Structure):
    """``Problem`` of cpu.cpp."""

    _fields_ = (
        *((name, _Tensor4) for name in _TENSORS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
        ("threads", ctypes.c_int64),
        ("parts", ctypes.c_int64),
    )


def _call(
    name: str,
    tensors: dict[str, Tensor],
    lists: Tensor,
    counts: Tensor | None,
    block: list[int],
    columns: int,
    valid: Tensor | None,
    scale: float,
    parts: int = 1,
) -> None:
    q, k = tensors["q"], tensors["k"]
    problem = _Problem()
    for key, x in tensors.items():
        setattr(problem, key, _Tensor4(x.data_ptr(), *x.stride()[:3]))
    if counts is None:
        problem.bits = lists.data_ptr()
    else:
        problem.indices, problem.counts = lists.data_ptr(), counts.data_ptr()
        problem.count_batch, problem.count_head = lead_strides(counts)
    problem.list_batch, problem.list_head, problem.list_row = *lead_strides(lists), lists.stride(2)
    if valid is not None:
        valid = valid.contiguous()
        problem.valid, problem.valid_heads = valid.data_ptr(), valid.shape[1]
        problem.valid_batch, problem.valid_head = lead_strides(valid)
    problem.batch, problem.heads, problem.queries, problem.dim = q.shape
    problem.kv_heads, problem.keys = k.shape[1:3]
    problem.block_q, problem.block_k = block
    problem.rows, problem.columns = lists.shape[2], columns
    problem.scale, problem.threads, problem.parts = scale, torch.get_num_threads(), parts
    kind = "double" if q.dtype == torch.float64 else "float"
    library, why = load()
    assert library is not None, why
    getattr(library, f"{name}_{kind}")(ctypes.byref(problem))


def _exact(x: Tensor) -> Tensor:
    """In float32 (float64 stays), rows contiguous."""
    return unit_stride(x.to(exact_dtype(x.dtype)))


@torch.library.custom_op("dit_sparse::block_sparse_attention_cpu", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    counts: Tensor | None,
    block: list[int],
    columns: int,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    tensors = {"q": _exact(q), "k": _exact(k), "v": _exact(v)}
    out, lse = empty_results(tensors["q"])
    _call("forward", tensors | {"out": out, "lse": lse}, lists, counts, block, columns, valid, scale)
    return out.to(q.dtype), lse


@_forward.register_fake
def _(q, k, v, lists, counts, block, columns, valid, scale):
    return empty_results(q)


@torch.library.custom_op("dit_sparse::block_sparse_attention_cpu_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
    counts: Tensor | None,
    block: list[int],
    columns: int,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    named = {"q": q, "k": k, "v": v, "out": out, "grad_out": grad_out, "grad_lse": grad_lse, "lse": lse}
    tensors = {name: _exact(x) for name, x in named.items()}
    tensors["grad_q"] = torch.zeros(q.shape, dtype=lse.dtype)
    # Each part of a head's work has sums of its own for keys and values: as few as keep the threads busy.
    parts = min(8, -(-torch.get_num_threads() // (q.shape[0] * k.shape[1])))
    lanes = 64 // lse.element_size()  # of the widest vector registers
    padded = (*k.shape[:3], -(-k.shape[3] // lanes) * lanes)
    slabs = {name: torch.zeros(parts, *padded, dtype=lse.dtype) for name in ("grad_k", "grad_v")}
    tensors |= {name: slab[0] for name, slab in slabs.items()}
    _call("backward", tensors, lists, counts, block, columns, valid, scale, parts)
    for slab in slabs.values():
        for part in slab[1:]:
            slab[0] += part
    grad_k, grad_v = (slab[0, ..., : k.shape[3]].to(k.dtype).contiguous() for slab in slabs.values())
    return tensors["grad_q"].to(q.dtype), grad_k, grad_v


@_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, lists, counts, block, columns, valid, scale):
    return empty_as(q, k, v)


def _save(ctx, inputs, output):
    q, k, v, lists, counts, block, columns, valid, scale = inputs
    ctx.save_for_backward(q, k, v, *output, lists, counts, valid)
    ctx.block, ctx.columns, ctx.scale = block, columns, scale


def _differentiate(ctx, grad_out, grad_lse):
    q, k, v, out, lse, lists, counts, valid = ctx.saved_tensors
    grads = _backward(
        grad_out, grad_lse, q, k, v, out, lse, lists, counts, ctx.block, ctx.columns, valid, ctx.scale
    )
    return (*grads, None, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | PackedPlan,
    *,
    valid: Tensor | None,
    scale: float,
    positions: None,
) -> tuple[Tensor, Tensor]:
    """See :func:`dit_sparse.kernels.block_sparse_attention`. Both results are differentiable.

    Raises:
        ValueError: Tensors that are not on the CPU, or no compiler.
    """
    assert positions is None, "rules are refused before a kernel is chosen"
    if q.device.type != "cpu":
        raise ValueError(f"the cpu backend needs tensors on the CPU, got {q.device}")
    there, why = compiled()
    if not there:
        raise ValueError(f"the cpu backend cannot run, for {why}; use 'gathered'")
    if isinstance(plan, PackedPlan):
        return _forward(q, k, v, plan.bits, None, plan.block, plan.keys, valid, scale)
    return _forward(q, k, v, plan.indices, plan.counts, plan.block, plan.keys, valid, scale)
