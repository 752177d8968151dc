"""Attention ops over block lists, and their backends."""

from dit_sparse.kernels.ops import block_sparse_attention, merge

__all__ = ["block_sparse_attention", "merge"]
