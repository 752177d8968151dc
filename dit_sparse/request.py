"""What is asked of ``dit-sparse generate`` and ``calibrate``, checked before any weights are loaded."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_sparse.pipelines.load import Source

EXAMPLE = "a red circle moving left and a blue square moving up on a gray background"
STOCK = ("dense", "none")
AUTO = {"videos": "radial", "images": "draft"}
"""The method that ``auto`` means for what a model makes."""
PRESETS = ("quality", "balanced", "fast")
OFFLOADS = ("none", "model", "sequential", "group")
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked on the command line."""

    model: str
    prompt: str | None = None
    negative_prompt: str | None = None
    image: Path | None = None
    lora: list[str] | None = None
    method: str
    density: float | None = None
    preset: str | None
    schedule: str | None
    param: list[str] | None
    backend: str = "auto"
    height: int | None
    width: int | None
    num_frames: int | None
    steps: int | None
    guidance_scale: float | None
    flow_shift: float | None
    seed: int
    dtype: str
    device: str
    offload: str
    compile: bool = False
    output: Path
    manifest_dir: Path | None = None
    compare_dense: bool = False
    report: Path | None = None

    @property
    def is_stock(self) -> bool:
        return self.method in STOCK

    @property
    def manifest(self) -> Path:
        beside = self.output.with_suffix(".json")
        return beside if self.manifest_dir is None else self.manifest_dir / beside.name

    @property
    def comparison(self) -> Path:
        return self.output.with_stem(f"{self.output.stem}_compare")


@dataclass(frozen=True)
class Choice:
    """The method's parameters and schedule, and where the numbers come from."""

    parameters: dict[str, Any]
    schedule: str
    preset: str | None
    source: str


def check_flags(asked: Request) -> None:
    """What can be told without looking at the model."""
    from dit_sparse.kernels.ops import BACKENDS
    from dit_sparse.processors import METHODS
    from dit_sparse.schedule import Schedule

    if not asked.is_stock:
        _one_of("--method", asked.method, ("auto", *STOCK, *(m for m in METHODS if m not in STOCK)))
    if asked.preset is not None:
        _one_of("--preset", asked.preset, PRESETS)
    _one_of("--offload", asked.offload, OFFLOADS)
    _one_of("--dtype", asked.dtype, DTYPES)
    _one_of("--backend", asked.backend, ("auto", *BACKENDS))
    for name in ("height", "width", "num_frames", "steps"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag_of(name)} must be at least 1, got {value}")
    if asked.density is not None and not 0 < asked.density <= 1:
        raise ValueError(f"--density must be above 0 and at most 1, got {asked.density:g}")
    for name in ("guidance_scale", "flow_shift"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag_of(name)} must be above 0, got {value:g}")
    if asked.schedule is not None:
        Schedule.parse(asked.schedule)
    if asked.is_stock:
        for name in ("density", "preset", "schedule", "param", "report", "compare_dense"):
            if getattr(asked, name):
                raise ValueError(f"{flag_of(name)} needs a sparse method, got --method {asked.method}")
    if asked.image is not None:
        read_image(asked.image)
    for lora in asked.lora or ():
        if not Path(lora).exists() and (lora.count("/") != 1 or lora.endswith(".safetensors")):
            raise ValueError(f"--lora {lora} does not exist, and it is no Hub id (owner/name)")


def check_prompt(model: str, prompt: str | None) -> None:
    """ValueError where nobody says what a model should show; the bundled one has an example."""
    from dit_sparse.pipelines.load import TINY

    if prompt is None and model != TINY:
        raise ValueError(f"--prompt is missing: what should {model} show?")


def check_json(output: Path) -> None:
    """ValueError unless a .json can be written there."""
    from dit_sparse.video import check_writable

    if output.suffix.lower() != ".json":
        raise ValueError(f"--output must end in .json, got {output}")
    check_writable("--output", output)


def with_method(asked: Request, video: bool) -> Request:
    """The request with what ``auto`` means."""
    return replace(asked, method=AUTO["videos" if video else "images"]) if asked.method == "auto" else asked


