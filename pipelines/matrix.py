"""Which method runs in which transformer: one table, printed by ``dit-sparse models --matrix`` and walked by
the contract suite."""

from __future__ import annotations

from dit_sparse.method import SparseProcessor
from dit_sparse.pipelines import FAMILIES, NOTHING_TO_DO, Family, families
from dit_sparse.processors import METHODS


def refusal(family: Family, method: SparseProcessor) -> str:
    """Why a method does not apply to a family; empty where it does."""
    if not family.video and method.needs_frames:
        return f"an image is one frame, and {method.needs_frames}"
    return ""


def missing(transformer: str) -> str:
    """Why a transformer class cannot be used here; empty where it can."""
    import diffusers

    if transformer in NOTHING_TO_DO:
        return NOTHING_TO_DO[transformer]
    if not hasattr(diffusers, transformer):
        return f"diffusers {diffusers.__version__} does not have it"
    return ""


def matrix() -> dict[str, dict[str, str]]:
    """Transformer class -> name of the method -> why it does not run there; empty where it does."""
    known = families()
    table = {
        cls: {name: refusal(known[file], method()) for name, method in METHODS.items()}
        for cls, file in FAMILIES.items()
    }
    return {
        **{cls: {n: missing(cls) or why for n, why in row.items()} for cls, row in table.items()},
        **{cls: dict.fromkeys(METHODS, why) for cls, why in NOTHING_TO_DO.items()},
    }
