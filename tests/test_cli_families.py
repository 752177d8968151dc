"""``dit-sparse generate`` for every family that a prompt, or a prompt and an image, is enough for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_images
import tiny_text
from offline import (
    allegro,
    auraflow,
    chroma,
    cogvideox,
    cogview4,
    cosmos,
    easyanimate,
    flux,
    flux2,
    helios,
    hidream,
    hunyuan_framepack,
    hunyuan_image,
    hunyuan_video,
    hunyuan_video15,
    lumina2,
    mochi,
    pixart,
    qwen_image,
    sd3,
    z_image,
)
from offline import ltx as ltx_video
from typer.testing import CliRunner, Result

from dit_sparse.cli import app
from dit_sparse.pipelines import FAMILIES, families
from dit_sparse.video import read_video

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast", "ignore:`FluxPosEmbed` is deprecated")

WINDOW = ["--method", "window", "--param", "block=8", "--param", "density=0.3"]


class Case(NamedTuple):
    """How a pipeline is made, and what is asked of it.

    Args:
        size: (frames, height, width); None where the pipeline takes height and width from its image.
        image: Whether it starts from one.
        made: The size of what comes out, where it is another.
        steps: Those that run; from an image, some pipelines leave out the first.
    """

    build: Callable[[], Any]
    size: tuple[int, int | None, int | None]
    image: bool = False
    made: tuple[int, int, int] | None = None
    steps: tuple[int, ...] = (0, 1, 2)

    def flags(self, size: tuple[int, int | None, int | None] | None = None) -> list[str]:
        frames, height, width = size or self.size
        given = {"--height": height, "--width": width, "--num-frames": frames if frames > 1 else None}
        return [word for name, n in given.items() if n is not None for word in (name, str(n))]


def cosmos_pipeline() -> Any:
    """Without the safety checker, which a folder does not hold."""
    from diffusers import CosmosTextToWorldPipeline

    pipe = cosmos.cosmos1(CosmosTextToWorldPipeline, "cosmos")
    pipe.register_modules(safety_checker=None)
    return pipe


def with_text(pipe: Any, width: int, layers: int = 2) -> Any:
    """With an encoder of prompts, which its other tests give as embeddings."""
    tokenizer = tiny_text.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    pipe.register_modules(text_encoder=tiny_text.llama(width, layers), tokenizer=tokenizer)
    return pipe


VIDEO = (17, 64, 96)
CASES = {
    "hunyuanvideo": Case(hunyuan_video.pipeline, VIDEO),
    "hunyuanvideo-1.5": Case(hunyuan_video15.pipeline, (9, 16, 24)),
    "hunyuanvideo-1.5-i2v": Case(
        lambda: hunyuan_video15.pipeline(image=True), (9, None, None), True, (9, 12, 16)
    ),
    "framepack": Case(hunyuan_framepack.pipeline, VIDEO, True, (37, 64, 96)),  # whole sections
    "hunyuanimage": Case(lambda: hunyuan_image.pipeline(hunyuan_image.guider()), (1, 40, 48)),
    "ltx": Case(ltx_video.pipeline, VIDEO),
    "ltx-i2v": Case(ltx_video.pipeline, VIDEO, True),
    "cogvideox": Case(cogvideox.pipeline, VIDEO),
    "mochi": Case(mochi.pipeline, (25, 64, 96)),
    "allegro": Case(lambda: allegro.pipeline("EulerAncestralDiscreteScheduler"), (20, 64, 96)),
    "easyanimate": Case(easyanimate.pipeline, VIDEO),
    "cosmos": Case(cosmos_pipeline, (17, 32, 48)),
    "helios": Case(helios.pipeline, (33, 64, 96)),
    "cogview4": Case(
        lambda: cogview4.pipeline("cogview4", "CogView4Pipeline", "FlowMatchEulerDiscreteScheduler"),
        (1, 160, 192),
    ),
    "cogview3plus": Case(
        lambda: cogview4.pipeline("cogview3plus", "CogView3PlusPipeline", "CogVideoXDDIMScheduler"),
        (1, 160, 192),
    ),
    "flux": Case(flux.pipeline, (1, 48, 40)),
    "flux-i2i": Case(flux.pipeline, (1, 48, 40), True, steps=(1, 2)),
    "flux-kontext": Case(lambda: flux.pipeline("FluxKontextPipeline"), (1, 48, 40), True),
    "flux.2": Case(lambda: with_text(flux2.pipeline(joint_attention_dim=24), 8, 28), (1, 96, 80)),
    "qwen-image": Case(lambda: with_text(qwen_image.pipeline(), 16), (1, 192, 160)),
    "chroma": Case(chroma.pipeline, (1, 48, 40)),
    "sd3": Case(sd3.pipeline, (1, 40, 48)),
    "pixart": Case(pixart.pipeline, (1, 40, 48)),
    "auraflow": Case(auraflow.pipeline, (1, 40, 48)),
    "z-image": Case(z_image.pipeline, (1, 40, 48)),
    "hidream": Case(hidream.pipeline, (1, 40, 48), made=(1, 60, 72)),
    "lumina2": Case(lumina2.pipeline, (1, 160, 192)),
}


@pytest.fixture(autouse=True)
def _as_small_models_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kontext and HiDream bring every image to a megapixel, and Cosmos asks a model on the Hub."""
    from diffusers import HiDreamImagePipeline
    from diffusers.pipelines.cosmos import pipeline_cosmos_text2world
    from diffusers.pipelines.flux import pipeline_flux_kontext

    always = property(lambda pipe: 34, lambda pipe, size: None)
    monkeypatch.setattr(HiDreamImagePipeline, "default_sample_size", always, raising=False)
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(24, 32)])
    monkeypatch.setattr(pipeline_cosmos_text2world, "CosmosSafetyChecker", cosmos.approves)


