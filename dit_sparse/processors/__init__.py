"""One method, one file. This is the table of names."""

from dit_sparse.method import SparseProcessor, install_seam
from dit_sparse.processors.dense import DenseProcessor
from dit_sparse.processors.radial import RadialProcessor

install_seam()

METHODS: dict[str, type[SparseProcessor]] = {
    "dense": DenseProcessor,
    "radial": RadialProcessor,
}
