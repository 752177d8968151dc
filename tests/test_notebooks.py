"""The notebooks run from top to bottom, are stored with what they show, and use public names alone."""

import ast
import json
import re
import sys
from base64 import b64decode
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import dit_sparse

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run in an empty folder, where nothing of the repository is found by accident."""
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        allow_errors=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def code_of(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@every_notebook
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert "raises-exception" not in cell.metadata.get("tags", []), "an error would be hidden"
    execute(notebook, tmp_path)


def test_an_error_in_a_cell_is_seen(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in ("x = 1", "assert x == 2", "y = 3")]
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook, tmp_path)


@every_notebook
def test_outputs_are_stored_and_small(path: Path) -> None:
    assert path.stat().st_size <= 1_000_000
    cells = code_of(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run in order"
    outputs = [output for cell in cells for output in cell.outputs]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert pictures
    assert max(len(b64decode(picture)) for picture in pictures) <= 150_000
    for cell in cells:
        shows = re.search(r"^\s*(print|draw|compare|plans_made)\(|plt\.subplots", cell.source, re.MULTILINE)
        defines_it = re.search(r"def (compare|plans_made)\(", cell.source)
        assert cell.outputs or not shows or defines_it, f"no output is stored for:\n{cell.source}"
    for output in outputs:
        assert output.output_type != "error"
        assert output.output_type != "display_data" or "image/png" in output.data, "an empty display"
        assert output.get("name") != "stderr", output.text
        text = json.dumps({**output, "data": {**output.get("data", {}), "image/png": ""}})
        assert not re.search(r"/(home|root|work|tmp|usr)/|Warning", text), text


@every_notebook
def test_cells_import_public_names_of_declared_packages(path: Path) -> None:
    known = {"dit_sparse", "diffusers", "transformers", "torch", "numpy", "matplotlib"}
    for cell in code_of(path):
        for node in ast.walk(ast.parse(cell.source)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, ast.unparse(node)
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                assert not re.match(r"_(?!_)", node.attr), f"{node.attr} is private:\n{cell.source}"
            for name in names:
                parts = name.split(".")
                assert parts[0] in known | sys.stdlib_module_names, name
                assert not any(part.startswith("_") for part in parts), f"{name} is private"


def test_every_method_has_a_figure() -> None:
    code = code_of(FOLDER / "01_patterns.ipynb")
    for method in dit_sparse.METHODS.values():
        shown = [cell for cell in code if f"{method.__name__}(" in cell.source]
        assert shown, f"{method.__name__} is not drawn"
        assert any("image/png" in output.get("data", {}) for cell in shown for output in cell.outputs)
