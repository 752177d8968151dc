"""Who takes part in ``dit-sparse bench kernels``: our backends, PyTorch, and other packages where installed.

A contender is made for one plan and one number of tokens, prepares what it can, and is then called with
q, k, v [1, H, S, D]. It imports its package when it is made; what it raises becomes a row of the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

from dit_sparse.kernels.ops import BACKENDS, block_sparse_attention, resolve_backend
from dit_sparse.plan import Plan, blocks_of

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(plan: Plan, tokens: int) -> Attention:
    """PyTorch's own choice of a dense kernel."""
    return F.scaled_dot_product_attention


def backend(name: str, plan: Plan, tokens: int) -> Attention:
    """One of ours, through the public op."""
    return lambda q, k, v: block_sparse_attention(q, k, v, plan, backend=name)[0]


def flexattention(plan: Plan, tokens: int) -> Attention:
    """What ``create_block_mask`` makes of whole blocks: they are read from lists, no mask is evaluated."""
    lists = F.pad(plan.indices, (0, plan.keys - plan.indices.shape[-1]))
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(plan.counts),
        torch.zeros_like(lists),
        plan.counts,
        lists,
        BLOCK_SIZE=plan.block,
        mask_mod=noop_mask,
        seq_lengths=(tokens, tokens),
    )
    return _flex(mask)


def flexattention_masked(plan: Plan, tokens: int) -> Attention:
    """The same lists with a mask evaluated inside each block: the form that holes and key padding need."""
    return _flex(plan.to_block_mask(tokens, tokens))


def _flex(mask: BlockMask) -> Attention:
    # A graph break would run eager FlexAttention: dense, whatever the lists say.
    return partial(torch.compile(flex_attention, fullgraph=True, dynamic=False), block_mask=mask)


def sdpa_loop(plan: Plan, tokens: int, dtype: torch.dtype | None = None) -> Attention:
    """One dense call per query block, in ``dtype``, over copies of the key blocks it reads."""
    bq, bk = plan.block
    lists = [
        [row[:count] for row, count in zip(rows, counts, strict=True)]
        for rows, counts in zip(plan.indices[0].tolist(), plan.counts[0].tolist(), strict=True)
    ]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = []
        for h, rows in enumerate(lists):
            queries, keys, values = (x[:, h : h + 1].split(b, 2) for x, b in ((q, bq), (k, bk), (v, bk)))
            parts = []
            for query, row in zip(queries, rows, strict=True):
                read = (query, *(torch.cat([blocks[j] for j in row], 2) for blocks in (keys, values)))
                parts.append(F.scaled_dot_product_attention(*(x.to(dtype or x.dtype) for x in read)))
            heads.append(torch.cat(parts, 2))
        return torch.cat(heads, 1)

    return attention


def flash_attn(plan: Plan, tokens: int) -> Attention:
    """Dense, https://github.com/Dao-AILab/flash-attention."""
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def spas_sage_attn(plan: Plan, tokens: int) -> Attention:
    """INT8 scores and FP8 values over given blocks, https://github.com/thu-ml/SpargeAttn."""
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    tile = (64, 128) if torch.cuda.get_device_capability() == (9, 0) else (128, 64)
    keep = plan.to_blocks()
    for axis, block, size in zip((2, 3), plan.block, tile, strict=True):
        if block % size:
            raise ValueError(f"needs blocks of a multiple of {tile[0]}x{tile[1]} on this GPU")
        keep = keep.repeat_interleave(block // size, axis).narrow(axis, 0, blocks_of(tokens, size))
    mask = keep.to(torch.int8).contiguous()
    return lambda q, k, v: block_sparse_sage2_attn_cuda(q, k, v, mask_id=mask)


CONTENDERS: dict[str, Callable[[Plan, int], Attention]] = {
    "dense": dense,
    **{name: partial(backend, name) for name in BACKENDS},
    "flexattention": flexattention,
    "flexattention-masked": flexattention_masked,
    "sdpa-loop": sdpa_loop,
    "flash-attn": flash_attn,
    "spas-sage-attn": spas_sage_attn,
}
DENSE = frozenset({"dense", "flash-attn"})
DEFAULT = {
    "cpu": "auto,gathered,flexattention,flexattention-masked,sdpa-loop",
    "cuda": "auto,flexattention,flexattention-masked,flash-attn,spas-sage-attn",
}


def chosen(names: str, device: str, *, backward: bool = False) -> list[str]:
    """Comma-separated names without repetitions; "auto" becomes the backend it stands for.

    Raises:
        ValueError: An unknown name.
    """
    found = []
    for name in names.split(","):
        if name not in ("auto", *CONTENDERS):
            raise ValueError(f"--contenders must be out of auto, {', '.join(CONTENDERS)}, got {name!r}")
        found.append(resolve_backend(device, needs_grad=backward)[0] if name == "auto" else name)
    return list(dict.fromkeys(found))
