"""Pictures of what a method keeps: which tokens one query reads, and which blocks are computed.

from dit_sparse.eval.patterns import draw, toy_attention
draw(RadialProcessor(block=16), layout, *toy_attention(layout))
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_sparse.kernels import block_mass, block_sparse_attention
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor
from dit_sparse.order import Order
from dit_sparse.plan import Plan
from dit_sparse.schedule import Phase

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = ((0.6, 2.0, 2.0), (9.0, 0.8, 0.8), (2.0, 1.2, 9.0), (9.0, 9.0, 9.0))
"""Per head of the toy, how far attention reaches over (frames, height, width), in tokens."""
SHARPNESS = 7.0
"""Score of a token with itself over that with a far one."""


def toy_attention(layout: TokenLayout, dim: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """q and k [1, 4, S, dim] whose heads look as trained heads do.

    The first attends within its frame, the second along time at its own position, the third along rows, the
    fourth nearly everywhere. Scores fall with the squared distance over :data:`WIDTHS` (random Fourier
    features of a Gaussian), and some of each token's content is its own.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.cartesian_prod(*(torch.arange(n) for n in layout.grid)).reshape(-1, 3).float()
    heads = []
    for widths in WIDTHS:
        phase = place @ (torch.randn(3, dim // 2, generator=generator) / torch.tensor(widths)[:, None])
        heads.append(torch.cat([phase.cos(), phase.sin()], 1))
    grid = torch.stack(heads)[None]
    text = torch.randn(1, len(WIDTHS), layout.extra, dim, generator=generator) / 4
    before = layout.grid_start
    x = torch.cat([text[:, :, :before], grid, text[:, :, before:]], 2) * (2 * SHARPNESS * dim**-0.5) ** 0.5
    q, k = (x + 0.2 * torch.randn(x.shape, generator=generator) for _ in range(2))
    return q, k


def chosen(method: SparseProcessor, q: Tensor, k: Tensor, layout: TokenLayout) -> tuple[Plan, Order]:
    """The plan and order a method arrives at, for step-cached methods after the step that fills the cache."""
    call = Call.standalone(layout, heads=q.shape[1], step=0, steps=2, phase=Phase.REFRESH)
    order = method.order(call)
    for later in (call, call.at(step=1, phase=Phase.SPARSE)):
        order = method.order(later)
        ordered = order.apply(q), order.apply(k)
        at = later.at(order=order)
        if later is call:
            method.attend(*ordered, ordered[1], at)
    return method.planned(*ordered, at), order


def tokens_read(plan: Plan, order: Order, layout: TokenLayout, query: int, head: int) -> Tensor:
    """Which grid tokens the query at grid position ``query`` reads: bool [frames, height, width]."""
    index = order.index[head if order.index.shape[0] > 1 else 0]
    position = layout.grid_start + query
    slot = int((index == position).nonzero()[0])
    keep = plan.to_blocks()[0, head if plan.counts.shape[1] > 1 else 0]
    slots = keep[slot // plan.block[0]].repeat_interleave(plan.block[1])[: len(index)] & (index >= 0)
    if plan.rule is not None:
        slots &= plan.rule(index[slot], index)
    read = torch.zeros(layout.sequence, dtype=torch.bool)
    read[index[slots]] = True
    return read[layout.grid_start :][: layout.tokens].view(layout.grid)


def mass_kept(plan: Plan, order: Order, q: Tensor, k: Tensor) -> float:
    """The share of the dense softmax's mass in the blocks of a plan, over all heads and queries."""
    valid = order.valid()
    q, k = order.apply(q), order.apply(k)
    full = Plan.full(q.shape[2], k.shape[2], 128)
    lse = block_sparse_attention(q, k, k, full, valid=valid)[1]
    lse = lse.masked_fill(~valid, torch.inf)
    mass = block_mass(q, k, lse, plan.block, valid=valid)
    return float((mass * plan.to_blocks()).sum() / mass.sum())


def draw(method: SparseProcessor, layout: TokenLayout, q: Tensor, k: Tensor, heads: int = 4) -> Figure:
    """One row a head: frames with the tokens that the centre query reads, and the block mask.

    Heads whose plans are equal share a row.
    """
    import matplotlib.pyplot as plt

    plan, order = chosen(method, q, k, layout)
    filled = order.filled(plan.block[0]), order.filled(plan.block[1])
    rows = 1 if max(plan.counts.shape[1], order.index.shape[0]) == 1 else heads
    frames, height, width = layout.grid
    query = (frames // 2 * height + height // 2) * width + width // 2
    figure, axes = plt.subplots(
        rows, 2, figsize=(9, 1.1 + 1.5 * rows), width_ratios=(3, 1), squeeze=False, layout="constrained"
    )
    for head, (left, right) in enumerate(axes):
        read = tokens_read(plan, order, layout, query, head).float()
        read.view(-1)[query] = 2
        columns = min(frames, 8)
        lines = ceil(frames / columns)
        sheet = torch.full((lines * (height + 1) - 1, columns * (width + 1) - 1), torch.nan)
        for f in range(frames):
            y, x = f // columns * (height + 1), f % columns * (width + 1)
            sheet[y : y + height, x : x + width] = read[f]
        left.imshow(sheet.numpy(), cmap="viridis", vmin=0, vmax=2)
        left.set_ylabel(f"head {head}" if rows > 1 else "all heads")
        blocks = plan.to_blocks()[0, head if plan.counts.shape[1] > 1 else 0]
        right.imshow(blocks.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for axis in (left, right):
            axis.set_xticks([])
            axis.set_yticks([])
    density = plan.density(*filled, order.index, order.valid())
    mass = mass_kept(plan, order, q, k)
    name = type(method).__name__
    figure.suptitle(
        f"{name}: {density:.0%} of the token pairs, {mass:.0%} of the attention mass", fontsize=10
    )
    axes[0, 0].set_title("what the bright token reads, frame by frame", fontsize=8)
    axes[0, 1].set_title(f"blocks of {plan.block[0]}x{plan.block[1]}", fontsize=8)
    return figure
