"""One of several processes that share a model: ``tests/test_parallel.py`` starts them, as ``torchrun`` would.

    RANK=0 WORLD_SIZE=2 ... PYTHONPATH=tests:tests/support python context_parallel_worker.py RESULTS CHECK...

A check is a function of this file. What each returns the first process writes to RESULTS, as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny_models as tiny
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import context_parallel
from diffusers.models import attention_dispatch
from diffusers.utils import logging
from families import Case, Pipe, at_step, cases
from test_contract import METHODS, Attached, Method, inputs_of, stock_output
from torch import Tensor

import dit_sparse
from dit_sparse import (
    DenseProcessor,
    PAROProcessor,
    Phase,
    Plan,
    RandomProcessor,
    SlidingTileProcessor,
    SparseProcessor,
    SparseVDiTProcessor,
    VMoBAProcessor,
    calibrate,
)
from dit_sparse.kernels import block_sparse_attention
from dit_sparse.pipelines.matrix import matrix

WAN = cases()["wan"]._replace(changes={"num_attention_heads": 4})
UNEVEN = ((5, 5, 3), (5, 3, 3), (1, 1, 1), (1, 1, 3))
"""Windows of sliding tiles for four heads: the first two read far more."""
# LTX gives each head of its cross-attention a copy of the mask: too many for the heads that Ulysses leaves.
MASKS = ("encoder_attention_mask", "audio_encoder_attention_mask")


def shared(case: Case, **config: Any) -> Any:
    """A model that all processes share, by default with Ulysses."""
    model = case.model()
    there = dict(model.named_modules())
    # The plan of Helios names the 40 blocks of its checkpoint, whatever a model has.
    plan = {path: how for path, how in model._cp_plan.items() if "*" in path or path in there}
    degrees = ContextParallelConfig(**config or {"ulysses_degree": dist.get_world_size()})
    model.enable_parallelism(config=degrees, cp_plan=plan)
    return model


def train(attached: Attached) -> None:
    """Give the trainable parts other weights than those with which they add nothing."""
    generator = torch.Generator().manual_seed(3)
    for part in attached.session.sparse_modules().values():
        for weight in part.parameters():
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)


def compared(
    method: Method, case: Case = WAN, grid: Any = None, batch: int = 1, **config: Any
) -> dict[str, Any]:
    """One process and all of them: the largest difference, and whether they count the same pairs."""
    outs, reports = [], []
    for model in (case.model(), shared(case, **config)):
        attached = Attached(case, method.sparse, model)
        train(attached)
        with torch.no_grad():
            outs.append(attached.forward(method, unmasked(case, model, batch, grid)))
        reports.append(attached.session.report())
    alone, together = outs
    whole = reports[1].gather()
    assert all(row.where.phase is not Phase.DENSE for row in whole.rows), str(whole)
    assert isinstance(method.sparse, DenseProcessor) or min(row.density for row in whole.rows) < 0.9, str(
        whole
    )
    return {
        "difference": float((alone - together).abs().max() / alone.abs().max()),
        "same_pairs": [(r.heads, r.pairs, r.every) for r in reports[0].rows]
        == [(r.heads, r.pairs, r.every) for r in whole.rows],
        "heads": reports[1].about["heads"],
        "all_heads": whole.about["heads"],
        "load": load(reports[1]),
    }


def load(report: Any) -> float:
    """Token pairs of the process with the most, over the mean."""
    pairs = torch.tensor([sum(sum(row.pairs) for row in report.rows)], dtype=torch.float64)
    every = [torch.empty_like(pairs) for _ in range(dist.get_world_size())]
    dist.all_gather(every, pairs)
    return float(max(every) / torch.cat(every).mean())


def every_method() -> dict[str, Any]:
    return {name: compared(method, batch=2) for name, method in METHODS.items()}


class Runs(Pipe):
    """Two steps of a model, for a calibration."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.model())
        self.case = case

    def __call__(self, prompt: str, **_: Any) -> None:
        model = self.components["transformer"]
        for step in range(2):
            with at_step(self, "cond", step, 2):
                model(**inputs_of(self.case, model))


