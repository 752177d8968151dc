"""VBench's totals against the official script's, and its dimension that runs here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dit_sparse.eval.vbench import (
    DIMENSIONS,
    DIMENSIONS_2,
    read_results,
    temporal_flickering,
    totals,
    totals_2,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors/vbench/totals.json").read_text())


@pytest.mark.parametrize("case", VECTORS["cases"])
def test_totals_are_those_of_the_official_script(case: dict[str, dict[str, float]]) -> None:
    found = totals(case["scores"])
    for name in ("quality", "semantic", "total"):
        assert found[name] == pytest.approx(case[name], abs=1e-9)


def test_dimensions_are_normalised_as_the_official_script_does() -> None:
    expected = {name.replace(" ", "_"): (v["Min"], v["Max"]) for name, v in VECTORS["normalisation"].items()}
    assert {name: (d.low, d.high) for name, d in DIMENSIONS.items()} == expected


def test_a_part_of_the_dimensions_has_no_total() -> None:
    scores = {name: 0.9 for name, d in DIMENSIONS.items() if d.group == "quality"}
    assert totals(scores)["quality"] is not None
    assert totals(scores)["semantic"] is None
    assert totals(scores)["total"] is None
    del scores["dynamic_degree"]
    assert set(totals(scores).values()) == {None}


def test_vbench_2_averages_groups_not_dimensions() -> None:
    dimensions = [name for names in DIMENSIONS_2.values() for name in names]
    scores = {name: (i / 20) ** 2 for i, name in enumerate(dimensions)}
    assert len(scores) == 18
    found = totals_2(scores)
    assert found["creativity"] == pytest.approx((scores["diversity"] + scores["composition"]) / 2)
    groups = [found[group] for group in DIMENSIONS_2]
    assert found["total"] == pytest.approx(sum(groups) / 5)  # type: ignore[arg-type]
    assert found["total"] != pytest.approx(sum(scores.values()) / 18, abs=1e-3)
    del scores["mechanics"]
    assert totals_2(scores)["physics"] is None
    assert totals_2(scores)["total"] is None


def test_scores_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown dimensions colour"):
        totals({"colour": 0.5})
    with pytest.raises(ValueError, match=r"color must lie in 0..1, got 85"):
        totals({"color": 85})
    path = tmp_path / "x_eval_results.json"
    path.write_text(json.dumps({"color": [0.8, [{"video_path": "a.mp4", "video_results": 0.8}]]}))
    assert read_results(path) == {"color": 0.8}
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no result of VBench"):
        read_results(path)


def test_temporal_flickering() -> None:
    still = torch.full((4, 8, 8, 3), 100, dtype=torch.uint8)
    assert temporal_flickering(still) == 1
    blinking = still.clone()
    blinking[1::2] = 151  # a fifth of the range, at every step
    assert temporal_flickering(blinking) == pytest.approx(0.8)
    assert temporal_flickering(blinking.flip(0)) == pytest.approx(0.8)  # bytes do not wrap
    with pytest.raises(ValueError, match="at least two frames"):
        temporal_flickering(still[:1])
