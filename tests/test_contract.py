"""The contract: every method in every model family. A new method or family is one row here.

``make test`` runs a pairwise cover of (method, family, promise); ``make test-all`` runs the full product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import tiny_models as tiny
import torch

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


class Method(NamedTuple):
    """A setting that leaves much out, one that leaves nothing out, and the steps before its cache is used."""

    sparse: SparseProcessor
    full: SparseProcessor
    warm: int = 0


class Family(NamedTuple):
    model: Callable[[], Any]
    inputs: Callable[..., dict[str, Any]]


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
        ReTtentionProcessor(inner=RadialProcessor(block=8, decay=0.3, decimate_below=32), residual="float32"),
        ReTtentionProcessor(inner=RadialProcessor(block=8, decay=99.0, decimate_below=0)),
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
FAMILIES = {
    "wan": Family(tiny.wan, tiny.wan_inputs),
    "wan-i2v": Family(tiny.wan_i2v, tiny.wan_i2v_inputs),
    "wan-vace": Family(tiny.wan_vace, tiny.wan_vace_inputs),
}


def attach(model: Any, method: SparseProcessor, **options: Any) -> dit_sparse.Session:
    """Attach to every layer at every step, without the shortcut that leaves full plans to the model."""
    session = dit_sparse.apply(model, method, **{"schedule": "always", **options})
    session.full_plan_is_dense = False
    return session


def forward(model: Any, method: Method, inputs: dict[str, Any], branch: str = "cond") -> torch.Tensor:
    """The model's output, for methods with a cache at the first step that uses it."""
    if not method.warm:
        with model.cache_context(branch):
            return model(**inputs)[0]
    for step in range(method.warm + 1):
        with model.cache_context(branch, step_index=step, num_inference_steps=20):
            out = model(**inputs)[0]
    return out


def assert_ran_sparse(session: dit_sparse.Session, method: Method) -> None:
    report = session.report()
    assert report.rows
    assert all(row.where.phase is not Phase.DENSE for row in report.rows), str(report)
    if isinstance(method.sparse, DenseProcessor):
        return
    rows = [row for row in report.rows if not method.warm or row.where.phase is Phase.SPARSE]
    assert sum(sum(row.pairs) for row in rows) < 0.9 * sum(sum(row.every) for row in rows), str(report)


