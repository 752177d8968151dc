"""Offloading: weights come and go around each module, and a run gives what it gives without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as tiny
import torch
from accelerate import cpu_offload

import dit_sparse
from dit_sparse import LinVideoProcessor, SLAProcessor, VSAProcessor

pytestmark = pytest.mark.filterwarnings("ignore:.*untrained parameters")

METHODS = {
    "step-cached": tiny.Cached(keep=2),
    "sla": SLAProcessor(ratio=0.3, block=8),
    "vsa": VSAProcessor(keep=0.3, tile=(2, 2, 2), gate=True),
    "linvideo": LinVideoProcessor(linear_layers=(1,)),
}
OFFLOADS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    # What enable_sequential_cpu_offload does to each model; on the CPU it fails in the text encoder.
    "sequential": lambda pipe: cpu_offload(pipe.transformer, torch.device("cpu")),
    "group-leaf": lambda pipe: group(pipe, offload_type="leaf_level"),
    "group-block": lambda pipe: group(pipe, offload_type="block_level", num_blocks_per_group=1),
}


def group(pipe: Any, **options: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **options
    )


def attach(pipe: Any, method: Any) -> dit_sparse.Session:
    """With trainable parts of random weights."""
    session = dit_sparse.apply(pipe, method, schedule="refresh 0, 2")
    for part in session.sparse_modules().values():
        for i, parameter in enumerate(part.parameters()):
            if not parameter.is_meta:
                parameter.data.copy_(0.3 * tiny.randn(*parameter.shape, seed=i))
    return session


@pytest.mark.parametrize("first", ["attach", "offload"])
@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_offloaded_run_equals_one_without(method: Any, how: str, first: str) -> None:
    pipe = tiny.wan_pipeline()
    stock = tiny.run_wan(pipe)
    with attach(pipe, method):
        wanted = tiny.run_wan(pipe)
    assert (wanted - stock).abs().max() > 1e-3
    steps = [lambda: attach(pipe, method), lambda: OFFLOADS[how](pipe)]
    for step in steps if first == "attach" else reversed(steps):
        step()
    assert torch.equal(tiny.run_wan(pipe), wanted)
    session = dit_sparse.session(pipe)
    assert session is not None
    layers = 1 if isinstance(method, LinVideoProcessor) else 3
    assert len(session.report().sparse_rows) == 4 * layers * 2
    session.remove()
    assert torch.equal(tiny.run_wan(pipe), stock)