def calibrated() -> dict[str, Any]:
    """Modes and masks of a calibration are those of the heads here."""
    found = {}
    for method in (SparseVDiTProcessor(block=8, lam=2.0, eps=9.0), PAROProcessor(density=0.3, block=8)):
        calibration = calibrate(Runs(WAN), method, ["a"])
        one = type(method)(calibration=calibration)
        found[method.calibrates] = compared(Method(one, one))
    return found


def per_head() -> dict[str, Any]:
    """Methods with settings of their own for each head, or a budget that heads share."""
    tiles = SlidingTileProcessor(window=UNEVEN, tile=(1, 2, 2))
    methods = {
        "sliding_tile": Method(tiles, tiles),
        "random like sliding_tile": Method(*[RandomProcessor(block=4, like=tiles)] * 2),
        "sparse_vdit budget": Method(*[SparseVDiTProcessor(block=8, budget=0.4)] * 2, warm=1),
        "blade even": Method(*[dit_sparse.BladeProcessor(block=8, samples=4, sampling="even")] * 2),
        "sparsed heads": Method(
            *[dit_sparse.SparseDProcessor(density=0.3, block=8, logit_scale="heads")] * 2, warm=1
        ),
    }
    return {name: compared(method) for name, method in methods.items()}


@dataclass(frozen=True, kw_only=True)
class InOrder(SlidingTileProcessor):
    """Sliding tiles whose heads are shared as diffusers does it."""

    def head_costs(self, call: Any) -> None:
        return None


def balance() -> dict[str, Any]:
    tiles = [cls(window=UNEVEN, tile=(1, 2, 2)) for cls in (SlidingTileProcessor, InOrder)]
    return {type(method).__name__: compared(Method(method, method)) for method in tiles}


def gather_any(x: Tensor, axis: int, group: Any) -> Tensor:
    """Diffusers' last step, for which it asks more of a backend than gloo has: parts of unequal sizes."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, x, group=group)
    return torch.cat(every, axis)


def uneven() -> dict[str, Any]:
    """Sequences, and heads, that the processes do not divide."""
    context_parallel._all_gather_anything = gather_any
    ranks = dist.get_world_size()
    anything = {"ulysses_degree": ranks, "ulysses_anything": True}
    three = WAN._replace(changes={"num_attention_heads": 2 * ranks - 1})
    method = METHODS["draft"]
    found = {
        "tokens": compared(method, WAN, (5, 3, 7), **anything),
        "heads": compared(METHODS["vsa"], three, (5, 3, 7), **anything),
    }
    try:
        compared(method, three)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def left_dense(method: SparseProcessor, **config: Any) -> dict[str, Any]:
    """Reasons, whether the result is that of the stock model, and what ``strict`` says."""
    inputs = inputs_of(WAN, WAN.model())
    stock = shared(WAN, **config)
    attached = Attached(WAN, method, shared(WAN, **config))
    strict = Attached(WAN, method, shared(WAN, **config), strict=True)
    with torch.no_grad():
        same = torch.equal(stock(**inputs)[0], attached.model(**inputs)[0])
        try:
            strict.model(**inputs)
        except ValueError as error:
            refusal = str(error)
    report = attached.session.report()
    every = report.gather().to_dict()["totals"]["full_run"]["all_pairs"]
    reasons = sorted({row.where.reason for row in report.rows})
    return {"reasons": reasons, "same": same, "strict": refusal, "pairs": every}


def with_lse(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """What rings merge, which diffusers' attention for CPUs does not give: [B, S, H, D] and [B, S, H]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = block_sparse_attention(q, k, v, Plan.full(q.shape[2], k.shape[2], 128), backend="reference")
    return out.transpose(1, 2), lse.transpose(1, 2)