def run(folder: Path, image: bool, *more: object) -> Result:
    arguments = ["generate", "--model", folder, "--prompt", "a cat runs", "--steps", 3, *more]
    if image:
        picture = folder.with_suffix(".png")
        tiny_images.picture(96, 64).save(picture)
        arguments += ["--image", picture]
    return CliRunner().invoke(app, [str(a) for a in arguments])


def error(done: Result) -> str:
    """The one line there is."""
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_is_enough(name: str, tmp_path: Path) -> None:
    case, folder = CASES[name], tmp_path / "model"
    case.build().save_pretrained(folder)
    suffix = ".mp4" if case.size[0] > 1 else ".png"
    for output, method in ((tmp_path / "window", WINDOW), (tmp_path / "auto", ["--schedule", "always"])):
        report = output.with_name("report.json")
        done = run(folder, case.image, *case.flags(), *method, "--output", output, "--report", report)
        assert done.exit_code == 0, done.output
        assert read_video(output.with_suffix(suffix)).shape == (*(case.made or case.size), 3)
        manifest = json.loads(output.with_suffix(".json").read_text())
        assert 0 < manifest["density"]["sparse_calls"] < 1
        assert {row["step"] for row in json.loads(report.read_text())["rows"]} == set(case.steps)
    if case.size[1] is not None:
        frames, height, width = case.size
        wrong = case.flags((frames, height + 1, width))
        done = run(folder, case.image, *wrong, "--output", tmp_path / "bad")
        assert "--height must be a multiple of" in error(done)
    assert not list(tmp_path.glob("bad*"))


@pytest.mark.parametrize(
    ("pipeline", "transformer", "image", "flags", "message"),
    [
        (
            "WanAnimatePipeline",
            "WanAnimateTransformer3DModel",
            True,
            [],
            "WanAnimatePipeline takes pose_video and face_video: call it in Python, with dit_sparse.apply",
        ),
        ("Cosmos2_5_TransferPipeline", "CosmosTransformer3DModel", False, [], "takes controls: call it in"),
        ("LTX2ConditionPipeline", "LTX2VideoTransformer3DModel", True, [], "takes conditions: call it in"),
        ("LTXI2VLongMultiPromptPipeline", "LTXVideoTransformer3DModel", True, [], "takes cond_image: call"),
        ("FluxFillPipeline", "FluxTransformer2DModel", True, [], "needs a mask: call it in Python"),
        (
            "QwenImageLayeredPipeline",
            "QwenImageTransformer2DModel",
            True,
            [],
            "makes several images: call it",
        ),
        ("QwenImageEditPipeline", "QwenImageTransformer2DModel", False, [], "needs an image"),
        ("MiniMaxH3ModularPipeline", "MiniMaxH3Transformer3DModel", False, [], "block by block: call it in"),
        ("AuraFlowPipeline", "AuraFlowTransformer2DModel", True, [], "AuraFlowPipeline takes no image"),
        (
            "Flux2Pipeline",
            "Flux2Transformer2DModel",
            False,
            ["--negative-prompt", "a dog"],
            "--negative-prompt: the pipeline of",
        ),
    ],
)
def test_what_more_is_needed_is_one_line(
    pipeline: str, transformer: str, image: bool, flags: list[str], message: str, tmp_path: Path
) -> None:
    """Told by the configuration alone: no weights are there."""
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    index = {"_class_name": pipeline, "transformer": ["diffusers", transformer]}
    (folder / "model_index.json").write_text(json.dumps(index))
    config = families()[FAMILIES[transformer]].transformers[transformer]
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    assert message in error(run(folder, image, *flags, "--output", tmp_path / "out"))


def test_a_package_that_a_pipeline_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.cosmos import pipeline_cosmos_text2world

    cosmos_pipeline().save_pretrained(tmp_path / "model")

    def absent() -> None:
        raise ImportError("`cosmos_guardrail` is not installed.\nInstall it.")

    monkeypatch.setattr(pipeline_cosmos_text2world, "CosmosSafetyChecker", absent)
    done = run(tmp_path / "model", False, *CASES["cosmos"].flags(), "--output", tmp_path / "out")
    assert "cannot be loaded: `cosmos_guardrail` is not installed." in error(done)
