"""The contract: every method in every model family. A new method or family is one row here.

``make test`` runs a pairwise cover of (method, model, promise); ``make test-all`` runs the full product.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import tiny_models as tiny
import torch
from families import Case, Pipe, at_step, cases
from torch.utils.checkpoint import checkpoint

import dit_sparse
from dit_sparse import (
    AdaSpaProcessor,
    BladeProcessor,
    DenseProcessor,
    DraftProcessor,
    EfficientVDiTProcessor,
    LinVideoProcessor,
    NeighborhoodProcessor,
    PAROProcessor,
    Phase,
    RadialProcessor,
    RandomProcessor,
    ReTtentionProcessor,
    SLAProcessor,
    SlidingTileProcessor,
    SparseDProcessor,
    SparseProcessor,
    SparseVDiTProcessor,
    VMoBAProcessor,
    VSAProcessor,
    WindowProcessor,
)
from dit_sparse.pipelines import FAMILIES, NOTHING_TO_DO
from dit_sparse.pipelines.matrix import matrix, missing


class Method(NamedTuple):
    """A method for a grid of about 120 tokens, of a video or an image.

    Args:
        sparse: A setting that leaves much out.
        full: One that leaves nothing out.
        warm: Steps before its cache is used.
    """

    sparse: SparseProcessor
    full: SparseProcessor
    warm: int = 0


METHODS = {
    "dense": Method(DenseProcessor(block=16), DenseProcessor(block=16)),
    "radial": Method(
        RadialProcessor(block=8, decay=0.3, decimate_below=32),
        RadialProcessor(block=8, decay=99.0, decimate_below=0),
    ),
    "draft": Method(DraftProcessor(density=0.3, pool=(2, 3)), DraftProcessor(density=1.0, pool=(2, 3))),
    "adaspa": Method(AdaSpaProcessor(density=0.3, block=8), AdaSpaProcessor(density=1.0, block=8), warm=1),
    "sparse_vdit": Method(
        SparseVDiTProcessor(block=8, eps=9.0), SparseVDiTProcessor(block=8, share=1.0, lam=0.0), warm=1
    ),
    "paro": Method(PAROProcessor(density=0.3, block=8), PAROProcessor(density=1.0, block=8), warm=1),
    "rettention": Method(
        ReTtentionProcessor(inner=WindowProcessor(density=0.3, block=8), residual="float32"),
        ReTtentionProcessor(inner=WindowProcessor(density=1.0, block=8)),
        warm=2,  # one step after a refresh, the same input gives the same output
    ),
    "sparsed": Method(SparseDProcessor(density=0.3, block=8), SparseDProcessor(density=1.0, block=8), warm=1),
    "neighborhood": Method(
        NeighborhoodProcessor(window=(3, 3, 3), stride=(1, 1, 1), tile=(2, 2, 4)),
        NeighborhoodProcessor(window=(-1, -1, -1)),
    ),
    "sliding_tile": Method(
        SlidingTileProcessor(window=(3, 1, 3), tile=(1, 2, 2)), SlidingTileProcessor(window=(99, 99, 99))
    ),
    "efficient_vdit": Method(
        EfficientVDiTProcessor(block=4, frames=1), EfficientVDiTProcessor(block=4, frames=99)
    ),
    "vmoba": Method(VMoBAProcessor(), VMoBAProcessor(share=1.0)),
    "blade": Method(
        BladeProcessor(block=8, samples=4, summary=8),
        BladeProcessor(block=8, samples=4, least=1.0, most=1.0, summary=None),
    ),
    "sla": Method(
        SLAProcessor(ratio=0.3, block=(16, 8), linear="rest"), SLAProcessor(ratio=1.0, block=(16, 8))
    ),
    "linvideo": Method(LinVideoProcessor(linear_layers=(1,)), LinVideoProcessor(r=1.0)),
    "vsa": Method(
        VSAProcessor(keep=0.3, tile=(2, 2, 2), gate=True), VSAProcessor(keep=1.0, tile=(2, 2, 2), gate=True)
    ),
    "window": Method(WindowProcessor(density=0.3, block=16), WindowProcessor(density=1.0, block=16)),
    "random": Method(RandomProcessor(density=0.3, block=16), RandomProcessor(density=1.0, block=16)),
    "per-call": Method(tiny.TopK(keep=3), tiny.TopK(keep=999)),
    "step-cached": Method(tiny.Cached(keep=3), tiny.Cached(keep=999)),
}
CASES = cases()


class Attached:
    """A model with a method at every layer and step, and no shortcut that leaves full plans to the model."""

    def __init__(self, case: Case, method: SparseProcessor, model: Any = None, **options: Any) -> None:
        self.case = case
        self.model = case.model() if model is None else model
        self.pipe = Pipe(self.model)
        self.session = dit_sparse.apply(self.pipe, method, **{"schedule": "always", **options})
        self.session.full_plan_is_dense = False

    def forward(self, method: Method, inputs: dict[str, Any], branch: str = "cond") -> torch.Tensor:
        """The model's output, for methods with a cache at the first step that uses it."""
        for step in range(method.warm + 1) if method.warm else (None,):
            with at_step(self.pipe, branch, step):
                out = self.model(**inputs)
        return self.case.output(out)

    def assert_ran_sparse(self, method: Method) -> None:
        report = self.session.report()
        assert report.rows
        assert all(row.where.phase is not Phase.DENSE for row in report.rows), str(report)
        if isinstance(method.sparse, DenseProcessor):
            return
        rows = [row for row in report.rows if not method.warm or row.where.phase is Phase.SPARSE]
        assert sum(sum(row.pairs) for row in rows) < 0.9 * sum(sum(row.every) for row in rows), str(report)


