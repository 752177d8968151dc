"""The public attention ops: arguments are checked here, once, and handed to one backend.

Letters: B batch, H query heads, KV key/value heads, S sequence (Sq, Sk where they differ), D head dim,
Q and K query and key blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from dit_sparse.plan import PackedPlan, Plan, Rule, blocks_of

# Name of a backend -> the module that has its `attention` function, imported on first use.
BACKENDS = {
    "reference": "dit_sparse.kernels.reference",
    "cpu": "dit_sparse.kernels.cpu",
    "gathered": "dit_sparse.kernels.gathered",
    "flex": "dit_sparse.kernels.flex",
    "triton": "dit_sparse.kernels.block_sparse",
}
HONOUR_RULE = frozenset({"reference", "gathered", "flex"})
READ_BITS = frozenset({"cpu", "triton"})
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | PackedPlan,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which each query block reads only the key blocks its plan lists.

    Args:
        q: [B, H, Sq, D] in block order.
        k, v: [B, KV, Sk, D] in block order; H is a multiple of KV.
        plan: The block lists, or the same as bits; ceil(Sq / block[0]) rows over ceil(Sk / block[1]) key
            blocks.
        valid: Which keys exist, bool [B or 1, H or KV or 1, Sk]; default all. Holes and padding are False.
        scale: Of the scores, above zero; default D ** -0.5.
        positions: Original position of each slot, int64 [1 or KV or H, S], read only where ``plan.rule`` is
            set (then Sq = Sk = S); default 0, 1, ... Holes are told by ``valid``, not by a position of -1.
        backend: "auto" (see :func:`resolve_backend`), "reference", "cpu", "gathered" (PyTorch operations on
            the CPU), "flex" or "triton".

    Returns:
        out [B, H, Sq, D] in the dtype of ``q``, contiguous, and lse [B, H, Sq], the natural log of the sum of
        exponentials, in float32 (float64 for float64 inputs). A query that reads no key gets 0 and -inf.

    Raises:
        ValueError: Arguments that do not fit together, or that the backend cannot honour.
    """
    _check_tensors(q, k, v)
    _check_plan(q, k, plan)
    _check_extras(q, k, plan, valid, positions)
    scale = _scale(q, scale)
    if backend == "auto":
        backend, _ = resolve_backend(q.device, needs_grad=_needs_grad(q, k, v), rule=plan.rule)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, known are auto, {', '.join(BACKENDS)}")
    if plan.rule is not None and backend not in HONOUR_RULE:
        raise ValueError(
            f"backend {backend!r} cannot honour the rule {plan.rule!r} of this plan, "
            f"use one of {', '.join(sorted(HONOUR_RULE))}"
        )
    if isinstance(plan, PackedPlan) and backend not in READ_BITS:
        plan = plan.unpack()
    where = positions if plan.rule is not None else None
    return _module(BACKENDS[backend]).attention(q, k, v, plan, valid=valid, scale=scale, positions=where)


def resolve_backend(
    device: torch.device | str,
    *,
    needs_grad: bool = False,
    needs_lse: bool = False,
    rule: Rule | None = None,
) -> tuple[str, str]:
    """What "auto" means on ``device``: the backend's name, and one sentence why.

    Args:
        device: Where the tensors live.
        needs_grad: Gradients will be asked for.
        needs_lse: The log-sum-exp will be used; every backend chosen here returns it.
        rule: The plan's rule, if it has one.
    """
    kind = torch.device(device).type
    needs = [n for n, asked in (("gradients", needs_grad), ("the log-sum-exp", needs_lse)) if asked]
    gives = f", which gives {' and '.join(needs)}" if needs else ""
    if kind == "cpu":
        if rule is not None:
            there, why = False, "the plan has a token-level rule, which the compiled kernels do not take"
        else:
            from dit_sparse.kernels.build import compiled

            there, why = compiled()
        if there:
            return "cpu", f"tensors are on the CPU: {why}{gives}"
        return "gathered", f"gathered key blocks and PyTorch's fused attention, for {why}{gives}"
    if kind == "cuda":
        if rule is not None:
            return "flex", f"the plan has a token-level rule, which the triton kernels do not take{gives}"
        if find_spec("triton") is None:
            return "flex", f"triton is not installed{gives}"
        return "triton", f"a GPU with triton installed{gives}"
    return "reference", f"no kernel for device type {kind!r}, so the quadratic eager definition{gives}"


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attentions of the same queries over disjoint sets of keys into the attention over all of them.

    Args:
        outs: Each [B, H, S, D].
        lses: Each [B, H, S], natural log; -inf marks a query that read no key (its out is 0).

    Returns:
        out [B, H, S, D] in the dtype of ``outs[0]`` and lse [B, H, S] in float32 (float64 if any lse is). A
        query that is empty in every part gets 0 and -inf. Differentiable in both arguments.

    Raises:
        ValueError: No parts, unequal numbers of them, or shapes that differ.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge needs as many outs as lses, at least one, got {len(outs)} and {len(lses)}")
    for name, parts, shape in (("outs", outs, outs[0].shape), ("lses", lses, outs[0].shape[:-1])):
        for i, part in enumerate(parts):
            if part.shape != shape:
                raise ValueError(f"{name}[{i}] has shape {tuple(part.shape)}, expected {tuple(shape)}")
    exact = torch.float64 if any(x.dtype == torch.float64 for x in lses) else torch.float32
    stacked = torch.stack([x.to(exact) for x in lses])
    # The peak cancels out, so it carries no gradient; 0 stands in for it where every part is empty.
    peak = stacked.detach().amax(0)
    empty = peak == float("-inf")
    peak = peak.masked_fill(empty, 0)
    weights = (stacked - peak).exp()
    total = weights.sum(0).masked_fill(empty, 1)
    shares = weights / total
    out = torch.zeros_like(outs[0], dtype=stacked.dtype)
    for share, part in zip(shares, outs, strict=True):
        out = out + share[..., None] * part.to(stacked.dtype)
    lse = (total.log() + peak).masked_fill(empty, float("-inf"))
    return out.to(outs[0].dtype).contiguous(), lse


