"""SparseProcessor, the base of every method, and Call, what a method may know of one attention call.

Shapes: q, k, v are [B, H, S, D]; after ordering S' slots instead of S tokens. K and V may have fewer heads
(GQA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar
from zlib import crc32

import torch
from torch import Tensor, nn

from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.order import Order, broadcast_heads
from dit_sparse.parallel import Ulysses
from dit_sparse.plan import PackedPlan, Plan, blocks_of
from dit_sparse.schedule import Phase

T = TypeVar("T")

READS = frozenset({"layout", "layer", "step", "qk"})


class ZeroLinear(nn.Linear):
    """A projection that starts as zero, so that what it projects adds nothing; in the dtype of its input."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call: where it stands in the run and what it may remember.

    Args:
        layout: The tokens of this call.
        layer, layers, name: Index, count, and transformer and module path of the layer.
        step, steps: 0-based denoising step, of how many; None when the run is not known.
        branch: Which forward pass of the step.
        phase: REFRESH or SPARSE (a DENSE call never reaches a method).
        heads, kv_heads: Heads of q and of k, v. With ``share`` those that this process computes.
        scale: Softmax scale; None means 1 / sqrt(D).
        valid: Key validity in model order, bool [B or 1, S]; None means every key.
        asked: Whose outputs are wanted, in model order, bool [S]: other tokens are keys only, their queries
            are zeros and are not counted. None means every token.
        lse: Natural-log softmax statistics of a dense call over the same tokens, float32 [B, H, S], where one
            is at hand (conformance of methods that cache it).
        seed: With layer, step and branch, the seed of :meth:`generator`.
        cache: This layer's and branch's memory, shared by :meth:`at`.
        replays: The call is recomputed for a backward: what it remembered stays as it is.
        part: The method's trainable module of this layer, if any.
        hidden: The layer's hidden states [B, S, C] in model order, for methods that ask (``reads_hidden``).
            Zeros for text that the model keeps at another width or cuts to length. With ``share`` only of the
            tokens here: what is made of them goes through :meth:`to_heads`.
        share: How processes share the heads of the layer, in context parallelism.
    """

    layout: TokenLayout
    layer: int = 0
    layers: int = 1
    name: str = ""
    step: int | None = None
    steps: int | None = None
    branch: str = "cond"
    phase: Phase = Phase.SPARSE
    heads: int = 1
    kv_heads: int = 1
    scale: float | None = None
    valid: Tensor | None = None
    asked: Tensor | None = None
    lse: Tensor | None = None
    seed: int = 0
    cache: dict[str, tuple[Any, int | None]] = field(default_factory=dict)
    replays: bool = False
    part: nn.Module | None = None
    hidden: Tensor | None = None
    share: Ulysses | None = None
    backend: str = "auto"
    order: Order | None = None
    on_run: Callable[..., str] | None = None
    plan_cache: Callable[[SparseProcessor, Callable[[], Plan], Call], Plan] | None = None

    @classmethod
    def standalone(
        cls,
        layout: TokenLayout,
        *,
        layer: int = 0,
        layers: int = 1,
        step: int | None = 0,
        steps: int | None = 1,
        heads: int = 1,
        kv_heads: int | None = None,
        branch: str = "cond",
        phase: Phase = Phase.SPARSE,
        valid: Tensor | None = None,
        lse: Tensor | None = None,
        seed: int = 0,
        cache: dict[str, tuple[Any, int | None]] | None = None,
    ) -> Call:
        """A call that needs no model: for tests, drawings and people with their own attention code."""
        if valid is not None and valid.ndim == 1:
            valid = valid[None]
        return cls(
            layout=layout,
            layer=layer,
            layers=layers,
            step=step,
            steps=steps,
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            branch=branch,
            phase=phase,
            valid=valid,
            lse=lse,
            seed=seed,
            cache={} if cache is None else cache,
        )

    def at(self, **changes: Any) -> Call:
        """The same call at another step (or phase, ...), with the same memory."""
        return replace(self, **changes)

    def generator(self) -> torch.Generator:
        """A CPU generator seeded by (seed, layer, step, branch): the same call draws the same numbers."""
        key = f"{self.seed}/{self.layer}/{self.step}/{self.branch}"
        return torch.Generator().manual_seed(crc32(key.encode()))

    @property
    def layer_heads(self) -> int:
        """Heads of the layer, of which ``heads`` are computed here: all but in context parallelism."""
        return self.heads if self.share is None else self.share.layer_heads

    def own(self, x: Tensor, axis: int = 0) -> Tensor:
        """What belongs to the heads here, of something that all heads of the layer have along ``axis``."""
        return x if self.share is None else self.share.own(x, axis)

    def all_heads(self, x: Tensor, axis: int = 1) -> Tensor:
        """Of something that the heads here have along ``axis``, that of all heads of the layer.

        Processes wait for each other: every one must ask, and not at every step.
        """
        return x if self.share is None else self.share.all_heads(x, axis)

    def to_heads(self, x: Tensor) -> Tensor:
        """What was made of ``hidden``, [B, heads of the layer, tokens, D], for the heads here: as v is."""
        return x if self.share is None else self.share.to_heads(x)

    def everywhere(self, here: bool, device: torch.device) -> bool:
        """Whether it holds in every process: what these decide, they must decide alike."""
        if self.share is None:
            return here
        return bool(self.all_heads(torch.full((1, self.heads), here, device=device)).all())

    def cached(self, name: str, make: Callable[[], T], *, renew: bool = True) -> T:
        """The remembered value, or ``make()`` when there is none yet and, if ``renew``, at REFRESH.

        Values carry no gradient and are immutable: one that ages is a function of (value, ``made_at(name)``,
        step). Plans are kept as bits.
        """
        found = self.cache.get(name)
        if found is None or (renew and self.phase is Phase.REFRESH and not self.replays):
            with torch.no_grad():
                value = make()
            self.cache[name] = (value.pack() if isinstance(value, Plan) else value, self.step)
            return value
        kept: Any = found[0].unpack() if isinstance(found[0], PackedPlan) else found[0]
        return kept

    def made_at(self, name: str) -> int | None:
        """The step at which the remembered value was made; None without one.

        Whether this very call made it is told by ``made_at(name) == step``, also when a call is replayed.
        """
        found = self.cache.get(name)
        return found[1] if found is not None else None

    def slots_valid(self) -> Tensor:
        """Which slots of the ordered sequence may be keys: bool [B or 1, H or 1, S']."""
        return self._order().valid(self.valid)

    def filled(self, block: int) -> Tensor:
        """Valid keys per block of the ordered sequence: int64 [B or 1, H or 1, blocks]."""
        return self._order().filled(block, self.valid)

    def grid_blocks(self, block: int) -> int:
        """Blocks of the ordered grid, before text, prefix and suffix."""
        return blocks_of(self._order().slots - self.layout.extra, block)

    def eligible(self, block: int) -> Tensor:
        """Key blocks with a token that may be read: bool [B or 1, H or 1, 1, blocks], beside [..., Q, K]."""
        return (self.filled(block) > 0)[..., None, :]

    def ordered_lse(self) -> Tensor | None:
        """``lse`` in the order of the slots, [B, H, S']; -inf in holes."""
        if self.lse is None:
            return None
        order = self._order()
        here = broadcast_heads(order.valid(), self.lse.shape[1])
        return order.apply(self.lse[..., None])[..., 0].masked_fill(~here, -torch.inf)

    def pairs(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Exact (computed, all) token pairs of a plan in this call, int64 [B or 1, H or 1]."""
        order = self._order()
        fq, fk = order.filled(plan.block[0], self.asked), order.filled(plan.block[1], self.valid)
        slots = None if plan.rule is None else (self.slots_valid(), order.valid(self.asked))
        return plan.pairs(fq, fk, order.index, *(slots or ())), fq.sum(-1) * fk.sum(-1)

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Execute a plan on ordered q, k, v: (out [B, H, S', D], lse float32 [B, H, S']), and report it."""
        positions = None if plan.rule is None else self._order().index
        return self._execute(q, k, v, plan, self._readable(), positions, lambda: self.pairs(plan)[0])

    def run_quantized(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, qk: str, pv: str
    ) -> tuple[Tensor, Tensor]:
        """:meth:`run` with its products in formats ``qk`` and ``pv``, such as "int8", and so no gradients.

        See :func:`dit_sparse.kernels.quantized_block_sparse_attention`.
        """
        valid = self.slots_valid()
        return self._execute(q, k, v, plan, valid, None, lambda: self.pairs(plan)[0], (qk, pv))

    def run_dense(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`run` with every block kept: what a method measures at REFRESH."""
        return self.run(q, k, v, Plan.full(q.shape[2], k.shape[2], 128, q.device))

    def run_summary(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Let every ordered query read the few keys that stand for the others: (out, lse) as :meth:`run`.

        Args:
            k, v: Pooled keys and values, [B, KV, fewer, D].
            valid: bool [B or 1, H or 1, fewer]; None means every one.
        """

        def pairs() -> Tensor:
            keys = torch.tensor([[k.shape[2]]], device=q.device) if valid is None else valid.sum(-1)
            return keys * (self._order().tokens if self.asked is None else self.asked.sum())

        plan = Plan.full(q.shape[2], k.shape[2], 128, q.device)
        return self._execute(q, k, v, plan, valid, None, pairs)

    def run_linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan | None = None,
        *,
        feature_map: str = "softmax",
        weights: tuple[Tensor, Tensor] | None = None,
        eps: float | None = None,
    ) -> Tensor:
        """Linear attention over all ordered keys, or those ``plan`` leaves: it computes no token pair.

        See :func:`dit_sparse.kernels.linear_attention`; a backend that it does not have counts as "auto".
        """
        from dit_sparse.kernels.linear_ops import BACKENDS, linear_attention

        def none() -> Tensor:
            return torch.zeros((1, 1), dtype=torch.int64, device=q.device)

        backend = self.backend if self.on_run is None else self.on_run(None, none, self)
        return linear_attention(
            q,
            k,
            v,
            plan,
            feature_map=feature_map,
            weights=weights,
            valid=self._readable(),
            eps=eps,
            backend=backend if backend in BACKENDS else "auto",
        )

    def _readable(self) -> Tensor | None:
        """:meth:`slots_valid`, or None where that is every slot."""
        order = self._order()
        return None if self.valid is None and order.slots == order.tokens else self.slots_valid()

    def _execute(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        valid: Tensor | None,
        positions: Tensor | None,
        pairs: Callable[[], Tensor],
        formats: tuple[str, str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        from dit_sparse.kernels import block_sparse_attention, quantized_block_sparse_attention

        if formats is not None:
            backend = "triton" if q.is_cuda and self.backend != "reference" else "reference"
            if self.on_run is not None:
                self.on_run(plan, pairs, self, "{} with {} x {}".format(backend, *formats))
            qk, pv = formats
            return quantized_block_sparse_attention(
                q, k, v, plan, qk=qk, pv=pv, valid=valid, scale=self.scale, backend=backend
            )
        backend = self.backend if self.on_run is None else self.on_run(plan, pairs, self)
        return block_sparse_attention(
            q, k, v, plan, valid=valid, scale=self.scale, positions=positions, backend=backend
        )

    def _order(self) -> Order:
        if self.order is None:
            raise ValueError(
                "this call has no order yet: use method.select(q, k, call), or call.at(order=...)"
            )
        return self.order


@dataclass(frozen=True, kw_only=True)
class SparseProcessor:
    """A method of sparse attention: parameters only, no state.

    A subclass is a frozen dataclass whose fields are the method's parameters. It sets ``reads`` and writes
    :meth:`plan`; it overrides :meth:`order` to form blocks along something else than raster order, and
    :meth:`attend` to merge, rescale or add a branch.

    >>> pipe.transformer.set_attn_processor(RadialProcessor())  # doctest: +SKIP
    """

    reads: ClassVar[frozenset[str]] = READS
    """What a plan depends on, out of "layout", "layer", "step" and "qk": that is its cache key."""
    orders_by_qk: ClassVar[bool] = False
    """Whether :meth:`order` looks into ``call.cache``, and so is asked at every call."""
    needs_training: ClassVar[bool] = False
    """Whether :meth:`module` has parameters without which the method is not what its paper says."""
    trained_with: ClassVar[tuple[str, ...]] = ()
    """Fields, of JSON values, without which trained parts are useless: a session refuses others' parts."""

    @property
    def needs_frames(self) -> str:
        """Why the method has no meaning for images, which are one frame; empty where it has one."""
        return ""

    @property
    def needs_all_heads(self) -> str:
        """Why the method cannot run where processes share the heads of a layer; empty where it can."""
        return ""

    @property
    def reads_hidden(self) -> bool:
        """Whether ``call.hidden`` is wanted."""
        return False

    @property
    def refresh(self) -> str:
        """Steps at which the method renews its cache where the schedule names none, as ``Schedule.parse``."""
        return ""

    def order(self, call: Call) -> Order:
        """Where tokens sit while blocks are formed. Default: raster, text on a boundary of ``self.block``."""
        block = self.block  # type: ignore[attr-defined]  # a field of every method that keeps this default
        return Order.raster(call.layout, block if isinstance(block, int) else max(block))

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The method: which key blocks each query block reads.

        Args:
            q, k: Ordered [B, H, S', D]; holes are zeros (see ``call.slots_valid()`` and ``call.filled``).
                Static methods ignore them.
        """
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Ordered q, k, v -> ordered output [B, H, S', D]. Default: execute :meth:`plan`."""
        return call.run(q, k, v, self.planned(q, k, call))[0]

    def is_dense(self, call: Call) -> bool:
        """Whether this call is the model's own attention, which then computes it (reported as "full plan").

        Static plans that leave nothing out are found without asking.
        """
        return False

    def planned(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """:meth:`plan` without gradients, made once for every call that shares what it ``reads``."""
        with torch.no_grad():
            if call.plan_cache is None:
                return self.plan(q, k, call)
            return call.plan_cache(self, lambda: self.plan(q, k, call), call)

    def head_costs(self, call: Call) -> Tensor | None:
        """What each head of the layer computes, in any unit, float64 [heads]; None where all are alike.

        It must be known before q and k: processes that share the heads by it decide alike without a word.
        """
        return None

    def at_density(self, density: float, layout: TokenLayout) -> SparseProcessor:
        """The nearest setting of this method to ``density`` for a layout.

        Raises:
            ValueError: The method cannot reach it; the message says its floor.
        """
        raise ValueError(f"{type(self).__name__} has no setting that follows a density")

    def module(self, layer: Layer) -> nn.Module | None:
        """The method's trainable part for one layer, or None."""
        return None

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        """A method is attached to a model, which tells it the grid; one layer's processor knows nothing."""
        raise ValueError(
            f"{type(self).__name__} cannot be one layer's processor: use model.set_attn_processor(...), "
            "which takes a dict for a choice of layers and knows methods once one was imported, or "
            "dit_sparse.apply(pipe, ...)"
        )

    def select(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """From model-order q, k [B, H, S, D]: order them, then :meth:`plan`."""
        order = self.order(call).to(q.device)
        return self.plan(order.apply(q), order.apply(k), call.at(order=order))

    @property
    def is_static(self) -> bool:
        """Whether plans do not depend on q and k."""
        return "qk" not in self.reads

    @property
    def only_plans(self) -> bool:
        """Whether :meth:`attend` only executes the plan, so that a full one is the model's own attention."""
        return type(self).attend is SparseProcessor.attend


def nearest_setting(
    method: SparseProcessor,
    layout: TokenLayout,
    density: float,
    reached: Callable[[int], float],
    most: int,
    less: str,
    more: str,
) -> int:
    """The integer setting in 0..most whose density ``reached(setting)``, which never falls, is nearest.

    Raises:
        ValueError: ``density`` is outside what the method reaches on ``layout``; the message says floor,
            ceiling and what to use for ``less`` or ``more``.
    """
    floor, ceiling = reached(0), reached(most)
    if not floor - 1e-4 <= density <= ceiling + 1e-4:  # what the message prints is accepted
        raise ValueError(
            f"{method} on {layout.grid} has the floor {floor:.4f} and the ceiling {ceiling:.4f}, "
            f"got {density}: use a {less if density < floor else more}"
        )
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reached(middle) <= density else (low, middle)
    return min(low, high, key=lambda setting: abs(reached(setting) - density))


def share_of_grid(method: SparseProcessor, density: float, layout: TokenLayout, floor: float = 0.0) -> float:
    """The share of the grid's own pairs that makes ``density`` where all other pairs are computed.

    Args:
        floor: The smallest share the method can keep.

    Raises:
        ValueError: ``density`` is outside what the method reaches on ``layout``; the message says its floor.
    """
    grid, everything = layout.tokens**2, layout.sequence**2
    lowest = (floor * grid + everything - grid) / everything
    if not lowest - 1e-4 <= density <= 1:  # what the message prints is accepted
        raise ValueError(
            f"{method} on {layout.grid} has the floor {lowest:.4f} and the ceiling 1, got {density}"
        )
    return max(floor, (density * everything - (everything - grid)) / grid)


def install_seam() -> None:
    """Let ``model.set_attn_processor`` take a method, or a dict with methods; the rest stays as it was."""
    from functools import wraps

    from diffusers.models.attention import AttentionMixin

    mixin: Any = AttentionMixin
    stock = mixin.set_attn_processor
    if hasattr(stock, "dit_sparse_seam"):
        return

    @wraps(stock)
    def set_attn_processor(self: nn.Module, processor: Any) -> None:
        from dit_sparse import attach

        if isinstance(processor, SparseProcessor):
            attach.apply(self, processor)
        elif isinstance(processor, dict) and any(isinstance(p, SparseProcessor) for p in processor.values()):
            attach.apply_dict(self, dict(processor), stock)
        else:
            given = list(processor.values()) if isinstance(processor, dict) else [processor]
            stock(self, processor)  # first, so that a dict it refuses leaves the session as it was
            attach.release_for(self, given)

    set_attn_processor.dit_sparse_seam = True  # type: ignore[attr-defined]
    mixin.set_attn_processor = set_attn_processor
