"""Calibration: what a method found out offline about one model at one token grid, and the file of it.

    dit-sparse calibrate --method sparse_vdit --output tiny-wan.json
    dit-sparse generate --method sparse_vdit --param calibration=tiny-wan.json

A method's search watches a few dense runs, layer by layer, on the q, k and v of each call. What it decides is
one JSON object per layer; masks go into a safetensors file beside.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dit_sparse.method import Call, SparseProcessor
from dit_sparse.order import Order
from dit_sparse.schedule import Schedule

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Calibration:
    """The result of one search. Compared by identity.

    Args:
        method: The method's name in ``METHODS``.
        models: Component -> class and fingerprint of its config (:func:`fingerprint`).
        source: The model as it was asked for: name, Hub id or folder.
        grid: (frames, height, width) in tokens.
        heads: Attention heads of a layer.
        steps: Denoising steps of the runs.
        prompts, seeds: What was generated.
        settings: The search's parameters.
        layers: ``"transformer/blocks.0.attn1"`` -> what was decided for the layer, JSON values.
        tensors: ``"transformer/blocks.0.attn1/mask"`` -> what does not fit into JSON.
        schedule: Which steps of the runs were looked at.
    """

    method: str
    models: dict[str, str]
    source: str
    grid: tuple[int, int, int]
    heads: int
    steps: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    schedule: str = "always"

    def __repr__(self) -> str:
        return f"Calibration({self.method!r}, {self.source!r}, grid={self.grid}, layers={len(self.layers)})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` (JSON) and, where there are tensors, ``<stem>.safetensors`` beside it."""
        from safetensors.torch import save

        from dit_sparse.video import staged

        path = Path(path)
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content = {"format": FORMAT, **content, "tensors": None}
        with staged() as stage:
            if self.tensors:
                blob = save({name: x.contiguous().cpu() for name, x in self.tensors.items()})
                beside = path.with_suffix(".safetensors")
                content["tensors"] = {"file": beside.name, "sha256": sha256(blob).hexdigest()}
                stage(beside).write_bytes(blob)
            stage(path).write_text(json.dumps(content, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: The file is missing, is no calibration, is of another format, or its tensors are not
                those it was saved with.
        """
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match
        from safetensors.torch import load

        path = Path(path)
        try:
            content = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no readable calibration: {error}") from error
        if not isinstance(content, dict) or "format" not in content:
            raise ValueError(f"{path} is no calibration: it has no format")
        if content["format"] != FORMAT:
            raise ValueError(
                f"{path} is of calibration format {content['format']!r}, expected {FORMAT}: calibrate again"
            )
        schema = json.loads(files("dit_sparse").joinpath("calibration.schema.json").read_text())
        if wrong := best_match(Draft202012Validator(schema).iter_errors(content)):
            raise ValueError(f"{path} is no calibration: {wrong.json_path}: {wrong.message}")
        tensors = {}
        if about := content["tensors"]:
            beside = path.with_name(about["file"])
            try:
                blob = beside.read_bytes()
            except OSError as error:
                raise ValueError(f"{path} needs {beside.name} beside it: {error}") from error
            if sha256(blob).hexdigest() != about["sha256"]:
                raise ValueError(f"{beside} is not the file that {path} was saved with")
            tensors = load(blob)
        del content["format"], content["tensors"]
        lists: dict[str, Any] = {key: tuple(content.pop(key)) for key in ("grid", "prompts", "seeds")}
        return cls(**content, **lists, tensors=tensors)

    def check_model(self, model: nn.Module) -> None:
        """ValueError unless this calibration was made with a model of this class and configuration."""
        if fingerprint(model) not in self.models.values():
            raise ValueError(
                f"the {self.method} calibration was made with {self.source} "
                f"({', '.join(self.models.values())}), got {fingerprint(model)}: calibrate this model"
            )

    def check_grid(self, grid: tuple[int, int, int]) -> None:
        """ValueError unless this calibration was made at this token grid."""
        if grid != self.grid:
            raise ValueError(
                f"the {self.method} calibration of {self.source} is for the token grid {self.grid}, "
                f"got {grid}: calibrate at this size"
            )

    def layer(self, call: Call) -> dict[str, Any]:
        """What was decided for the layer of a call. ValueError where the call does not fit."""
        self.check_grid(call.layout.grid)
        if call.layer_heads != self.heads or layer_key(call) not in self.layers:
            raise ValueError(
                f"the {self.method} calibration of {self.source} has {self.heads} heads in "
                f"{len(self.layers)} layers, not {call.layer_heads} heads in layer {layer_key(call)}"
            )
        return self.layers[layer_key(call)]


def layer_key(call: Call) -> str:
    """The key of a call's layer in a calibration."""
    return call.name or str(call.layer)


def fingerprint(model: Any) -> str:
    """Class and configuration of a model, such as ``"WanTransformer3DModel:0f1e2d3c4b5a"``, not weights."""
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=str)
    return f"{type(model).__name__}:{sha256(text.encode()).hexdigest()[:12]}"


def under(order: Order | None, call: Call, *tensors: Tensor) -> tuple[Call, list[Tensor]]:
    """The same call with its tokens in another order, and tensors [B, H, S', D] of its order in that one."""
    assert order is not None
    assert call.order is not None
    there = order.to(tensors[0].device)
    return call.at(order=there), [there.apply(call.order.undo(x)) for x in tensors]


def error(out: Tensor, dense: Tensor, metric: str, call: Call) -> Tensor:
    """What each head loses by computing ``out`` [B, H, S, D] instead of ``dense``: float32 [B, H].

    Tokens that may not be read are padding: nothing reads what they give either, and they do not count.

    Args:
        metric: "mse", the mean squared error; or "relative", the same over the mean square of the whole dense
            output, so that a threshold fits any model and the errors of heads add up.
    """
    valid = call.slots_valid().float()

    def mean_square(x: Tensor) -> Tensor:
        return (x.square().mean(3) * valid).sum(2) / valid.sum(2).clamp(min=1)

    lost = mean_square(out.float() - dense.float())
    if metric == "mse":
        return lost
    layer = call.all_heads(mean_square(dense.float())).mean(1, keepdim=True)
    return lost / layer.clamp(min=torch.finfo(lost.dtype).tiny)


METRICS = ("relative", "mse")


def within(errors: Tensor, costs: Tensor, budget: float) -> Tensor:
    """One option for each item, such that the mean cost keeps to ``budget`` and errors add up to little.

    Every item takes its least error + weight * cost, with the smallest weight that keeps to the budget, found
    by bisection: no choice that costs no more has a smaller sum of errors.

    Args:
        errors: [..., items, options].
        costs: [options].

    Returns:
        int64 [..., items]; the cheapest options where even those cost more.
    """
    errors, costs = errors.double(), costs.double()
    scale = errors.amax((-2, -1)).clamp(min=torch.finfo(errors.dtype).tiny)
    low, high = torch.zeros_like(scale), 1e9 * scale

    def chosen(weight: Tensor) -> Tensor:
        return (errors + weight[..., None, None] * costs).argmin(-1)

    for _ in range(100):
        middle = (low + high) / 2
        fits = costs[chosen(middle)].mean(-1) <= budget * (1 + 1e-9)
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return chosen(high)


class Sees(Protocol):
    """Is shown the calls of a dense run."""

    def observe(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> None:
        """One call: q, k, v and dense out [B, H, S, D] in raster order, [grid, rest]; lse [B, H, S]."""


class Search(Sees, Protocol):
    """What a method does with the dense runs of :func:`calibrate`."""

    def result(self) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        """(``layers``, ``tensors``) of the :class:`Calibration`; a layer may tell its ``"density"``."""


@dataclass(frozen=True, kw_only=True)
class CalibratedProcessor(SparseProcessor):
    """Base of the methods that are calibrated.

    Args:
        calibration: What ``dit-sparse calibrate`` wrote, or its path. None leaves it to the method.
    """

    calibrates: ClassVar[str]
    """The method's name in ``METHODS``."""
    searched: ClassVar[tuple[str, ...]] = ()
    """Parameters that went into the search: with a calibration they are the file's."""

    calibration: Calibration | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.calibration is None or isinstance(self.calibration, Calibration):
            found = self.calibration
        else:
            found = Calibration.load(self.calibration)
            object.__setattr__(self, "calibration", found)
        if found is not None and found.method != self.calibrates:
            raise ValueError(f"{type(self).__name__} needs a calibration of {self.calibrates}, got {found!r}")
        for f in fields(self):
            if found is None or f.name not in self.searched:
                continue
            given, made = getattr(self, f.name), found.settings.get(f.name, f.default)
            if given not in (f.default, made):
                raise ValueError(
                    f"{f.name}={given!r} does not fit a calibration that was made with "
                    f"{f.name}={made!r}: leave it out, or calibrate again"
                )
            object.__setattr__(self, f.name, made)

    @property
    def calibrated(self) -> Calibration | None:
        """The calibration, loaded."""
        assert self.calibration is None or isinstance(self.calibration, Calibration)
        return self.calibration

    def check_model(self, model: nn.Module) -> None:
        """ValueError unless the calibration, if any, was made with such a model."""
        if self.calibrated is not None:
            self.calibrated.check_model(model)

    def search(self) -> Search:
        """A new search with this method's parameters."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class Observer(SparseProcessor):
    """Runs dense and shows every call to ``search``."""

    reads: ClassVar[frozenset[str]] = frozenset({"layout"})

    search: Sees
    calls: list[Call] = field(default_factory=list)

    def order(self, call: Call) -> Order:
        return Order.raster(call.layout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if call.share is not None:
            raise ValueError("calibrate in one process: each of several sees some heads only")
        out, lse = call.run_dense(q, k, v)
        self.search.observe(q, k, v, out, lse, call)
        if not self.calls:
            self.calls.append(call)
        return out


def calibrate(
    pipe: Any,
    method: CalibratedProcessor,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    source: str = "",
    settings: Mapping[str, Any] | None = None,
    schedule: Schedule | str = "always",
) -> Calibration:
    """Generate from each prompt with the model's own attention, and let the method search meanwhile.

    Args:
        pipe: A diffusers pipeline.
        prompts: A few; methods say how many their papers used.
        seeds: One per prompt; default 0, 1, ...
        source: The model's name, for the file.
        settings: Keywords of the pipeline's call (steps, size, guidance).
        schedule: When the method will run: steps that stay dense are not looked at.
    """
    from dit_sparse.attach import apply

    seeds = range(len(prompts)) if seeds is None else seeds
    if not prompts or len(seeds) != len(prompts):
        raise ValueError(f"expected prompts and as many seeds, got {len(prompts)} and {len(seeds)}")
    search = method.search()
    observer = Observer(search=search)
    schedule = replace(Schedule.parse(schedule), layers=(), refresh=())
    with torch.no_grad(), apply(pipe, observer, schedule=schedule) as session:
        session.full_plan_is_dense = False
        models = {part.name: fingerprint(part.model) for part in session.parts}
        for prompt, seed in zip(prompts, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            pipe(prompt, generator=generator, output_type="latent", **(settings or {}))
        if not observer.calls:
            raise ValueError(f"no attention call could be observed:\n{session.report()}")
    first = observer.calls[0]
    layers, tensors = search.result()
    parameters = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "calibration"}
    return Calibration(
        method=method.calibrates,
        models=models,
        source=source or type(pipe).__name__,
        grid=first.layout.grid,
        heads=first.heads,
        steps=first.steps or 0,
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        settings=parameters,
        layers=layers,
        tensors=tensors,
        schedule=str(schedule),
    )
