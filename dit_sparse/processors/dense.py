"""Dense: every block, through the block-sparse kernels. The baseline of every comparison.

Nothing is left out, so the result is the model's own attention; a session takes the model's own call for it
and reports "full plan".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor
from dit_sparse.plan import Plan


@dataclass(frozen=True, kw_only=True)
class DenseProcessor(SparseProcessor):
    """All blocks kept.

    Args:
        block: Tokens per block.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"layout"})

    block: int = 128

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        return Plan.full(q.shape[2], k.shape[2], self.block, q.device)

    def at_density(self, density: float, layout: TokenLayout) -> DenseProcessor:
        if density != 1:
            raise ValueError(f"DenseProcessor has density 1 only, got {density}")
        return self
