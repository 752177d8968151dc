"""The wheel, outside the clone: it carries every package and the bundled model, and generates."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("dit_sparse", "kernels", "pipelines", "eval", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with our wheel, and the dependencies of this one but not its clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(wheel, check=True)
    (built,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    bin_ = folder / "venv" / "bin"
    subprocess.run(
        [bin_ / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", built], check=True
    )
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return bin_ / "python"


def test_generate_from_the_wheel(python: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [python, "-c", "import dit_sparse, dit_sparse.eval.attributes, dit_sparse.pipelines.tiny as t;"
         "print(dit_sparse.__file__); print(t.MODEL_DIR)"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert all(Path(path).is_relative_to(python.parents[1]) for path in where)
    assert (Path(where[1]) / "model_index.json").exists()
    assert Path(where[0]).with_name("calibration.schema.json").exists()
    command = [
        python.parent / "dit-sparse",
        "generate",
        "--num-frames",
        "17",
        "--steps",
        "2",
        "--output",
        "out.mp4",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out.mp4").stat().st_size > 1000
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["method"]
