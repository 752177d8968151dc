"""The command line on tiny random models: files, comparison, one-line errors, Ctrl-C, the Hub cache."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import tiny_models as models
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from dit_sparse import generate, request
from dit_sparse.cli import app

REPO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SIZE = ["--height", "64", "--width", "96", "--num-frames", "17", "--steps", "4"]
SPARSE = ["--param", "block=8", "--param", "decay=0.2", "--param", "decimate_below=16"]
FULL = ["--param", "block=8", "--param", "decay=99", "--param", "decimate_below=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random-wan"
    models.wan_pipeline().save_pretrained(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def make(folder: Path, output: Path, *more: object) -> dict[str, Any]:
    """A run that succeeds: its manifest."""
    result = run("generate", "--model", folder, "--prompt", "a cat runs", *SIZE, "--output", output, *more)
    assert result.exit_code == 0, result.output
    return json.loads(output.with_suffix(".json").read_text())


def decoded(path: Path) -> torch.Tensor:
    """uint8 [F, H, W, 3] as a player sees it."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    frames = [torch.frombuffer(bytearray(f), dtype=torch.uint8).view(height, width, 3) for f in reader]
    return torch.stack(frames)


def test_help_needs_no_torch() -> None:
    code = "import sys, dit_sparse.cli; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    result = run("--help")
    assert result.exit_code == 0
    assert all(word in result.output for word in ("generate", "methods", "models", "bench"))
    assert "--compare-dense" in run("generate", "--help").output


def test_methods_and_models_are_listed() -> None:
    output = run("methods").output
    assert "radial" in output
    assert "decimate_below=128" in output.replace("\n", "")
    output = run("models").output
    for word in ("tiny-wan", "wan2.1-14b", REPO, "Wan-AI/Wan2.2-T2V-A14B-Diffusers"):
        assert word in output


