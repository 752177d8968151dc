"""What really ran: phase, exact density, backend and reason for every (model, step, layer, branch)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dit_sparse.schedule import Phase


@dataclass(frozen=True)
class Where:
    """The calls that are merged into one row: same place in the run, same treatment."""

    model: str
    step: int | None
    layer: int
    name: str
    branch: str
    phase: Phase
    backend: str
    reason: str


class Record:
    """Token pairs of the calls at one place, kept on the device until the report is read."""

    def __init__(self, heads: Sequence[int]) -> None:
        self.heads = tuple(heads)
        self.calls = 0
        self.pairs: Tensor | int = 0
        self.every: Tensor | int = 0

    def add(self, pairs: Tensor, every: Tensor, batch: int, is_call: bool = True) -> None:
        """Merge computed and all pairs, int64 [B or 1, H or 1], of a call or of a further part of one."""
        self.calls += is_call
        self.pairs = self.pairs + _per_head(pairs, batch, len(self.heads))
        self.every = self.every + _per_head(every, batch, len(self.heads))

    def counts(self) -> tuple[list[int], list[int]]:
        """Computed and all pairs per head."""
        return torch.as_tensor(self.pairs).tolist(), torch.as_tensor(self.every).tolist()


def _per_head(x: Tensor, batch: int, heads: int) -> Tensor:
    return x.expand(batch, heads).sum(0)


@dataclass(frozen=True)
class Row:
    """One line of a report; ``pairs`` and ``every`` are token pairs of each of ``heads``."""

    where: Where
    calls: int
    heads: tuple[int, ...]
    pairs: tuple[int, ...]
    every: tuple[int, ...]

    @property
    def density(self) -> float:
        """Computed token pairs over all token pairs."""
        return _ratio(sum(self.pairs), sum(self.every))

    def to_dict(self, heads: bool = False) -> dict[str, Any]:
        w = self.where
        row: dict[str, Any] = {
            "model": w.model,
            "step": w.step,
            "layer": w.layer,
            "name": w.name,
            "branch": w.branch,
            "phase": w.phase.value,
            "density": self.density,
            "pairs": sum(self.pairs),
            "all_pairs": sum(self.every),
            "calls": self.calls,
            "backend": w.backend,
            "reason": w.reason,
        }
        if heads:
            row["heads"] = [
                {"head": h, "density": _ratio(p, e), "pairs": p, "all_pairs": e}
                for h, p, e in zip(self.heads, self.pairs, self.every, strict=True)
            ]
        return row


@dataclass(frozen=True)
class Report:
    """A run's attention calls.

    ``print(report)`` shows a table in which neighbouring steps and layers that were treated alike share a
    line.

    Args:
        rows: One per (model, step, layer, branch) and treatment, in run order.
        about: What the session is: method, schedule, backend, steps.
    """

    rows: tuple[Row, ...]
    about: dict[str, Any]

    @classmethod
    def read(cls, records: dict[Where, Record], about: dict[str, Any]) -> Report:
        """Bring the counts from the device. This is the only synchronisation."""
        rows = []
        for where, record in records.items():
            pairs, every = record.counts()
            rows.append(Row(where, record.calls, record.heads, tuple(pairs), tuple(every)))
        return cls(tuple(rows), about)

    def gather(self, group: Any = None) -> Report:
        """In context parallelism, where a report tells of its own process: that of all heads.

        Every process of ``group`` must ask, and all get the same.
        """
        reports: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(reports, self, group=group)
        counts: dict[Where, tuple[int, dict[int, tuple[int, int]]]] = {}
        for row in (row for report in reports for row in report.rows):
            _, heads = counts.setdefault(row.where, (row.calls, {}))
            for head, pairs, every in zip(row.heads, row.pairs, row.every, strict=True):
                before = heads.get(head, (0, 0))
                heads[head] = before[0] + pairs, before[1] + every
        rows = [
            Row(where, calls, tuple(sorted(heads)), *zip(*(heads[h] for h in sorted(heads)), strict=True))
            for where, (calls, heads) in counts.items()
        ]
        return Report(tuple(rows), {**self.about, "heads": f"all, of {len(reports)} processes"})

    @property
    def density(self) -> float:
        """Over the full run, dense calls included."""
        return _total(self.rows)["density"]

    @property
    def sparse_density(self) -> float:
        """Over the calls a method ran in; 1.0 when there were none."""
        return _total(self.sparse_rows)["density"]

    @property
    def sparse_rows(self) -> tuple[Row, ...]:
        """The rows in which a method ran."""
        return tuple(r for r in self.rows if r.where.phase is not Phase.DENSE)

    def to_dict(self, heads: bool = False) -> dict[str, Any]:
        """Everything, as plain Python values. ``heads`` adds the counts of every head."""
        return {
            **self.about,
            "totals": {"full_run": _total(self.rows), "sparse_calls_only": _total(self.sparse_rows)},
            "rows": [row.to_dict(heads) for row in self.rows],
        }

    def to_json(self, heads: bool = False, indent: int | None = 1) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(heads), indent=indent)

    def __rich__(self) -> Any:
        from rich.table import Table

        about = ", ".join(f"{k} {v}" for k, v in self.about.items() if not isinstance(v, dict | list))
        table = Table(title=f"dit_sparse: {about}", title_justify="left")
        for column in ("model", "steps", "layers", "branches", "phase", "backend", "reason"):
            table.add_column(column)
        for column in ("calls", "density"):
            table.add_column(column, justify="right")
        for group in _lines(self.rows):
            w, total = group[0].where, _total(group)
            table.add_row(
                w.model,
                runs(r.where.step for r in group),
                runs(r.where.layer for r in group),
                ",".join(dict.fromkeys(r.where.branch for r in group)),
                w.phase.value,
                w.backend,
                w.reason,
                str(total["calls"]),
                f"{total['density']:.4f}",
            )
        for label, rows in (("full run", self.rows), ("sparse calls only", self.sparse_rows)):
            total = _total(rows)
            table.add_section()
            table.add_row(label, *[""] * 6, str(total["calls"]), f"{total['density']:.4f}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, color_system=None, force_terminal=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def _ratio(pairs: int, every: int) -> float:
    return pairs / every if every else 1.0


def _total(rows: Iterable[Row]) -> dict[str, Any]:
    rows = list(rows)
    pairs, every = sum(sum(r.pairs) for r in rows), sum(sum(r.every) for r in rows)
    return {
        "calls": sum(r.calls for r in rows),
        "pairs": pairs,
        "all_pairs": every,
        "density": _ratio(pairs, every),
    }


def _lines(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in groups of one line: same treatment and density at the same steps."""

    def treatment(row: Row) -> tuple[Any, ...]:
        w = row.where
        return w.model, w.phase.value, w.backend, w.reason, round(row.density, 6)

    def step(row: Row) -> int:
        return -1 if row.where.step is None else row.where.step

    lines: dict[tuple[Any, ...], list[Row]] = {}
    for _, same_step in groupby(sorted(rows, key=step), key=step):
        by_treatment: dict[tuple[Any, ...], list[Row]] = {}
        for row in same_step:
            by_treatment.setdefault(treatment(row), []).append(row)
        for key, group in by_treatment.items():
            places = tuple(sorted({(r.where.layer, r.where.name, r.where.branch) for r in group}))
            lines.setdefault((*key, places), []).extend(group)
    return iter(lines.values())


def runs(values: Iterable[int | None]) -> str:
    """0,1,2,5 -> "0-2,5"; "?" where one is not known."""
    unique = set(values)
    if None in unique:
        return "?"
    parts = []
    numbers = sorted(v for v in unique if v is not None)
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [n for _, n in run]
        parts.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(parts)
