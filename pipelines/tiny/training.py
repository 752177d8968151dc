"""What the two trainers share: checkpoints, averaged weights, stopping, and several processes.

A checkpoint is one safetensors file that holds tensors and, in its header, everything else as JSON. It is
written beside its place and then renamed, so that a run killed at any moment leaves the last whole
checkpoint.

Under `torchrun --nproc-per-node N` each process takes its share of every batch. On a CPU that other programs
use too, N processes of one thread each are much faster than one process of N threads: they meet once a step,
not at every operation.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save(path: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """Write tensors and a JSON-able state to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # safetensors refuses tensors that share memory, which tied weights do.
    whole = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    save_file(whole, partial, metadata={"state": json.dumps(state)})
    os.replace(partial, path)


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and state `save` wrote."""
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["state"])  # noqa: SIM118


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix.`, without it."""
    return {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `part`."""
    return {f"{prefix}.{k}": v for k, v in tensors.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as a flat dict; its hyper-parameters are the trainer's arguments, not state."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(v) for i, s in state.items() for name, v in s.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Average:
    """An exponential moving average of a module's weights, in float32; it forgets the first steps sooner."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's weights after step number `step` (from 0)."""
        now = module.state_dict()
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), [now[k] for k in self.weights], weight)


def join() -> tuple[int, int]:
    """(rank, number of processes); joins the others when started by torchrun."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in one exchange."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(piece.view_as(t))


class StopRequest:
    """Notes SIGTERM and SIGINT; the training loop asks between steps."""

    def __init__(self) -> None:
        self.signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, *_) -> None:
        self.signalled = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop: the same answer in all of them."""
        flag = torch.tensor([float(self.signalled)])
        average_over_processes([flag])
        return flag.item() > 0