def test_a_video_a_manifest_and_a_report(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "folders" / "are made"
    manifest = make(folder, out / "a.mp4", *SPARSE, "--report", out / "r.json", "--seed", 3)
    assert sorted(p.name for p in out.iterdir()) == ["a.json", "a.mp4", "r.json"]
    assert decoded(out / "a.mp4").shape == (17, 64, 96, 3)
    assert manifest["format"] == 1
    assert manifest["seed"] == 3
    assert manifest["prompt"] == "a cat runs"
    assert manifest["settings"]["num_inference_steps"] == 4
    assert manifest["method"]["parameters"] == {"block": 8, "decay": 0.2, "decimate_below": 16}
    assert set(manifest["versions"]) == {"dit-sparse", "torch", "diffusers", "transformers", "python"}
    assert 0 < manifest["density"]["sparse_calls"] < manifest["density"]["full_run"] < 1
    seconds = manifest["seconds"]
    assert set(seconds) == {"total", "text_encoder", "transformer", "vae_decode"}
    assert sum(seconds.values()) - seconds["total"] <= seconds["total"]
    report = json.loads((out / "r.json").read_text())
    assert report["totals"]["full_run"]["density"] == manifest["density"]["full_run"]
    assert {row["step"] for row in report["rows"] if row["phase"] == "sparse"} == {1, 2, 3}


def test_the_same_seed_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    names = [tmp_path / f"{n}.mp4" for n in ("one", "two", "other")]
    for path, seed in zip(names, (1, 1, 2), strict=True):
        make(folder, path, *SPARSE, "--seed", seed)
    one, two, other = (path.read_bytes() for path in names)
    assert one == two != other


def test_compare_dense(folder: Path, tmp_path: Path) -> None:
    result = run(
        "generate", "--model", folder, "--prompt", "a cat", *SIZE, *SPARSE, "--compare-dense",
        "--output", tmp_path / "a.mp4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    compared = json.loads((tmp_path / "a.json").read_text())["comparison"]
    manifest = json.loads((tmp_path / "a.json").read_text())
    share, density = compared["attention_share"], manifest["density"]["full_run"]
    assert 0 < share < 1
    assert compared["amdahl_bound"] == pytest.approx(1 / (1 - share * (1 - density)))
    assert compared["speed_up"] == pytest.approx(
        compared["dense_seconds"]["total"] / manifest["seconds"]["total"]
    )
    assert compared["identical_frames"] < 17
    assert 5 < compared["psnr"] < 60
    for word in ("one run each", "Amdahl's bound", "PSNR", "SSIM", "dense left, sparse right"):
        assert word in result.stdout
    both = decoded(tmp_path / "a_compare.mp4")
    assert both.shape == (17, 64, 192, 3)
    make(folder, tmp_path / "d.mp4", "--method", "dense", "--prompt", "a cat")
    dense, sparse = decoded(tmp_path / "d.mp4").float(), decoded(tmp_path / "a.mp4").float()
    left, right = both[:, :, :96].float(), both[:, :, 96:].float()
    assert (left - dense).abs().mean() < (left - sparse).abs().mean()
    assert (right - sparse).abs().mean() < (right - dense).abs().mean()


def test_everything_kept_is_the_dense_video(folder: Path, tmp_path: Path) -> None:
    """Same noise, and a dense run that is the stock model: no pixel differs."""
    manifest = make(folder, tmp_path / "a.mp4", *FULL, "--compare-dense")
    assert manifest["density"]["full_run"] == 1
    assert manifest["comparison"]["identical_frames"] == 17
    assert manifest["comparison"]["psnr"] is None
    make(folder, tmp_path / "d.mp4", "--method", "dense")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "d.mp4").read_bytes()


def test_density_and_schedule_are_what_is_reported(folder: Path, tmp_path: Path) -> None:
    asked = [
        "--param",
        "block=2",
        "--param",
        "decimate_below=16",
        "--density",
        "0.8",
        "--schedule",
        "dense 0-50%",
    ]
    manifest = make(folder, tmp_path / "a.mp4", *asked)
    assert manifest["density"]["sparse_calls"] == pytest.approx(0.8, abs=0.05)
    assert manifest["density"]["full_run"] == pytest.approx((1 + manifest["density"]["sparse_calls"]) / 2)
    assert manifest["method"]["schedule"] == "dense 0-50%"
    assert manifest["method"]["requested_density"] == 0.8


def test_nothing_sparse_is_said(folder: Path, tmp_path: Path) -> None:
    result = run(
        "generate", "--model", folder, "--prompt", "a", *SIZE, *FULL, "--output", tmp_path / "a.mp4"
    )  # fmt: skip
    assert result.exit_code == 0
    assert "no call ran sparse (full plan" in result.stderr


def test_image_to_video(folder: Path, tmp_path: Path) -> None:
    from diffusers import WanImageToVideoPipeline

    base = models.wan_pipeline()
    WanImageToVideoPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        transformer=models.wan(in_channels=12),
        vae=base.vae,
        scheduler=base.scheduler,
    ).save_pretrained(tmp_path / "model")
    Image.new("RGB", (300, 200), (200, 80, 20)).save(tmp_path / "red.png")
    Image.new("RGB", (300, 200), (20, 80, 200)).save(tmp_path / "blue.png")
    videos = []
    for colour in ("red", "blue"):
        manifest = make(
            tmp_path / "model", tmp_path / f"{colour}.mp4", *SPARSE, "--image", tmp_path / f"{colour}.png"
        )
        assert manifest["model"]["pipeline"] == "WanImageToVideoPipeline"
        assert "vae_encode" in manifest["seconds"]
        assert manifest["density"]["sparse_calls"] < 1
        videos.append((tmp_path / f"{colour}.mp4").read_bytes())
    assert videos[0] != videos[1]
    result = run(
        "generate", "--model", tmp_path / "model", "--prompt", "a", *SIZE, "--output", tmp_path / "c.mp4"
    )
    assert_one_line(result, "needs an image")


def test_two_experts(tmp_path: Path) -> None:
    models.wan_pipeline(two=True).save_pretrained(tmp_path / "model")
    make(tmp_path / "model", tmp_path / "a.mp4", *SPARSE, "--report", tmp_path / "r.json", "--steps", 8)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["model"] for row in rows if row["phase"] == "sparse"} == {"transformer", "transformer_2"}
    assert {row["step"] for row in rows} == set(range(8))


def test_lora(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pipe = models.wan_pipeline()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(config)
    pipe.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(pipe.transformer))
    (weights,) = tmp_path.glob("*.safetensors")
    manifest = make(folder, tmp_path / "a.mp4", *SPARSE, "--lora", weights)
    assert manifest["model"]["lora"] == [str(weights)]
    assert manifest["density"]["sparse_calls"] < 1
    make(folder, tmp_path / "b.mp4", *SPARSE)
    assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "b.mp4").read_bytes()


def test_flow_shift_reaches_the_scheduler() -> None:
    from diffusers import UniPCMultistepScheduler

    pipe = models.wan_pipeline()
    generate._set_flow_shift(pipe, 7.0)
    assert pipe.scheduler.config.shift == 7.0
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    generate._set_flow_shift(pipe, 5.0)
    assert pipe.scheduler.config.flow_shift == 5.0


def test_the_image_gives_the_shape(tmp_path: Path) -> None:
    Image.new("RGB", (200, 400)).save(tmp_path / "tall.png")
    size = request._shape_of(tmp_path / "tall.png", {"height": 480, "width": 832}, (4, 16, 16))
    assert size == (896, 448)


