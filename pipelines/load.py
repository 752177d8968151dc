"""Loading a pipeline by the name users type, by its Hub id, or from a local folder.

>>> pipe, checkpoint = load("wan2.1", dtype=torch.bfloat16, device="cuda")  # doctest: +SKIP

Only safetensors are loaded, and never code from a repository.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines import FAMILIES, NOTHING_TO_DO, families, tiny
from dit_sparse.pipelines.family import Checkpoint, Family

if TYPE_CHECKING:
    import torch

TINY = "tiny-wan"


def checkpoints() -> dict[str, Checkpoint]:
    """Every model that has a name, the bundled one first."""
    bundled = Checkpoint(
        str(tiny.MODEL_DIR),
        "tiny",
        "text to video of moving shapes, 64x128; comes with the package; minutes on a CPU",
        {**tiny.DEFAULT, "fps": 16},
    )
    found = {TINY: bundled}
    for family in families().values():
        found.update(family.checkpoints)
    return found


@dataclass(frozen=True)
class Source:
    """A model that was found: its configuration is read, its weights are not.

    Args:
        model: What was asked for.
        location: The folder, or the Hub id.
        folder: Where its ``model_index.json`` lies on this machine.
        checkpoint: Its entry among :func:`checkpoints`, if it has one.
        index: ``model_index.json``.
        transformer: The first transformer's ``config.json``.
        vae: The autoencoder's ``config.json``; empty without one.
    """

    model: str
    location: str
    folder: Path
    checkpoint: Checkpoint | None
    index: Mapping[str, Any]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]

    @property
    def family(self) -> Family:
        """The family of its transformer."""
        return families()[FAMILIES[self.transformer["_class_name"]]]

    @property
    def alike(self) -> Checkpoint | None:
        """Its own entry among :func:`checkpoints`, or that of a model with the same configuration."""
        return self.checkpoint or self.family.alike(self.transformer)

    @property
    def size(self) -> str | None:
        """The key of its presets; read off the transformer where the model has no name."""
        if self.checkpoint is not None:
            return self.checkpoint.size
        experts = sum(bool(_class(self.index, name)) for name in ("transformer", "transformer_2"))
        return self.family.preset_size(self.transformer, experts)

    @property
    def multiples(self) -> tuple[int, int, int]:
        """(t, h, w) that the size of a video must be multiples of.

        Frames are one above a multiple of t where the family's first frame stands alone.
        """
        return (self.family.multiples or self.family.pixels)(self.transformer, self.vae)

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The token grid of a video of this size, which fits :attr:`multiples`."""
        frames, *sides = self.family.pixels(self.transformer, self.vae)
        alone = int(self.family.lone_first_frame)
        return (num_frames - alone) // frames + alone, height // sides[0], width // sides[1]

    def pipeline_class(self, image: bool) -> str:
        """The class in diffusers that runs it with or without an image; ValueError where it cannot."""
        import diffusers

        try:
            name = self.family.pipeline_class(self.index, image)
        except ValueError as error:
            raise ValueError(f"{self.model}: {error}") from None
        if not hasattr(diffusers, name):
            raise ValueError(
                f"{self.model} needs {name}, which diffusers {diffusers.__version__} does not have"
            )
        return name


def find(model: str) -> Source:
    """Find a model and read its configuration: three small files, fetched where the Hub cache lacks them.

    Raises:
        ValueError: An unknown name, a missing folder or file, no way to the Hub, a model of another kind.
    """
    known = checkpoints()
    checkpoint = known.get(model)
    location = checkpoint.repo if checkpoint is not None else model
    is_folder = model == TINY or Path(location).expanduser().is_dir()
    if checkpoint is None:
        checkpoint = next((c for c in known.values() if c.repo == location), None)
        if not is_folder and not re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]+", location):
            what = f"{model} does not exist" if "/" in model else f"unknown model {model!r}"
            raise ValueError(
                f"{what}; a model is a folder with a model_index.json, a Hub id (owner/name), "
                f"or one of {', '.join(known)}"
            )
    if is_folder:
        location = str(Path(location).expanduser())
    index_file = _file(location, is_folder, "model_index.json", checkpoint)
    index = json.loads(index_file.read_text())
    part = "transformer" if _class(index, "transformer") else "transformer_2"
    if _class(index, part) in NOTHING_TO_DO:
        raise ValueError(f"{model}: {NOTHING_TO_DO[_class(index, part) or '']}")
    if _class(index, part) not in FAMILIES:
        raise ValueError(
            f"{model} is a {index.get('_class_name')} with the transformer {_class(index, part)}; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    transformer, vae = (
        json.loads(_file(location, is_folder, f"{name}/config.json", checkpoint).read_text())
        if _class(index, name)
        else {}
        for name in (part, "vae")
    )
    transformer["_class_name"] = _class(index, part)
    return Source(model, location, index_file.parent, checkpoint, index, transformer, vae)


