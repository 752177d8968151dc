"""Family: what a model family must say so that any method can run in it. One family, one file; the table is
in ``dit_sparse.pipelines``."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch import Tensor

from dit_sparse.layout import Layer, TokenLayout

Config = Mapping[str, Any]
Arguments = Mapping[str, Any]
"""The bound arguments of a transformer's forward."""


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
        defaults: Keywords of the pipeline call that its authors recommend; ``fps`` and ``flow_shift`` beside.
        transformer: Class name of its transformer.
        config: The transformer's configuration where it differs from the class's defaults.
        attention: (layers, heads, head dim) of the attention over the token grid.
        tokens: Token layout of a call at ``defaults``.
    """

    repo: str
    size: str
    about: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    transformer: str = ""
    config: Config = field(default_factory=dict)
    attention: tuple[int, int, int] | None = None
    tokens: TokenLayout | None = None


def own_pipeline(index: Config, image: bool, starts_from_image: str = "ImageToVideo") -> str:
    """The pipeline that ``model_index.json`` names.

    Args:
        starts_from_image: What is in the names of those that need an image; the others take none.
    """
    name: str = index["_class_name"]
    if image != (starts_from_image in name):
        raise ValueError(f"{name} takes no image" if image else f"{name} needs an image")
    return name


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: The name in reports.
        transformers: Class names in diffusers, each with a configuration small enough for a test.
        layers: model -> the self-attention layers over the token grid (see :func:`stacks`).
        layout: (model, arguments) -> TokenLayout, or a sentence why this call has none and must stay dense.
            ``text`` is left 0 and, where ``joint``, completed from the sequence the attention call sees.
        joint: Text tokens share the sequence.
        video: Whether it makes videos: methods along time refuse images.
        anchors: (model, arguments) -> leading latent frames every query must be able to read (the image of
            image-to-video models).
        positions: (model, arguments) -> int64 [prefix + grid + suffix], where these tokens stand in the
            model's sequence when not in this order (text is then whatever is left), or None. With an axis
            before, batch items have places of their own.
        validity: mask of an attention call -> key validity, bool [B or 1, S], where the model's masks are
            known to be more than a key-padding mask of shape [B, 1, 1, S]. None reads and checks them.
        items: (model, arguments) -> batch items, where the processor makes one attention call for each of
            them, in their order and with their own text; 0 where it makes one for all.
        text_asks: Text tokens are queries too. Where not, a call has the other tokens as queries and all as
            keys.
        hidden: Names of the attention module's arguments with the hidden states of the grid and of text,
            where they are not its first one and the one that ends in ``encoder_hidden_states``.
        edit: A change to the source of a processor's ``__call__`` beyond the redirected call.
        timestep: Name of the forward's argument with the timestep.
        branches: Names of the forward passes of a step, in call order, where the pipeline gives none.
        schedule: The default schedule.
        presets: (method, size) -> {"quality", "balanced", "fast"} -> Preset.
        checkpoints: Name users type -> Checkpoint.
        pixels: (transformer's config, autoencoder's config) -> (frames, height, width) that become one token.
        lone_first_frame: The first frame is a token frame of its own, so lengths are 1 + a multiple.
        call: Keywords of every call of its pipelines, where those have no usable default; flags come first.
        tiled: Its autoencoder decodes in tiles alone.
        multiples: As ``pixels``: what sizes must be multiples of, where the pipelines ask for more.
        pipeline_class: (``model_index.json``, whether an image is given) -> pipeline class in diffusers.
            ValueError: An image for a model that takes none, or none for one that needs it.
        size_of: (transformer's config, how many transformers) -> key of the presets of a model without a
            name; None where unknown. By default that of the checkpoint with the same configuration.
        float32: Components that stay in float32 whatever the transformer's dtype.
    """

    name: str
    transformers: Mapping[str, Config]
    layers: Callable[[Any], list[Layer]]
    layout: Callable[[Any, Arguments], TokenLayout | str]
    pixels: Callable[[Config, Config], tuple[int, int, int]]
    joint: bool = False
    video: bool = True
    anchors: Callable[[Any, Arguments], int] = lambda model, arguments: 0
    positions: Callable[[Any, Arguments], Tensor | None] = lambda model, arguments: None
    validity: Callable[[Tensor], Tensor] | None = None
    items: Callable[[Any, Arguments], int] = lambda model, arguments: 0
    text_asks: bool = True
    hidden: tuple[str, str] | None = None
    edit: Callable[[ast.FunctionDef], None] | None = None
    timestep: str = "timestep"
    branches: tuple[str, ...] = ("cond", "uncond")
    schedule: str = "dense 0-25%"
    presets: Mapping[tuple[str, str], Mapping[str, Preset]] = field(default_factory=dict)
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
    lone_first_frame: bool = True
    call: Config = field(default_factory=dict)
    tiled: bool = False
    multiples: Callable[[Config, Config], tuple[int, int, int]] | None = None
    pipeline_class: Callable[[Config, bool], str] = own_pipeline
    size_of: Callable[[Config, int], str | None] | None = None
    float32: tuple[str, ...] = ()

    def preset_size(self, transformer: Config, experts: int) -> str | None:
        """The key of the presets for a transformer's ``config.json``; None where no size is known for it."""
        if self.size_of is not None:
            return self.size_of(transformer, experts)
        alike = self.alike(transformer)
        return None if alike is None else alike.size

    def alike(self, transformer: Config) -> Checkpoint | None:
        """The first named model with the configuration of this ``config.json``, if there is one."""
        name = transformer["_class_name"]
        known = [c for c in self.checkpoints.values() if c.transformer == name]
        if not known:
            return None
        import diffusers

        own = signature(getattr(diffusers, name)).parameters
        # A checkpoint names what differs from the defaults; the tiny configuration names every size.
        telling = sorted({key for c in known for key in c.config} | set(self.transformers[name]))

        def told(config: Config) -> list[Any]:
            values = [config.get(key, own[key].default) for key in telling]
            return [list(v) if isinstance(v, tuple) else v for v in values]

        return next((c for c in known if told(c.config) == told(transformer)), None)


