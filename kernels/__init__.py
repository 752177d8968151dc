"""Attention ops over block lists, and their backends."""

from dit_sparse.kernels.linear_ops import linear_attention
from dit_sparse.kernels.mass_ops import block_mass, block_statistics, pooled_scores
from dit_sparse.kernels.ops import block_sparse_attention, merge
from dit_sparse.kernels.quant_ops import quantized_block_sparse_attention

__all__ = [
    "block_mass",
    "block_sparse_attention",
    "block_statistics",
    "linear_attention",
    "merge",
    "pooled_scores",
    "quantized_block_sparse_attention",
]
