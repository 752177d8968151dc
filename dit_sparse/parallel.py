"""Context parallelism, as diffusers' ``enable_parallelism`` does it: processes share the tokens of a model.

With Ulysses (https://arxiv.org/abs/2309.14509) a process holds some tokens of all heads between attention
calls, and all tokens of some heads within one; an all-to-all exchange leads from one to the other and back. A
method runs within, as in one process but on fewer heads. What it needs of the others it asks its ``Call``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dit_sparse.layout import TokenLayout

Heads = tuple[tuple[int, ...], ...]
"""The heads of a layer that each process computes."""


@dataclass(frozen=True, eq=False)
class Ulysses:
    """How the processes of ``group`` share one attention call.

    Args:
        tokens: How many tokens of the sequence each holds.
        heads: Which heads of the layer each computes.
        index: Where the tokens of the call's layout stand among those of the processes in turn, int64 [S] or
            [B, S]; None for the same order.
    """

    group: Any
    tokens: tuple[int, ...]
    heads: Heads
    index: Tensor | None = None

    @cached_property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def own_heads(self) -> tuple[int, ...]:
        """The heads of this process."""
        return self.heads[self.rank]

    @property
    def layer_heads(self) -> int:
        return sum(map(len, self.heads))

    def own(self, x: Tensor, axis: int) -> Tensor:
        """What belongs to the heads of this process, of something that all heads of the layer have."""
        return x.index_select(axis, _tensor(self.own_heads, x.device))

    def reordered(self, index: Tensor | None) -> Ulysses:
        """With the tokens in the order ``index`` of the present one."""
        if index is None or self.index is None:
            return self if index is None else replace(self, index=index)
        return replace(self, index=self.index[index])

    def to_heads(self, x: Tensor) -> Tensor:
        """[B, heads of the layer, tokens here, D] -> [B, heads here, S, D], in the order of the layout."""
        batch, _, _, width = x.shape
        parts = x.index_select(1, _tensor(self._in_turn, x.device)).split([len(h) for h in self.heads], 1)
        whole = torch.cat(
            self._exchange(parts, [(batch, len(self.own_heads), n, width) for n in self.tokens]), dim=2
        )
        return whole if self.index is None else taken(whole, self.index, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back: [B, heads here, S, D] -> [B, heads of the layer, tokens here, D]."""
        if self.index is not None:
            x = taken(x, self.index.argsort(dim=-1), 2)
        batch, _, _, width = x.shape
        here = self.tokens[self.rank]
        parts = self._exchange(x.split(self.tokens, 2), [(batch, len(h), here, width) for h in self.heads])
        return self._by_head(torch.cat(parts, dim=1), 1)

    def tokens_here(self, x: Tensor) -> Tensor:
        """[B, S, C], in the model's order -> [B, tokens here, C]."""
        if self.index is not None:
            x = taken(x, self.index.argsort(dim=-1), 1)
        return x.split(self.tokens, 1)[self.rank]

    def all_heads(self, x: Tensor, axis: int) -> Tensor:
        """Of something that the heads of this process have, that of all heads of the layer."""
        return self._by_head(self._gathered(x, axis, [len(h) for h in self.heads]), axis)

    def all_tokens(self, x: Tensor) -> Tensor:
        """Of something that the tokens here have, along the last axis, that of the processes in turn."""
        return self._gathered(x, x.ndim - 1, self.tokens)

    @cached_property
    def _in_turn(self) -> tuple[int, ...]:
        return tuple(head for heads in self.heads for head in heads)

    def _by_head(self, x: Tensor, axis: int) -> Tensor:
        """From the order of the processes' heads to that of the layer."""
        return x.index_select(axis, _tensor(self._in_turn, x.device).argsort())

    def _gathered(self, x: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
        shapes = [(*x.shape[:axis], n, *x.shape[axis + 1 :]) for n in sizes]
        return torch.cat(self._exchange([x] * len(sizes), shapes), dim=axis)

    def _exchange(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send a part to each process, receive one of a known shape from each."""
        sizes = [prod(shape) for shape in shapes]
        sent = torch.cat([part.flatten() for part in parts])
        received: Tensor = _AllToAll.apply(sent, [part.numel() for part in parts], sizes, self.group)
        return [x.view(shape) for x, shape in zip(received.split(sizes), shapes, strict=True)]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sizes = received, sent, group
        out = x.new_empty(sum(received))
        dist.all_to_all_single(out, x, received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllToAll.apply(grad.contiguous(), *ctx.sizes), None, None, None


def share_out(
    config: Any, q: Tensor, grid: TokenLayout | str, text_apart: bool
) -> tuple[Ulysses | None, int, str]:
    """How processes share an attention call: (how, tokens of the whole sequence, why no method can run).

    Args:
        config: ``ContextParallelConfig``.
        q: The queries of this process's tokens, [B, H, S here, D].
        grid: The token layout without text, or why there is none.
        text_apart: See :func:`shares_text_apart`.
    """
    tokens = token_counts(config, q.shape[2], q.device)
    if config.ring_degree > 1:
        return None, sum(tokens), "ring context parallelism, in which no process has all keys of a query"
    heads = consecutive(q.shape[1], len(tokens), config.ulysses_anything)
    how = Ulysses(config._ulysses_mesh.get_group(), tokens, heads)
    if isinstance(grid, TokenLayout) and text_apart and sum(tokens) > grid.sequence:
        index = in_turn(tokens, replace(grid, text=sum(tokens) - grid.sequence), q.device)
        if isinstance(index, str):
            return how, sum(tokens), index
        how = how.reordered(index)
    return how, sum(tokens), ""


def token_counts(config: Any, here: int, device: torch.device) -> tuple[int, ...]:
    """How many tokens of a sequence each process of a ``ContextParallelConfig`` holds."""
    group = config._flattened_mesh.get_group()
    processes = dist.get_world_size(group)
    if not (config.ulysses_anything or config.ring_anything):
        return (here,) * processes  # diffusers refuses to share out anything else
    counts = torch.zeros(processes, dtype=torch.int64, device=device)
    counts[dist.get_rank(group)] = here
    dist.all_reduce(counts, group=group)
    return tuple(counts.tolist())


def consecutive(heads: int, processes: int, uneven: bool) -> Heads:
    """Who computes which heads as diffusers has it.

    Raises:
        ValueError: They cannot be shared so, and diffusers' own attention would fail too.
    """
    each = -(-heads // processes)
    shares = tuple(tuple(range(i * each, min((i + 1) * each, heads))) for i in range(processes))
    if not shares[-1] or (not uneven and each * processes != heads):
        raise ValueError(
            f"{heads} heads cannot be shared among {processes} processes: equal shares are needed, or, with "
            "ulysses_anything=True, less than one share for the last process"
        )
    return shares


def balanced(costs: Sequence[float], shares: Heads) -> Heads:
    """As many heads for each process as in ``shares``, but such that the costs they add up to are near.

    The dearest head first, each to the process with the least so far (Graham, 1969). Equal costs leave
    ``shares`` as they are.
    """
    if len(set(costs)) == 1:
        return shares
    chosen: list[list[int]] = [[] for _ in shares]
    load = [0.0] * len(shares)
    for head in sorted(range(len(costs)), key=lambda head: -costs[head]):
        open_to = [i for i, heads in enumerate(chosen) if len(heads) < len(shares[i])]
        least = min(open_to, key=lambda i: load[i])
        chosen[least].append(head)
        load[least] += costs[head]
    return tuple(tuple(sorted(heads)) for heads in chosen)


def shares_text_apart(model: nn.Module) -> bool:
    """Whether diffusers shares out the text by itself and not as a part of one sequence."""
    from diffusers.hooks.context_parallel import ContextParallelSplitHook

    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    hooks = (hook for registry in registries if registry is not None for hook in registry.hooks.values())
    return any(
        isinstance(hook, ContextParallelSplitHook) and "encoder_hidden_states" in hook.metadata
        for hook in hooks
    )


@lru_cache(maxsize=32)
def in_turn(tokens: tuple[int, ...], layout: TokenLayout, device: torch.device) -> Tensor | str:
    """Where a sequence of text and grid that are shared out apart stands among the tokens of the processes.

    Each holds a part of the text beside a part of the grid: [text 0, grid 0, text 1, grid 1, ...].

    Returns:
        int64 [S] in the model's order of ``layout``, or why not.
    """
    text, grid = (_parts(n, len(tokens)) for n in (layout.text, layout.sequence - layout.text))
    if tuple(map(sum, zip(text, grid, strict=True))) != tokens:
        return f"processes hold {tokens} tokens, which are no equal shares of text and grid of {layout}"
    places: dict[str, list[Tensor]] = {"text": [], "grid": []}
    order = ("text", "grid") if layout.text_first else ("grid", "text")
    start = 0
    for sizes in zip(text, grid, strict=True):
        for name in order:
            end = start + sizes[name == "grid"]
            places[name].append(torch.arange(start, end))
            start = end
    return torch.cat([x for name in order for x in places[name]]).to(device)


def taken(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """The tokens of ``x``, along ``axis``, at ``index``, int64 [S] or with a row for each batch item."""
    if index.ndim == 1:
        return x.index_select(axis, index)
    shape = [len(index), *[1] * (x.ndim - 1)]
    shape[axis] = index.shape[1]
    return x.take_along_dim(index.view(shape), axis)


def _parts(n: int, processes: int) -> list[int]:
    """Sizes of nearly equal parts, the larger ones first, as ``Tensor.tensor_split`` makes them."""
    return [n // processes + (i < n % processes) for i in range(processes)]


@lru_cache(maxsize=1024)
def _tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
