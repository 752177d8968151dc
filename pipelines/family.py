"""Family: what a model family must say so that any method can run in it. One family, one file; the table is
in ``dit_sparse.pipelines``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dit_sparse.layout import TokenLayout


@dataclass(frozen=True)
class Preset:
    """Parameters and schedule of one method, named by intent.

    Args:
        parameters: Keywords of the method's constructor.
        schedule: When it runs (see ``Schedule.parse``).
        source: Where the numbers come from.
    """

    parameters: Mapping[str, Any]
    schedule: str
    source: str


@dataclass(frozen=True)
class Checkpoint:
    """A model by the name users type.

    Args:
        repo: Hub id of the diffusers folder.
        size: Key of the family's presets.
        about: One line: what it makes and what it needs.
        defaults: Keywords of the pipeline call that its authors recommend.
    """

    repo: str
    size: str
    about: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: The name in reports.
        transformers: Class names in diffusers.
        layers: model -> [(module path, index, count)] of the attention modules over the token grid.
        layout: (model, bound arguments of its forward) -> TokenLayout; ``text`` is left 0 and, where
            ``joint``, completed from the sequence the attention call sees.
        joint: Text tokens share the sequence.
        anchors: (model, bound arguments) -> leading latent frames every query must be able to read (the image
            of image-to-video models).
        branches: Names of the forward passes of a step, in call order, where the pipeline gives none.
        schedule: The default schedule.
        presets: (method, size) -> {"quality", "balanced", "fast"} -> Preset.
        checkpoints: Name users type -> Checkpoint.
    """

    name: str
    transformers: tuple[str, ...]
    layers: Callable[[nn.Module], list[tuple[str, int, int]]]
    layout: Callable[[nn.Module, Mapping[str, Any]], TokenLayout]
    joint: bool = False
    anchors: Callable[[nn.Module, Mapping[str, Any]], int] = lambda model, arguments: 0
    branches: tuple[str, ...] = ("cond", "uncond")
    schedule: str = "dense 0-25%"
    presets: Mapping[tuple[str, str], Mapping[str, Preset]] = field(default_factory=dict)
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
