"""Pictures of what a method keeps: which tokens one query reads, and which blocks are computed.

from dit_sparse.eval.patterns import draw, toy_attention
draw(RadialProcessor(block=16), layout, *toy_attention(layout))
"""

from __future__ import annotations

import warnings
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.kernels import block_mass, block_sparse_attention
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor
from dit_sparse.order import Order
from dit_sparse.plan import Plan
from dit_sparse.report import runs
from dit_sparse.schedule import Phase

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = ((0.6, 2.0, 2.0), (9.0, 0.8, 0.8), (2.0, 1.2, 9.0), (9.0, 9.0, 9.0))
"""Per head of the toy, how far attention reaches over (frames, height, width), in tokens."""
SHARPNESS = 7.0
"""Score of a token with itself over that with a far one."""


def toy_attention(
    layout: TokenLayout, dim: int = 96, seed: int = 0, heads: int = len(WIDTHS)
) -> tuple[Tensor, Tensor]:
    """q and k [1, heads, S, dim] whose heads look as trained heads do.

    The first attends within its frame, the second along time at its own position, the third along rows, the
    fourth nearly everywhere, and so on. Scores fall with the squared distance over :data:`WIDTHS` (random
    Fourier features of a Gaussian), and some of each token's content is its own.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.cartesian_prod(*(torch.arange(n) for n in layout.grid)).reshape(-1, 3).float()
    features = []
    for head in range(heads):
        widths = torch.tensor(WIDTHS[head % len(WIDTHS)])
        phase = place @ (torch.randn(3, dim // 2, generator=generator) / widths[:, None])
        features.append(torch.cat([phase.cos(), phase.sin()], 1))
    grid = torch.stack(features)[None]
    text = torch.randn(1, heads, layout.extra, dim, generator=generator) / 4
    before = layout.grid_start
    x = torch.cat([text[:, :, :before], grid, text[:, :, before:]], 2) * (2 * SHARPNESS * dim**-0.5) ** 0.5
    q, k = (x + 0.2 * torch.randn(x.shape, generator=generator) for _ in range(2))
    return q, k


def chosen(
    method: SparseProcessor, q: Tensor, k: Tensor, layout: TokenLayout, call: Call | None = None
) -> tuple[Plan, Order]:
    """The plan and order a method arrives at in a call, which for step-cached methods follows a REFRESH.

    Args:
        call: Where in a run; default the second of two steps.
    """
    if call is None:
        call = Call.standalone(layout, heads=q.shape[1], step=1, steps=2)
    before = call.at(step=max(0, (call.step or 0) - 1), phase=Phase.REFRESH)
    for later in (before, call):
        order = method.order(later)
        ordered = order.apply(q), order.apply(k)
        at = later.at(order=order)
        if later is before:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of what a whole run would keep in memory
                method.attend(*ordered, ordered[1], at)
    return method.planned(*ordered, at), order


def tokens_read(plan: Plan, order: Order, layout: TokenLayout, query: int, head: int) -> Tensor:
    """Which grid tokens the query at grid position ``query`` reads: bool [frames, height, width]."""
    index = order.rows[0, head if order.rows.shape[1] > 1 else 0]
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
    """:func:`picture` of what a method chooses for q and k, with its density and the mass it keeps."""
    import matplotlib.pyplot as plt

    plan, order = chosen(method, q, k, layout)
    filled = order.filled(plan.block[0]), order.filled(plan.block[1])
    density = plan.density(*filled, order.index, order.valid())
    mass = mass_kept(plan, order, q, k)
    name = type(method).__name__
    title = f"{name}: {density:.0%} of the token pairs, {mass:.0%} of the attention mass"
    return picture(plan, order, layout, title, heads, plt.figure(layout="constrained"))


def picture(
    plan: Plan,
    order: Order,
    layout: TokenLayout,
    title: str,
    heads: int = 4,
    figure: Figure | None = None,
) -> Figure:
    """One row a head: frames with the tokens that the centre query reads, and the block mask.

    Heads whose plans are equal share a row; ``heads`` rows at most. Masks of more than 512 blocks a side are
    drawn in grey: the share of the blocks under a point.

    Args:
        figure: An empty one to draw on. Default: a new one that is not pyplot's, so nothing has to close it.
    """
    from matplotlib.figure import Figure

    frames, height, width = layout.grid
    query = (frames // 2 * height + height // 2) * width + width // 2
    groups = alike(plan, order)
    shown = groups[:heads]
    columns = min(frames, 8)
    lines = ceil(frames / columns)
    size = lines * (height + 1) - 1, columns * (width + 1) - 1
    tall = min(max(1.5, 6.2 * size[0] / size[1]), 4.5)
    figure = Figure(layout="constrained") if figure is None else figure
    figure.set_size_inches(9, 1.1 + tall * len(shown))
    axes = figure.subplots(len(shown), 2, width_ratios=(3, 1), squeeze=False)
    keep = plan.to_blocks()[0]
    for group, (left, right) in zip(shown, axes, strict=True):
        read = tokens_read(plan, order, layout, query, group[0]).float()
        read.view(-1)[query] = 2
        sheet = torch.full(size, torch.nan)
        for f in range(frames):
            y, x = f // columns * (height + 1), f % columns * (width + 1)
            sheet[y : y + height, x : x + width] = read[f]
        left.imshow(sheet.numpy(), cmap="viridis", vmin=0, vmax=2, interpolation="nearest")
        f, y, x = frames // 2, height // 2, width // 2
        place = f % columns * (width + 1) + x, f // columns * (height + 1) + y
        left.plot(*place, "o", ms=6, mfc="none", mec="#e8452c", mew=1)
        one = f"head {group[0]}" if len(group) == 1 else f"heads {runs(group)}"
        left.set_ylabel("all heads" if len(groups) == 1 else one)
        right.imshow(_shrunk(keep[min(group[0], len(keep) - 1)]), cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for axis in (left, right):
            axis.set_xticks([])
            axis.set_yticks([])
    more = len(groups) - len(shown)
    figure.suptitle(
        title + (f"\nand {more} more plan{'s' * (more > 1)} of other heads" if more else ""), fontsize=10
    )
    axes[0, 0].set_title("what the bright token reads, frame by frame", fontsize=8)
    axes[0, 1].set_title(f"blocks of {plan.block[0]}x{plan.block[1]}", fontsize=8)
    return figure


def alike(plan: Plan, order: Order) -> list[list[int]]:
    """Heads in groups of one plan and order; a plan that all heads share is one group of head 0."""
    heads = max(plan.counts.shape[1], order.rows.shape[1])
    groups: list[list[int]] = []

    def same(a: int, b: int) -> bool:
        parts = (plan.counts[0], plan.indices[0], order.rows[0])
        return all(len(x) == 1 or torch.equal(x[a], x[b]) for x in parts)

    for head in range(heads):
        group = next((g for g in groups if same(g[0], head)), None)
        if group is None:
            groups.append([head])
        else:
            group.append(head)
    return groups


def _shrunk(keep: Tensor, most: int = 512) -> Any:
    """A block mask [Q, K] as shares in [0, 1] of at most ``most`` rows and columns."""
    size = min(keep.shape[0], most), min(keep.shape[1], most)
    return torch.nn.functional.adaptive_avg_pool2d(keep.float()[None], size)[0].numpy()
