"""``dit-sparse methods`` and ``models``."""

from __future__ import annotations

from dataclasses import fields
from inspect import getdoc
from typing import Annotated

import typer

from dit_sparse.commands.terminal import table


def methods() -> None:
    """List the methods and their parameters with defaults."""
    from dit_sparse.processors import METHODS

    rows = []
    for name, cls in METHODS.items():
        parameters = ", ".join(f"{f.name}={f.default!r}" for f in fields(cls))
        rows.append((name, (getdoc(cls) or "").split("\n")[0], parameters))
    table(("method", "what it computes", "parameters"), rows)


def models(
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Which method runs in which transformer instead.")
    ] = False,
) -> None:
    """List the models that have a name, with their Hub ids."""
    if matrix:
        _matrix()
        return
    from dit_sparse.pipelines.load import TINY, checkpoints

    rows = [(name, c.about if name == TINY else f"{c.about}\n{c.repo}") for name, c in checkpoints().items()]
    table(("model", "about, and Hub id"), rows)


def _matrix() -> None:
    """Transformers by methods, in plain text of a fixed width; what the columns and letters mean, below."""
    from dit_sparse.pipelines.matrix import matrix

    cells = matrix()
    methods = list(next(iter(cells.values())))
    reasons = list(dict.fromkeys(why for row in cells.values() for why in row.values() if why))
    marks = {"": "x", **{why: chr(ord("a") + i) for i, why in enumerate(reasons)}}
    wide = max(map(len, cells))
    print(" " * wide, *(f"{i + 1:>2}" for i in range(len(methods))))
    for cls, row in cells.items():
        print(f"{cls:<{wide}}", *(f"{marks[row[name]]:>2}" for name in methods))
    print("\nx runs, and is tested by the contract suite")
    print(*(f"{i + 1} {name}" for i, name in enumerate(methods)), sep=", ")
    for why in reasons:
        print(f"{marks[why]}: {why}")
