"""``dit-sparse calibrate`` on tiny random models, and ``generate`` with what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
from typer.testing import CliRunner, Result

from dit_sparse import Calibration, search
from dit_sparse.cli import app

SIZE = ["--height", "64", "--width", "96", "--num-frames", "17", "--steps", "4"]
PROMPTS = ["--prompt", "a cat runs", "--prompt", "a dog sits"]
SETTINGS = {
    "sparse_vdit": ["--param", "block=8", "--param", "eps=9"],
    "efficient_vdit": ["--param", "block=8", "--param", "budget=0.8"],
    "paro": ["--param", "block=8"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random-wan"
    models.wan_pipeline().save_pretrained(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def calibrated(folder: Path, output: Path, method: str, *more: object) -> Calibration:
    result = run(
        "calibrate", "--model", folder, "--method", method, *SIZE, *PROMPTS, *SETTINGS[method],
        "--output", output, *more,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"--method {method} --param calibration={output}" in result.stdout
    return Calibration.load(output)


def generated(folder: Path, output: Path, method: str, *more: object) -> dict[str, Any]:
    result = run(
        "generate", "--model", folder, "--method", method, "--prompt", "a cat", *SIZE, *more,
        "--output", output, "--report", output.with_name("report.json"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return json.loads(output.with_suffix(".json").read_text())


@pytest.mark.parametrize("method", ["sparse_vdit", "efficient_vdit", "paro"])
def test_a_calibration_is_made_and_used(folder: Path, tmp_path: Path, method: str) -> None:
    path = tmp_path / "made" / "c.json"
    found = calibrated(folder, path, method, "--seed", 7)
    assert (found.method, found.source, found.grid) == (method, str(folder), (5, 4, 6))
    assert (found.prompts, found.seeds) == (("a cat runs", "a dog sits"), (7, 8))
    assert (found.steps, found.schedule) == (4, "dense 0-25%")
    assert set(found.layers) == {f"transformer/blocks.{i}.attn1" for i in range(3)}
    assert found.settings["block"] == 8
    manifest = generated(folder, tmp_path / "a.mp4", method, "--param", f"calibration={path}")
    assert manifest["method"]["parameters"] == {"calibration": str(path)}
    assert manifest["method"]["source"] == "the calibration"
    assert 0 < manifest["density"]["sparse_calls"] < 1


@pytest.mark.parametrize("method", ["sparse_vdit", "efficient_vdit"])
def test_the_density_is_the_one_in_the_file(folder: Path, tmp_path: Path, method: str) -> None:
    found = calibrated(folder, tmp_path / "c.json", method)
    generated(
        folder, tmp_path / "a.mp4", method, "--param", f"calibration={tmp_path / 'c.json'}",
        "--schedule", "dense 0-25%",
    )  # fmt: skip
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    sparse = [row for row in rows if row["phase"] == "sparse"]
    assert {row["step"] for row in sparse} == {1, 2, 3}
    for row in sparse:
        layer = found.layers[f"{row['model']}/{row['name']}"]
        assert row["density"] == pytest.approx(layer["density"], abs=0.05)
    full = sum(layer["density"] == 1 for layer in found.layers.values())
    assert {row["reason"] for row in rows} <= {"schedule", "full plan", ""}
    assert sum(row["reason"] == "full plan" for row in rows) == full * 3 * 2


def test_the_same_search_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        calibrated(folder, tmp_path / name, "sparse_vdit")
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["tensors"].pop("file") == "a.safetensors"
    assert b["tensors"].pop("file") == "b.safetensors"
    assert a == b


def test_prompts_come_from_a_file_and_may_be_fewer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a dog runs\n\n  a cat sits \n")
    found = calibrated(
        folder, tmp_path / "c.json", "efficient_vdit", "--prompt-file", tmp_path / "p.txt", "--prompts", 3
    )  # fmt: skip
    assert found.prompts == ("a cat runs", "a dog sits", "a dog runs")


def test_the_bundled_model_has_prompts_of_its_own(tmp_path: Path) -> None:
    from dit_sparse.pipelines.tiny.data import held_out_prompts

    result = run(
        "calibrate", "--method", "efficient_vdit", "--param", "block=32", "--num-frames", 9, "--steps", 2,
        "--prompts", 1, "--output", tmp_path / "c.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Calibration.load(tmp_path / "c.json").prompts == (held_out_prompts(1, seed=1)[0][0],)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "radial"], ["--method must be one of sparse_vdit, paro, efficient_vdit, got 'radial'"]),
        (["--output", "c.mp4"], ["--output must end in .json, got c.mp4"]),
        (["--output", "/proc/none/c.json"], ["/proc/none/c.json cannot be written"]),
        (["--prompts", "0"], ["--prompts must be at least 1, got 0"]),
        (["--prompts", "3"], ["--prompts 3: only 2 were given"]),
        (["--prompt-file", "none.txt"], ["--prompt-file none.txt cannot be read"]),
        (["--num-frames", "18"], ["one above a multiple of 4"]),
        (["--param", "metric=l1"], ["metric must be one of relative, mse"]),
        (["--param", "k=1"], ["sparse_vdit has no such parameter", "budget"]),
        (["--schedule", "dense 0-"], ["schedule:"]),
        (["--param", "calibration=none.json"], ["none.json is no readable calibration"]),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(search, "placed_pipeline", no_weights)
    given = ["--model", folder, "--method", "sparse_vdit", "--output", "c.json", *SIZE, *PROMPTS, *arguments]
    assert_one_line(run("calibrate", *given), *words)
    assert not list(tmp_path.iterdir())


def test_prompts_are_asked_for(folder: Path, tmp_path: Path) -> None:
    result = run(
        "calibrate", "--model", folder, "--method", "paro", "--output", tmp_path / "c.json", *SIZE
    )  # fmt: skip
    assert_one_line(result, "--prompt or --prompt-file is missing")


def test_a_calibration_that_does_not_fit_is_one_line(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    calibrated(folder, path, "efficient_vdit")
    use = ["--param", f"calibration={path}", "--output", tmp_path / "a.mp4"]
    ask = ["generate", "--model", folder, "--prompt", "a", *SIZE]
    assert_one_line(run(*ask, "--method", "paro", *use), "PAROProcessor needs a calibration of paro")
    result = run(*ask, "--method", "efficient_vdit", *use, "--num-frames", 21)
    assert_one_line(result, "is for the token grid (5, 4, 6), got (6, 4, 6): calibrate at this size")
    result = run(*ask, "--method", "efficient_vdit", *use, "--param", "block=16")
    assert_one_line(result, "block=16 does not fit a calibration that was made with block=8")
    result = run(*ask, "--method", "efficient_vdit", *use, "--density", "0.5")
    assert_one_line(result, "fixes the density: calibrate with budget=0.5")
    other = models.wan_pipeline(layers=2)
    other.save_pretrained(tmp_path / "other")
    ask[2] = tmp_path / "other"
    result = run(*ask, "--method", "efficient_vdit", *use)
    assert result.exit_code == 2
    assert "calibrate this model" in result.stderr.splitlines()[-1]
    result = run(
        "calibrate", "--model", folder, "--method", "efficient_vdit", "--param", f"calibration={path}",
        *SIZE, *PROMPTS, "--output", tmp_path / "d.json",
    )  # fmt: skip
    assert_one_line(result, "is to be made, got one that exists")


def assert_one_line(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
