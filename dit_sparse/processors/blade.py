"""BLADE's adaptive block-sparse attention (ASA), https://arxiv.org/abs/2508.10774 (Y. Gu et al., ICLR 2026).

Tokens are put along a Gilbert curve, so that a block is a compact region of the video. A few tokens drawn
from every block tell which key blocks matter to which query block. In ASA_GT every query also reads the
means of n consecutive tokens, each with the weight of n keys, so that nothing is lost completely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels import merge
from dit_sparse.layout import TokenLayout
from dit_sparse.method import Call, SparseProcessor, nearest_setting
from dit_sparse.order import Order, broadcast_heads
from dit_sparse.plan import Plan, blocks_of, pool, top_k, top_mass, with_text

# Sampled scores that are held at a time: all of them are 1/64 of the square of the sequence, for each head.
SCORES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class BladeProcessor(SparseProcessor):
    """Blocks chosen by sampled tokens. The authors' distilled models need ``inclusive=False``.

    Batch items and branches share the samples of a (seed, layer, step); the released code draws from the
    global generator. Text, history and reference tokens are dense both ways, start on a block boundary and
    are not among the blocks that are counted (released: the last two blocks, which are). What is short is
    completed with its last token, as released: a block for the draw, the last group of the means. Gradients
    are those of one softmax over keys and means; the released ones are up to 18 % off.

    Args:
        energy: Keep the best blocks of a row up to this share of its importance (paper, released: 0.95),
        least, most: but no less and no more than these shares of all blocks, rounded down, and one. ``most``
            nearly always decides. Released: 0.05; 0.1 for CogVideoX, 0.2 for Wan2.1, 0.17 elsewhere.
        summary: n, the tokens of a mean; None leaves the means out (ASA). Adds 1 / n to the density.
            Released: 15 for CogVideoX, 30 for Wan2.1.
        block: Tokens per block (released: 128).
        samples: Tokens drawn from a block, anew for queries and keys (paper: 16, released models: 32).
        sampling: ``"random"``, or ``"even"``: spread over the block, the same at every call.
        importance: ``"relmax"`` as released, the largest exp(best score in the key block - best score
            anywhere) of the block's queries; ``"softmax_max"``, the paper's text, their largest probability.
        inclusive: Keep the block that crosses ``energy`` too; the released code drops it.

    Raises:
        ValueError: A parameter out of range.
    """

    # Layer and step draw the samples, yet need no mention: a plan that reads q and k is made at every call.
    reads: ClassVar[frozenset[str]] = frozenset({"layout", "qk"})

    energy: float = 0.95
    least: float = 0.05
    most: float = 0.2
    summary: int | None = 30
    block: int = 128
    samples: int = 16
    sampling: str = "random"
    importance: str = "relmax"
    inclusive: bool = True

    def __post_init__(self) -> None:
        if not (0 < self.energy <= 1 and 0 <= self.least <= self.most <= 1):
            raise ValueError(f"energy must lie in (0, 1], and 0 <= least <= most <= 1, got {self}")
        if not 1 <= self.samples <= self.block or (self.summary is not None and self.summary < 1):
            raise ValueError(f"samples must lie in 1..block and summary be None or >= 1, got {self}")
        if self.sampling not in ("random", "even") or self.importance not in ("relmax", "softmax_max"):
            raise ValueError(
                f"sampling is 'random' or 'even', importance 'relmax' or 'softmax_max', got {self}"
            )

    def order(self, call: Call) -> Order:
        return Order.curve(call.layout, self.block)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        if self.sampling == "even":
            spread = (torch.arange(self.samples, device=q.device) * 2 + 1) * self.block // (2 * self.samples)
            offsets = [spread[None, None]] * 2
        else:
            generator = call.at(branch="").generator()
            heads = (call.layer_heads * x.shape[1] // call.heads for x in (q, k))
            draws = [torch.rand(1, n, self.block, generator=generator) for n in heads]
            offsets = [call.own(draw.topk(self.samples).indices.to(q.device), 1) for draw in draws]
        valid, grid, eligible = call.slots_valid(), call.grid_blocks(self.block), call.eligible(self.block)
        scores = asa_importance(q, k, self.block, offsets, self.importance, valid=valid, scale=call.scale)
        scores, rule = scores[:, :, :grid, :grid], (self.energy, self.least, self.most, self.inclusive)
        keep = energy_mask(scores, *rule, eligible[..., :grid])
        return Plan.from_blocks(with_text(keep, *[eligible.shape[-1]] * 2) & eligible, self.block)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        out, lse = call.run(q, k, v, self.planned(q, k, call))
        if self.summary is None:
            return out
        valid = call.slots_valid()
        keys, values = (summarise(x, self.summary, valid) for x in (k, v))
        groups = torch.arange(keys.shape[2], device=k.device) * self.summary
        means, mean_lse = call.run_summary(q, keys, values, groups < valid.sum(-1, keepdim=True))
        # A weight of n for every mean is ln n on all their scores, and so on their log-sum-exp.
        return merge([out, means], [lse, mean_lse + log(self.summary)])[0]

    def at_density(self, density: float, layout: TokenLayout) -> BladeProcessor:
        """The nearest number of blocks, equal in every row, through ``least`` and ``most``; all else stays.

        Blocks of fewer tokens are taken to be average ones. ValueError below the floor: one block, the means.
        """
        blocks, sequence = blocks_of(layout.tokens, self.block), layout.sequence
        means = 0 if self.summary is None else blocks_of(sequence, self.summary) / sequence

        def reached(setting: int) -> float:
            return 1 - (1 - (setting + 1) / blocks) * layout.tokens**2 / sequence**2 + means

        less = "smaller block or summary=None"
        kept = 1 + nearest_setting(self, layout, density, reached, blocks - 1, less, "larger block")
        share = min(1.0, (kept + 0.5) / blocks)  # rounded down it is `kept`, in spite of floating point
        return replace(self, least=share, most=share)


@torch.no_grad()
def asa_importance(
    q: Tensor,
    k: Tensor,
    block: int,
    offsets: Sequence[Tensor],
    importance: str = "relmax",
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Importance of every key block to every query block: float32 [B, H, Q, K], 0 for keys without a token.

    Args:
        q, k: Ordered [B, H, S', D] and [B, KV, S', D].
        offsets: The tokens that stand for a block, of q and of k: int64 [B or 1, H or 1, samples], counted
            among its valid ones.
        importance: See :class:`BladeProcessor`. Rows of ``"relmax"`` add up to 1.
        valid: bool [B or 1, 1, S']; None means every slot.
    """
    if valid is None:
        valid = torch.ones((1, 1, q.shape[2]), dtype=torch.bool, device=q.device)
    exact, relmax = torch.promote_types(q.dtype, torch.float32), importance == "relmax"
    slots = torch.nn.functional.pad(valid, (0, -q.shape[2] % block)).unflatten(-1, (-1, block))
    starts = torch.arange(slots.shape[2], device=q.device)[:, None] * block
    of_q, of_k = (starts + _nth_valid(slots, offset[:, :, None]) for offset in offsets)
    # Samples of a key block are a row apart and not neighbours: their maximum is taken over whole rows.
    queries, keys = _tokens(q, of_q.flatten(2)).to(exact), _tokens(k, of_k.mT.flatten(2)).to(exact)
    queries, keys = queries * (scale or q.shape[-1] ** -0.5), broadcast_heads(keys, q.shape[1]).mT
    empty, samples = (slots.sum(-1) == 0)[:, :, None, None], of_q.shape[-1]
    rows = max(1, SCORES // (q.shape[0] * q.shape[1] * samples * keys.shape[-1]))
    found = []
    for part in queries.split(rows * samples, dim=2):
        scores = (part @ keys).unflatten(-1, (-1, len(starts))).masked_fill(empty, -torch.inf)
        best = scores.amax(-2)
        whole = best.amax(-1, keepdim=True) if relmax else scores.flatten(-2).logsumexp(-1, keepdim=True)
        found.append((best - whole).exp().unflatten(2, (-1, samples)).amax(3))
    # Without any key, a row is nan so far.
    scores = torch.cat(found, 2).nan_to_num(0)
    return scores / scores.sum(-1, keepdim=True).clamp(min=1) if relmax else scores


def energy_mask(
    scores: Tensor, energy: float, least: float, most: float, inclusive: bool, eligible: Tensor | None = None
) -> Tensor:
    """The best key blocks of each row of ``scores`` [..., Q, K]: see :class:`BladeProcessor`."""
    low, high = (max(1, int(scores.shape[-1] * share)) for share in (least, most))
    count = top_mass(scores, energy, eligible).sum(-1) - int(not inclusive)
    return top_k(scores, count.clamp(low, high), eligible)


def summarise(x: Tensor, n: int, valid: Tensor) -> Tensor:
    """Means of n consecutive valid tokens of [B, H, S', D], the last group completed with its last one."""
    ranks = torch.arange(blocks_of(x.shape[2], n) * n, device=x.device)
    return pool(_tokens(x, _nth_valid(valid, ranks[None, None])), n)


def _nth_valid(valid: Tensor, rank: Tensor) -> Tensor:
    """Where on the last axis the valid slot of each ``rank`` is; past the last of them, where that one is."""
    places = valid.argsort(dim=-1, descending=True, stable=True)
    rank = torch.minimum(rank, (valid.sum(-1, keepdim=True) - 1).clamp(min=0))
    return places.expand(*rank.shape[:-1], -1).gather(-1, rank)


def _tokens(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of [B, H, S', D] at ``places`` [B or 1, H or 1, any]."""
    return x.gather(2, places[..., None].expand(*x.shape[:2], -1, x.shape[3]))