def ring() -> dict[str, Any]:
    method, ranks = METHODS["radial"].sparse, dist.get_world_size()
    degrees = {(ranks, 1), (2, ranks // 2)}
    with patch.object(attention_dispatch, "_native_attention_forward_op", with_lse):
        return {str(d): left_dense(method, ring_degree=d[0], ulysses_degree=d[1]) for d in sorted(degrees)}


def competing() -> dict[str, Any]:
    return left_dense(VMoBAProcessor(competition="overall"))


def joint() -> dict[str, Any]:
    """Text and image are shared out apart: processes in turn have them in another order than the model."""
    case = cases()["flux"]._replace(changes={"num_attention_heads": 4})
    kinds = ("draft", "vsa", "step-cached")
    return {name: compared(METHODS[name], case, batch=2) for name in kinds}


def gradients() -> dict[str, Any]:
    """What all processes' gradients add up to."""
    found = {}
    for name in ("radial", "draft", "vsa"):
        grads = []
        for model in (WAN.model(), shared(WAN)):
            attached = Attached(WAN, METHODS[name].sparse, model)
            train(attached)
            model.train()
            attached.forward(METHODS[name], inputs_of(WAN, model)).square().mean().backward()
            attached.assert_ran_sparse(METHODS[name])
            grads.append([p.grad for p in model.blocks.parameters() if p.grad is not None])
        for grad in grads[1]:
            dist.all_reduce(grad)
        pairs = list(zip(*grads, strict=True))
        found[name] = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in pairs)
    return found


def compiled() -> dict[str, Any]:
    found = {}
    for name in ("radial", "draft", "adaspa"):
        method, outs = METHODS[name], []
        for compile in (False, True):
            attached = Attached(WAN, method.sparse, shared(WAN))
            if compile:
                attached.model.compile_repeated_blocks(backend="aot_eager")
            with torch.no_grad():
                outs.append(attached.forward(method, inputs_of(WAN, attached.model)))
            attached.assert_ran_sparse(method)
        found[name] = float((outs[0] - outs[1]).abs().max())
    return found


def pipeline() -> dict[str, Any]:
    """A whole run with dense and sparse steps: attached first, shared then, and restored."""
    outs: list[Tensor] = []
    for together in (False, True):
        pipe = tiny.wan_pipeline()
        stock = tiny.run_wan(pipe) if together else None
        session = dit_sparse.apply(pipe, METHODS["adaspa"].sparse, schedule="dense 0-25%; layers 0")
        if together:
            pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        outs.append(tiny.run_wan(pipe))
        report = session.report().gather() if together else session.report()
        outs.append(torch.tensor([row.density for row in report.rows]))
    session.remove()
    restored = tiny.run_wan(pipe)
    return {
        "difference": float((outs[0] - outs[2]).abs().max() / outs[0].abs().max()),
        "same_densities": torch.equal(outs[1], outs[3]),
        "restored": float((stock - restored).abs().max() / stock.abs().max()),
    }


def families() -> dict[str, Any]:
    """Every case of a model that diffusers can share, with a method for each kind of plan."""
    context_parallel._all_gather_anything = gather_any
    equal = {"ulysses_degree": dist.get_world_size()}
    found, table = {}, matrix()
    for name, case in cases().items():
        if getattr(case.stock, "_cp_plan", None) is None:
            continue
        config = stock_config(case, equal, {**equal, "ulysses_anything": True})
        if isinstance(config, str):
            found[name] = {"stock": config}
            continue
        for kind in ("draft", "vsa", "step-cached"):
            if not table[case.cls].get(kind):
                found[f"{name} {kind}"] = compared(METHODS[kind], case, batch=2, **config)
    return found


def stock_config(case: Case, *configs: dict[str, Any]) -> dict[str, Any] | str:
    """The first with which diffusers itself computes what it computes alone, or why there is none."""
    for config in configs:
        try:
            models = case.model(), shared(case, **config)
            with torch.no_grad():
                alone, together = (stock_output(case, model, unmasked(case, model, 2)) for model in models)
            torch.testing.assert_close(alone, together)
            return config
        except (AssertionError, RuntimeError) as error:
            why = str(error)
    return why


def unmasked(case: Case, model: Any, batch: int, grid: Any = None) -> dict[str, Any]:
    inputs = inputs_of(case, model, batch, grid)
    return {**inputs, **{name: None for name in MASKS if name in inputs}}


def main() -> None:
    results, *checks = sys.argv[1:]
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo")
    # Diffusers takes a process's accelerator by its number; a machine without any has none to number.
    torch.accelerator.device_count = dist.get_world_size
    found = {check: globals()[check]() for check in checks}
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