def stacks(model: Any, *parts: tuple[str, str], **widths: Any) -> list[Layer]:
    """Layers of stacks of blocks that tokens pass one after the other, numbered through.

    >>> stacks(flux, ("transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))  # doctest: +SKIP

    Args:
        parts: (path of a ``ModuleList``, path of the attention module within a block).
        widths: As :func:`numbered`.
    """
    return numbered(
        model,
        [f"{blocks}.{i}.{attention}" for blocks, attention in parts
         for i in range(len(model.get_submodule(blocks)))],
        **widths,
    )  # fmt: skip


def numbered(
    model: Any,
    paths: Sequence[str],
    *,
    index: Sequence[int] | None = None,
    count: int | None = None,
    **widths: int,
) -> list[Layer]:
    """Layers at module paths, in order.

    Args:
        index, count: Where an attention module is not the layer of its own place (VACE's control blocks).
        widths: ``heads``, ``head_dim`` and ``dim`` (see ``Layer``) of modules that do not have them as
            ``heads`` and in the shape of ``to_q``.
    """
    layers = []
    for i, path in enumerate(paths):
        shape = widths
        if not widths:
            module = model.get_submodule(path)
            shape = {
                "heads": module.heads,
                "head_dim": module.to_q.out_features // module.heads,
                "dim": module.to_q.in_features,
            }
        layers.append(Layer(index[i] if index else i, path, count or len(paths), **shape))
    return layers


def kl_scale(vae: Config) -> int:
    """Pixels a side of a latent of ``AutoencoderKL``: each of its blocks but the last halves the sides."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def wan_scale(vae: Config) -> tuple[int, int, int]:
    """Pixels of a latent of ``AutoencoderKLWan``, whose older configs leave the class's defaults out."""
    side = vae.get("scale_factor_spatial", 8)
    return vae.get("scale_factor_temporal", 4), side, side


def scaled(scale: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """``pixels`` of patches of latents, both (frames, height, width)."""
    frames, height, width = (s * p for s, p in zip(scale, patch, strict=True))
    return frames, height, width


def square_patches(transformer: Config, vae: Config) -> tuple[int, int, int]:
    """``pixels`` of image models that cut the latents of ``AutoencoderKL`` into square patches."""
    side = kl_scale(vae) * transformer["patch_size"]
    return 1, side, side


def patches(size: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """The token grid of latents of a (frames, height, width) cut into patches that do not overlap."""
    frames, height, width = (n // p for n, p in zip(size, patch, strict=True))
    return frames, height, width