@torch.no_grad()
def full_budget_equals_stock(method: Method, family: Family) -> None:
    model, inputs = family.model(), family.inputs(2)
    stock = model(**inputs)[0]
    session = attach(model, method.full)
    torch.testing.assert_close(forward(model, method, inputs), stock, atol=1e-5, rtol=1e-5)
    rows = session.report().sparse_rows
    assert rows
    last = max(row.where.step or 0 for row in rows)
    assert all(row.density == 1 for row in rows if (row.where.step or 0) == last)
    session.full_plan_is_dense = True
    torch.testing.assert_close(forward(model, method, inputs), stock, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def restores_bit_for_bit(method: Method, family: Family) -> None:
    model, inputs = family.model(), family.inputs()
    stock, processors = (
        forward(model, method, inputs),
        dict(model.attn_processors),
    )  # leaves diffusers' own marks
    before = set(vars(model)), len(model._forward_pre_hooks), list(model.state_dict())
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with attach(model, method.sparse) as session:
        forward(model, method, inputs)
        assert_ran_sparse(session, method)
    assert torch.equal(model(**inputs)[0], stock)
    assert {k: id(p) for k, p in model.attn_processors.items()} == {k: id(p) for k, p in processors.items()}
    assert (set(vars(model)), len(model._forward_pre_hooks), list(model.state_dict())) == before
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert dit_sparse.session(model) is None


@torch.no_grad()
def is_deterministic(method: Method, family: Family) -> None:
    outs = []
    for _ in range(2):
        model = family.model()
        attach(model, method.sparse)
        outs += [forward(model, method, family.inputs()) for _ in range(2)]
    assert all(torch.equal(out, outs[0]) for out in outs)


@torch.no_grad()
def differs_from_dense(method: Method, family: Family) -> None:
    model, inputs = family.model(), family.inputs()
    stock = model(**inputs)[0]
    session = attach(model, method.sparse)
    out = forward(model, method, inputs)
    assert_ran_sparse(session, method)
    if not isinstance(method.sparse, DenseProcessor):
        assert (out - stock).abs().max() > 1e-4


@torch.no_grad()
def batch_equals_two_calls(method: Method, family: Family) -> None:
    """Batched classifier-free guidance equals two passes: state is kept per branch and per batch item."""
    model, both = family.model(), family.inputs(2)
    session = attach(model, method.sparse)
    together = forward(model, method, both, "cond_uncond")
    assert_ran_sparse(session, method)
    apart = []
    for i, branch in enumerate(("cond", "uncond")):
        one = {
            k: v[i : i + 1] if torch.is_tensor(v) and len(v) == 2 and v.ndim != 1 else v
            for k, v in both.items()
        }
        one["timestep"] = both["timestep"][:1]
        apart.append(forward(model, method, one, branch))
    torch.testing.assert_close(torch.cat(apart), together, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def resolution_may_change(method: Method, family: Family) -> None:
    model = family.model()
    session = attach(model, method.sparse)
    sizes = [{}, {"frames": 7, "height": 16, "width": 10}, {"frames": 9, "height": 12, "width": 12}, {}]
    outs = []
    for size in sizes:
        outs.append(forward(model, method, family.inputs(**size)))
        assert_ran_sparse(session, method)
    assert torch.equal(outs[0], outs[-1])


@torch.no_grad()
def reports_what_brute_force_counts(method: Method, family: Family) -> None:
    """Reported pairs equal the ones counted token by token over the plans that were executed."""
    model, counted = family.model(), []
    session = attach(model, method.sparse)
    from dit_sparse.method import Call

    original = Call._execute

    def spy(self: Any, q: Any, k: Any, v: Any, plan: Any, valid: Any, positions: Any, pairs: Any) -> Any:
        bq, bk = plan.block
        tokens = plan.to_blocks().repeat_interleave(bq, -2).repeat_interleave(bk, -1)
        tokens = tokens[..., : q.shape[2], : k.shape[2]]
        tokens = tokens & self.order.valid()[..., None]
        if valid is not None:
            tokens = tokens & valid[..., None, :]
        if plan.rule is not None:
            tokens = tokens & plan.rule(positions[None, :, :, None], positions[None, :, None, :])
        counted.append(int(tokens.expand(q.shape[0], q.shape[1], -1, -1).sum()))
        return original(self, q, k, v, plan, valid, positions, pairs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Call, "_execute", spy)
        forward(model, method, family.inputs(2))
    rows = session.report().rows
    assert sum(sum(row.pairs) for row in rows) == sum(counted) > 0
    tokens = 120
    assert all(sum(row.every) == row.calls * 2 * 2 * tokens * tokens for row in rows)


def gradients_survive_checkpointing(method: Method, family: Family) -> None:
    """Forwards of two branches and three steps, then one backward: the same gradients with and without.

    The last forward renews what the first one remembered, so a backward that looked at the session's current
    state would recompute the first one with other plans.
    """

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = family.model().train()
        session = attach(model, method.sparse, schedule="refresh 1, 5")
        if checkpointing:
            model.enable_gradient_checkpointing()
        losses = []
        for branch, step in (("cond", 1), ("uncond", 1), ("cond", 2), ("cond", 5)):
            inputs = family.inputs()
            inputs["hidden_states"] = tiny.randn(*inputs["hidden_states"].shape, seed=step)
            with model.cache_context(branch, step_index=step, num_inference_steps=10):
                losses.append(model(**inputs)[0].square().mean())
        assert_ran_sparse(session, method)
        calls = session.report().to_dict()["totals"]["full_run"]["calls"]
        sum(losses).backward()
        assert (
            session.report().to_dict()["totals"]["full_run"]["calls"] == calls
        )  # recomputation is not counted
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 20
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def gradients_equal_the_reference(method: Method, family: Family) -> None:
    def gradients(backend: str) -> list[torch.Tensor]:
        model = family.model().train()
        session = attach(model, method.sparse, backend=backend)
        forward(model, method, family.inputs()).square().mean().backward()
        assert_ran_sparse(session, method)
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients("auto"), gradients("reference"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def lora_may_come_and_go(method: Method, family: Family) -> None:
    from peft import LoraConfig

    model, inputs = family.model(), family.inputs()
    session = attach(model, method.sparse)
    without = forward(model, method, inputs)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    adapted = forward(model, method, inputs)
    assert_ran_sparse(session, method)
    assert (adapted - without).abs().max() > 1e-4
    session.remove()
    attach(model, method.sparse)
    torch.testing.assert_close(forward(model, method, inputs), adapted, atol=1e-6, rtol=1e-6)
    model.disable_adapters()
    torch.testing.assert_close(forward(model, method, inputs), without, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def copies_are_stock(method: Method, family: Family) -> None:
    import copy
    import pickle

    model, inputs = family.model(), family.inputs()
    stock = model(**inputs)[0]
    session = attach(model, method.sparse)
    sparse = forward(model, method, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.blocks))):
        assert not any(
            "Sparse" in type(m.processor).__name__ for m in twin.modules() if hasattr(m, "processor")
        )
    twin = copy.deepcopy(model)
    assert dit_sparse.session(twin) is None
    assert torch.equal(twin(**inputs)[0], stock)
    assert dit_sparse.session(model) is session
    assert torch.equal(forward(model, method, inputs), sparse)


PROMISES = [
    full_budget_equals_stock,
    restores_bit_for_bit,
    is_deterministic,
    differs_from_dense,
    batch_equals_two_calls,
    resolution_may_change,
    reports_what_brute_force_counts,
    gradients_survive_checkpointing,
    gradients_equal_the_reference,
    lora_may_come_and_go,
    copies_are_stock,
]


def pairwise(*axes: list[Any]) -> set[tuple[Any, ...]]:
    """A small set of combinations in which every pair of values of two axes appears (greedy)."""
    product = list(itertools.product(*axes))

    def pairs(row: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    missing, chosen = set().union(*map(pairs, product)), set()
    while missing:
        best = max(product, key=lambda row: len(pairs(row) & missing))
        chosen.add(best)
        missing -= pairs(best)
    return chosen


AXES = list(METHODS), list(FAMILIES), [p.__name__ for p in PROMISES]
COVER = pairwise(*AXES)
CASES = [
    pytest.param(*row, marks=[] if row in COVER else pytest.mark.full, id="-".join(row))
    for row in itertools.product(*AXES)
]


@pytest.mark.parametrize(("method", "family", "promise"), CASES)
@pytest.mark.filterwarnings("ignore:.*outside a pipeline run", "ignore:.*untrained parameters")
def test_contract(method: str, family: str, promise: str) -> None:
    check = next(p for p in PROMISES if p.__name__ == promise)
    check(METHODS[method], FAMILIES[family])


def test_every_method_has_a_row() -> None:
    assert {name: type(row.sparse) for name, row in METHODS.items() if name in dit_sparse.METHODS} == (
        dit_sparse.METHODS
    )


def test_every_family_has_a_row() -> None:
    from dit_sparse.pipelines import FAMILIES as TABLE

    assert set(TABLE) <= {type(row.model()).__name__ for row in FAMILIES.values()}
