"""What happens to one attention call: who decides it, what is remembered for it, and what is reported."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import Signature
from typing import Any

import torch
from torch import Tensor, nn

from dit_sparse.clock import Tick
from dit_sparse.core import Attachment
from dit_sparse.kernels.ops import BACKENDS, resolve_backend
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor
from dit_sparse.order import Order, broadcast_heads, fill_counts
from dit_sparse.parallel import Heads, Ulysses, balanced, share_out, shares_text_apart, taken
from dit_sparse.pipelines import Family
from dit_sparse.plan import Plan, Rule
from dit_sparse.report import Record, Report, Where
from dit_sparse.schedule import Phase, Schedule
from dit_sparse.watch import Watch


@dataclass(eq=False)
class Part:
    """One transformer of a session: Wan2.2 has two."""

    name: str
    model: nn.Module
    family: Family
    arguments: Signature
    layers: list[Attachment] = field(default_factory=list)
    shadows: dict[str, Callable[..., Any]] = field(default_factory=dict)
    text_apart: dict[int, bool] = field(default_factory=dict)
    forward: Forward | None = None


Site = tuple[Attachment, int]
"""What remembers: a layer, or one batch item of it."""


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward pass of a transformer: written by its pre-hook, read by every layer's core.

    Args:
        grid: The token layout without text, or why there is none.
        anchors: Leading frames every query must be able to read.
        positions: Where the tokens of ``grid`` stand in the model's sequence, if not in this order.
        items: Batch items, where each has an attention call of its own; 0 where one call has them all.
        replays: The forward is recomputed under gradient checkpointing: it takes the plans and memories of
            the first pass, and is not counted.
    """

    grid: TokenLayout | str
    tick: Tick
    anchors: int
    positions: Tensor | None = None
    items: int = 0
    replays: bool = False
    masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    indices: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)
    plans: dict[Any, Plan] = field(default_factory=dict)
    caches: dict[Site, tuple[Phase, dict[str, Any]]] = field(default_factory=dict)
    shares: dict[Attachment, tuple[Ulysses | None, int, str]] = field(default_factory=dict)
    gathered: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    calls: Counter[int] = field(init=False, default_factory=Counter)

    def site(self, at: Attachment) -> Site:
        """The layer, and which batch item where its processor calls attention for each of them."""
        item = self.calls[id(at)] if self.items else 0
        self.calls[id(at)] += 1
        return at, item

    def index(self, layout: TokenLayout, joint: bool, device: torch.device) -> Tensor | None:
        """Where the tokens of a call's ``layout`` stand in the model's sequence, int64 [S] or [B, S].

        Text is whatever ``positions`` leave. None for the same order, which layers of a ``joint`` family that
        see no text (refiners) have in any case.
        """
        if self.positions is None or (joint and not layout.text):
            return None
        key = layout.sequence, device
        if key not in self.indices:
            positions = self.positions.to(device)
            is_text = torch.ones(*positions.shape[:-1], layout.sequence, dtype=torch.bool, device=device)
            is_text.scatter_(-1, positions, False)
            text = is_text.byte().argsort(dim=-1, descending=True, stable=True)[..., : layout.text]
            parts = [text, positions] if layout.text_first else [positions, text]
            self.indices[key] = torch.cat(parts, dim=-1)
        return self.indices[key]

    def share(self, at: Attachment, q: Tensor, config: Any) -> tuple[Ulysses | None, int, str]:
        """:func:`share_out`, once a layer: by size, say, processes might not all ask when one does."""
        if at not in self.shares:
            apart = at.part.text_apart
            if id(config) not in apart:
                apart[id(config)] = at.part.family.joint and shares_text_apart(at.part.model)
            self.shares[at] = share_out(config, q, self.grid, apart[id(config)])
        return self.shares[at]

    def whole_mask(self, mask: Tensor, share: Ulysses) -> Tensor:
        """A mask over the tokens of all processes in turn, of one over those here."""
        if mask.shape[-1] != share.tokens[share.rank]:
            return mask
        if id(mask) not in self.gathered:
            self.gathered[id(mask)] = mask, share.all_tokens(mask)
        return self.gathered[id(mask)][1]


