"""``dit-sparse generate`` for image models: a PNG, a method that has a meaning for one frame, and sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_images
import tiny_text
from families.chroma import CASES
from PIL import Image
from typer.testing import CliRunner, Result

from dit_sparse.cli import app

SIZE = ["--height", "40", "--width", "48", "--steps", "4"]
DRAFT = ["--param", "pool=(2, 3)", "--param", "density=0.3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random-chroma"
    text = {"text_encoder": tiny_text.t5(16), "tokenizer": tiny_text.tokenizer()}
    pipe = tiny_images.pipeline("ChromaPipeline", CASES["chroma"].model(), vae=tiny_images.vae(1), **text)
    pipe.save_pretrained(path)
    return path


def run(folder: Path, *more: object) -> Result:
    arguments = ["generate", "--model", folder, "--prompt", "a cat runs", *more]
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_an_image_its_manifest_and_the_comparison(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "cat"
    done = run(folder, *SIZE, *DRAFT, "--output", output, "--compare-dense", "--report", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "cat.png") as image, Image.open(tmp_path / "cat_compare.png") as both:
        assert image.size == (48, 40)
        assert both.size == (96, 40)
        assert np.array_equal(np.array(both)[:, 48:], np.array(image))
        assert not np.array_equal(np.array(both)[:, :48], np.array(image))
    manifest = json.loads((tmp_path / "cat.json").read_text())
    assert manifest["method"]["name"] == "draft"
    assert manifest["density"]["sparse_calls"] < 0.9
    assert manifest["comparison"]["frames"] == 1
    assert "num_frames" not in manifest["settings"]
    assert "fps" not in manifest["settings"]
    assert "40x48, seed 0" in done.output
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["step"] for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([*SIZE, "--output", "x.mp4"], "makes images: --output must end in .png, got x.mp4"),
        ([*SIZE, "--method", "radial"], "--method radial does not apply to"),
        ([*SIZE, "--num-frames", "5"], "--num-frames: the pipeline of"),
        (["--height", "41", "--width", "48"], "--height must be a multiple of 4 for"),
        (["--steps", "2"], "--height is missing: nothing says what"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, more: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(folder, *more)
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.strip().splitlines() if line.startswith("error: ")]
    assert message in line
    assert "loading" not in done.stderr  # it is told before
    assert not list(tmp_path.iterdir())