def _module(name: str) -> ModuleType:
    """The module of a backend, imported on first use, also while ``torch.compile`` traces this."""
    _ensure_imported(name)
    return sys.modules[name]


@torch.compiler.assume_constant_result
def _ensure_imported(name: str) -> bool:
    import_module(name)
    return True


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a finite number above zero, got {scale}")
    return scale


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 axes [B, H, S, D], got shape {tuple(x.shape)}")
        if x.dtype != q.dtype or x.dtype not in DTYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(
                f"q, k, v must share one dtype out of {known}; q is {q.dtype}, {name} is {x.dtype}"
            )
        if x.device != q.device:
            raise ValueError(f"q, k, v must be on one device; q is on {q.device}, {name} on {x.device}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k differ in batch or head dim: {tuple(q.shape)} and {tuple(k.shape)}")
    if not 1 <= q.shape[3] <= 256:
        raise ValueError(f"head dim must lie in 1..256, got {q.shape[3]}")
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"q and k must not be empty, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key/value heads, got {q.shape[1]} and {k.shape[1]}"
        )


def _check_plan(q: Tensor, k: Tensor, plan: Plan | PackedPlan) -> None:
    lists = plan.bits if isinstance(plan, PackedPlan) else plan.indices
    batch, heads, rows, _ = lists.shape
    for name, got, length, block in (
        ("query", rows, q.shape[2], plan.block[0]),
        ("key", plan.keys, k.shape[2], plan.block[1]),
    ):
        expected = blocks_of(length, block)
        if got != expected:
            raise ValueError(
                f"the plan has {got} {name} blocks of {block}, but {length} {name} tokens fill {expected}"
            )
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
        raise ValueError(
            f"the plan is for batch {batch} and {heads} heads, "
            f"expected 1 or {q.shape[0]} and 1 or {q.shape[1]} as in q {tuple(q.shape)}"
        )
    if lists.device != q.device:
        raise ValueError(f"the plan is on {lists.device}, q on {q.device}; use plan.to(q.device)")


def _check_valid(q: Tensor, k: Tensor, valid: Tensor | None, *, of_queries: bool = False) -> None:
    if valid is None:
        return
    name, of = ("query_valid", q) if of_queries else ("valid", k)
    batch, heads, kv_heads, tokens = q.shape[0], q.shape[1], k.shape[1], of.shape[2]
    shape = tuple(valid.shape)
    fits = (
        valid.ndim == 3 and shape[0] in (1, batch) and shape[1] in (1, kv_heads, heads) and shape[2] == tokens
    )
    if valid.dtype != torch.bool or not fits:
        raise ValueError(
            f"{name} must be bool [1 or {batch}, 1 or {kv_heads} or {heads}, {tokens}], "
            f"got {valid.dtype} {shape}"
        )
    if valid.device != q.device:
        raise ValueError(f"{name} is on {valid.device}, q on {q.device}")


def _check_extras(
    q: Tensor, k: Tensor, plan: Plan | PackedPlan, valid: Tensor | None, positions: Tensor | None
) -> None:
    heads, kv_heads, keys = q.shape[1], k.shape[1], k.shape[2]
    _check_valid(q, k, valid)
    if plan.rule is None:
        return
    if q.shape[2] != keys:
        raise ValueError(f"a plan with a rule needs as many queries as keys, got {q.shape[2]} and {keys}")
    if positions is not None:
        shape = tuple(positions.shape)
        fits = positions.ndim == 2 and shape[0] in (1, kv_heads, heads) and shape[1] == keys
        if positions.dtype != torch.int64 or not fits:
            raise ValueError(
                f"positions must be int64 [1 or {kv_heads} or {heads}, {keys}], got {positions.dtype} {shape}"
            )
        if positions.device != q.device:
            raise ValueError(f"positions are on {positions.device}, q on {q.device}")
