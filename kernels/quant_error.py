"""Measure the error of quantised attention against float64, and print it as a page of Markdown.

python -m dit_sparse.kernels.quant_error > kernels/QUANTIZATION.md
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.ops import block_sparse_attention
from dit_sparse.kernels.quant_ops import PV, QK, quantized_block_sparse_attention
from dit_sparse.plan import Plan

HEADS, TOKENS, BLOCK, DENSITY = 2, 1536, 64, 0.3
DATA = ("normal", "outliers", "sink")
INTRODUCTION = f"""# Error of quantised attention

Written by `python -m dit_sparse.kernels.quant_error`; change nothing by hand.

The emulation (`backend="reference"`: it rounds what the GPU kernels round) against attention in float64 over
the same blocks: {HEADS} heads, {TOKENS} tokens, blocks of {BLOCK}, a random plan of density {DENSITY}. Inputs
are bfloat16 numbers given as float32, so that all of the error is quantisation. `out` is the RMS of the error
over the RMS of the result, `lse` the RMS of its error in nats, each with and without `smooth_k`.

* normal: q, k, v are independent and standard normal: diffuse attention.
* outliers: as normal, and every eighth channel of k has a bias of 5 to 10, the same for all tokens of a head.
* sink: as normal, and one key that every query reads scores about 7 above the rest, as in attention sinks.

| D | data | qk | pv | out | out, not smoothed | lse | lse, not smoothed |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


class Row(NamedTuple):
    """One line of the page; figures as in its heading."""

    head_dim: int
    data: str
    qk: str
    pv: str
    out: float
    out_raw: float
    lse: float
    lse_raw: float


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def inputs(data: str, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Plan]:
    """q, k, v and the plan of one kind of :data:`DATA`, the same in every call."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, TOKENS, head_dim, generator=g) for _ in range(3))
    blocks = TOKENS // BLOCK
    keep = torch.rand(HEADS, blocks, blocks, generator=g) < DENSITY
    keep[:, :, 0] = True
    bias = torch.rand(1, HEADS, 1, head_dim, generator=g) * 5 + 5
    if data == "outliers":
        k[..., ::8] += bias[..., ::8]
    if data == "sink":
        common = torch.randn(1, HEADS, 1, head_dim, generator=g)
        q += common
        k[:, :, :1] += 7 * head_dim**0.5 * common / common.square().sum(-1, keepdim=True)
    return q.bfloat16().float(), k.bfloat16().float(), v.bfloat16().float(), Plan.from_blocks(keep, BLOCK)


def measure(head_dim: int) -> list[Row]:
    rows = []
    for data in DATA:
        q, k, v, plan = inputs(data, head_dim)
        exact, exact_lse = block_sparse_attention(
            q.double(), k.double(), v.double(), plan, backend="reference"
        )
        for qk, pv in itertools.product(QK, PV):
            found = []
            for smooth in (True, False):
                out, lse = quantized_block_sparse_attention(
                    q, k, v, plan, qk=qk, pv=pv, smooth_k=smooth, backend="reference"
                )
                found.append((rms(out - exact) / rms(exact), rms(lse - exact_lse)))
            (out_s, lse_s), (out_r, lse_r) = found
            rows.append(Row(head_dim, data, qk, pv, out_s, out_r, lse_s, lse_r))
    return rows


def main() -> None:
    print(INTRODUCTION, end="")
    for head_dim in (64, 128):
        for row in measure(head_dim):
            print("|", *(f"{x:#.2g} |" if isinstance(x, float) else f"{x} |" for x in row))


if __name__ == "__main__":
    main()
