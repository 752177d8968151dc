"""``dit-sparse models --matrix`` shows the table that the contract suite walks."""

from __future__ import annotations

from typer.testing import CliRunner

from dit_sparse import METHODS
from dit_sparse.cli import app
from dit_sparse.pipelines import FAMILIES, NOTHING_TO_DO
from dit_sparse.pipelines.matrix import matrix


def test_the_printed_matrix_is_the_table() -> None:
    result = CliRunner().invoke(app, ["models", "--matrix"])
    assert result.exit_code == 0
    above, below = result.output.split("\n\n")
    table = matrix()
    assert list(table) == [*FAMILIES, *NOTHING_TO_DO]
    reasons = dict(line.split(": ", 1) for line in below.splitlines()[2:])
    header, *lines = above.splitlines()
    assert header.split() == [str(i + 1) for i in range(len(METHODS))]
    for line, (cls, row) in zip(lines, table.items(), strict=True):
        name, *marks = line.split()
        assert name == cls
        assert [reasons.get(mark, "") for mark in marks] == list(row.values())
        assert all(mark == "x" for mark, why in zip(marks, row.values(), strict=True) if not why)


def test_every_method_runs_somewhere_and_no_class_is_in_two_tables() -> None:
    table = matrix()
    assert all(any(not row[name] for row in table.values()) for name in METHODS)
    assert not set(FAMILIES) & set(NOTHING_TO_DO)