def completed(asked: Request, video: bool) -> Request:
    """The request with what follows from the kind of model: the method, the suffix of the output.

    Raises:
        ValueError: The video or image, its manifest or a report cannot be written.
    """
    from dit_sparse.video import check_writable

    suffix, what = (".mp4", "videos") if video else (".png", "images")
    asked = with_method(asked, video)
    if not asked.output.suffix:
        asked = replace(asked, output=asked.output.with_suffix(suffix))
    if asked.output.suffix.lower() != suffix:
        raise ValueError(f"{asked.model} makes {what}: --output must end in {suffix}, got {asked.output}")
    if asked.report is not None:
        if asked.report.suffix.lower() != ".json":
            raise ValueError(f"--report must end in .json, got {asked.report}")
        if asked.report.absolute() == asked.manifest.absolute():
            raise ValueError(f"--report {asked.report} is where the manifest goes; give another name")
        check_writable("--report", asked.report)
    for path in (asked.output, asked.manifest):
        check_writable("--output", path)
    return asked


def device_of(asked: Request) -> str:
    import torch

    device = asked.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {asked.device}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: this machine shows {torch.cuda.device_count()} CUDA devices")
    if asked.offload != "none" and kind == "cpu":
        raise ValueError(f"--offload {asked.offload} moves weights to a GPU and back, but the device is cpu")
    return device


