"""Where a redirected attention call arrives: in eager code, inside a compiled graph, and under autograd."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dit_sparse.layout import Layer
from dit_sparse.method import SparseProcessor
from dit_sparse.redirect import DISPATCH, SDPA, redirected
from dit_sparse.schedule import Schedule


class Routes(Protocol):
    """What an attachment asks of its session."""

    def route(
        self,
        at: Attachment,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        odd: bool,
        parallel: Any = None,
    ) -> Tensor | None:
        """The sparse result [B, H, S, D], or None when the model's own call is to run."""


@dataclass(eq=False)
class Attachment:
    """One layer of one session."""

    router: Routes
    part: Any
    layer: Layer
    module: nn.Module
    method: SparseProcessor
    schedule: Schedule
    stock: Any
    processor: Any = None
    hidden: tuple[Tensor, Tensor | None] | None = None

    def redirect(self) -> bool:
        """Replace the module's processor by a redirected copy; False when it makes no core attention call."""
        stock: Any = self.module.processor
        kind: type = type(stock)
        cls = redirected(kind, Redirected, self.part.family.edit)
        if cls is None:
            return False
        handle = next(_HANDLES)
        processor = copy.copy(stock)
        processor.__class__ = cls
        # Past __setattr__: an IP-Adapter's processor is a module, and its copy shares what it registers.
        vars(processor).update(
            _handle=torch.tensor(handle), _stock=stock, _leaves_graph=self.method.reads_hidden
        )
        self.stock = stock
        _skipped_as(kind, cls)
        _ATTACHMENTS[handle] = self
        self.module.processor = self.processor = processor
        return True

    def restore(self) -> None:
        """Put the stock processor back, unless somebody else has replaced ours."""
        if self.module.processor is self.processor:
            self.module.processor = restored(self.processor)

    def dense(self, kind: str) -> Callable[..., Tensor]:
        """The callable of the stock processor's core call."""
        if kind == SDPA:
            return torch.nn.functional.scaled_dot_product_attention
        return type(self.stock).__call__.__globals__["dispatch_attention_fn"]


def _skipped_as(stock: type, cls: type) -> None:
    """Let guiders that skip layers treat ``cls`` like the stock processor, whose very class they look up."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    with suppress(ValueError):  # it does not know the stock class
        AttentionProcessorRegistry.register(cls, AttentionProcessorRegistry.get(stock))


_ATTACHMENTS: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


class Redirected:
    """Mixin of the generated processor classes.

    A layer is told by a 0-dim CPU tensor: a Python int would be a constant of the compiled graph and cost one
    recompilation per layer.
    """

    _handle: Tensor
    _stock: Any
    _leaves_graph: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """``type(processor)()`` is how diffusers makes another of a layer's kind: that is a stock one."""
        return cls.__bases__[1](*args, **kwargs)

    def _core(
        self,
        attn: nn.Module,
        kind: str,
        dense: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        **extra: Any,
    ) -> Tensor:
        own: dict[str, Any] = {
            "attn_mask": attn_mask,
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
        }
        if enable_gqa:
            own["enable_gqa"] = True
        own.update(extra)
        run = _eager
        if torch.compiler.is_compiling():
            tensors_only = attn_mask is None or isinstance(attn_mask, Tensor)
            branch = attn._modules.get("sparse_branch")
            trained = () if branch is None else branch.parameters()
            if tensors_only and not self._leaves_graph and not _needs_grad(query, key, value, *trained):
                q, k, v = (_heads_first(x, kind) for x in (query, key, value))
                parallel = extra.get("parallel_config") is not None
                flags = [kind == DISPATCH, enable_gqa, is_causal, "backend" in extra, parallel]
                out = torch.ops.dit_sparse.core(q, k, v, attn_mask, self._handle, scale, dropout_p, flags)
                return _heads_first(out, kind)
            run = _outside_the_graph
        return run(self._handle, kind, dense, query, key, value, own)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(restored(self), memo)

    def __reduce__(self) -> Any:
        return copy.copy, (restored(self),)


def restored(processor: Any) -> Any:
    """The stock processor behind a redirected one, with what the user set on the redirected one since."""
    stock = processor._stock
    for name in ("_attention_backend", "_parallel_config"):
        if name in vars(processor):
            setattr(stock, name, vars(processor)[name])
    return stock


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _heads_first(x: Tensor, kind: str) -> Tensor:
    """[B, S, H, D] of the dispatch generation <-> [B, H, S, D]."""
    return x.transpose(1, 2) if kind == DISPATCH else x


def _eager(
    handle: Tensor,
    kind: str,
    dense: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own: dict[str, Any],
) -> Tensor:
    at = _ATTACHMENTS[int(handle)]
    q, k, v = (_heads_first(x, kind) for x in (query, key, value))
    mask, parallel = own["attn_mask"], own.get("parallel_config")
    odd = own["dropout_p"] > 0 or own["is_causal"] or not (mask is None or isinstance(mask, Tensor))
    config = None if parallel is None else parallel.context_parallel_config
    out = at.router.route(at, q, k, v, None if odd else mask, own["scale"], odd, config)
    return dense(query, key, value, **own) if out is None else _heads_first(out, kind)


_outside_the_graph = torch.compiler.disable(
    _eager,
    reason="with gradients, or for a method that reads hidden states, dit_sparse computes attention outside "
    "the graph: compile with fullgraph=False to train, or run under torch.no_grad()",
)


@torch.library.custom_op("dit_sparse::core", mutates_args=())
def _core_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    handle: Tensor,
    scale: float | None,
    dropout_p: float,
    flags: list[bool],
) -> Tensor:
    """One attention call inside a compiled graph; its state is looked up when it runs."""
    is_dispatch, enable_gqa, is_causal, has_backend, parallel = flags
    at = _ATTACHMENTS[int(handle)]
    kind = DISPATCH if is_dispatch else SDPA
    own: dict[str, Any] = {"attn_mask": mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if enable_gqa:
        own["enable_gqa"] = True
    if has_backend:  # Cosmos' processors have none of their own
        own["backend"] = at.processor._attention_backend
    if parallel:
        own["parallel_config"] = at.processor._parallel_config
    query, key, value = (_heads_first(x, kind) for x in (q, k, v))
    return _heads_first(_eager(handle, kind, at.dense(kind), query, key, value, own), kind).contiguous()


@_core_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, handle: Tensor, scale: Any, dropout_p: float, flags: Any
) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))
