"""One method, one file. This is the table of names."""

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
