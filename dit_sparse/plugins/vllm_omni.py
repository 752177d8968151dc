"""A sparse attention callable as vLLM-Omni's dispatcher wants one (vllm-project/vllm-omni, pull request 4493,
open when this was written): ``fn(q, k, v, params, is_causal, softmax_scale)``.

``params`` is the engine's merge of what was configured and what the forward pass tells. Read here: ``grid``
(required); ``run``, a ``dit_sparse.Run`` that remembers and reports, or ``method`` and its ``parameters``;
and the other keywords of ``dit_sparse.sdpa``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dit_sparse.functional import sdpa
from dit_sparse.processors import method_of


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, params: Mapping[str, Any], is_causal: bool, softmax_scale: float | None
) -> Tensor:
    """q, k, v and the result are [B, S, H, D]."""
    if is_causal:
        raise ValueError("diffusion transformers attend both ways, got is_causal=True")
    if "grid" not in params:
        raise ValueError(f"params needs 'grid', (frames, height, width) in tokens, got {sorted(params)}")
    told = dict(params)
    run = told.pop("run", None)
    method = method_of(told.pop("method", "radial"), told.pop("parameters", {})) if run is None else run
    out = sdpa(*(x.transpose(1, 2) for x in (q, k, v)), method=method, scale=softmax_scale, **told)
    return out.transpose(1, 2)