def inputs_of(case: Case, model: Any, batch: int = 1, grid: Any = None, first: int = 0) -> dict[str, Any]:
    return case.inputs(model, batch if case.batched else 1, grid or case.grid, first)


def stock_output(case: Case, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with at_step(Pipe(model), "cond"):
        return case.output(model(**inputs))


@torch.no_grad()
def full_budget_equals_stock(method: Method, case: Case) -> None:
    model = case.model()
    inputs = inputs_of(case, model, 2)
    stock = stock_output(case, model, inputs)
    attached = Attached(case, method.full, model)
    torch.testing.assert_close(attached.forward(method, inputs), stock, atol=1e-5, rtol=1e-5)
    rows = attached.session.report().sparse_rows
    assert rows
    last = max(row.where.step or 0 for row in rows)
    assert all(row.density == 1 for row in rows if (row.where.step or 0) == last)
    attached.session.full_plan_is_dense = True
    torch.testing.assert_close(attached.forward(method, inputs), stock, atol=1e-5, rtol=1e-5)


def processors_of(model: Any) -> dict[str, int]:
    return {name: id(m.processor) for name, m in model.named_modules() if hasattr(m, "processor")}


@torch.no_grad()
def restores_bit_for_bit(method: Method, case: Case) -> None:
    model = case.model()
    inputs = inputs_of(case, model)
    stock, processors = stock_output(case, model, inputs), processors_of(model)
    before = set(vars(model)), len(model._forward_pre_hooks), list(model.state_dict())
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    attached = Attached(case, method.sparse, model)
    with attached.session:
        attached.forward(method, inputs)
        attached.assert_ran_sparse(method)
    assert torch.equal(stock_output(case, model, inputs), stock)
    assert processors_of(model) == processors
    assert (set(vars(model)), len(model._forward_pre_hooks), list(model.state_dict())) == before
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert dit_sparse.session(model) is None


@torch.no_grad()
def is_deterministic(method: Method, case: Case) -> None:
    outs = []
    for _ in range(2):
        attached = Attached(case, method.sparse)
        outs += [attached.forward(method, inputs_of(case, attached.model)) for _ in range(2)]
    assert all(torch.equal(out, outs[0]) for out in outs)


@torch.no_grad()
def differs_from_dense(method: Method, case: Case) -> None:
    model = case.model()
    inputs = inputs_of(case, model)
    stock = stock_output(case, model, inputs)
    attached = Attached(case, method.sparse, model)
    out = attached.forward(method, inputs)
    attached.assert_ran_sparse(method)
    if not isinstance(method.sparse, DenseProcessor):
        assert (out - stock).abs().max() > 1e-4 * stock.abs().max()


@torch.no_grad()
def batch_equals_two_calls(method: Method, case: Case) -> None:
    """Batched classifier-free guidance equals two passes: state is kept per branch and per batch item."""
    attached = Attached(case, method.sparse)
    together = attached.forward(method, inputs_of(case, attached.model, 2), "cond_uncond")
    attached.assert_ran_sparse(method)
    apart = [
        attached.forward(method, inputs_of(case, attached.model, first=i), branch)
        for i, branch in enumerate(("cond", "uncond"))
    ]
    torch.testing.assert_close(torch.cat(apart), together, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def padding_changes_nothing(method: Method, case: Case) -> None:
    """A padded prompt gives what the trimmed one gives: masks are honoured, in plans and in kernels."""
    assert case.padded is not None
    attached = Attached(case, method.sparse)
    padded, trimmed = case.padded(attached.model)
    out = attached.forward(method, padded)
    attached.assert_ran_sparse(method)
    torch.testing.assert_close(out, attached.forward(method, trimmed), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def resolution_may_change(method: Method, case: Case) -> None:
    attached = Attached(case, method.sparse)
    grids = [(7, 8, 5), (9, 6, 6)] if case.family.video else [(1, 16, 17), (1, 14, 15)]
    outs = []
    for grid in (case.grid, *grids, case.grid):
        outs.append(attached.forward(method, inputs_of(case, attached.model, grid=grid)))
        attached.assert_ran_sparse(method)
    assert torch.equal(outs[0], outs[-1])


@torch.no_grad()
def reports_what_brute_force_counts(method: Method, case: Case) -> None:
    """Reported pairs equal the ones counted token by token over the plans that were executed."""
    from dit_sparse.method import Call
    from dit_sparse.order import broadcast_heads
    from dit_sparse.router import Router

    attached, counted, every = Attached(case, method.sparse), [], []
    execute, route = Call._execute, Router.route

    def spy(self: Any, q: Any, k: Any, v: Any, plan: Any, valid: Any, positions: Any, pairs: Any) -> Any:
        bq, bk = plan.block
        tokens = plan.to_blocks().repeat_interleave(bq, -2).repeat_interleave(bk, -1)
        tokens = tokens[..., : q.shape[2], : k.shape[2]]
        tokens = tokens & broadcast_heads(self.order.valid(self.asked), q.shape[1])[..., None]
        if valid is not None:
            tokens = tokens & broadcast_heads(valid, q.shape[1])[..., None, :]
        if plan.rule is not None:
            tokens = tokens & plan.rule(positions[None, :, :, None], positions[None, :, None, :])
        counted.append(int(tokens.expand(q.shape[0], q.shape[1], -1, -1).sum()))
        return execute(self, q, k, v, plan, valid, positions, pairs)

    def count(self: Any, at: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any) -> Any:
        keys = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
        if mask is not None:
            keys = keys & (mask[:, :1] if mask.dtype == torch.bool else mask[:, :1] == 0)
        every.append(int(keys.any(2).sum()) * q.shape[1] * q.shape[2])
        return route(self, at, q, k, v, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Call, "_execute", spy)
        patch.setattr(Router, "route", count)
        attached.forward(method, inputs_of(case, attached.model, 2))
    rows = attached.session.report().rows
    assert sum(sum(row.pairs) for row in rows) == sum(counted) > 0
    assert sum(sum(row.every) for row in rows) == sum(every)


def gradients_survive_checkpointing(method: Method, case: Case) -> None:
    """Forwards of two branches and three steps, then one backward: the same gradients with and without.

    The last forward renews what the first one remembered, so a backward that looked at the session's current
    state would recompute the first one with other plans.
    """

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        attached = Attached(case, method.sparse, schedule="refresh 1, 5")
        model = attached.model.train()
        if checkpointing:
            # Diffusers' own function takes no keywords, with which HunyuanImage calls it.
            model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        losses = []
        for branch, step in (("cond", 1), ("uncond", 1), ("cond", 2), ("cond", 5)):
            with at_step(attached.pipe, branch, step, 10):
                out = case.output(model(**inputs_of(case, model, first=step)))
            losses.append(out.square().mean())
        attached.assert_ran_sparse(method)
        calls = attached.session.report().to_dict()["totals"]["full_run"]["calls"]
        sum(losses).backward()
        recomputed = attached.session.report().to_dict()["totals"]["full_run"]["calls"]
        assert recomputed == calls  # recomputation is not counted
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 10
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def gradients_equal_the_reference(method: Method, case: Case) -> None:
    def gradients(backend: str) -> list[torch.Tensor]:
        attached = Attached(case, method.sparse, backend=backend)
        attached.model.train()
        attached.forward(method, inputs_of(case, attached.model)).square().mean().backward()
        attached.assert_ran_sparse(method)
        return [p.grad for p in attached.model.parameters() if p.grad is not None]

    for a, b in zip(gradients("auto"), gradients("reference"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def lora_may_come_and_go(method: Method, case: Case) -> None:
    from peft import LoraConfig

    attached = Attached(case, method.sparse)
    model = attached.model
    inputs = inputs_of(case, model)
    without = attached.forward(method, inputs)
    own = {f"{layer.name}." for layer in case.family.layers(model)}
    targets = [
        name
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
        and any(name.startswith(layer) for layer in own)
        and "sparse_branch" not in name
    ]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapted = attached.forward(method, inputs)
    attached.assert_ran_sparse(method)
    assert (adapted - without).abs().max() > 1e-4 * without.abs().max()
    attached.session.remove()
    attached = Attached(case, method.sparse, model)
    torch.testing.assert_close(attached.forward(method, inputs), adapted, atol=1e-6, rtol=1e-6)
    model.disable_adapters()
    torch.testing.assert_close(attached.forward(method, inputs), without, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def copies_are_stock(method: Method, case: Case) -> None:
    import copy
    import pickle

    model = case.model()
    inputs = inputs_of(case, model)
    stock = stock_output(case, model, inputs)
    attached = Attached(case, method.sparse, model)
    sparse = attached.forward(method, inputs)
    parts = torch.nn.ModuleList(m for m in model.children() if isinstance(m, torch.nn.ModuleList))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(parts))):
        assert not any(
            "Sparse" in type(m.processor).__name__ for m in twin.modules() if hasattr(m, "processor")
        )
    twin = copy.deepcopy(model)
    assert dit_sparse.session(twin) is None
    assert torch.equal(stock_output(case, twin, inputs), stock)
    assert dit_sparse.session(model) is attached.session
    assert torch.equal(attached.forward(method, inputs), sparse)


PROMISES = [
    full_budget_equals_stock,
    restores_bit_for_bit,
    is_deterministic,
    differs_from_dense,
    batch_equals_two_calls,
    padding_changes_nothing,
    resolution_may_change,
    reports_what_brute_force_counts,
    gradients_survive_checkpointing,
    gradients_equal_the_reference,
    lora_may_come_and_go,
    copies_are_stock,
]


def pairwise(rows: list[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """A small set of rows in which every pair of values that some row has appears (greedy)."""

    def pairs(row: tuple[str, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    missing = set().union(*map(pairs, rows))
    chosen = set()
    for wanted in (3, 2, 1):
        for row in rows:
            if len(pairs(row) & missing) >= wanted:
                chosen.add(row)
                missing -= pairs(row)
    return chosen


def applies(case: Case, promise: Callable[[Method, Case], None]) -> bool:
    """Whether diffusers itself can do to the model what the promise is about."""
    if promise is padding_changes_nothing:
        return case.padded is not None
    if promise is batch_equals_two_calls:
        return case.batched
    if promise is gradients_survive_checkpointing:
        return bool(getattr(case.stock, "_supports_gradient_checkpointing", False))
    if promise is lora_may_come_and_go:
        return hasattr(case.stock, "add_adapter")
    return True


def parameters() -> list[Any]:
    """Every (method, case, promise) that can be; those outside the cover are marked ``full``."""
    table = matrix()
    rows = []
    for method, (name, case), promise in itertools.product(METHODS, CASES.items(), PROMISES):
        runs = not table[case.cls].get(method, missing(case.cls))
        if runs and applies(case, promise):
            rows.append((method, name, promise.__name__))
    cover = pairwise(rows)
    return [
        pytest.param(*row, marks=[] if row in cover else pytest.mark.full, id="-".join(row)) for row in rows
    ]


@pytest.mark.parametrize(("method", "case", "promise"), parameters())
@pytest.mark.filterwarnings("ignore:.*outside a pipeline run", "ignore:.*untrained parameters")
def test_contract(method: str, case: str, promise: str) -> None:
    check = next(p for p in PROMISES if p.__name__ == promise)
    check(METHODS[method], CASES[case])


def test_every_method_has_a_row() -> None:
    assert {name: type(row.sparse) for name, row in METHODS.items() if name in dit_sparse.METHODS} == (
        dit_sparse.METHODS
    )


def test_every_family_has_a_case() -> None:
    assert {case.cls for case in CASES.values()} == set(FAMILIES)


REFUSED = [
    (name, method, why)
    for name, case in CASES.items()
    if not missing(case.cls)
    for method, why in matrix()[case.cls].items()
    if why
]


@pytest.mark.parametrize(("name", "method", "why"), REFUSED)
def test_a_method_that_does_not_apply_says_so(name: str, method: str, why: str) -> None:
    model = CASES[name].model()
    with pytest.raises(ValueError, match=re.escape(f"does not apply to {CASES[name].cls}: {why}")):
        dit_sparse.apply(model, METHODS[method].sparse)
    assert dit_sparse.session(model) is None


@pytest.mark.parametrize("cls", NOTHING_TO_DO)
def test_a_model_without_anything_to_make_sparse_says_so(cls: str) -> None:
    model = type(cls, (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=re.escape(NOTHING_TO_DO[cls])):
        dit_sparse.apply(model, METHODS["window"].sparse)
