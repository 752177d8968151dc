"""Calibration: what a method found out offline about one model at one token grid, and the file of it.

    dit-sparse calibrate --model wan2.1 --method sparse_vdit --output wan2.1-480p.json

A method's search watches a few dense runs, layer by layer, on the q, k and v of each call. What it decides is
one JSON object per layer; masks go into a safetensors file beside.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dit_sparse.method import Call, SparseProcessor
from dit_sparse.order import Order

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

    def __repr__(self) -> str:
        return f"Calibration({self.method!r}, {self.source!r}, grid={self.grid}, layers={len(self.layers)})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` (JSON) and, where there are tensors, ``<stem>.safetensors`` beside it."""
        from safetensors.torch import save

        path = Path(path)
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content = {"format": FORMAT, **content, "tensors": None}
        if self.tensors:
            blob = save({name: x.contiguous().cpu() for name, x in self.tensors.items()})
            content["tensors"] = {
                "file": path.with_suffix(".safetensors").name,
                "sha256": sha256(blob).hexdigest(),
            }
            _write(path.with_suffix(".safetensors"), blob)
        _write(path, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: The file is missing, is no calibration, is of another format, or its tensors are not
                those it was saved with.
        """
        from safetensors.torch import load

        path = Path(path)
        try:
            content = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no readable calibration: {error}") from error
        kinds: dict[str, Any] = {
            "format": int, "method": str, "models": dict, "source": str, "grid": list, "heads": int,
            "steps": int, "prompts": list, "seeds": list, "settings": dict, "layers": dict,
            "tensors": dict | None,
        }  # fmt: skip
        if not isinstance(content, dict) or set(content) != set(kinds):
            got = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} is no calibration: expected the keys {sorted(kinds)}, got {got}")
        if content["format"] != FORMAT:
            raise ValueError(
                f"{path} is of calibration format {content['format']!r}, expected {FORMAT}: calibrate again"
            )
        for key, kind in kinds.items():
            if not isinstance(content[key], kind):
                raise ValueError(f"{path}: {key} must be a {kind}, got {content[key]!r}")
        grid = content["grid"]
        if len(grid) != 3 or not all(type(n) is int and n > 0 for n in grid):
            raise ValueError(f"{path}: grid must be three sizes (frames, height, width), got {grid}")
        tensors = {}
        if about := content["tensors"]:
            beside = path.with_name(Path(str(about.get("file"))).name)
            try:
                blob = beside.read_bytes()
            except OSError as error:
                raise ValueError(f"{path} needs {beside.name} beside it: {error}") from error
            if sha256(blob).hexdigest() != about.get("sha256"):
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

    def layer(self, call: Call) -> dict[str, Any]:
        """What was decided for the layer of a call. ValueError where the call does not fit."""
        if call.layout.grid != self.grid:
            raise ValueError(
                f"the {self.method} calibration of {self.source} is for the token grid {self.grid}, "
                f"got {call.layout.grid}: calibrate at this size"
            )
        if call.heads != self.heads or layer_key(call) not in self.layers:
            raise ValueError(
                f"the {self.method} calibration of {self.source} has {self.heads} heads in "
                f"{len(self.layers)} layers, not {call.heads} heads in layer {layer_key(call)}"
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


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


class Search(Protocol):
    """What a method does with the dense runs of :func:`calibrate`."""

    def observe(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> None:
        """One call: q, k, v and dense out [B, H, S, D] in raster order, [grid, rest]; lse [B, H, S]."""

    def result(self) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        """(``layers``, ``tensors``) of the :class:`Calibration`."""


@dataclass(frozen=True, kw_only=True)
class CalibratedProcessor(SparseProcessor):
    """Base of the methods that are calibrated.

    Args:
        calibration: What ``dit-sparse calibrate`` wrote, or its path. None leaves it to the method.
    """

    calibrates: ClassVar[str]
    """The method's name in ``METHODS``."""

    calibration: Calibration | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.calibration is None or isinstance(self.calibration, Calibration):
            found = self.calibration
        else:
            found = Calibration.load(self.calibration)
            object.__setattr__(self, "calibration", found)
        if found is not None and found.method != self.calibrates:
            raise ValueError(f"{type(self).__name__} needs a calibration of {self.calibrates}, got {found!r}")

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
class _Observer(SparseProcessor):
    """Runs dense and shows every call to a search."""

    reads: ClassVar[frozenset[str]] = frozenset({"layout"})

    search: Search
    calls: list[Call] = field(default_factory=list)

    def order(self, call: Call) -> Order:
        return Order.raster(call.layout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
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
) -> Calibration:
    """Generate from each prompt with the model's own attention, and let the method search meanwhile.

    Args:
        pipe: A diffusers pipeline.
        prompts: A few; methods say how many their papers used.
        seeds: One per prompt; default 0, 1, ...
        source: The model's name, for the file.
        settings: Keywords of the pipeline's call (steps, size, guidance).
    """
    from dit_sparse.attach import apply

    seeds = range(len(prompts)) if seeds is None else seeds
    if not prompts or len(seeds) != len(prompts):
        raise ValueError(f"expected prompts and as many seeds, got {len(prompts)} and {len(seeds)}")
    observer = _Observer(search=method.search())
    with torch.no_grad(), apply(pipe, observer, schedule="always") as session:
        session.full_plan_is_dense = False
        models = {part.name: fingerprint(part.model) for part in session.parts}
        for prompt, seed in zip(prompts, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            pipe(prompt, generator=generator, output_type="latent", **(settings or {}))
        if not observer.calls:
            raise ValueError(f"no attention call could be observed:\n{session.report()}")
    first = observer.calls[0]
    layers, tensors = observer.search.result()
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
    )
