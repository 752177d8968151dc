"""One method, one file. This is the table of names."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dit_sparse.method import SparseProcessor, install_seam
from dit_sparse.processors.adaspa import AdaSpaProcessor
from dit_sparse.processors.blade import BladeProcessor
from dit_sparse.processors.dense import DenseProcessor
from dit_sparse.processors.draft import DraftProcessor
from dit_sparse.processors.efficient_vdit import EfficientVDiTProcessor
from dit_sparse.processors.linvideo import LinVideoProcessor
from dit_sparse.processors.neighborhood import NeighborhoodProcessor, SlidingTileProcessor
from dit_sparse.processors.paro import PAROProcessor
from dit_sparse.processors.radial import RadialProcessor
from dit_sparse.processors.random import RandomProcessor
from dit_sparse.processors.rettention import ReTtentionProcessor
from dit_sparse.processors.sla import SLAProcessor
from dit_sparse.processors.sparse_vdit import SparseVDiTProcessor
from dit_sparse.processors.sparsed import SparseDProcessor
from dit_sparse.processors.vmoba import VMoBAProcessor
from dit_sparse.processors.vsa import VSAProcessor
from dit_sparse.processors.window import WindowProcessor

install_seam()

METHODS: dict[str, type[SparseProcessor]] = {
    "radial": RadialProcessor,
    "draft": DraftProcessor,
    "adaspa": AdaSpaProcessor,
    "sparse_vdit": SparseVDiTProcessor,
    "paro": PAROProcessor,
    "rettention": ReTtentionProcessor,
    "sparsed": SparseDProcessor,
    "neighborhood": NeighborhoodProcessor,
    "sliding_tile": SlidingTileProcessor,
    "efficient_vdit": EfficientVDiTProcessor,
    "vmoba": VMoBAProcessor,
    "blade": BladeProcessor,
    "sla": SLAProcessor,
    "linvideo": LinVideoProcessor,
    "vsa": VSAProcessor,
    "dense": DenseProcessor,
    "window": WindowProcessor,
    "random": RandomProcessor,
}


def method_of(method: SparseProcessor | str, parameters: Mapping[str, Any]) -> SparseProcessor:
    """A method given as itself, or by name with keywords of its constructor.

    Raises:
        ValueError: An unknown name or parameter, or parameters beside a method that has its own.
    """
    if isinstance(method, SparseProcessor):
        if parameters:
            raise ValueError(
                f"parameters {sorted(parameters)} belong to a method given by name, got {method!r}"
            )
        return method
    if not isinstance(method, str):
        raise ValueError(f"method must be a SparseProcessor, a name or a dict of processors, got {method!r}")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(sorted(METHODS))}")
    names = {f.name for f in fields(METHODS[method])}
    wrong = sorted(set(parameters) - names)
    if wrong:
        raise ValueError(f"{method} has no parameter {', '.join(wrong)}; it has {', '.join(sorted(names))}")
    return METHODS[method](**parameters)
