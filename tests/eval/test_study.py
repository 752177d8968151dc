"""The study: a row per method and density, a control at the density a row achieved; goes on where it was."""

import json
from pathlib import Path

import pytest

from dit_sparse.eval import study as module
from dit_sparse.eval.study import Study, generate
from dit_sparse.pipelines import tiny
from dit_sparse.pipelines.tiny import data

SHORT = {**tiny.STUDY, "num_frames": 9, "num_inference_steps": 4}


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch):
    from diffusers import WanPipeline

    monkeypatch.setattr(tiny, "STUDY", SHORT)
    pipe = WanPipeline.from_pretrained(tiny.MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_rows_controls_and_going_on(pipe, tmp_path: Path) -> None:
    study = Study(tmp_path, pipe, ["draft", "radial"], [0.4])
    assert isinstance(study.cells["radial", 0.4], str)  # five frames: its floor is above
    (text, _), *_ = data.held_out_prompts(1)
    study.round(0, text)
    names = [(row["name"], row["density_asked"]) for row in study.rows]
    draft = study.rows[0]
    control = study.control(draft["sparse_density"])
    assert names == [("draft", 0.4), ("control", control), ("noise floor", 1.0), ("dense", 1.0)]
    control = study.rows[1]
    assert draft["sparse_density"] == pytest.approx(0.4, abs=0.05)
    # Never below the row it stands beside, and above by less than a block in each row.
    assert 0 <= control["sparse_density"] - draft["sparse_density"] < 0.06
    assert 0 < draft["planning"] < draft["attention"] < draft["seconds"]
    assert study.rows[-1]["psnr"] == 99.0
    assert 80 < study.rows[-2]["psnr"] != 99.0  # the noise floor is measured

    again = Study(tmp_path, pipe, ["draft", "radial"], [0.4])
    assert again.rows == study.rows
    again.round(0, text)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(study.rows) == len(again.rows)

    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({**line, "prompt": i}) + "\n" for i in (0, 1) for line in lines)
    )
    table = Study(tmp_path, pipe, ["draft", "radial"], [0.4]).table(
        dict.fromkeys(("command", "machine", "date", "commit", "tokens", "steps", "prompts", "schedule"), "x")
    )
    assert "| radial | n/a, floor 0." in table
    for start in ("| draft |", "| noise floor: dense by the kernels |"):
        (row,) = [line for line in table.splitlines() if line.startswith(start)]
        assert len(row.split("|")) == 11


def test_the_noise_floor_is_dense_and_rounds_otherwise(pipe) -> None:
    text = data.held_out_prompts(1)[0][0]
    dense, _ = generate(pipe, text, 0, None)
    again, _ = generate(pipe, text, 0, None)
    floor, row = generate(pipe, text, 0, None, is_floor=True)
    assert (again == dense).all()
    assert 0 < abs(floor - dense).max() < 0.01
    assert row["sparse_density"] == row["density"] == 1
    assert module.SCHEDULE.startswith("dense")