def assert_one_line(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-frames", "0"], ["--num-frames must be at least 1, got 0"]),
        (["--num-frames", "18"], ["one above a multiple of 4", "got 18", "nearest are 17 and 21"]),
        (["--height", "60"], ["--height must be a multiple of 16", "got 60", "nearest are 48 and 64"]),
        (["--width", "7"], ["--width must be a multiple of 16", "the smallest is 16"]),
        (["--width", "2048"], ["64 positions per axis"]),
        (["--steps", "0"], ["--steps must be at least 1"]),
        (["--method", "sparkle"], ["--method must be one of", "radial", "'sparkle'"]),
        (["--preset", "best"], ["--preset must be one of quality, balanced, fast, got 'best'"]),
        (["--preset", "fast"], ["there are no presets for radial"]),
        (["--backend", "cuda"], ["--backend must be one of auto, reference"]),
        (["--density", "0"], ["--density must be above 0", "got 0"]),
        (["--density", "1.5"], ["at most 1, got 1.5"]),
        (["--density", "0.001"], ["has the floor", "got 0.001"]),
        (["--schedule", "dense 0-"], ["schedule:", "dense 0-"]),
        (["--param", "blocks=4"], ["radial has no such parameter", "decimate_below"]),
        (["--param", "block"], ["--param must be NAME=VALUE"]),
        (["--param", "block=0"], ["block must be >= 1"]),
        (["--param", "block=big"], ["radial does not take"]),
        (["--dtype", "int8"], ["--dtype must be one of"]),
        (["--device", "tpu"], ["--device must be auto, cpu, cuda"]),
        (["--offload", "disk"], ["--offload must be one of"]),
        (["--offload", "model", "--device", "cpu"], ["--offload model", "device is cpu"]),
        (["--guidance-scale", "-1"], ["--guidance-scale must be above 0"]),
        (["--image", "none.png"], ["--image none.png does not exist"]),
        (["--image", __file__], ["cannot be read"]),
        (["--lora", "none.safetensors"], ["--lora none.safetensors does not exist"]),
        (["--output", "video.gif"], ["--output must end in .mp4"]),
        (["--output", "/proc/none/a.mp4"], ["/proc/none/a.mp4 cannot be written"]),
        (["--output", f"{__file__}/a.mp4"], ["cannot be written", "test_cli.py is no folder"]),
        (["--report", "out.json"], ["is where the manifest goes"]),
        (["--report", "r.txt"], ["--report must end in .json"]),
        (["--method", "dense", "--compare-dense"], ["--compare-dense needs a sparse method"]),
        (["--method", "none", "--density", "0.5"], ["--density needs a sparse method"]),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(generate, "placed_pipeline", no_weights)
    defaults = ["--output", "out.mp4", *SIZE]
    result = run("generate", "--model", folder, "--prompt", "a", *defaults, *arguments)
    assert_one_line(result, *words)
    assert not list(tmp_path.iterdir())


def test_a_prompt_is_asked_for(folder: Path, tmp_path: Path) -> None:
    assert_one_line(run("generate", "--model", folder, "--output", tmp_path / "a.mp4"), "--prompt is missing")


def test_an_unknown_model_is_one_line(tmp_path: Path) -> None:
    result = run("generate", "--model", "wan3", "--prompt", "a", "--output", tmp_path / "a.mp4")
    assert_one_line(result, "unknown model 'wan3'", "wan2.1-14b")


def test_a_lora_of_another_model_is_one_line(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from safetensors.torch import save_file

    save_file({"unet.mid.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    result = run(
        "generate", "--model", folder, "--prompt", "a", *SIZE, "--lora", tmp_path / "other.safetensors",
        "--output", tmp_path / "a.mp4",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "other.safetensors" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "a.mp4").exists()


def test_ctrl_c_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    stock = FlowMatchEulerDiscreteScheduler.step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.step_index == 1:
            raise KeyboardInterrupt  # a real signal may fall into a finaliser and be lost
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", interrupted)
    result = run(
        "generate", "--model", folder, "--prompt", "a", *SIZE, *SPARSE, "--output", tmp_path / "a.mp4"
    )
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "stopped; nothing was written"
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_a_failure_while_writing_leaves_the_old_files(folder: Path, tmp_path: Path) -> None:
    from dit_sparse.video import staged

    old = tmp_path / "a.mp4"
    old.write_text("old")

    def write() -> None:
        with staged() as stage:
            stage(old).write_text("half")
            stage(tmp_path / "a.json").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.mp4", "old")]


def seeded_hub_cache(cache: Path, repo: str, folder: Path) -> str:
    """What ``hf download`` leaves behind: blobs, a snapshot of links to them, a ref. Gives the commit."""
    commit = hashlib.sha1(repo.encode()).hexdigest()
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "blobs").mkdir()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = file.read_bytes()
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = root / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return commit


def test_a_hub_id_out_of_an_offline_cache(folder: Path, tmp_path: Path) -> None:
    commit = seeded_hub_cache(tmp_path / "hub", REPO, folder)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [
            sys.executable, "-c", "from dit_sparse.cli import app; app()", "generate", "--model", "wan2.1",
            "--prompt", "a cat", *SIZE, *SPARSE, "--output", "cat.mp4",
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "cat.json").read_text())
    assert manifest["model"]["location"] == REPO
    assert manifest["model"]["revision"] == commit
    assert manifest["model"]["size"] == "1.3b"
    assert manifest["method"]["preset"] == "balanced"
    assert manifest["method"]["schedule"] == "dense 0-24%; layers 0"
    assert manifest["settings"]["flow_shift"] == 3.0
    assert manifest["density"]["sparse_calls"] < 1
    assert decoded(tmp_path / "cat.mp4").shape == (17, 64, 96, 3)


def test_the_bundled_model_is_the_default(tmp_path: Path) -> None:
    result = run("generate", "--num-frames", 9, "--steps", 3, "--output", tmp_path / "a.mp4")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "a.json").read_text())
    assert manifest["model"]["asked"] == "tiny-wan"
    assert manifest["method"]["preset"] == "balanced"
    assert manifest["prompt"] == request.EXAMPLE
    assert decoded(tmp_path / "a.mp4").shape == (9, 64, 128, 3)


