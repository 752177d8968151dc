"""Linear attention by matrix products of PyTorch, one head at a time: the CPU's backend, on any device.

With a column of ones beside v, the state [F, D + 1] of a key block holds both sums: phi(k)^T [v, 1]. What
query blocks read is one product of the 0/1 matrix of unlisted blocks [Q, K] with the states [K, F * (D + 1)].
It costs the same whatever a plan lists, and adds only what is read: nothing is subtracted, nothing cancels.
Without a plan there is one block of queries and one of keys.
Letters: B batch, H query heads, KV key/value heads, S tokens, D head dim, F features, Q and K blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_sparse.kernels.linear_ops import define
from dit_sparse.kernels.operands import empty_as, empty_results, exact_dtype

# The states of as many query blocks as fit here are made at a time.
CHUNK_BYTES = 32 << 20


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    valid: Tensor | None,
    block: list[int],
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    exact, group = exact_dtype(q.dtype), q.shape[1] // k.shape[1]
    out, inverse = empty_results(q)
    for b, kv in product(range(k.shape[0]), range(k.shape[1])):
        keys = _blocks(_key_features(k, valid, b, kv, feature_map), block[1])
        states = keys.mT @ _blocks(_with_ones(v[b, kv].to(exact)), block[1])
        for h in range(kv * group, (kv + 1) * group):
            queries = _blocks(_features(q[b, h].to(exact), feature_map), block[0])
            chunks = _chunks(indices, counts, b, h, states)
            sums = _tokens([queries[rows] @ _sum(unlisted, states) for rows, unlisted in chunks], q.shape[2])
            total = sums[:, -1]
            inverse[b, h] = torch.where(total > 0, 1 / (total + eps), 0)
            out[b, h] = sums[:, :-1] * inverse[b, h, :, None]
    return out, inverse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inverse: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    valid: Tensor | None,
    block: list[int],
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    exact, group = exact_dtype(q.dtype), q.shape[1] // k.shape[1]
    grad_q, grad_k, grad_v = empty_as(q, k, v)
    for b, kv in product(range(k.shape[0]), range(k.shape[1])):
        keys = _blocks(_key_features(k, valid, b, kv, feature_map), block[1])
        values = _blocks(_with_ones(v[b, kv].to(exact)), block[1])
        states = keys.mT @ values
        grad_states = torch.zeros_like(states)
        for h in range(kv * group, (kv + 1) * group):
            queries = _blocks(_features(q[b, h].to(exact), feature_map), block[0])
            scale = _blocks(inverse[b, h, :, None], block[0])
            outer = _blocks(grad[b, h].to(exact), block[0]) * scale
            parts = []
            for rows, unlisted in _chunks(indices, counts, b, h, states):
                read = _sum(unlisted, states)
                # out is all sums but the last times the inverse, which falls as the last one grows.
                sums = queries[rows] @ read[..., :-1]
                last = -(outer[rows] * sums).sum(-1, keepdim=True) * scale[rows]
                grad_sums = torch.cat((outer[rows], last), -1)
                grad_states += _sum(unlisted.T, queries[rows].mT @ grad_sums)
                parts.append(_pull_back(queries[rows], grad_sums @ read.mT, feature_map))
            grad_q[b, h] = _tokens(parts, q.shape[2])
        grad_k[b, kv] = _tokens([_pull_back(keys, values @ grad_states.mT, feature_map)], k.shape[2])
        grad_v[b, kv] = _tokens([keys @ grad_states[..., :-1]], k.shape[2])
    return grad_q, grad_k, grad_v


def _features(x: Tensor, feature_map: str) -> Tensor:
    if feature_map == "hedgehog":
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)
    if feature_map == "softmax":
        return x.softmax(-1)
    return torch.nn.functional.elu(x) + 1 if feature_map == "elu" else x.relu()


def _pull_back(phi: Tensor, grad: Tensor, feature_map: str) -> Tensor:
    """The gradient of x from that of phi(x)."""
    if feature_map == "elu":
        return grad * phi.clamp(max=1)
    if feature_map == "relu":
        return grad * (phi > 0)
    if feature_map == "hedgehog":
        positive, negative = (
            _pull_back(p, g, "softmax") for p, g in zip(phi.chunk(2, -1), grad.chunk(2, -1), strict=True)
        )
        return positive - negative
    return phi * (grad - (phi * grad).sum(-1, keepdim=True))


def _key_features(k: Tensor, valid: Tensor | None, b: int, kv: int, feature_map: str) -> Tensor:
    phi = _features(k[b, kv].to(exact_dtype(k.dtype)), feature_map)
    if valid is None:
        return phi
    return phi * valid[b * valid.shape[0] // k.shape[0], kv * valid.shape[1] // k.shape[1], :, None]


def _with_ones(x: Tensor) -> Tensor:
    return pad(x, (0, 1), value=1.0)


def _blocks(x: Tensor, size: int) -> Tensor:
    """[S, F] -> [blocks, size, F]; the tail of a ragged last block is zeros."""
    return pad(x, (0, 0, 0, -x.shape[0] % size)).unflatten(0, (-1, size))


def _tokens(parts: list[Tensor], length: int) -> Tensor:
    """The inverse of :func:`_blocks`, from parts of the blocks."""
    return torch.cat(parts).flatten(0, 1)[:length]


def _sum(chosen: Tensor, states: Tensor) -> Tensor:
    """[rows, K] of 0 and 1, [K, F, D + 1] -> [rows, F, D + 1]."""
    return (chosen @ states.flatten(1)).unflatten(1, states.shape[1:])


def _chunks(
    indices: Tensor | None, counts: Tensor | None, b: int, h: int, states: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Some query blocks of a head at a time, and which key blocks their lists leave: [rows, K], 1 or 0."""
    if indices is None or counts is None:
        yield slice(0, 1), states.new_ones((1, 1))
        return
    # A plan for every batch item or head has one entry on that axis.
    indices, counts = (x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)] for x in (indices, counts))
    step = max(1, CHUNK_BYTES // (states[0].numel() * states.element_size()))
    slots = torch.arange(indices.shape[1], device=indices.device)
    for first in range(0, len(indices), step):
        rows = slice(first, min(first + step, len(indices)))
        listed = torch.where(slots < counts[rows, None], indices[rows], len(states)).long()
        unlisted = states.new_ones((len(listed), len(states) + 1)).scatter_(1, listed, 0)
        yield rows, unlisted[:, :-1]


attention = define("cpu", _forward, _backward)
