"""Attaching a method to an unmodified diffusers model, and taking it out again.

A session owns every piece of state: what each layer and branch remembers, the clock, the report. It replaces
the processors of the layers over the token grid by redirected ones (see ``redirect.py``), and reads grid,
step and branch from the model's own arguments in one forward pre-hook per transformer.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dit_sparse.calibration import CalibratedProcessor
from dit_sparse.checkpointing import wrap
from dit_sparse.clock import Clock
from dit_sparse.core import Attachment, Redirected, restored
from dit_sparse.layout import TokenLayout
from dit_sparse.method import SparseProcessor
from dit_sparse.pipelines import Family, family_of
from dit_sparse.pipelines.matrix import refusal
from dit_sparse.router import Forward, Part, Router
from dit_sparse.schedule import Schedule
from dit_sparse.shadows import Hook, NoHook, shadows


class _HiddenHook:
    """Keeps the hidden states an attention module was called with, for a method that reads them.

    Where text joins the sequence only inside the module, it has two: they are kept as given, and put in order
    when the layout of the call is known.
    """

    def __init__(self, at: Attachment) -> None:
        self.at = at
        self.names = list(signature(type(at.module).forward).parameters)[1:]
        text = next((name for name in self.names if name.endswith("encoder_hidden_states")), "")
        named: tuple[str, str] | None = at.part.family.hidden
        self.hidden, self.text = named or (self.names[0], text)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        hidden, text = given[self.hidden], given.get(self.text)
        if not self.at.part.family.joint or text is hidden:
            text = None
        self.at.hidden = _batched(hidden), None if text is None else _batched(text)

    def __reduce__(self) -> Any:
        return NoHook, ()


class Session(Router):
    """A method attached to the transformers of one pipeline: made by :func:`apply`.

    Use :meth:`report` after a run and :meth:`remove` to restore the model; as a context manager it removes
    itself.
    """

    def __init__(
        self,
        pipe: Any,
        models: Mapping[str, nn.Module],
        method: SparseProcessor | Mapping[str, SparseProcessor],
        *,
        schedule: Schedule | str | None,
        density: float | None,
        backend: str,
        strict: bool,
        seed: int,
    ) -> None:
        families = {name: family_of(model) for name, model in models.items()}
        default = next(iter(families.values())).schedule
        super().__init__(
            method, Schedule.parse(default if schedule is None else schedule), density, backend, strict, seed
        )
        self.parts: list[Part] = []
        self._clock = Clock(pipe)
        self._grid: TokenLayout | str | None = None
        self._warned = False
        self._untrained = False
        self._undo: list[Callable[[], object]] = []
        try:
            for name, model in models.items():
                self._attach(name, model, families[name])
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put every stock processor back. The model computes what it did before, bit for bit.

        The report stays readable. Removing twice does nothing.
        """
        while self._undo:
            self._undo.pop()()
        self.parts.clear()
        self._memory.clear()
        self._made.clear()

    @property
    def active(self) -> bool:
        """Whether the session is attached."""
        return bool(self.parts)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        layers = sum(len(part.layers) for part in self.parts)
        return f"Session({self.method!r}, schedule={str(self.schedule)!r}, layers={layers})"

    def sparse_modules(self) -> dict[str, nn.Module]:
        """The methods' trainable parts by ``transformer/layer path``."""
        return {name: at.module.sparse_branch for name, at in self._trainable().items()}  # type: ignore[misc]

    def _trainable(self) -> dict[str, Attachment]:
        return {
            f"{part.name}/{at.layer.name}": at
            for part in self.parts
            for at in part.layers
            if "sparse_branch" in at.module._modules
        }

    def _trained_as(self) -> dict[str, dict[str, Any]]:
        """What the trainable parts belong to, as JSON has it: method and what it must be trained with."""
        methods = {name: at.method for name, at in self._trainable().items()}
        return {
            name: {"method": type(m).__name__, **{p: getattr(m, p) for p in m.trained_with}}
            for name, m in methods.items()
        }

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the trainable parts: ``sparse_modules.safetensors`` and ``sparse_config.json``."""
        modules = self.sparse_modules()
        if not modules:
            raise ValueError(f"{self.method!r} has no trainable parts to save")
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            f"{n}.{k}": v.contiguous().cpu() for n, m in modules.items() for k, v in m.state_dict().items()
        }
        config = {"format": 1, "method": repr(self.method), "modules": self._trained_as()}
        save_file(state, folder / "sparse_modules.safetensors.part")
        (folder / "sparse_config.json.part").write_text(json.dumps(config, indent=1))
        for name in ("sparse_modules.safetensors", "sparse_config.json"):
            (folder / f"{name}.part").replace(folder / name)

    def load_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            ValueError: Keys are missing or unexpected, shapes differ, or the parts were trained as something
                else; nothing is loaded then.
        """
        state = load_file(Path(directory) / "sparse_modules.safetensors")
        saved_as = json.loads((Path(directory) / "sparse_config.json").read_text())["modules"]
        modules = self.sparse_modules()
        wanted = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
        if set(wanted) != set(state):
            missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
            raise ValueError(
                f"{directory} does not fit {self.method!r}: missing {missing}, unexpected {unexpected}"
            )
        for name, value in wanted.items():
            if value.shape != state[name].shape:
                raise ValueError(
                    f"{directory} does not fit {self.method!r}: {name} has the shape "
                    f"{tuple(state[name].shape)}, expected {tuple(value.shape)}"
                )
        for name, own in self._trained_as().items():
            if saved_as.get(name) != own:
                raise ValueError(
                    f"{directory} does not fit {self.method!r}: {name} was trained as {saved_as.get(name)}, "
                    f"expected {own}"
                )
        for name, module in modules.items():
            own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            module.load_state_dict(own)
        self._untrained = False

    def _attach(self, name: str, model: nn.Module, family: Family) -> None:
        part = Part(name, model, family, signature(type(model).forward))
        self.parts.append(part)
        uncovered = []
        for layer in family.layers(model):
            key = f"{layer.name}.processor"
            method = self.method.get(key) if isinstance(self.method, Mapping) else self.method
            if method is None:
                continue
            why = refusal(family, method)
            if why:
                raise ValueError(f"{type(method).__name__} does not apply to {type(model).__name__}: {why}")
            module: Any = model.get_submodule(layer.name)
            if isinstance(method, CalibratedProcessor):
                method.check_model(model)
            schedule = self.schedule.with_refresh(method.refresh)
            at = Attachment(self, part, layer, module, method, schedule, module.processor)
            if not at.redirect():
                uncovered.append(f"{layer.name} ({type(at.stock).__name__})")
                continue
            part.layers.append(at)
            self._undo.append(at.restore)
            branch = method.module(layer)
            if branch is not None:
                weight = next(module.parameters())
                computed_in = (torch.float32, torch.bfloat16, torch.float16)  # weights may be stored in less
                module.sparse_branch = branch.to(
                    _computes_on(model, module), weight.dtype if weight.dtype in computed_in else None
                )
                self._undo.append(partial(module._modules.pop, "sparse_branch"))
                self._untrained |= method.needs_training
            if method.reads_hidden:
                self._undo.append(module.register_forward_pre_hook(_HiddenHook(at), with_kwargs=True).remove)
        if uncovered:
            raise ValueError("no attention call to redirect was found in " + ", ".join(uncovered))
        hook = model.register_forward_pre_hook(Hook(self, part), with_kwargs=True)
        self._undo.append(hook.remove)
        part.shadows = {**self._clock.listen(model), **shadows(part)}
        model.__dict__.update(part.shadows)
        self._undo += [partial(model.__dict__.pop, name) for name in part.shadows]

    def begin(self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the start of every forward pass of a transformer."""
        arguments = part.arguments.bind(part.model, *args, **kwargs).arguments
        family = part.family
        grid = family.layout(part.model, arguments)
        tick = self._clock.tick(arguments.get(family.timestep), grid, family.branches)
        if tick.begins:
            self._records.clear()
            if self._grid != grid:
                self._made.clear()
            self._grid = grid
            self._look_for_drift()
            if self._untrained and not torch.is_grad_enabled():
                warnings.warn(
                    f"{self.method!r} runs with untrained parameters, unlike its paper: train them, or load "
                    "trained ones with session.load_pretrained(directory)",
                    stacklevel=2,
                )
            self._untrained = False  # warned of, or being trained
        if tick.first or tick.step is None:
            # Without a clock nothing tells one run from the next, so nothing is remembered between forwards.
            self._memory.clear()
        if tick.step is None and self.schedule.needs_steps and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(part.model).__name__} was called outside a pipeline run this session knows, so the "
                f"step rules of the schedule {str(self.schedule)!r} are off; attach with "
                "dit_sparse.apply(pipe, ...) and call the pipeline to have them",
                stacklevel=2,
            )
        part.forward = Forward(
            grid,
            tick,
            family.anchors(part.model, arguments),
            family.positions(part.model, arguments),
            family.items(part.model, arguments),
        )
        if torch.is_grad_enabled():
            self._undo += wrap(part)

    def _look_for_drift(self) -> None:
        for part in self.parts:
            lost = [at.layer.name for at in part.layers if at.module.processor is not at.processor]
            if lost:
                warnings.warn(
                    f"{len(lost)} of {len(part.layers)} layers no longer have the processor they were given "
                    f"({lost[0]}, ...) and run what replaced it; attach again to have them sparse",
                    stacklevel=3,
                )


def apply(
    pipe: Any,
    method: SparseProcessor | str | Mapping[str, SparseProcessor],
    *,
    schedule: Schedule | str | None = None,
    density: float | None = None,
    backend: str = "auto",
    strict: bool = False,
    seed: int = 0,
    **parameters: Any,
) -> Session:
    """Attach a method to a pipeline or a bare transformer.

    Args:
        pipe: A diffusers pipeline (its clock is then known) or a transformer. A compiled transformer will do.
        method: A processor, a name out of ``METHODS``, or a dict of processors by ``"<path>.processor"``.
        schedule: When it runs; default the model family's. See :meth:`Schedule.parse`.
        density: Ask for the method's setting nearest to this density of all pairs, at each token layout. To
            set a parameter of this name that a method has, give a processor.
        backend: "auto", "reference", "cpu", "gathered", "flex" or "triton".
        strict: Raise where a call cannot run sparse, instead of recording why it ran dense.
        seed: For methods that draw samples.
        parameters: Keywords of the method's constructor, when it is given by name.

    Raises:
        ValueError: Unknown model class, method, schedule or backend; or nothing to attach to.
    """
    from dit_sparse.processors import method_of

    if not isinstance(method, Mapping):
        method = method_of(method, parameters)
    elif parameters:
        raise ValueError(f"parameters {sorted(parameters)} belong to a method given by name, got {method!r}")
    models = _transformers(pipe)
    for model in models.values():
        attached = session(model)
        if attached is not None:
            attached.remove()
    return Session(
        pipe if not isinstance(pipe, nn.Module) else None,
        models,
        method,
        schedule=schedule,
        density=density,
        backend=backend,
        strict=strict,
        seed=seed,
    )


def session(model: Any) -> Session | None:
    """The session attached to a transformer (or to a pipeline's), or None."""
    for found in _transformers(model).values() if not isinstance(model, nn.Module) else [_uncompiled(model)]:
        for hook in found._forward_pre_hooks.values():
            if isinstance(hook, Hook):
                return hook.session
    return None


def _computes_on(model: nn.Module, layer: nn.Module) -> torch.device:
    """The device of a layer's calls: not that of its weights while offloading keeps them elsewhere."""
    from accelerate.hooks import AlignDevicesHook
    from diffusers.hooks.group_offloading import _get_group_onload_device, _is_group_offload_enabled

    for module in layer.modules():
        hook = module.__dict__.get("_hf_hook")
        if isinstance(hook, AlignDevicesHook) and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    if _is_group_offload_enabled(model):
        return _get_group_onload_device(model)
    return next(layer.parameters()).device


def _batched(hidden: torch.Tensor) -> torch.Tensor:
    """[B, S, C], also of sequences packed into one, [S, C]."""
    return hidden if hidden.ndim == 3 else hidden[None]


def _uncompiled(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def _transformers(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline (or the one given) by component name."""
    if isinstance(pipe, nn.Module):
        return {"transformer": _uncompiled(pipe)}
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise ValueError(f"expected a diffusers pipeline or a transformer, got {type(pipe).__name__}")
    names = [name for name in components if name.startswith("transformer") and components[name] is not None]
    if not names:
        raise ValueError(
            f"{type(pipe).__name__} has no transformer; its components are {', '.join(components)}"
        )
    return {name: _uncompiled(components[name]) for name in names}


def apply_dict(model: Any, processors: dict[str, Any], stock: Callable[[Any, Any], None]) -> None:
    """``set_attn_processor`` with a dict that mixes methods and stock processors."""
    names = set(model.attn_processors)
    if set(processors) != names:
        missing, unknown = sorted(names - set(processors)), sorted(set(processors) - names)
        raise ValueError(
            f"the number of processors, {len(processors)}, or their names do not match the {len(names)} "
            f"attention layers: missing {missing}, unknown {unknown}"
        )
    attached = session(model)
    if attached is not None:
        attached.remove()
    present = model.attn_processors
    sparse = {k: p for k, p in processors.items() if isinstance(p, SparseProcessor)}
    stock(model, {k: present[k] if k in sparse else p for k, p in processors.items()})
    apply(model, sparse)


def release_for(model: Any, given: list[Any]) -> None:
    """End the model's session once processors that are no methods were set; its own ones may be set again.

    Those of a session that has ended, or of another model's, become the stock ones they came from.
    """
    attached = session(model)
    redirected = [p for p in given if isinstance(p, Redirected)]
    if attached is not None:
        own = [at.processor for part in attached.parts for at in part.layers]
        if redirected and all(p in own for p in redirected):
            return
        attached.remove()
    if redirected:
        for module in model.modules():
            if isinstance(getattr(module, "processor", None), Redirected):
                module.processor = restored(module.processor)
