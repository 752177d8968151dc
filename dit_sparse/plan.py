"""Plan: which key blocks each query block reads; and the selections methods share.

Letters: B batch, H heads, Q and K query and key blocks.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dit_sparse.order import broadcast_heads


class Rule(Protocol):
    """A frozen, hashable predicate on original token positions (int64, broadcastable): may q read k?"""

    def __call__(self, q: Tensor, k: Tensor, /) -> Tensor: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Plan:
    """The block lists that FlexAttention, FlashInfer and FlashAttention also use.

    Args:
        indices: int32 [B or 1, H or 1, Q, Kmax]: key blocks to read, ascending, packed left, unused slots 0.
        counts: int32 [B or 1, H or 1, Q]: how many of them.
        block: (query block, key block) in tokens, any sizes; an int means both.
        keys: K, the number of key blocks.
        rule: Optional predicate on original token positions, on top of the blocks.

    Raises:
        ValueError: Shapes that do not fit together, or a block below one token.
    """

    indices: Tensor
    counts: Tensor
    block: tuple[int, int]
    keys: int
    rule: Rule | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", pair_of(self.block))
        if self.indices.ndim != 4 or self.counts.shape != self.indices.shape[:3]:
            raise ValueError(
                "a plan needs indices [B, H, Q, Kmax] and counts [B, H, Q], "
                f"got {tuple(self.indices.shape)} and {tuple(self.counts.shape)}"
            )
        if self.indices.shape[-1] > self.keys:
            raise ValueError(f"lists of {self.indices.shape[-1]} key blocks where there are only {self.keys}")

    def __repr__(self) -> str:
        b, h, q, width = self.indices.shape
        rule = f", rule={self.rule!r}" if self.rule is not None else ""
        sizes = f"batch={b}, heads={h}, queries={q}, keys={self.keys}"
        return f"Plan({sizes}, block={self.block}, width={width}{rule})"

    @classmethod
    def from_blocks(cls, keep: Tensor, block: int | tuple[int, int], rule: Rule | None = None) -> Plan:
        """From a block mask.

        Args:
            keep: bool [Q, K], [H, Q, K] or [B, H, Q, K]; True means computed.
            block: Tokens per block, or (query block, key block).
        """
        if keep.dtype != torch.bool or not 2 <= keep.ndim <= 4:
            raise ValueError(
                f"keep must be bool with 2 to 4 axes [..., Q, K], got {keep.dtype} {tuple(keep.shape)}"
            )
        keep = keep[(None,) * (4 - keep.ndim)]
        counts = keep.sum(-1, dtype=torch.int32)
        width = int(counts.max()) if counts.numel() else 0
        # Scatter each kept block to its rank in the row; what is not kept goes to a slot that is cut off.
        slot = (keep.cumsum(-1, dtype=torch.int32) - 1).masked_fill_(~keep, width)
        blocks = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device).expand_as(slot)
        indices = slot.new_zeros((*keep.shape[:-1], width + 1))
        indices.scatter_(-1, slot.long(), blocks)
        return cls(indices[..., :width].contiguous(), counts, pair_of(block), keep.shape[-1], rule)

    @classmethod
    def full(cls, q_len: int, k_len: int, block: int, device: torch.device | str = "cpu") -> Plan:
        """Every block of a sequence of ``q_len`` queries and ``k_len`` keys."""
        return _full(blocks_of(q_len, block), blocks_of(k_len, block), block, torch.device(device))

    def to_blocks(self) -> Tensor:
        """The block mask, bool [B or 1, H or 1, Q, keys]."""
        used = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        target = torch.where(used, self.indices, self.keys).long()
        keep = torch.zeros((*self.counts.shape, self.keys + 1), dtype=torch.bool, device=self.indices.device)
        return keep.scatter_(-1, target, True)[..., : self.keys].contiguous()

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""
        if self.indices.device == torch.device(device):
            return self
        return Plan(self.indices.to(device), self.counts.to(device), self.block, self.keys, self.rule)

    def to_block_mask(
        self,
        q_len: int,
        k_len: int,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
        gradients: bool = False,
    ) -> BlockMask:
        """FlexAttention's form of this plan.

        Lists are padded to ``keys`` (narrower ones raise in flex), all are partial blocks (a rule or padding
        may cut any), and ``mask_mod`` repeats the blocks because eager flex ignores the lists.

        Args:
            q_len, k_len: Ordered query and key tokens.
            valid: Key validity of the ordered sequence, bool [B or 1, H or 1, k_len].
            positions: int64 [1 or H, k_len], the original position in each slot, for ``rule``; default 0, 1,
                ...
            gradients: Also make the transposed lists, which flex's backward reads.
        """
        keep = self.to_blocks()
        batch, heads = keep.shape[:2]
        (bq, bk), rule = self.block, self.rule
        lists = torch.nn.functional.pad(self.indices, (0, self.keys - self.indices.shape[-1]))
        if positions is None:
            positions = torch.arange(max(q_len, k_len), device=keep.device)[None]

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            allowed = keep[b if batch > 1 else 0, h if heads > 1 else 0, q // bq, k // bk]
            if valid is not None:
                allowed = allowed & valid[b if valid.shape[0] > 1 else 0, h if valid.shape[1] > 1 else 0, k]
            if rule is not None:
                row = h if positions.shape[0] > 1 else 0
                allowed = allowed & rule(positions[row, q], positions[row, k])
            return allowed

        return BlockMask.from_kv_blocks(
            self.counts,
            lists,
            BLOCK_SIZE=self.block,
            mask_mod=mask_mod,
            seq_lengths=(q_len, k_len),
            compute_q_blocks=gradients,
        )

    def pairs(
        self,
        fq: Tensor,
        fk: Tensor,
        positions: Tensor | None = None,
        valid: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Exact token pairs this plan computes, int64 [B or 1, H or 1], without a synchronisation.

        Args:
            fq, fk: Valid tokens per query and key block, int64 [B or 1, H or 1, blocks] (``Order.filled``).
            positions, valid, asked: Only for a plan with a rule, which is counted token by token: original
                position of each slot, int64 [1 or H, S'], and which slots count as keys and as queries, bool
                [B or 1, H or 1, S'].
        """
        for name, filled, blocks in (("fq", fq, self.counts.shape[-1]), ("fk", fk, self.keys)):
            if filled.shape[-1] != blocks:
                raise ValueError(f"{name} must count {blocks} blocks, got {filled.shape[-1]}")
        if self.rule is not None:
            return self._rule_pairs(fk, positions, valid, asked)
        fq, fk = (broadcast_heads(filled, max(self.counts.shape[1], filled.shape[1])) for filled in (fq, fk))
        used = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        shape = torch.broadcast_shapes(self.indices.shape[:2], fk.shape[:2])
        lists = self.indices.long().expand(*shape, -1, -1)
        per_row = fk.expand(*shape, -1).gather(-1, lists.flatten(2)).view(lists.shape).mul(used).sum(-1)
        return (per_row * fq).sum(-1)

    def _rule_pairs(
        self, fk: Tensor, positions: Tensor | None, valid: Tensor | None, asked: Tensor | None
    ) -> Tensor:
        (bq, bk), keep = self.block, self.to_blocks()
        if positions is None:
            # Raster order: a block's tokens come first, what is left of it is the ragged tail.
            slots = torch.arange(bk, device=keep.device)
            there = (slots < fk.amax((0, 1))[:, None]).flatten()
            positions = torch.where(there, torch.arange(len(there), device=keep.device), -1)[None]
            valid = (slots < fk[..., None]).flatten(-2) if valid is None else valid
        place = broadcast_heads(positions[None], max(keep.shape[1], positions.shape[0]))
        here = place >= 0
        keys = here if valid is None else here[..., : valid.shape[-1]] & valid
        queries = here if asked is None else here & asked
        missing = self.keys * bk - keys.shape[-1]
        keys = torch.nn.functional.pad(keys, (0, missing))
        key_place = torch.nn.functional.pad(place, (0, max(0, self.keys * bk - place.shape[-1])), value=-1)
        total = keep.new_zeros(torch.broadcast_shapes(keep.shape[:2], keys.shape[:2]), dtype=torch.int64)
        for i in range(keep.shape[2]):
            rows = slice(i * bq, min((i + 1) * bq, place.shape[-1]))
            allowed = self.rule(place[..., rows, None], key_place[..., None, : self.keys * bk])  # type: ignore[misc]
            allowed = allowed & keep[:, :, i].repeat_interleave(bk, -1)[:, :, None]
            total = total + (allowed & keys[..., None, :] & queries[..., rows, None]).sum((-2, -1))
        return total

    def density(
        self, fq: Tensor, fk: Tensor, positions: Tensor | None = None, valid: Tensor | None = None
    ) -> float:
        """Computed token pairs over all token pairs, over all heads and batch items."""
        pairs = self.pairs(fq, fk, positions, valid)
        every = broadcast_heads(fq.sum(-1) * fk.sum(-1), pairs.shape[1])
        shape = torch.broadcast_shapes(pairs.shape, every.shape)
        return float(pairs.expand(shape).sum() / every.expand(shape).sum().clamp(min=1))

    def same(self, other: Plan) -> bool:
        """Whether both read the same blocks under the same rule, whatever their broadcasting."""
        if (self.block, self.keys, self.rule) != (other.block, other.keys, other.rule):
            return False
        mine, theirs = self.to_blocks(), other.to_blocks().to(self.indices.device)
        if any(a != b and 1 not in (a, b) for a, b in zip(mine.shape, theirs.shape, strict=True)):
            return False
        return bool((mine == theirs).all())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors (one bit a block). A plan with a rule is refused: code is not saved."""
        from safetensors.torch import save_file

        if self.rule is not None:
            raise ValueError(f"a plan with a rule cannot be saved, its rule {self.rule!r} is code")
        bits = self.pack()
        meta = {"plan": json.dumps({"block": self.block, "keys": self.keys, "format": 1})}
        part = Path(f"{os.fspath(path)}.part")
        save_file({"bits": bits.bits.cpu()}, part, metadata=meta)
        part.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what :meth:`save` wrote."""
        from safetensors import safe_open

        with safe_open(os.fspath(path), framework="pt") as file:
            meta = file.metadata() or {}
            if "plan" not in meta:
                raise ValueError(f"{os.fspath(path)} is not a saved plan: its metadata has no 'plan' entry")
            info = json.loads(meta["plan"])
            return PackedPlan(file.get_tensor("bits"), tuple(info["block"]), info["keys"]).unpack()

    def pack(self) -> PackedPlan:
        """One bit per block, whatever the longest row: how cached plans are kept."""
        keep = self.to_blocks()
        keep = torch.nn.functional.pad(keep, (0, -self.keys % 8)).unflatten(-1, (-1, 8))
        weights = 2 ** torch.arange(7, -1, -1, device=keep.device, dtype=torch.uint8)
        return PackedPlan((keep * weights).sum(-1, dtype=torch.uint8), self.block, self.keys, self.rule)


