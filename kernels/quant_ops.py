"""The public op of quantised attention: arguments are checked here, once, and handed to one backend.

Letters: B batch, H query heads, KV key/value heads, Sq and Sk tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.ops import _check_plan, _check_tensors, _check_valid, _needs_grad, _scale
from dit_sparse.plan import PackedPlan, Plan

BACKENDS = ("reference", "triton")
QK, PV = ("int8", "fp8"), ("fp16", "fp8", "int8")

# Tokens of a block that share one scale, counted from the block's start.
GROUP = 128
# What the largest magnitude becomes: the largest integer, the largest e4m3 number; in float16 any.
LIMITS = {"int8": 127.0, "fp8": 448.0, "fp16": 1.0}
# What a weight of 1 becomes. In float8 a power of two, which rounds nothing: its precision is the same at any
# scale, and with 448 weights would vanish below 2 ** -18.8 instead of 2 ** -18.
WEIGHT_OF_ONE = {"int8": 127.0, "fp8": 256.0, "fp16": 1.0}
# What numbers of a kind are kept in.
STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp16": torch.float16}
# Peaks below this count as this, so that no scale is zero and none has an infinite inverse.
FLOOR = 2.0**-100


def quantized_block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | PackedPlan,
    *,
    qk: str = "int8",
    pv: str = "fp16",
    smooth_k: bool = True,
    valid: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention with one or both of its products in 8 bits. For inference.

    After SageAttention (https://arxiv.org/abs/2410.02367 and 2411.10958) and PAROAttention
    (https://arxiv.org/abs/2506.16054). Everything is rounded to nearest even, symmetrically about zero:

    * q and k with one scale for each query or key block, or each 128 tokens of a larger one. (SageAttention
      scales parts of its tiles, down to what one thread holds; PARO's kernels 32 queries and 64 keys.)
    * k first loses its mean over tokens, with ``smooth_k``. This adds one number to all scores of a query,
      which a softmax does not see, and removes what keys have in common, such as channels with a large bias.
    * The weights, at most 1 relative to the peak of their row, with a constant scale: 1/127 in int8 (PARO),
      1/256 in e4m3 (SageAttention2: 1/448), 1 in float16. They are summed before they are rounded.
    * v with one scale per channel and KV head, as in SageAttention2; in float16 too, against overflow.

    ``python -m dit_sparse.kernels.quant_error`` measures what this costs: ``kernels/QUANTIZATION.md``.

    Args:
        q: [B, H, Sq, D] in block order; float16, bfloat16 or float32.
        k, v: [B, KV, Sk, D] in block order; H is a multiple of KV.
        plan: The block lists, without a rule.
        qk: Of q and k: "int8" or "fp8" (e4m3).
        pv: Of the weights and v: "fp16" (summed in float32), "fp8" (e4m3) or "int8".
        smooth_k: Whether k loses its mean over the valid tokens of its head.
        valid: Which keys exist, bool [B or 1, H or KV or 1, Sk]; default all. The mean and the scales know
            no others.
        scale: Of the scores, above zero; default D ** -0.5.
        backend: "reference" emulates the rounding in float32 on any device, in memory linear in tokens;
            "triton" needs a GPU, for "fp8" one of NVIDIA's of compute capability 8.9 or newer. "auto" is
            "triton" for tensors on a GPU and "reference" elsewhere.

    Returns:
        out [B, H, Sq, D] in the dtype of ``q``, contiguous, and lse [B, H, Sq] in float32, the natural log of
        the sum of exponentials of the quantised scores. What ``smooth_k`` takes from the scores is added
        again: it merges with the lse of any other attention. A query that reads no key gets 0 and -inf.

    Raises:
        ValueError: Arguments that do not fit together, that the backend cannot honour or that need gradients.
    """
    _check_tensors(q, k, v)
    _check_plan(q, k, plan)
    _check_valid(q, k, valid)
    if q.dtype == torch.float64:
        raise ValueError("quantised attention takes float16, bfloat16 or float32, got float64")
    for name, got, known in (("qk", qk, QK), ("pv", pv, PV), ("backend", backend, ("auto", *BACKENDS))):
        if got not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {got!r}")
    if plan.rule is not None:
        raise ValueError(f"quantised attention reads whole blocks, got a plan with the rule {plan.rule!r}")
    if _needs_grad(q, k, v):
        raise ValueError(
            "quantised attention has no gradients: use torch.no_grad(), or block_sparse_attention to train"
        )
    scale = _scale(q, scale)
    if isinstance(plan, PackedPlan):
        plan = plan.unpack()
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        from dit_sparse.kernels.quant import attention
    else:
        from dit_sparse.kernels.quant_reference import attention
    return attention(q, k, v, plan, qk=qk, pv=pv, smooth_k=smooth_k, valid=valid, scale=scale)


def per_kv_head(valid: Tensor, kv_heads: int) -> Tensor:
    """Which keys exist for any of the query heads that share them: bool [B or 1, KV or 1, Sk]."""
    return valid if valid.shape[1] in (1, kv_heads) else valid.unflatten(1, (kv_heads, -1)).any(2)