def load(
    model: str | Source,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    image: bool = False,
) -> tuple[Any, Checkpoint | None]:
    """Load a pipeline.

    Args:
        model: A name out of :func:`checkpoints`, a Hub id, a folder, or what :func:`find` returned.
        dtype: Of every component but those that the family keeps in float32.
        device: Where to; None leaves the modules on the CPU, for offloading.
        image: The pipeline that starts from an image, for models that can do both.

    Returns:
        The diffusers pipeline, and the model's entry among :func:`checkpoints`, if it has one.

    Raises:
        ValueError: Says what was missing and how to get it.
    """
    import diffusers
    import torch

    source = find(model) if isinstance(model, str) else model
    cls = getattr(diffusers, source.pipeline_class(image))
    is_folder = Path(source.location).is_dir()
    if is_folder:
        _check_complete(source)
    dtypes = {"default": dtype, **dict.fromkeys(source.family.float32, torch.float32)}
    try:
        with warnings.catch_warnings():
            # The name that every supported diffusers knows; newer ones also call it dtype.
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            pipe = cls.from_pretrained(source.location, torch_dtype=dtypes, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        _check_complete(source)
        raise ValueError(f"{source.location} cannot be loaded: {_first_line(error)}") from error
    if source.family.tiled:
        pipe.vae.enable_tiling()
    return (pipe if device is None else pipe.to(device)), source.checkpoint


def _class(index: Mapping[str, Any], name: str) -> str | None:
    """The class of a component in a ``model_index.json``; None where it has none."""
    cls = (index.get(name) or (None, None))[1]
    if cls == "Transformer2DModel" and index["_class_name"].startswith("PixArt"):
        return "PixArtTransformer2DModel"  # by its old name, which diffusers replaces too
    return cls


def _file(location: str, is_folder: bool, name: str, checkpoint: Checkpoint | None) -> Path:
    """A file of a model on this machine, fetched from the Hub where it may be."""
    if is_folder:
        path = Path(location) / name
        if path.is_file():
            return path
        if location == str(tiny.MODEL_DIR):
            raise ValueError(f"the bundled model is incomplete: {path} is missing; install the package again")
        holds = ", ".join(sorted(p.name for p in Path(location).iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{location} has no {name}: expected a diffusers folder as pipe.save_pretrained writes it; "
            f"it holds {holds}"
        )
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        return Path(hf_hub_download(location, name))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{location} asks for consent: give it on https://huggingface.co/{location}, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no {location} on the Hub, or it is private: then `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = (
            "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        )
        about = f" ({checkpoint.about})" if checkpoint is not None else ""
        raise ValueError(
            f"{name} of {location} is not in the local Hub cache at {constants.HF_HUB_CACHE}, and {why}; "
            f"where there is network, run `hf download {location}`{about}, or give --model a folder"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ValueError(
            f"{location} on the Hub has no {name}: it is no diffusers repository (Wan-AI's end in -Diffusers)"
        ) from error


def _check_complete(source: Source) -> None:
    """ValueError with the files a folder lacks; nothing where it is whole."""
    missing = _missing(source.folder, source.index)
    if not missing:
        return
    how = f"run `hf download {source.location}` where there is network"
    if Path(source.location).is_dir():
        how = "copy or download it again"
    raise ValueError(f"{source.folder} is not complete, it lacks {', '.join(missing)}; {how}")


def _missing(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """Component folders and weight files that a ``model_index.json`` promises."""
    missing = []
    for name in index:
        if name.startswith("_") or not isinstance(index[name], list) or _class(index, name) is None:
            continue
        part = folder / name
        if not part.is_dir():
            missing.append(f"{name}/")
        elif (part / "config.json").is_file():
            shards = {p.name for p in part.glob("*.safetensors")}
            lists = [json.loads(p.read_text())["weight_map"] for p in part.glob("*.safetensors.index.json")]
            wanted = {shard for weights in lists for shard in weights.values()}
            missing += [f"{name}/{shard}" for shard in sorted(wanted - shards)]
            if not shards and not wanted:
                missing.append(f"{name}/*.safetensors")
    return missing


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