@dataclass(frozen=True, eq=False)
class PackedPlan:
    """A plan as bits: uint8 [B or 1, H or 1, Q, ceil(K/8)], most significant bit first."""

    bits: Tensor
    block: tuple[int, int]
    keys: int
    rule: Rule | None = None

    def unpack(self) -> Plan:
        """The plan itself, with lists."""
        shifts = torch.arange(7, -1, -1, device=self.bits.device, dtype=torch.uint8)
        keep = (self.bits[..., None] >> shifts & 1).flatten(-2)[..., : self.keys].bool()
        return Plan.from_blocks(keep, self.block, self.rule)


def pool(x: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """Mean of the valid tokens of each block.

    Args:
        x: [B, H, S', D].
        valid: bool [B or 1, H or 1, S']; None counts every token.

    Returns:
        [B, H, ceil(S'/block), D] in the dtype of ``x`` (summed in float32); a block with no valid token is 0.
    """
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    if x.is_cuda and x.dtype != torch.float64 and not wants_gradient and find_spec("triton") is not None:
        from dit_sparse.kernels.mass import block_means

        return block_means(x, block, valid, x.dtype)
    if valid is None:
        valid = torch.ones((1, 1, x.shape[2]), dtype=torch.bool, device=x.device)
    pad = -x.shape[2] % block
    exact = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~valid[..., None], 0)
    total = torch.nn.functional.pad(exact, (0, 0, 0, pad)).unflatten(2, (-1, block)).sum(3)
    count = torch.nn.functional.pad(valid, (0, pad)).unflatten(2, (-1, block)).sum(3)
    return (total / count.clamp(min=1)[..., None]).to(x.dtype)