def call_parameters(asked: Request, source: Source) -> Mapping[str, Parameter]:
    """The parameters of the call of the pipeline that runs it.

    Raises:
        ValueError: It asks for more than a prompt and an image, or has another use for an image.
    """
    import diffusers

    name = source.pipeline_class(asked.image is not None)
    own = signature(getattr(diffusers, name).__call__).parameters
    asks = [n for n, p in own.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    more = [n for n in asks if n not in ("self", "prompt", "image")]
    if asked.image is not None and not {"image", "reference_images"} & own.keys():
        more = [n for n in own if n.endswith(("image", "conditions"))] or ["no image"]
    if "prompt" not in own:  # a modular pipeline
        more = ["its inputs block by block"]
    if more:
        raise ValueError(
            f"{asked.model}: {name} takes {' and '.join(more)}: call it in Python, with dit_sparse.apply"
        )
    return own


def makes_video(asked: Request, source: Source) -> bool:
    """Whether a file of this model is a video: some families make both."""
    return source.family.video and "num_frames" in call_parameters(asked, source)


FRAME_RATES = ("fps", "frame_rate")
"""What pipelines call the frames of a second, where their models want to know."""
_SETTINGS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")


def settings_of(asked: Request, source: Source) -> dict[str, Any]:
    """Keywords of the call, ``fps`` and ``flow_shift``: the pipeline's defaults, the model's, the flags.

    Height and width are left out where the pipeline makes them from its image.
    """
    own = call_parameters(asked, source)
    names = [n for n in _SETTINGS if n in own]
    recommended = {} if source.alike is None else source.alike.defaults
    settings: dict[str, Any] = {"flow_shift": None, **source.family.call}
    if makes_video(asked, source):
        settings["fps"] = next((own[n].default for n in FRAME_RATES if n in own), 16)
    for name in names:
        # A pipeline that leaves its size open takes the one recommended for the model's configuration.
        settings[name] = recommended.get(name) if own[name].default is None else own[name].default
    if source.checkpoint is not None:
        settings.update(recommended)
    flags = {
        "height": asked.height,
        "width": asked.width,
        "num_frames": asked.num_frames,
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance_scale,
        "flow_shift": asked.flow_shift,
    }
    flags = {name: value for name, value in flags.items() if value is not None}
    given = [*flags, *(["negative_prompt"] if asked.negative_prompt is not None else [])]
    for name in given:
        if name not in own and name != "flow_shift":
            raise ValueError(f"{flag_of(name)}: the pipeline of {asked.model} has no such setting")
    settings.update(flags)
    if asked.guidance_scale is not None:
        settings.pop("guidance_scale_2", None)
    sized = {"height", "width"} <= set(names)
    if asked.image is not None and sized and asked.height is None and asked.width is None:
        settings["height"], settings["width"] = _shape_of(asked.image, settings, source.multiples)
    for name in ("height", "width", "num_frames"):
        if settings.get(name, 0) is None:
            raise ValueError(f"{flag_of(name)} is missing: nothing says what {asked.model} is made for")
    _check_multiples(asked.model, settings, source)
    limit = source.transformer.get("rope_max_seq_len")
    if limit is not None and max(grid := grid_of(source, settings)) > limit:
        raise ValueError(
            f"{asked.model} knows {limit} positions per axis; frames, height and width come to {grid} tokens"
        )
    return settings


def _check_multiples(model: str, settings: Mapping[str, Any], source: Source) -> None:
    """ValueError with the nearest sizes, for one that makes no whole tokens."""
    alone = int(source.family.lone_first_frame)
    for name, multiple in zip(("num_frames", "height", "width"), source.multiples, strict=True):
        if name not in settings:
            continue
        extra = alone if name == "num_frames" else 0
        over = (settings[name] - extra) % multiple
        if over:
            below = settings[name] - over
            near = f"nearest are {below} and {below + multiple}" if below else f"the smallest is {multiple}"
            raise ValueError(
                f"{flag_of(name)} must be {'one above ' * extra}a multiple of {multiple} for {model}, got "
                f"{settings[name]}; {near}"
            )


def flag_of(name: str) -> str:
    """The flag of a setting, as it is typed."""
    return f"--{name.replace('_', '-')}"


def grid_of(source: Source, settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """The token grid; where the pipeline makes its size from the image, that of the model's usual one."""
    if "height" not in settings:
        if source.alike is None or source.alike.tokens is None:
            raise ValueError(f"nothing says what size {source.model} makes")
        return source.alike.tokens.grid
    return source.grid(settings.get("num_frames", 1), settings["height"], settings["width"])


def _shape_of(image: Path, settings: Mapping[str, Any], multiples: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width of about the model's own area in the proportions of an image."""
    width, height = read_image(image).size
    scale = (settings["height"] * settings["width"] / (width * height)) ** 0.5
    tall, wide = (
        max(1, round(n * scale / m)) * m for n, m in zip((height, width), multiples[1:], strict=True)
    )
    return tall, wide


def choice_of(asked: Request, source: Source, settings: Mapping[str, Any]) -> Choice:
    """The method's setting out of preset and flags, tried on the token grid of the video."""
    from dit_sparse.calibration import CalibratedProcessor
    from dit_sparse.layout import TokenLayout
    from dit_sparse.pipelines.matrix import refusal
    from dit_sparse.processors import METHODS

    presets = source.family.presets.get((asked.method, source.size or ""))
    if presets is None and asked.preset is not None:
        raise ValueError(f"there are no presets for {asked.method} on {asked.model}; leave --preset out")
    preset = presets[asked.preset or "balanced"] if presets else None
    parameters = parameters_of(asked.param or ())
    if preset is not None and "calibration" not in parameters:  # which comes with parameters of its own
        parameters = {**preset.parameters, **parameters}
    cls = METHODS[asked.method]
    known = [f.name for f in fields(cls)]
    for name in parameters:
        if name not in known:
            raise ValueError(
                f"--param {name}: {asked.method} has no such parameter; it has {', '.join(known)}"
            )
    try:
        processor = cls(**parameters)
    except TypeError as error:
        raise ValueError(f"--param: {asked.method} does not take {parameters}: {error}") from None
    why = refusal(source.family, processor)
    if why:
        raise ValueError(f"--method {asked.method} does not apply to {asked.model}: {why}")
    if isinstance(processor, CalibratedProcessor) and processor.calibrated is not None:
        processor.calibrated.check_grid(grid_of(source, settings))
    if asked.density is not None:
        processor.at_density(asked.density, TokenLayout(grid_of(source, settings)))
    schedule = asked.schedule or (source.family.schedule if preset is None else preset.schedule)
    if "calibration" in parameters:
        return Choice(parameters, schedule, None, "the calibration")
    if preset is None:
        return Choice(parameters, schedule, None, "the method's own defaults")
    return Choice(parameters, schedule, asked.preset or "balanced", preset.source)


def parameters_of(pairs: list[str] | tuple[()]) -> dict[str, Any]:
    """``["block=64", "variant=head"]`` as Python values."""
    found = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"--param must be NAME=VALUE, got {pair!r}")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def read_prompts(flag: str, path: Path) -> list[str]:
    """One prompt a line. Blank lines and those that begin with # do not count.

    Raises:
        ValueError: The file cannot be read, or has no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {error}") from None
    texts = [line for line in lines if line and not line.startswith("#")]
    if not texts:
        raise ValueError(f"{flag} {path} has no prompt")
    return texts


def words(flag: str, text: str) -> list[str]:
    """What stands between commas."""
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise ValueError(f"{flag} must be names with commas between them, got {text!r}")
    return found


def numbers(flag: str, text: str) -> list[float]:
    """Numbers between commas."""
    try:
        return [float(word) for word in words(flag, text)]
    except ValueError:
        raise ValueError(f"{flag} must be numbers with commas between them, got {text!r}") from None


def read_image(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"--image {path} does not exist") from None
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"--image {path} cannot be read: {flat(error)}") from None


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{flag} must be one of {', '.join(known)}, got {value!r}")


def flat(error: BaseException) -> str:
    """A message on one line; markers under a quoted line go."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line.strip("^~ ")) or type(error).__name__
