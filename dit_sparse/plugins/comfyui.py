"""For a ComfyUI node: :func:`route` says where a call stands in the sampling, :func:`attend` computes it.

run = dit_sparse.Run("draft", layers=30, schedule="dense 0-25%")
options = model.model_options["transformer_options"]
options["optimized_attention_override"] = partial(attend, run=run, grid=(21, 45, 80))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch import Tensor

from dit_sparse.functional import Run, sdpa


def route(options: Mapping[str, Any], doubles: int = 0) -> dict[str, Any]:
    """``transformer_options`` as keywords of ``dit_sparse.sdpa``: layer, branch and step.

    Args:
        doubles: Double-stream blocks before the single-stream ones, whose index begins at 0 again.
    """
    which = set(options.get("cond_or_uncond", ()))
    where = {
        "layer": options.get("block_index", 0) + doubles * (options.get("block_type") == "single"),
        "branch": "cond" if which == {0} else "uncond" if which == {1} else "cond_uncond",
    }
    if "sample_sigmas" in options:
        sigmas = options["sample_sigmas"][:-1]  # the last one is where sampling ends
        where["step"] = int((sigmas - options["sigmas"][0]).abs().argmin())
        where["steps"] = len(sigmas)
    return where


def attend(
    dense: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    *,
    run: Run,
    grid: tuple[int, int, int],
    doubles: int = 0,
    **options: Any,
) -> Tensor:
    """An ``optimized_attention_override``: attention of the grid's tokens by ``run``, any other by ``dense``.

    q, k, v are [B, S, H * D], or [B, H, S, D] with ``skip_reshape``; the result is [B, S, H * D], or
    [B, H, S, D] with ``skip_output_reshape``.
    """
    if k.shape[-2] != q.shape[-2] or q.shape[-2] < prod(grid):
        return dense(q, k, v, heads, mask, **options)
    if not options.get("skip_reshape"):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    where = route(options.get("transformer_options") or {}, doubles)
    out = sdpa(q, k, v, grid=grid, method=run, attn_mask=mask, **where)
    return out if options.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)
