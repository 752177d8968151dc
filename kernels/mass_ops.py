"""The public probes, which look at scores and attend nothing: arguments are checked here, once.

Letters: B batch, H query heads, KV key heads, Sq and Sk tokens, D head dim, Q and K query and key blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from dit_sparse.kernels.operands import exact_dtype
from dit_sparse.kernels.ops import _check_tensors, _check_valid, _module, _scale
from dit_sparse.order import broadcast_heads
from dit_sparse.plan import pair_of

# Name of a backend -> the module that has `block_mass`, `block_statistics` and `block_means`.
BACKENDS = {
    "reference": "dit_sparse.kernels.reference",
    "cpu": "dit_sparse.kernels.cpu_mass",
    "triton": "dit_sparse.kernels.mass",
}


@torch.no_grad()
def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block: int | tuple[int, int],
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax mass of every block pair: one pass over the keys with a log-sum-exp that is known already.

    mass[i, j] is the sum over queries a of block i and existing keys c of block j of
    exp(scale * q_a . k_c - lse_a) (AdaSpa, arXiv 2502.21079). With the true ``lse`` each row adds up to the
    number of its queries; with that of an earlier step it does not, and single terms may be above one.

    Args:
        q: [B, H, Sq, D] in block order.
        k: [B, KV, Sk, D] in block order; H is a multiple of KV.
        lse: float32 [B, H, Sq], natural log, as attention returns it. A query whose lse is not finite has no
            mass: fill in infinity to leave it out.
        block: Tokens per block, or (query block, key block).
        valid: Which keys exist, bool [B or 1, H or KV or 1, Sk]; default all.
        scale: Of the scores, above zero; default D ** -0.5.
        backend: "auto" (see :func:`resolve_probe`), "reference", "cpu" or "triton".

    Returns:
        float32 [B, H, Q, K] (float64 for float64 inputs), without gradient. Memory beside it is linear in Sq
        and Sk, except for "reference".

    Raises:
        ValueError: Arguments that do not fit together, or that the backend cannot honour.
    """
    scale = _check_probe(q, k, lse, valid, scale)
    return _probe(q, backend).block_mass(q, k, lse, pair_of(block), valid=valid, scale=scale)


