"""Sparse attention for the diffusion transformers of Hugging Face diffusers.

Letters used throughout: B batch, H heads, S sequence, D head dim; q, k, v are [B, H, S, D]; Q, K are the
numbers of query and key blocks. A grid is (frames, height, width) in tokens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "apply": "attach",
    "session": "attach",
    "Session": "attach",
    "sdpa": "functional",
    "Run": "functional",
    "TokenLayout": "layout",
    "Order": "order",
    "Plan": "plan",
    "Schedule": "schedule",
    "Phase": "schedule",
    "SparseProcessor": "processors",  # with it set_attn_processor takes methods, those of users too
    "Call": "method",
    "Calibration": "calibration",
    "calibrate": "calibration",
    "Report": "report",
    "METHODS": "processors",
    "AdaSpaProcessor": "processors",
    "BladeProcessor": "processors",
    "DenseProcessor": "processors",
    "DraftProcessor": "processors",
    "EfficientVDiTProcessor": "processors",
    "LinVideoProcessor": "processors",
    "NeighborhoodProcessor": "processors",
    "PAROProcessor": "processors",
    "RadialProcessor": "processors",
    "RandomProcessor": "processors",
    "ReTtentionProcessor": "processors",
    "SLAProcessor": "processors",
    "SlidingTileProcessor": "processors",
    "SparseDProcessor": "processors",
    "SparseVDiTProcessor": "processors",
    "VMoBAProcessor": "processors",
    "VSAProcessor": "processors",
    "WindowProcessor": "processors",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from dit_sparse.attach import Session, apply, session
    from dit_sparse.calibration import Calibration, calibrate
    from dit_sparse.functional import Run, sdpa
    from dit_sparse.layout import TokenLayout
    from dit_sparse.method import Call, SparseProcessor
    from dit_sparse.order import Order
    from dit_sparse.plan import Plan
    from dit_sparse.processors import (
        METHODS,
        AdaSpaProcessor,
        BladeProcessor,
        DenseProcessor,
        DraftProcessor,
        EfficientVDiTProcessor,
        LinVideoProcessor,
        NeighborhoodProcessor,
        PAROProcessor,
        RadialProcessor,
        RandomProcessor,
        ReTtentionProcessor,
        SLAProcessor,
        SlidingTileProcessor,
        SparseDProcessor,
        SparseVDiTProcessor,
        VMoBAProcessor,
        VSAProcessor,
        WindowProcessor,
    )
    from dit_sparse.report import Report
    from dit_sparse.schedule import Phase, Schedule


def __getattr__(name: str) -> Any:
    """Names are imported when used: ``import dit_sparse`` needs neither diffusers nor triton."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
