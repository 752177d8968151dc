"""Odd shapes of block-sparse attention, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.plan import Plan


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison; ``plan`` and ``valid`` are the (batch, heads) of those two."""

    queries: int
    keys: int
    head_dim: int
    block: tuple[int, int]
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    plan: tuple[int, int] = (1, 1)
    valid: tuple[int, int] | None = None

    def __str__(self) -> str:
        heads = f"{self.heads}of{self.kv_heads}" if self.heads != self.kv_heads else str(self.heads)
        valid = "" if self.valid is None else f"-valid{self.valid[0]}x{self.valid[1]}"
        return (
            f"{self.queries}x{self.keys}-D{self.head_dim}-block{self.block[0]}x{self.block[1]}"
            f"-B{self.batch}-H{heads}-plan{self.plan[0]}x{self.plan[1]}{valid}"
        )


CASES = [
    Case(63, 63, 16, (16, 16)),
    Case(127, 127, 24, (32, 32), batch=2, plan=(1, 2)),
    Case(200, 200, 40, (64, 32), batch=2, plan=(2, 2)),
    Case(300, 300, 48, (24, 40), plan=(1, 2), valid=(1, 1)),
    Case(63, 127, 64, (32, 32), batch=2, heads=4, kv_heads=2, plan=(2, 4), valid=(2, 1)),
    Case(200, 63, 128, (64, 32), heads=4, kv_heads=2, valid=(1, 2)),
    Case(128, 192, 48, (32, 64), batch=2, heads=4, kv_heads=1, plan=(2, 1), valid=(2, 4)),
    Case(40, 96, 3, (1, 16), plan=(1, 2)),
    Case(160, 160, 160, (160, 160), heads=1, kv_heads=1, valid=(1, 1)),
]


def make(
    case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Plan, Tensor | None]:
    """q, k, v, plan and valid of a case. Row 1 of the plan is empty, and key block 1 is all holes."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(case.batch, case.heads, case.queries, case.head_dim, generator=g)
    k = torch.randn(case.batch, case.kv_heads, case.keys, case.head_dim, generator=g)
    v = torch.randn(case.batch, case.kv_heads, case.keys, case.head_dim, generator=g)
    rows, columns = -(-case.queries // case.block[0]), -(-case.keys // case.block[1])
    keep = torch.rand(*case.plan, rows, columns, generator=g) < 0.6
    keep[:, :, 0] = True
    if rows > 1:
        keep[0, 0, 1] = False
    valid = None
    if case.valid is not None:
        valid = torch.rand(*case.valid, case.keys, generator=g) < 0.8
        valid[0, :, case.block[1] : 2 * case.block[1]] = False
        valid[..., : min(case.block[1], case.keys - 1)] = True
        valid = valid.to(device)
    plan = Plan.from_blocks(keep, case.block).to(device)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    return q, k, v, plan, valid


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
