"""A method's plan without a model: what ``dit-sparse inspect`` tells and draws.

    look = inspect(RadialProcessor(), TokenLayout((21, 30, 52)), heads=12, head_dim=128)
    print(look.facts); look.figure().savefig("plan.png")

Methods that choose by q and k are shown on :func:`dit_sparse.eval.patterns.toy_attention`, and that is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_sparse.eval.patterns import chosen, mass_kept, picture, toy_attention
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor
from dit_sparse.order import Order
from dit_sparse.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOY_TOKENS = 8192
"""Longest sequence that toy attention is made for: some methods measure it densely, on the CPU."""
RULE_ROWS = 64
"""Rows of blocks that a rule is counted on, token by token, where the sequence is longer than that."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """A plan and what there is to say of it.

    Args:
        facts: Lines of (what, value).
        density: Computed over all token pairs of each head.
        title: Over the picture.
    """

    plan: Plan
    order: Order
    layout: TokenLayout
    density: tuple[float, ...]
    facts: tuple[tuple[str, str], ...]
    title: str

    def figure(self, heads: int = 4) -> Figure:
        """See :func:`dit_sparse.eval.patterns.picture`."""
        return picture(self.plan, self.order, self.layout, self.title, heads)


def inspect(
    method: SparseProcessor,
    layout: TokenLayout,
    *,
    heads: int = 4,
    head_dim: int = 128,
    layer: int = 0,
    layers: int | None = None,
    name: str = "",
    step: int | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> Inspection:
    """What a method computes in one attention call.

    Args:
        heads, head_dim: Of the layer; ``head_dim`` only for FLOPs.
        layer, layers, name: Which of how many; None leaves out what is said of the whole model.
        step, steps: Denoising step of how many. Default: the second of two.
        seed: Of methods that draw samples, and of toy attention.

    Raises:
        ValueError: The method needs frames and there is one; it chooses by q and k and the sequence is longer
            than :data:`TOY_TOKENS`; or it cannot plan for this layout.
    """
    if layout.grid[0] == 1 and method.needs_frames:
        raise ValueError(f"{method} does not apply: an image is one frame, and {method.needs_frames}")
    if not method.is_static and layout.sequence > TOY_TOKENS:
        raise ValueError(
            f"{type(method).__name__} chooses by q and k, and is shown on toy attention "
            f"of at most {TOY_TOKENS} tokens, got {layout.sequence}: {_smaller(layout)}"
        )
    call = Call.standalone(layout, layer=layer, layers=layers or layer + 1, heads=heads, seed=seed)
    steps = steps if steps is not None else max(2, (step or 0) + 1)
    call = call.at(step=1 if step is None else step, steps=steps, name=name)
    mass = None
    if layout.sequence <= TOY_TOKENS:
        q, k = toy_attention(layout, seed=seed, heads=heads)
        plan, order = chosen(method, q, k, layout, call)
        mass = mass_kept(plan, order, q, k)
    else:
        plan, order = _static(method, call)
    pairs, counted = _pairs(plan, call.at(order=order))
    every = layout.sequence**2
    density = tuple((pairs / every).expand(heads).tolist())
    title = f"{type(method).__name__} on {'x'.join(map(str, layout.grid))} tokens"
    title += f": {sum(density) / heads:.1%} of the token pairs"
    if mass is not None:
        title += f", {mass:.0%} of toy attention's mass"
    if not method.is_static:
        title += "\nchosen by toy attention, not by a model's: another q and k gives another plan"
    facts = _facts(method, plan, call.at(order=order), density, counted, mass)
    facts += _whole(method, plan, call, density, head_dim, layers)
    return Inspection(plan, order, layout, density, tuple(facts), title)


def _static(method: SparseProcessor, call: Call) -> tuple[Plan, Order]:
    """A plan that does not look at q and k: these have the right shape and no memory."""
    order = method.order(call)
    nothing = torch.zeros(()).expand(1, call.heads, order.slots, 1)
    return method.planned(nothing, nothing, call.at(order=order)), order


def _pairs(plan: Plan, call: Call) -> tuple[Tensor, str]:
    """Token pairs of each head, float64 [1 or heads], and how they were counted."""
    order, rows = call.order, plan.counts.shape[2]
    assert order is not None
    if plan.rule is None or (call.layout.sequence <= TOY_TOKENS) or rows <= RULE_ROWS:
        return call.pairs(plan)[0][0].double(), "exact"
    place, (bq, bk) = order.rows[0], plan.block
    total = torch.zeros(max(plan.counts.shape[1], len(place)), dtype=torch.float64)
    asked = 0
    for row in torch.linspace(0, rows - 1, RULE_ROWS).long().tolist():
        for head in range(len(total)):
            slots = place[min(head, len(place) - 1)]
            at = min(head, plan.counts.shape[1] - 1)
            blocks = plan.indices[0, at, row, : int(plan.counts[0, at, row])].long()
            keys = (blocks[:, None] * bk + torch.arange(bk)).flatten()
            keys = slots[keys[keys < order.slots]]
            queries = slots[row * bq : (row + 1) * bq]
            keys, queries = keys[keys >= 0], queries[queries >= 0]
            total[head] += plan.rule(queries[:, None], keys).sum()
            asked += len(queries) if head == 0 else 0
    what = f"estimated: the rule was counted in {RULE_ROWS} of {rows} rows of blocks, evenly spaced"
    return total * call.layout.sequence / asked, what


def _facts(
    method: SparseProcessor,
    plan: Plan,
    call: Call,
    density: tuple[float, ...],
    counted: str,
    mass: float | None,
) -> list[tuple[str, str]]:
    layout, order, (bq, bk) = call.layout, call.order, plan.block
    assert order is not None
    frames = layout.grid
    text = f"{layout.text}, {'before' if layout.text_first else 'after'} the grid" if layout.text else "none"
    facts = [
        ("method", repr(method)),
        ("grid", f"{frames[0]} x {frames[1]} x {frames[2]} = {layout.tokens} tokens"),
        ("text", text),
    ]
    if layout.prefix or layout.suffix:
        facts.append(("history, reference", f"{layout.prefix}, {layout.suffix} tokens"))
    tails = order.slots % bq or bq, order.slots % bk or bk
    facts += [
        (
            "sequence",
            f"{layout.sequence} tokens in {order.slots} slots, {order.slots - layout.sequence} holes",
        ),
        ("block", f"{bq} queries x {bk} keys"),
        (
            "blocks",
            f"{plan.counts.shape[2]} of queries x {plan.keys} of keys; "
            f"the last has {tails[0]} x {tails[1]} slots",
        ),
        ("density", f"{_spread(density, '.4f')} over {call.heads} heads ({counted})"),
        ("key blocks a row", _spread(plan.counts.flatten().tolist(), ".4g")),
    ]
    if plan.rule is not None:
        facts.append(("rule", f"{plan.rule!r} hides single tokens within the blocks"))
    if mass is not None:
        facts.append(("mass kept", f"{mass:.3f} of toy attention's softmax"))
    if not method.is_static:
        facts.append(
            ("q and k", "those of toy attention, not of a model: another q and k gives another plan")
        )
    if not method.only_plans:
        facts.append(
            ("beside the plan", "the method does more than execute it, which is not in these numbers")
        )
    if method.needs_training:
        facts.append(("training", "the method has trainable parts, shown as they start"))
    return facts


def _whole(
    method: SparseProcessor,
    plan: Plan,
    call: Call,
    density: tuple[float, ...],
    head_dim: int,
    layers: int | None,
) -> list[tuple[str, str]]:
    """What a plan takes and saves, in a layer and, where ``layers`` are known, in the model."""
    each, bits = _bytes(plan)
    facts = [
        ("reads", f"{', '.join(sorted(method.reads))}: made {_often(method)}"),
        ("bytes of the plan", f"{_size(each)} as lists, {_size(bits)} as bits"),
    ]
    mean = sum(density) / len(density)
    if layers is not None:
        kept = layers if {"layer", "qk"} & method.reads else 1
        if method.is_static and "layer" in method.reads:
            plans = {i: _static(method, call.at(layer=i)) for i in range(layers) if i != call.layer}
            others = [_pairs(p, call.at(layer=i, order=o))[0] for i, (p, o) in plans.items()]
            every = call.layout.sequence**2
            means = [mean, *(float((x / every).mean()) for x in others)]
            facts.append(("density of the layers", f"{_spread(means, '.4f')} over {layers}"))
            mean = sum(means) / layers
            sizes = [(each, bits), *(_bytes(p) for p, _ in plans.values())]
            each, bits = (sum(x) // layers for x in zip(*sizes, strict=True))
        whole = f"{_size(each * kept)} as lists, {_size(bits * kept)} as bits"
        facts.append((f"bytes in {layers} layers", f"{whole}: {_counted(method, kept)}"))
    many = call.heads * (layers or 1)
    pairs = call.layout.sequence**2 * many
    where = f"{call.heads} heads" + (f" x {layers} layers" if layers is not None else "")
    facts.append(("token pairs", f"{mean * pairs:.4g} of {pairs:.4g} in {where}"))
    flops = 4 * head_dim * pairs
    facts.append(
        (
            "FLOPs of attention",
            f"{flops / 1e12:.4g} T dense, {mean * flops / 1e12:.4g} T sparse in a forward pass "
            f"(4 x head dim {head_dim} x pairs; bound on the speed-up {_bound(mean)})",
        )
    )
    return facts


def _often(method: SparseProcessor) -> str:
    """How often a session makes a plan, as the router keeps them."""
    if "qk" in method.reads:
        kept = "layer and branch at REFRESH, and kept from step to step"
        return f"once for each {kept}" if "step" in method.reads else "anew in every call"
    each = [name for name in ("layer", "step") if name in method.reads]
    return f"once for each {' and '.join(each)}" if each else "once for a run"


def _counted(method: SparseProcessor, kept: int) -> str:
    if "qk" not in method.reads:
        return f"{kept} plan{'s' * (kept > 1)}"
    if "step" not in method.reads:
        return "kept for the time of a call, one layer after the other"
    return f"{kept} plans, kept as bits, for each branch"


def _bytes(plan: Plan) -> tuple[int, int]:
    lists = plan.indices.numel() * plan.indices.element_size()
    lists += plan.counts.numel() * plan.counts.element_size()
    return lists, plan.counts.numel() * -(-plan.keys // 8)


def _bound(density: float) -> str:
    return f"{1 / density:.1f}x" if density else "none"


def _spread(values: list[float] | tuple[float, ...], form: str) -> str:
    low, mean, high = (format(x, form) for x in (min(values), sum(values) / len(values), max(values)))
    return mean if low == high else f"{low} to {high}, mean {mean}"


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.4g} GiB"


def _smaller(layout: TokenLayout) -> str:
    """A grid of the same frames, or fewer, that fits."""
    frames, height, width = layout.grid
    room = TOY_TOKENS - layout.extra
    if room < 1:
        return "use fewer tokens outside the grid"
    scale = min(1.0, sqrt(room / (frames * height * width)))
    height, width = max(1, int(height * scale)), max(1, int(width * scale))
    frames = min(frames, max(1, room // (height * width)))
    return f"try --grid {frames},{height},{width}"