TINY = ["--shape", "192,1,16", "--block", "32", "--contenders", "gathered,triton", "--seconds", "0.01"]


def test_bench_kernels_prints_and_writes_the_same(tmp_path: Path) -> None:
    result = run("bench", "kernels", *TINY, "--backward", "--output", tmp_path / "made" / "gpu-{device}.csv")
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "made").iterdir()
    assert file.name.startswith("gpu-")
    assert "{" not in file.name
    assert file.read_text() == result.stdout
    rows = list(csv.DictReader(result.stdout.splitlines()))
    assert [(row["density"], row["direction"]) for row in rows[::3]] == [
        ("0.1667", "forward"), ("0.1667", "forward+backward"),
        ("0.5", "forward"), ("0.5", "forward+backward"),
    ]  # fmt: skip
    assert [row["contender"] for row in rows] == ["dense", "gathered", "triton"] * 4
    assert all(float(row["eta"]) > 0 for row in rows if row["contender"] == "gathered")


def test_bench_kernels_help_names_every_choice() -> None:
    from dit_sparse.kernels.bench import DTYPES, PATTERNS, SHAPES
    from dit_sparse.kernels.contenders import CONTENDERS

    shown = re.sub(r"[\s│]", "", run("bench", "kernels", "--help").output)
    assert all(name in shown for name in (*SHAPES, *CONTENDERS, *DTYPES, *PATTERNS))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], ["--device must be one of cpu, cuda, got 'tpu'"]),
        (["--shape", "wan9"], ["--shape must be N,H,D", "hunyuanvideo-720p", "got 'wan9'"]),
        (["--shape", "100,0,16"], ["got '100,0,16'"]),
        (["--density", "0"], ["--density must be above 0 and at most 1, got 0"]),
        (["--block", "128x"], ["--block must be tokens", "got '128x'"]),
        (["--dtype", "int8"], ["--dtype must be one of auto, float32"]),
        (["--pattern", "diagonal"], ["--pattern must be one of random, uneven"]),
        (["--contenders", "auto,fast"], ["--contenders must be out of auto, dense", "got 'fast'"]),
        (["--seconds", "0"], ["--seconds must be above 0, got 0"]),
        (["--output", "a.txt"], ["--output must end in .csv, got a.txt"]),
        (["--output", f"{__file__}/a.csv"], ["cannot be written", "test_cli.py is no folder"]),
    ],
)
def test_bench_kernels_bad_input_is_one_line(arguments: list[str], words: list[str]) -> None:
    assert_one_line(run("bench", "kernels", *arguments), *words)


def test_bench_kernels_needs_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line(run("bench", "kernels", "--device", "cuda"), "this machine shows no CUDA device")


def test_bench_kernels_stopped_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_sparse.kernels import bench

    stock = bench.measure

    def interrupted(case: bench.Case, *args: Any, **kwargs: Any) -> list[bench.Row]:
        if case.density == 0.5:
            raise KeyboardInterrupt
        return stock(case, *args, **kwargs)

    monkeypatch.setattr(bench, "measure", interrupted)
    result = run("bench", "kernels", *TINY, "--output", tmp_path / "a.csv")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("stopped; what was measured until then")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 4
