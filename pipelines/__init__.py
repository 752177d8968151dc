"""Model families: one file each, found by the transformer's class name."""

from importlib import import_module

from torch import nn

from dit_sparse.pipelines.family import Checkpoint, Family, Preset

__all__ = ["FAMILIES", "Checkpoint", "Family", "Preset", "family_of"]

FAMILIES: dict[str, str] = {
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan",
}
"""Transformer class in diffusers -> file of its family."""


def family_of(model: nn.Module) -> Family:
    """The family of a transformer, by its class or a base class of it.

    Raises:
        ValueError: No family knows the class; the message names those that are known.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return import_module(f"dit_sparse.pipelines.{FAMILIES[cls.__name__]}").FAMILY
    known = ", ".join(sorted(FAMILIES))
    raise ValueError(f"{type(model).__name__} is not a supported transformer; supported are {known}")
