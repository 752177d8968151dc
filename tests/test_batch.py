"""Many prompts from a file: names, resumption, one manifest, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
from typer.testing import CliRunner, Result

from dit_sparse import generate
from dit_sparse.batch import names
from dit_sparse.cli import app
from dit_sparse.request import read_prompts

SIZE = ["--height", "32", "--width", "32", "--num-frames", "5", "--steps", "2"]
SPARSE = ["--method", "random", "--density", "0.5", "--param", "block=2", "--schedule", "always"]
PROMPTS = "# animals\na cat runs\n\n  a dog!  \nein Bär läuft\n"
FILES = ["0000-a-cat-runs", "0001-a-dog", "0002-ein-bar-lauft"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random-wan"
    models.wan_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def command(folder: Path, prompts: Path, out: Path, *more: object) -> list[str]:
    given = ["--model", folder, "--prompts", prompts, "--output-dir", out, *SIZE, *SPARSE, *more]
    return ["generate", *map(str, given)]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, command(*arguments))


def index(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def everything(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_every_prompt_has_a_file_and_all_one_manifest(folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "folders" / "are made"
    result = run(folder, prompts, out, "--seed", 7)
    assert result.exit_code == 0, result.output
    assert sorted(everything(out)) == sorted(
        ["manifest.json", *(f"{name}.{suffix}" for name in FILES for suffix in ("json", "mp4"))]
    )
    found = index(out)
    assert found["prompts"] == 3
    assert list(found["files"]) == [f"{name}.mp4" for name in FILES]
    for i, (name, prompt) in enumerate(zip(FILES, ["a cat runs", "a dog!", "ein Bär läuft"], strict=True)):
        manifest = found["files"][f"{name}.mp4"]
        assert manifest == json.loads((out / f"{name}.json").read_text())
        assert (manifest["prompt"], manifest["seed"]) == (prompt, 7 + i)
        assert manifest["density"]["sparse_calls"] < 1
    assert "3 of 3 prompts, 3 made now" in result.output


def test_a_file_is_what_its_prompt_and_seed_make_alone(folder: Path, prompts: Path, tmp_path: Path) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone.mp4"
    assert run(folder, prompts, out).exit_code == 0
    arguments = ["--model", folder, "--prompt", "a dog!", "--seed", 1, *SIZE, *SPARSE, "--output", alone]
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert alone.read_bytes() == (out / "0001-a-dog.mp4").read_bytes()


def test_a_stopped_run_goes_on(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made, real = tmp_path / "out", [], generate.run_once

    def counted(pipe: Any, call: Any, seed: int, name: Any) -> Any:
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(name)
        return real(pipe, call, seed, name)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "run_once", counted)
        result = run(folder, prompts, out)
    assert result.exit_code == 130
    assert "the same command goes on" in result.output
    before = everything(out)
    assert sorted(before) == [f"{FILES[0]}.json", f"{FILES[0]}.mp4"]
    (out / f"{FILES[1]}.mp4").write_bytes(b"without a manifest it is not finished")
    result = run(folder, prompts, out)
    assert result.exit_code == 0, result.output
    assert "3 of 3 prompts, 2 made now" in result.output
    after = everything(out)
    assert before.items() <= after.items()
    assert len(after[f"{FILES[1]}.mp4"]) > 100

    monkeypatch.setattr(generate, "placed_pipeline", None)  # no weights are loaded when nothing is to be made
    result = run(folder, prompts, out)
    assert result.exit_code == 0, result.output
    assert everything(out) == after


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "1"], "was made with seed 0 and not 1: give another"),
        (["--steps", "3"], "was made with settings.num_inference_steps 2 and not 3: give"),
        (["--density", "0.6"], "was made with method.requested_density 0.5 and not 0.6: give"),
    ],
)
def test_what_was_made_otherwise_is_kept(
    folder: Path, prompts: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    out = tmp_path / "out"
    prompts.write_text("a cat runs\n")
    assert run(folder, prompts, out).exit_code == 0
    before = everything(out)
    result = run(folder, prompts, out, *change)
    assert result.exit_code == 2
    assert message in result.output
    assert everything(out) == before


def test_a_prompt_that_fails_is_named_and_the_others_are_made(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", generate.run_once

    def failing(pipe: Any, call: Any, seed: int, name: Any) -> Any:
        if call["prompt"] == "a dog!":
            raise ValueError("the model made values that are no numbers")
        return real(pipe, call, seed, name)

    monkeypatch.setattr(generate, "run_once", failing)
    result = run(folder, prompts, out)
    assert result.exit_code == 2
    assert "1 of 3 failed: 0001-a-dog (the model made values that are no numbers)" in result.output
    assert list(index(out)["files"]) == [f"{FILES[0]}.mp4", f"{FILES[2]}.mp4"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "a.mp4"], "--output a.mp4 is for one prompt"),
        (["--prompt", "a cat"], "--prompt is for one prompt"),
        (["--compare-dense"], "--compare-dense is for one prompt"),
        (["--report", "r.json"], "--report is for one prompt"),
        (["--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_flags_that_do_not_fit(
    folder: Path, prompts: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    result = run(folder, prompts, tmp_path / "out", *more)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1


def test_prompts_that_cannot_be_had(folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content, message in (
        (None, "cannot be read"),
        (b"# only\n\n", "has no prompt"),
        (b"\xff\xfe", "cannot"),
    ):
        prompts.unlink() if content is None else prompts.write_bytes(content)
        result = run(folder, prompts, out)
        assert result.exit_code == 2
        assert message in result.output
        assert not out.exists()
    prompts.write_text("a cat")
    (tmp_path / "file").write_text("")
    result = run(folder, prompts, tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "--output-dir" in result.output
    for given in (["--prompts", prompts], ["--output-dir", out]):
        result = CliRunner().invoke(app, ["generate", *map(str, given)])
        assert result.exit_code == 2
        assert "--prompts and --output-dir need each other" in result.output


def test_names_are_safe_and_stable() -> None:
    found = names(["a/../b \\ c", "日本語", "x" * 300, "A long prompt " * 20, "été"])
    assert found[0] == "0000-a-b-c"
    assert found[1] == "0001"
    assert found[2] == "0002"
    assert len(found[3]) <= 45
    assert found[4] == "0004-ete"
    assert names(["a"] * 3) == ["0000-a", "0001-a", "0002-a"]


def test_comments_and_blank_lines_are_no_prompts(prompts: Path) -> None:
    assert read_prompts("--prompts", prompts) == ["a cat runs", "a dog!", "ein Bär läuft"]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_processes_share_the_prompts(folder: Path, prompts: Path, tmp_path: Path, launcher: str) -> None:
    """Two processes make what one makes, each a part, and a third run has nothing left."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    launch = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"],
        "accelerate": [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
            "--no_python",
        ],
    }[launcher]
    dit_sparse = Path(sys.executable).with_name("dit-sparse")
    result = subprocess.run(
        [sys.executable, "-m", *launch, dit_sparse, *command(folder, prompts, out, "--device", "cpu")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "3 of 3 prompts, 3 made now" in result.stdout
    assert result.stdout.count("density") == 3
    assert result.stderr.count("loading") == 2  # each process made some
    assert run(folder, prompts, alone).exit_code == 0
    for name in FILES:
        assert (out / f"{name}.mp4").read_bytes() == (alone / f"{name}.mp4").read_bytes()
    before = everything(out)
    assert run(folder, prompts, out).exit_code == 0
    assert everything(out) == before
