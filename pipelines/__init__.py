"""Model families: one file each, found by the transformer's class name."""

from importlib import import_module
from typing import Any

from dit_sparse.pipelines.family import Checkpoint, Family, Preset

__all__ = ["FAMILIES", "NOTHING_TO_DO", "Checkpoint", "Family", "Preset", "families", "family_of"]

FAMILIES: dict[str, str] = {
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan",
}
"""Transformer class in diffusers -> file of its family."""

NOTHING_TO_DO: dict[str, str] = {}
"""Transformer class in diffusers -> why there is nothing to make sparse in it."""


def families() -> dict[str, Family]:
    """File of a family -> the family, in the order of the table."""
    return {
        file: import_module(f"dit_sparse.pipelines.{file}").FAMILY
        for file in dict.fromkeys(FAMILIES.values())
    }


def family_of(model: Any) -> Family:
    """The family of a transformer, by its class or a base class of it.

    Raises:
        ValueError: No family knows the class; the message names those that are known.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return import_module(f"dit_sparse.pipelines.{FAMILIES[cls.__name__]}").FAMILY
        if cls.__name__ in NOTHING_TO_DO:
            raise ValueError(
                f"there is nothing to make sparse in {cls.__name__}: {NOTHING_TO_DO[cls.__name__]}"
            )
    known = ", ".join(sorted(FAMILIES))
    raise ValueError(f"{type(model).__name__} is not a supported transformer; supported are {known}")