@dataclass(eq=False)
class Here:
    """An attention call as this process computes it.

    Args:
        q, k: Of what shape, device and need of gradients. With ``share`` they stand, without memory, for this
            process' heads over the tokens of all.
        share: How processes share the heads.
    """

    site: Site
    forward: Forward
    q: Tensor
    k: Tensor
    share: Ulysses | None = None

    @property
    def at(self) -> Attachment:
        return self.site[0]


@dataclass(eq=False)
class Memory:
    """What a site and branch remember, and the step of its last call."""

    cache: dict[str, Any] = field(default_factory=dict)
    step: int | None = None

    def phase(self, at: Attachment, tick: Tick) -> Phase:
        """That of the schedule, but REFRESH for the first call after one that a step cache has skipped."""
        layer = at.layer.index, at.layer.count
        phase, last = at.schedule.phase(tick.step, tick.steps, *layer), self.step
        self.step = tick.step
        if phase is not Phase.SPARSE or last is None or tick.step is None:
            return phase
        skipped = (at.schedule.phase(step, tick.steps, *layer) for step in range(last + 1, tick.step))
        return Phase.REFRESH if Phase.REFRESH in skipped else phase


class Router:
    """Sends each attention call to its method or leaves it to the model, and keeps all state of a session.

    Args:
        method: A processor, or a dict of processors by ``"<path>.processor"``.
        schedule: When it runs.
        density: Ask for the method's setting nearest to this density at each layout.
        backend: Kernel backend, or "auto": resolved once per device.
        strict: Raise where a call cannot run sparse.
        seed: For methods that draw samples.
    """

    def __init__(
        self,
        method: SparseProcessor | Mapping[str, SparseProcessor],
        schedule: Schedule,
        density: float | None,
        backend: str,
        strict: bool,
        seed: int,
    ) -> None:
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"unknown backend {backend!r}; there are auto, {', '.join(BACKENDS)}")
        self.method = method
        self.schedule = (
            schedule.with_refresh(method.refresh) if isinstance(method, SparseProcessor) else schedule
        )
        self.density = density
        self.backend = backend
        self.strict = strict
        self.seed = seed
        self.full_plan_is_dense = True
        """Whether an all-kept static plan takes the model's own dense call (reported as "full plan")."""
        self.watches: list[Watch] = []
        self._records: dict[Where, Record] = {}
        self._memory: dict[tuple[Site, str], dict[tuple[int, TokenLayout], Memory]] = {}
        """By batch size, as FasterCache runs some steps without the unconditional half of the batch, and by
        layout, as the prompt may change from step to step."""
        self._made: dict[tuple[Any, ...], Any] = {}
        self._share: Ulysses | None = None
        self._backends: dict[tuple[torch.device, bool, Rule | None], tuple[str, str]] = {}

    def reseed(self, seed: int) -> None:
        """For another generation: what was drawn is drawn anew."""
        self.seed = seed
        self._made.clear()

    def report(self) -> Report:
        """What ran since the last run of the pipeline began. Reading it synchronises the device, once."""
        backends = [f"{name} on {device} ({why})" for (device, *_), (name, why) in self._backends.items()]
        about = {
            "method": repr(self.method) if isinstance(self.method, SparseProcessor) else "one per layer",
            "schedule": str(self.schedule),
            "backend": ", ".join(backends) or self.backend,
        }
        if self._share is not None:
            share = self._share
            mine = f"{len(share.own_heads)} of {share.layer_heads} in a layer"
            about["heads"] = f"{mine}, in process {share.rank} of {len(share.heads)}"
        if self.density is not None:
            about["requested density"] = f"{self.density:g}"
        return Report.read(self._records, about)

    def route(
        self,
        at: Attachment,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        odd: bool,
        parallel: Any = None,
    ) -> Tensor | None:
        """One attention call: the sparse result [B, H, S, D], or None when the model's own call is to run.

        With ``parallel``, a ``ContextParallelConfig`` of diffusers, q, k and v are those of the tokens here.
        """
        forward = at.part.forward or _NOWHERE
        here = Here(forward.site(at), forward, q, k)
        given = at.hidden
        if here.site[1] + 1 >= forward.items:
            at.hidden = None  # a layer's hidden states are not kept beyond its last call
        why = "causal, dropout or a block mask" if odd else ""
        if parallel is not None:
            why = self._share_out(here, parallel, why)
            if mask is not None and here.share is not None:
                mask = forward.whole_mask(mask, here.share)
        layout, valid, why = self._understand(here, mask, why)
        hidden = None
        if layout is not None and given is not None:
            hidden, why = _hidden_states(given, layout, here, k.shape[2])
        if layout is None or why:
            # A further call of a processor (IP adapters) reads a sequence with no grid, as it should.
            if self.strict and not _reads_elsewhere(at, q, k):
                raise ValueError(f"{at.layer.name} cannot run sparse: {why}")
            self._left_dense(here, None, why)
            return None
        memory = self._memory_of(here, layout, q.shape[0])
        phase = memory.phase(at, forward.tick)
        if phase is Phase.DENSE:
            self._left_dense(here, valid, "schedule")
            return None
        method = at.method
        if self.density is not None:
            density = self.density
            method = self._once((method, layout), lambda: at.method.at_density(density, layout))
        call = self._call(here, layout, phase, valid, scale, memory.cache)
        return self._attend(here, method, call.at(hidden=hidden), q, k, v)

    def _attend(
        self, here: Here, method: SparseProcessor, call: Call, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor | None:
        """Run ``method`` on q, k, v as the model gave them; None where it leaves nothing out.

        They go through the exchange of heads, the grid's order and the method's, and the output comes back.
        """
        forward, share, layout, asked = here.forward, here.share, call.layout, None
        if q.shape[2] < k.shape[2]:
            q, asked = _beside_text(q, layout)
        index = forward.index(layout, here.at.part.family.joint, q.device)
        if share is not None:
            share = replace(share.reordered(index), heads=self._heads(here, method, layout, share))
            here.share, index = share, share.index
        elif index is not None:
            q, k, v = (taken(x, index, 2) for x in (q, k, v))
            call = call.at(hidden=None if call.hidden is None else taken(call.hidden, index, 1))
        if index is not None:
            call = call.at(valid=None if call.valid is None else taken(call.valid, index, 1))
            asked = None if asked is None else asked[index]
        call = call.at(share=share, asked=asked)
        order = self._order(method, call, q.device)
        call = call.at(order=order)
        if self._leaves_nothing_out(here, method, call, q if share is None else here.q):
            self._left_dense(here, call.valid, "full plan")
            return None
        if share is not None:
            q, k, v = share.to_heads(torch.cat([q, k, v], -1)).split([x.shape[3] for x in (q, k, v)], -1)
        out = order.undo(method.attend(order.apply(q), order.apply(k), order.apply(v), call))
        if torch.is_grad_enabled() and not forward.replays:
            forward.caches[here.site] = call.phase, dict(call.cache)
        if share is not None:
            return share.to_tokens(out)
        out = out if index is None else taken(out, index.argsort(dim=-1), 2)
        return out if asked is None else out.narrow(2, *_but_text(layout))

    def _share_out(self, here: Here, parallel: Any, why: str) -> str:
        """Settle how processes share the heads of a call, or why they do not."""
        at, q, k = here.at, here.q, here.k
        share, tokens, cannot = here.forward.share(at, q, parallel)
        why = why or cannot or at.method.needs_all_heads
        if q.shape[1:3] != k.shape[1:3]:
            why = why or "context parallelism where queries and keys differ in number or in heads"
        here.k = _shaped(q, k, q.shape[1] if share is None else len(share.own_heads), tokens)
        if share is not None:
            here.q, here.share = here.k, share
            self._share = share
        return why

    def _memory_of(self, here: Here, layout: TokenLayout, batch: int) -> Memory:
        key, tick = (here.site, here.forward.tick.branch), here.forward.tick
        if tick.step is not None and tick.step + 1 == tick.steps:
            # What was remembered can be gigabytes, for which the autoencoder that follows has a use.
            remembered = self._memory.pop(key, {})
        else:
            remembered = self._memory.setdefault(key, {})
        return remembered.setdefault((here.forward.items or batch, layout), Memory())

    def _order(self, method: SparseProcessor, call: Call, device: torch.device) -> Order:
        if method.orders_by_qk:
            return method.order(call).to(device)
        key = self._key("order", method, call, device)
        order: Order = self._once(key, lambda: method.order(call).to(device))
        return order

    def _leaves_nothing_out(self, here: Here, method: SparseProcessor, call: Call, q: Tensor) -> bool:
        """Whether a call is the model's own attention, which then computes it."""
        if not self.full_plan_is_dense:
            return False
        if method.is_dense(call):
            return True
        if not (method.is_static and method.only_plans):
            return False
        order = call.order
        assert order is not None

        def full() -> bool:
            # A plan is made for ordered q and k: an order with holes has more slots than tokens.
            plan = method.planned(order.apply(q), order.apply(here.k), call)
            return call.everywhere(_is_full(plan), q.device)

        key = *self._key("full", method, call, q.device), here.forward.anchors
        return bool(self._once(key, full))

    def _heads(self, here: Here, method: SparseProcessor, layout: TokenLayout, share: Ulysses) -> Heads:
        """Who computes which heads: for the whole run, as what a head remembers stays where it is."""

        at, tick = here.at, here.forward.tick

        def make() -> Heads:
            own = at.layer
            call = Call.standalone(layout, layer=own.index, layers=own.count, heads=share.layer_heads)
            call = call.at(name=f"{at.part.name}/{own.name}", step=tick.step, steps=tick.steps)
            costs = method.head_costs(call)
            return share.heads if costs is None else balanced(costs.tolist(), share.heads)

        return self._once(("heads", method, layout, at.part.name, at.layer.name, share.heads), make)

    def _understand(
        self, here: Here, mask: Tensor | None, why: str
    ) -> tuple[TokenLayout | None, Tensor | None, str]:
        """(layout, key validity, "") of a call a method can honour, or (None, None, why not)."""
        at, forward, q, k = here.at, here.forward, here.q, here.k
        if forward is _NOWHERE:
            return None, None, "called outside its transformer's forward, which tells the grid"
        if why:
            return None, None, why
        if _scores_are_skipped(at.module):
            return None, None, "a guider replaces its attention weights"
        if _reads_elsewhere(at, q, k):
            return None, None, f"{q.shape[2]} queries read {k.shape[2]} keys of another sequence"
        layout, family = forward.grid, at.part.family
        if isinstance(layout, str):
            return None, None, layout
        rest = k.shape[2] - layout.sequence
        fits = rest == 0 or (rest > 0 and family.joint)
        if not fits or not (family.text_asks or q.shape[2] == layout.sequence):
            sizes = "x".join(map(str, layout.grid))
            return None, None, f"the sequence has {q.shape[2]} tokens, the grid {sizes} has {layout.sequence}"
        if rest:
            layout = replace(layout, text=rest)
        if mask is None:
            return layout, None, ""
        read = family.validity
        if read is not None:
            return layout, read(mask), ""  # not kept: each layer of Chroma makes one of S x S
        if id(mask) in forward.masks:
            return layout, forward.masks[id(mask)][1], ""
        valid = _key_validity(mask, q.shape[0], layout.sequence)
        if isinstance(valid, str):
            return None, None, valid
        # The mask is kept with what was read from it, so that its id cannot become another's.
        forward.masks[id(mask)] = mask, valid
        return layout, valid, ""

    def _call(
        self,
        here: Here,
        layout: TokenLayout,
        phase: Phase,
        valid: Tensor | None,
        scale: float | None,
        cache: dict[str, Any],
    ) -> Call:
        at, site, forward, q, k = here.at, here.site, here.forward, here.q, here.k
        tick, device, training = forward.tick, q.device, torch.is_grad_enabled()
        needs_grad = training and any(x.requires_grad for x in (q, k))
        if not cache and "step" in at.method.reads and not at.method.is_static:
            phase = Phase.REFRESH
        if forward.replays:
            phase, cache = forward.caches.get(site, (phase, cache))  # none for a call left to the model

        runs = itertools.count()

        def on_run(plan: Plan | None, count: Callable[[], Tensor], call: Call, backend: str = "") -> str:
            rule = None if plan is None else plan.rule
            backend = backend or self._backend(device, needs_grad, rule)
            if forward.replays:
                return backend
            if plan is not None:
                for watch in self.watches:
                    watch.executed(plan, call)
            if valid is None and at.method.is_static:
                pairs, _ = self._once(("pairs", id(plan), call.order), lambda: (count(), plan))
            else:
                pairs = count()
            # A method may compute more than one part of an attention call: it stays one call over all pairs.
            first = next(runs) == 0
            every = self._every(q, k, valid) * first
            self._record(here, phase, backend, "").add(pairs, every, q.shape[0], first)
            return backend

        def plan_cache(method: SparseProcessor, make: Callable[[], Plan], call: Call) -> Plan:
            def whole() -> Plan:
                chosen = make
                for watch in self.watches:
                    chosen = partial(watch.planning, chosen)
                return _with_anchors(chosen(), call, forward.anchors)

            if method.is_static:
                key = *self._key("plan", method, call, device), forward.anchors
                return self._once(key, lambda: whole().to(device))
            mine = site, method
            if forward.replays and mine in forward.plans:
                return forward.plans[mine]
            plan = whole()
            if training:
                forward.plans[mine] = plan
            return plan

        return Call(
            layout=layout,
            layer=at.layer.index,
            layers=at.layer.count,
            name=f"{at.part.name}/{at.layer.name}",
            step=tick.step,
            steps=tick.steps,
            branch=tick.branch,
            phase=phase,
            heads=q.shape[1],
            kv_heads=k.shape[1],
            scale=scale,
            valid=valid,
            seed=self.seed,
            cache=cache,
            replays=forward.replays,
            part=at.module._modules.get("sparse_branch"),
            backend=self.backend,
            share=here.share,
            on_run=on_run,
            plan_cache=plan_cache,
        )

    def _backend(self, device: torch.device, needs_grad: bool, rule: Rule | None) -> str:
        key = device, needs_grad, rule
        if key not in self._backends:
            automatic = resolve_backend(device, needs_grad=needs_grad, rule=rule)
            self._backends[key] = automatic if self.backend == "auto" else (self.backend, "as asked")
        return self._backends[key][0]

    def _key(self, what: str, method: SparseProcessor, call: Call, device: torch.device) -> tuple[Any, ...]:
        layer = (call.layer, call.name) if "layer" in method.reads else None
        # What a method remembers from step to step lies in one order, so an order depends on no step.
        step = (call.step, call.steps) if "step" in method.reads and what != "order" else None
        heads = call.heads if call.share is None else call.share.heads
        return what, method, call.layout, device, heads, layer, step

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _left_dense(self, here: Here, valid: Tensor | None, reason: str) -> None:
        """Record a call that the model computes itself."""
        if not here.forward.replays:
            every = self._every(here.q, here.k, valid)
            self._record(here, Phase.DENSE, "model", reason).add(every, every, here.q.shape[0])

    def _every(self, q: Tensor, k: Tensor, valid: Tensor | None) -> Tensor:
        """All token pairs of a call, int64 [B or 1, 1]."""
        if valid is None:
            return torch.full((1, 1), k.shape[2] * q.shape[2], device=q.device)
        return valid.sum(-1)[:, None] * q.shape[2]

    def _record(self, here: Here, phase: Phase, backend: str, reason: str) -> Record:
        at, tick, layer = here.at, here.forward.tick, here.at.layer
        where = Where(
            at.part.name, tick.step, layer.index, layer.name, tick.branch, phase, backend, reason
        )  # fmt: skip
        heads = range(here.q.shape[1]) if here.share is None else here.share.own_heads
        return self._records.setdefault(where, Record(heads))


_NOWHERE = Forward(TokenLayout((1, 1, 1)), Tick(None, None, "cond", False), 0)


def _shaped(q: Tensor, k: Tensor, heads: int, tokens: int) -> Tensor:
    """Stands for [B, heads, tokens, D] where only shape, device and need of gradients count."""
    one = q.new_empty((), requires_grad=q.requires_grad or k.requires_grad)
    return one.expand(q.shape[0], heads, tokens, q.shape[3])


def _reads_elsewhere(at: Attachment, q: Tensor, k: Tensor) -> bool:
    return k.shape[2] != q.shape[2] and at.part.family.text_asks


def _but_text(layout: TokenLayout) -> tuple[int, int]:
    """Where the tokens that are not text stand in the model's sequence: (start, length)."""
    return layout.text * layout.text_first, layout.sequence - layout.text


def _beside_text(q: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Queries of the whole sequence, text's being zeros, and which were asked, bool [S]."""
    start, length = _but_text(layout)
    tokens = torch.arange(layout.sequence, device=q.device)
    asked = (tokens >= start) & (tokens < start + length)
    return torch.nn.functional.pad(q, (0, 0, start, layout.text - start)), asked


def _hidden_states(
    given: tuple[Tensor, Tensor | None], layout: TokenLayout, here: Here, tokens: int
) -> tuple[Tensor, str]:
    """The hidden states of the tokens here, or why they cannot be had."""
    hidden = _one_sequence(given, layout, here.site[1] if here.forward.items else None)
    if here.share is not None and hidden.shape[1] == layout.sequence:
        hidden = here.share.tokens_here(hidden)  # Helios shares tokens out within its layers
    if hidden.shape[1] == tokens:
        return hidden, ""
    return (
        hidden,
        f"the method reads hidden states, of which the layer is given {hidden.shape[1]} for {tokens} tokens",
    )


def _one_sequence(hidden: tuple[Tensor, Tensor | None], layout: TokenLayout, item: int | None) -> Tensor:
    """The hidden states of grid and text in the order of the attention call, [B, S, C].

    Args:
        item: The batch item of the call, where each has its own: its text is then cut to length.
    """
    grid, text = hidden
    if item is not None:
        grid = grid[item, None]
    if text is None:
        return grid
    if item is not None or text.shape[2] != grid.shape[2]:
        text = grid.new_zeros(len(grid), layout.text, grid.shape[2])
    return torch.cat([text, grid] if layout.text_first else [grid, text], dim=1)


def _scores_are_skipped(module: nn.Module) -> bool:
    """Whether a guider (PAG) lets each token of this layer attend to itself only, by patching sdpa."""
    from diffusers.hooks.layer_skip import AttentionProcessorSkipHook

    hooks = module.__dict__.get("_diffusers_hook")
    return hooks is not None and any(
        isinstance(hook, AttentionProcessorSkipHook) and hook.skip_attention_scores
        for hook in hooks.hooks.values()
    )


def _is_full(plan: Plan) -> bool:
    return plan.rule is None and bool((plan.counts == plan.keys).all())


def _with_anchors(plan: Plan, call: Call, frames: int) -> Plan:
    """Let every query block read the first ``frames`` frames of the grid."""
    if not frames or call.order is None:
        return plan
    start = call.layout.grid_start
    slots = call.order.rows
    here = broadcast_heads((slots >= start) & (slots < start + frames * call.layout.frame), call.heads)
    columns = fill_counts(here, plan.block[1]) > 0
    rule = None if plan.rule is None else _Anchored(plan.rule, start, start + frames * call.layout.frame)
    return Plan.from_blocks(
        plan.to_blocks() | columns[..., None, :].to(plan.indices.device), plan.block, rule
    )


@dataclass(frozen=True)
class _Anchored:
    """A plan's rule, which must not hide the keys start <= k < stop that every query may read."""

    rule: Rule
    start: int
    stop: int

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return self.rule(q, k) | ((k >= self.start) & (k < self.stop))


def _key_validity(mask: Tensor, batch: int, tokens: int) -> Tensor | str:
    """Key validity bool [B or 1, S] of a mask that only hides keys, or the reason it is not one.

    Accepts bool (True may be read), and additive masks whose entries are 0 or at most -1e4.
    """
    shape = tuple(mask.shape)
    if mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    elif mask.ndim == 3 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != tokens:
        return f"an attention mask of shape {shape} is no key-padding mask of {tokens} keys"
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask <= -1e4)).all()):
        return f"an additive attention mask of shape {shape} that does more than hide keys"
    return mask == 0
