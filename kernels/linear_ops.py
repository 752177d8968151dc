"""The public op of linear attention: arguments are checked here, once, and handed to one backend.

Letters: B batch, H query heads, KV key/value heads, Sq and Sk tokens, D head dim, F features, Q and K blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from dit_sparse.kernels.operands import empty_as, empty_results
from dit_sparse.kernels.ops import _check_plan, _check_tensors, _check_valid
from dit_sparse.order import broadcast_heads
from dit_sparse.plan import PackedPlan, Plan

BACKENDS = ("reference", "cpu", "triton")
FEATURE_MAPS = ("softmax", "elu", "relu", "hedgehog")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | PackedPlan | None = None,
    *,
    feature_map: str = "softmax",
    weights: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
    eps: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bidirectional linear attention: phi(q) (sum phi(k)^T v) / (phi(q) . sum phi(k) + eps).

    The sums go over all keys or, with a plan, for each query block over the key blocks the plan does *not*
    list: the variants "all" and "rest" of SLA (https://arxiv.org/abs/2509.24006). A query whose weights
    phi(q) . phi(k) sum to 0, because nothing is left or, with "relu", by chance, gets 0 and has no gradient.

    Args:
        q: [B, H, Sq, D], in block order where there is a plan.
        k, v: [B, KV, Sk, D]; H is a multiple of KV.
        plan: Blocks to leave out, those that softmax attention takes; None leaves out none.
        feature_map: phi, on each head vector x: "softmax" over the head dim, "elu" (elu(x) + 1), "relu", or
            "hedgehog": [softmax(x W), softmax(-x W)] (https://arxiv.org/abs/2402.04347, LinVideo's choice).
        weights: For "hedgehog" and only there, W of queries and of keys, each [H or KV or 1, D, D] in any
            dtype. Differentiable.
        valid: Which keys exist, bool [B or 1, H or KV or 1, Sk]; default all. Holes and padding are False.
        eps: Added to the denominator; default 1e-5 without a plan and 0 with one, as in the authors' code.
        backend: "reference" (quadratic in time and memory), "cpu" (matrix products of PyTorch, any device),
            "triton", or "auto": "triton" on a GPU where it is installed and takes the dtype, else "cpu".

    Returns:
        [B, H, Sq, D] in the dtype of ``q``, contiguous; summed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: Arguments that do not fit together, or that the backend cannot honour.
    """
    _check_tensors(q, k, v)
    _check_valid(q, k, valid)
    _check_features(q, k, feature_map, weights)
    if plan is not None:
        _check_plan(q, k, plan)
        if plan.rule is not None:
            raise ValueError(
                f"linear attention leaves out whole blocks, but the plan has the rule {plan.rule!r}"
            )
        if isinstance(plan, PackedPlan):
            plan = plan.unpack()
    if eps is None:
        eps = 1e-5 if plan is None else 0.0
    elif not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number, zero or above, got {eps}")
    if backend == "auto":
        served = q.is_cuda and q.dtype != torch.float64 and find_spec("triton") is not None
        backend = "triton" if served else "cpu"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, known are auto, {', '.join(BACKENDS)}")
    if backend == "reference":
        from dit_sparse.kernels import reference

        return reference.linear_attention(
            q, k, v, plan, feature_map=feature_map, weights=weights, valid=valid, eps=eps
        )
    if backend == "triton":
        from dit_sparse.kernels.linear import attention
    else:
        from dit_sparse.kernels.cpu_linear import attention

    group = q.shape[1] // k.shape[1]
    if group > 1 and q.shape[1] in (
        valid.shape[1] if valid is not None else 1,
        weights[1].shape[0] if weights is not None else 1,
    ):
        # What the query heads of a group sum over differs, so each needs keys of its own.
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if weights is not None:
        q, k = (
            x @ broadcast_heads(w[None], x.shape[1]).to(x.dtype) for x, w in zip((q, k), weights, strict=True)
        )
    if valid is not None:
        valid = broadcast_heads(valid, k.shape[1])
    if plan is None or plan.indices.shape[-1] == 0:
        return attention(q, k, v, None, None, valid, [q.shape[2], k.shape[2]], feature_map, eps)[0]
    return attention(q, k, v, plan.indices, plan.counts, valid, list(plan.block), feature_map, eps)[0]


def define(backend: str, forward: Callable, backward: Callable) -> Callable[..., tuple[Tensor, Tensor]]:
    """The differentiable op of one backend, out of its two functions.

    Args:
        forward: (q, k, v, indices, counts, valid, block, feature_map, eps) -> out and, for the backward, the
            inverse of each query's denominator [B, H, Sq], 0 where its weights sum to 0. ``valid`` is per key
            head; "hedgehog" is given x W for x.
        backward: (gradient of out, q, k, v, inverse, then as ``forward``) -> gradients of q, k and v.
    """
    name = f"dit_sparse::linear_attention_{backend}"
    forward_op = torch.library.custom_op(name, forward, mutates_args=())
    backward_op = torch.library.custom_op(f"{name}_backward", backward, mutates_args=())

    @forward_op.register_fake
    def _(q, k, v, *rest):
        return empty_results(q)

    @backward_op.register_fake
    def _(grad, q, k, v, *rest):
        return empty_as(q, k, v)

    def save(ctx, inputs, output):
        q, k, v, indices, counts, valid, *ctx.rest = inputs
        ctx.save_for_backward(q, k, v, output[1], indices, counts, valid)

    def differentiate(ctx, grad, _):
        grads = backward_op(grad, *ctx.saved_tensors, *ctx.rest)
        return (*grads, *[None] * (3 + len(ctx.rest)))

    forward_op.register_autograd(differentiate, setup_context=save)
    return forward_op


def _check_features(q: Tensor, k: Tensor, feature_map: str, weights: tuple[Tensor, Tensor] | None) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"unknown feature_map {feature_map!r}, known are {', '.join(FEATURE_MAPS)}")
    if (weights is not None) != (feature_map == "hedgehog"):
        raise ValueError(
            f"feature_map 'hedgehog' takes weights and no other does, got {feature_map!r} "
            f"with{'out' if weights is None else ''} weights"
        )
    for name, w in zip(("queries", "keys"), weights or (), strict=False):
        heads, dim = (1, k.shape[1], q.shape[1]), q.shape[3]
        if w.ndim != 3 or w.shape[0] not in heads or w.shape[1:] != (dim, dim):
            raise ValueError(
                f"the weights of {name} must be [1 or {heads[1]} or {heads[2]}, {dim}, {dim}], "
                f"got {tuple(w.shape)}"
            )
        if w.device != q.device:
            raise ValueError(f"the weights of {name} are on {w.device}, q on {q.device}")