@torch.no_grad()
def block_statistics(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block: int | tuple[int, int],
    small: float,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The pass of :func:`block_mass`, which also looks at single probabilities (PARO's metrics need them).

    Args:
        small: What counts as small.
        q, k, lse, block, valid, scale, backend: As in :func:`block_mass`.

    Returns:
        mass, peak and count, each [B, H, Q, K]: peak is the largest probability of a block pair, 0 where
        there is none, in the dtype of mass; count is how many are below ``small``, int32. Keys that do not
        exist and queries without a finite lse do not count.

    Raises:
        ValueError: As :func:`block_mass`.
    """
    scale = _check_probe(q, k, lse, valid, scale)
    return _probe(q, backend).block_statistics(q, k, lse, pair_of(block), small, valid=valid, scale=scale)


@torch.no_grad()
def pooled_scores(
    q: Tensor,
    k: Tensor,
    block: int | tuple[int, int],
    *,
    valid: Tensor | None = None,
    query_valid: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scores of block means: scale * mean of query block i . mean of key block j.

    The means are those of :func:`dit_sparse.plan.pool`, but stay float32: in bfloat16 they would give ties.

    Args:
        q: [B, H, Sq, D] in block order.
        k: [B, KV, Sk, D] in block order; H is a multiple of KV.
        block: Tokens per block, or (query block, key block).
        valid, query_valid: Which keys and queries exist, bool [B or 1, H or KV or 1, Sk or Sq]; default all.
        scale: Of the scores, above zero; default D ** -0.5.
        backend: As in :func:`block_mass`.

    Returns:
        float32 [B, H, Q, K] (float64 for float64 inputs), without gradient; 0 where a block has no token.

    Raises:
        ValueError: As :func:`block_mass`.
    """
    _check_tensors(q, k, k)
    _check_valid(q, k, valid)
    _check_valid(q, k, query_valid, of_queries=True)
    scale = _scale(q, scale)
    exact = exact_dtype(q.dtype)
    block_q, block_k = pair_of(block)
    if valid is not None and valid.shape[1] > k.shape[1]:
        k = k.repeat_interleave(valid.shape[1] // k.shape[1], 1)
    if query_valid is not None:
        query_valid = broadcast_heads(query_valid, q.shape[1])
    means = _probe(q, backend).block_means
    queries, keys = means(q, block_q, query_valid, exact), means(k, block_k, valid, exact)
    # The query heads that share keys as one matrix: no copy of the keys for each.
    grouped = queries.reshape(len(q), k.shape[1], -1, q.shape[3])
    return (grouped @ keys.mT).view(*queries.shape[:3], keys.shape[2]).mul_(scale)


def resolve_probe(device: torch.device | str) -> tuple[str, str]:
    """What "auto" means for probes on ``device``: the backend's name, and one sentence why."""
    kind = torch.device(device).type
    if kind == "cpu":
        return "cpu", "tensors are on the CPU: tiles of scores in its caches"
    if kind == "cuda" and find_spec("triton") is not None:
        return "triton", "a GPU with triton installed"
    missing = "triton is not installed" if kind == "cuda" else f"no kernel for device type {kind!r}"
    return "reference", f"{missing}, so the quadratic eager definition"


def define(backend: str, probe: Callable) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """``block_mass`` and ``block_statistics`` of one backend, out of the function that computes both.

    Args:
        probe: (q, k, lse, valid, block, scale, small) -> mass, peak and count, the last two only where
            ``small`` is not None.
    """

    def mass(
        q: Tensor, k: Tensor, lse: Tensor, valid: Tensor | None, block: Sequence[int], scale: float
    ) -> Tensor:
        return probe(q, k, lse, valid, block, scale, None)[0]

    def statistics(
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        valid: Tensor | None,
        block: Sequence[int],
        scale: float,
        small: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return probe(q, k, lse, valid, block, scale, small)

    mass_op = torch.library.custom_op(f"dit_sparse::block_mass_{backend}", mass, mutates_args=())
    statistics_op = torch.library.custom_op(
        f"dit_sparse::block_statistics_{backend}", statistics, mutates_args=()
    )

    @mass_op.register_fake
    def fake(q, k, lse, valid, block, scale):
        shape = (*q.shape[:2], -(-q.shape[2] // block[0]), -(-k.shape[2] // block[1]))
        return q.new_empty(shape, dtype=exact_dtype(q.dtype))

    @statistics_op.register_fake
    def _(q, k, lse, valid, block, scale, small):
        mass, peak = (fake(q, k, lse, valid, block, scale) for _ in range(2))
        return mass, peak, torch.empty_like(mass, dtype=torch.int32)

    def block_mass(q, k, lse, block, *, valid, scale):
        return mass_op(q, k, lse, valid, block, scale)

    def block_statistics(q, k, lse, block, small, *, valid, scale):
        return statistics_op(q, k, lse, valid, block, scale, small)

    return block_mass, block_statistics


def _probe(q: Tensor, backend: str) -> ModuleType:
    if backend == "auto":
        backend, _ = resolve_probe(q.device)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, known are auto, {', '.join(BACKENDS)}")
    return _module(BACKENDS[backend])


def _check_probe(q: Tensor, k: Tensor, lse: Tensor, valid: Tensor | None, scale: float | None) -> float:
    """Returns the scale."""
    _check_tensors(q, k, k)
    _check_valid(q, k, valid)
    if lse.shape != q.shape[:3] or lse.dtype not in (torch.float32, exact_dtype(q.dtype)):
        raise ValueError(f"lse must be float32 {tuple(q.shape[:3])}, got {lse.dtype} {tuple(lse.shape)}")
    if lse.device != q.device:
        raise ValueError(f"lse is on {lse.device}, q on {q.device}")
    return _scale(q, scale)
