"""The notebooks run from top to bottom, and the one of patterns shows every method."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import dit_sparse

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()


def test_every_method_has_a_figure() -> None:
    notebook = nbformat.read(FOLDER / "01_patterns.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for method in dit_sparse.METHODS.values():
        shown = [cell for cell in code if f"{method.__name__}(" in cell.source]
        assert shown, f"{method.__name__} is not drawn"
        assert any("image/png" in output.get("data", {}) for cell in shown for output in cell.outputs)