def top_k(scores: Tensor, k: int | Tensor, eligible: Tensor | None = None) -> Tensor:
    """The ``k`` best key blocks of each row; ties go to the lower index.

    Args:
        scores: [..., Q, K].
        k: How many; an int or an integer tensor broadcastable to [..., Q]. At least one is kept.
        eligible: bool [..., Q, K], blocks that may be kept (those with a valid token).
    """
    best = scores.argsort(dim=-1, descending=True, stable=True)
    may = torch.ones_like(best, dtype=torch.bool)
    if eligible is not None:
        may = eligible.expand(scores.shape).gather(-1, best)
    wanted = torch.as_tensor(k, device=scores.device).clamp(min=1)
    keep = may & (may.cumsum(-1, dtype=torch.int32) <= (wanted[..., None] if wanted.ndim else wanted))
    return torch.zeros_like(keep).scatter_(-1, best, keep)


def top_mass(mass: Tensor, share: float, eligible: Tensor | None = None) -> Tensor:
    """The fewest key blocks of each row that together hold ``share`` of its mass; at least one.

    Args:
        mass: [..., Q, K], non-negative.
        share: In (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if eligible is not None:
        mass = mass.masked_fill(~eligible, 0)
    ordered, rank = mass.double().sort(dim=-1, descending=True, stable=True)
    upto = ordered.cumsum(-1)
    # At share 1 every block with mass, however small: sums of floats cannot tell that.
    keep = ordered > 0 if share == 1 else upto - ordered < share * upto[..., -1:]
    keep[..., 0] = True
    out = torch.zeros_like(keep).scatter_(-1, rank, keep)
    return out if eligible is None else out & eligible


def with_text(keep: Tensor, queries: int, keys: int) -> Tensor:
    """Complete a block mask of the grid with dense rows and columns for everything after it.

    Args:
        keep: bool [..., q, k] over the blocks of the grid.
        queries, keys: Blocks of the whole ordered sequence.
    """
    extra = (0, keys - keep.shape[-1], 0, queries - keep.shape[-2])
    if min(extra) < 0:
        raise ValueError(f"a mask of {tuple(keep.shape[-2:])} blocks does not fit into {(queries, keys)}")
    return torch.nn.functional.pad(keep, extra, value=True)


@lru_cache(maxsize=32)
def _full(queries: int, keys: int, block: int, device: torch.device) -> Plan:
    return Plan.from_blocks(torch.ones(queries, keys, dtype=torch.bool, device=device), block)


def blocks_of(tokens: int, block: int) -> int:
    """Blocks that ``tokens`` slots fill, the last one ragged."""
    return ceil(tokens / block)


def pair_of(block: int | tuple[int, int]) -> tuple[int, int]:
    """(query block, key block) in tokens; an int means both."""
    q, k = (block, block) if isinstance(block, int) else block
    if q < 1 or k < 1:
        raise ValueError(f"block must be a positive number of tokens, got {block}")
    return int(q), int(k)
