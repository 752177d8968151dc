"""``dit-sparse bench generate``: what is timed in which order, and its table. No speed is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dit_sparse import generate
from dit_sparse.cli import app
from dit_sparse.eval.latency import rows_of, spread

SIZE = ["--height", "64", "--width", "96", "--num-frames", "9", "--steps", "4"]


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "generate", *SIZE, *map(str, arguments)])


def test_dense_and_sparse_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = generate.run_once

    def logged(pipe: Any, call: Any, seed: int, name: Any) -> Any:
        order.append(name)
        return real(pipe, call, seed, name)

    monkeypatch.setattr(generate, "run_once", logged)
    output = tmp_path / "times.json"
    done = bench("--method", "draft", "--schedule", "dense 0-25%", "--rounds", "2", "--output", output)
    assert done.exit_code == 0, done.output
    names = ["dense", "draft", "dense again"]
    assert order == [*(f"{n}, round 1" for n in names), *(f"{n}, round 2" for n in reversed(names))]
    result = json.loads(output.read_text())
    assert list(result["rows"]) == names
    for name, row in result["rows"].items():
        seconds = row["seconds"]
        assert {len(taken) for taken in seconds.values()} == {2}
        for i in range(2):
            parts = sum(seconds[part][i] for part in ("text_encoder", "transformer", "vae_decode"))
            assert 0 < parts < seconds["total"][i]
            assert seconds["planning"][i] < seconds["attention"][i] < seconds["transformer"][i]
            assert (seconds["planning"][i] > 0) == (name == "draft")
        assert len(row["peak_memory_mib"]) == 2
    assert result["rows"]["dense"]["density"] == {"full_run": 1.0, "sparse_calls": 1.0}
    assert result["rows"]["draft"]["density"]["sparse_calls"] < 0.5
    assert list(result["speed_up"]) == names[1:]
    dense, draft = (result["rows"][n]["seconds"]["total"] for n in ("dense", "draft"))
    ratios = [d / s for d, s in zip(dense, draft, strict=True)]
    assert result["speed_up"]["draft"]["low"] == pytest.approx(min(ratios))
    assert result["speed_up"]["draft"]["median"] == pytest.approx(sum(ratios) / 2)
    assert result["dense_attention"] == "native"
    share = sum(result["rows"]["dense"]["seconds"]["attention"]) / sum(dense)
    full = result["rows"]["draft"]["density"]["full_run"]
    assert result["amdahl_bound"] == pytest.approx(1 / (1 - share * (1 - full)))
    assert result["device"]["commit"]
    assert "of it planning" in done.output
    assert "no spread" not in done.output


def test_one_round_shows_no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    done = bench("--method", "window", "--density", "0.5", "--rounds", "1", "--steps", "2")
    assert done.exit_code == 0, done.output
    assert "one run of each: no spread" in done.output
    assert "(" not in done.output.split("total, s")[1].split("\n")[0]


def test_the_table_of_made_up_times() -> None:
    """Parts add up to the whole, and the text encoder that some runs lack is left out of theirs."""
    rows = {
        "dense": {
            "seconds": {"total": [10.0, 12.0], "text_encoder": [1.0, 1.0], "transformer": [8.0, 10.0],
                        "attention": [4.0, 6.0], "planning": [0.0, 0.0]},
            "density": {"full_run": 1.0, "sparse_calls": 1.0},
            "peak_memory_mib": [100.0, 120.0],
        },
        "draft": {
            "seconds": {"total": [5.0, 4.0], "transformer": [4.0, 3.0], "attention": [2.0, 1.0],
                        "planning": [0.5, 0.5]},
            "density": {"full_run": 0.5, "sparse_calls": 0.25},
            "peak_memory_mib": [None, None],
        },
    }  # fmt: skip
    columns, lines = rows_of({"rows": rows, "speed_up": {"draft": spread([2.0, 3.0])}, "amdahl_bound": 1.25})
    assert columns == ("median (20-80 %)", "dense", "draft")
    assert lines == [
        ("total, s", "11.00 (10.40-11.60)", "4.50 (4.20-4.80)"),
        ("text encoder, s", "1.00", ""),
        ("transformer, s", "9.00 (8.40-9.60)", "3.50 (3.20-3.80)"),
        ("  self-attention, s", "5.00 (4.40-5.60)", "1.50 (1.20-1.80)"),
        ("    of it planning, s", "0.00", "0.50"),
        ("rest, s", "1.00", "1.00"),
        ("speed-up", "", "2.50 (2.20-2.80)"),
        ("Amdahl's bound", "", "1.25", ""),
        ("density", "1.000, sparse 1.000", "0.500, sparse 0.250"),
        ("peak memory, MiB", "120", "not known"),
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--method", "dense"], "--method dense: dense is timed beside every method; which one?"),
        (["--output", "a.csv"], "--output must end in .json, got a.csv"),
        (["--model", "wan2.1"], "--prompt is missing: what should wan2.1 show?"),
        (["--density", "2"], "--density must be above 0 and at most 1, got 2"),
    ],
)
def test_what_cannot_be_is_told_first(more: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "placed_pipeline", None)  # no weights are loaded
    done = bench(*more)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output
