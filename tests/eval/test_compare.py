"""``dit-sparse compare``: the same noise, what really ran, and what its files say of it."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_images
import tiny_text
import torch
from families.chroma import CASES
from PIL import Image
from typer.testing import CliRunner, Result

from dit_sparse import Call, Plan, TokenLayout
from dit_sparse.cli import app
from dit_sparse.eval import compare as module
from dit_sparse.eval.compare import ERROR_GAIN, error_picture
from dit_sparse.eval.comparison import Comparison
from dit_sparse.eval.masks import PlanMasks
from dit_sparse.processors import METHODS
from dit_sparse.video import read_video

SIZE = ["--height", "64", "--width", "96", "--num-frames", "9", "--steps", "4"]
PROMPTS = ["a red circle moving left on a gray background", "a blue square moving up on a black background"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def compared(folder: Path, *more: object) -> Result:
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    return run("compare", *SIZE, *prompts, "--output-dir", folder, "--schedule", "dense 0-25%", *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("out")
    done = compared(path, "--methods", "draft,radial,adaspa", "--densities", "0.3", "--seed", "5")
    assert done.exit_code == 0, done.output
    assert "radial-0.3 refused: RadialProcessor" in done.output
    assert "of one run each" in done.output
    return path


@pytest.fixture(scope="module")
def result(folder: Path) -> Comparison:
    return Comparison.load(folder / "results.json")


def test_dense_and_noise_floor_come_first(result: Comparison) -> None:
    labels = [(row.label, row.kind) for row in result.rows]
    assert labels[:2] == [("dense", "dense"), ("noise-floor", "floor")]
    assert labels[2:] == [(name, "method") for name in ("draft-0.3", "radial-0.3", "adaspa-0.3")]
    dense, floor, draft, radial, _ = result.rows
    assert dense.summary["psnr"]["mean"] is None
    assert [clip.identical_frames for clip in dense.clips] == [9, 9]
    # Rounding alone: far nearer than any method, and yet another computation.
    assert 60 < floor.summary["psnr"]["mean"] < 130
    assert floor.summary["psnr"]["mean"] > draft.summary["psnr"]["mean"] + 10
    assert "floor 0." in radial.refused
    assert radial.clips == []


def test_every_row_ran_as_it_says(result: Comparison) -> None:
    steps, layers = 4, 8
    for row in result.rows:
        if row.refused:
            continue
        assert {(cell.step, cell.layer) for cell in row.cells} == {
            (s, i) for s in range(steps) for i in range(layers)
        }
        assert {cell.branch for cell in row.cells} == {"cond", "uncond"}
    dense, floor, draft, _, adaspa = result.rows
    assert {(cell.phase, cell.density) for cell in dense.cells} == {("dense", 1.0)}
    assert {(cell.phase, cell.density) for cell in floor.cells} == {("sparse", 1.0)}
    for row in (draft, adaspa):
        first = [cell for cell in row.cells if cell.step == 0]
        assert {(cell.phase, cell.reason) for cell in first} == {("dense", "schedule")}
        assert row.summary["density"]["sparse_calls"] < 0.9
        # Steps 1 to 3 of 4 are the method's.
        full, sparse = (row.summary["density"][name] for name in ("full_run", "sparse_calls"))
        assert full == pytest.approx(0.25 + 0.75 * sparse)
    assert draft.summary["density"]["sparse_calls"] == pytest.approx(0.3, abs=0.06)
    assert {"refresh", "sparse"} <= {cell.phase for cell in adaspa.cells}


def test_videos_are_those_that_generate_makes(folder: Path, result: Comparison, tmp_path: Path) -> None:
    for i, label, method in ((0, "dense", ["dense"]), (1, "draft-0.3", ["draft", "--density", "0.3"])):
        own = tmp_path / f"{label}.mp4"
        asked = [*SIZE, "--prompt", PROMPTS[i], "--seed", 5 + i, "--method", *method, "--output", own]
        asked += [] if label == "dense" else ["--schedule", "dense 0-25%"]
        done = run("generate", *asked)
        assert done.exit_code == 0, done.output
        (row,) = (row for row in result.rows if row.label == label)
        assert own.read_bytes() == (folder / row.clips[i].file).read_bytes()
    assert result.seeds == [5, 6]
    assert result.prompts == PROMPTS


def test_times_of_parts_are_within_the_whole(result: Comparison) -> None:
    for row in result.rows:
        for clip in row.clips:
            seconds = {name: taken[0] for name, taken in clip.seconds.items()}
            assert 0 <= seconds["planning"] < seconds["attention"] < seconds["transformer"] < seconds["total"]
            assert {len(taken) for taken in clip.seconds.values()} == {1}
    draft, dense = result.rows[2], result.rows[0]
    ratios = [
        d.seconds["total"][0] / c.seconds["total"][0] for d, c in zip(dense.clips, draft.clips, strict=True)
    ]
    assert draft.summary["speed_up"]["ratios"] == pytest.approx(ratios)
    assert draft.clips[0].seconds["planning"][0] > 0


def test_the_table_has_a_line_for_each_video(folder: Path, result: Comparison) -> None:
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["row"] for row in rows] == [
        *["dense"] * 2, *["noise-floor"] * 2, *["draft-0.3"] * 2, "radial-0.3", *["adaspa-0.3"] * 2,
    ]  # fmt: skip
    assert rows[6]["refused"] == result.rows[3].refused
    assert rows[5]["prompt"] == PROMPTS[1]
    assert float(rows[5]["psnr"]) == result.rows[2].clips[1].quality["psnr"]
    assert rows[0]["psnr"] == ""
    mean = (float(rows[4]["psnr"]) + float(rows[5]["psnr"])) / 2
    assert result.rows[2].summary["psnr"]["mean"] == pytest.approx(mean)
    low, high = result.rows[2].summary["psnr"]["interval"]
    assert low <= mean <= high


def test_error_pictures_show_where(folder: Path, result: Comparison) -> None:
    dense = torch.full((1, 2, 3, 3), 100, dtype=torch.uint8)
    frames = dense.clone()
    frames[0, 0, 0] = torch.tensor([100, 90, 100])
    frames[0, 1, 2] = torch.tensor([0, 100, 250])
    brightness = error_picture(frames, dense).float().mean(-1)[0]
    assert brightness[0, 1] == brightness[1, 0] == 0
    assert 0 < brightness[0, 0] < brightness[1, 2]
    whole = dense + torch.tensor(256 // ERROR_GAIN, dtype=torch.uint8)
    assert torch.equal(error_picture(whole, dense)[0, 0, 0], error_picture(frames, dense)[0, 1, 2])
    clip = result.rows[2].clips[0]
    video, errors = read_video(folder / clip.file), read_video(folder / clip.error_file)
    assert video.shape == errors.shape == (9, 64, 96, 3)
    assert errors.max() > 20


def test_thumbnails_are_the_plans_that_ran(result: Comparison) -> None:
    draft = result.rows[2].masks
    assert {mask.step for mask in draft} == {2}  # of 1, 2, 3
    assert {(mask.layer, mask.branch) for mask in draft} == {
        (i, b) for i in range(8) for b in ("cond", "uncond")
    }
    for layer in range(8):
        heads = [h for mask in draft if (mask.layer, mask.branch) == (layer, "cond") for h in mask.heads]
        assert sorted(heads) == [0, 1, 2, 3]
    cells = {(c.layer, c.branch): c for c in result.rows[2].cells if c.step == 2}
    for mask in draft:
        picture = _picture(mask.image)
        assert set(np.unique(picture)) == {0, 255}
        known = cells[mask.layer, mask.branch].heads
        assert mask.density == pytest.approx(known[mask.heads[0]] if len(known) > 1 else known[0], abs=1e-4)


class _Session:
    """A session of one layer."""

    def __init__(self) -> None:
        self.watches: list[Any] = []
        self.parts: list[Any] = []


def test_thumbnails_of_many_small_blocks() -> None:
    """A plan for each token, heads that share a plan, and a batch whose items differ."""
    layout = TokenLayout((1, 10, 13))
    method = METHODS["window"](block=1)  # type: ignore[call-arg]
    call = Call.standalone(layout, heads=3, step=None).at(name="transformer/0")
    call = call.at(order=method.order(call))
    keep = torch.zeros(2, 3, 130, 26, dtype=torch.bool)
    keep[0] = True
    keep[1, :2, :, :13] = True
    keep[1, 2, :65] = True
    with PlanMasks(_Session()) as masks:  # type: ignore[arg-type]
        masks.executed(Plan.from_blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool), 128), call)  # a pooled part
        masks.executed(Plan.from_blocks(keep, (1, 5)), call)
        masks.executed(Plan.from_blocks(~keep, (1, 5)), call)  # a later part of the same call
    both, last = masks.read()
    assert (both.heads, last.heads) == ([0, 1], [2])
    assert both.density == last.density == 0.5
    picture = _picture(both.image)
    assert picture.shape == (64, 26)
    assert (picture[:, :13] == 0).all()
    assert (picture[:, 13:] == 255).all()
    assert _picture(last.image)[0, 0] == 0
    assert _picture(last.image)[-1, -1] == 255


def _picture(image: str) -> Any:
    return np.array(Image.open(io.BytesIO(base64.b64decode(image.split(",")[1]))))


def test_rounds_alternate_and_files_of_before_go(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = module.timed_run

    def logged(*arguments: Any) -> Any:
        order.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(module, "timed_run", logged)
    first = ["--methods", "window,random", "--densities", "0.5"]
    small = ["--num-frames", "5", "--steps", "2", "--output-dir", tmp_path, "--schedule", "always"]
    done = run("compare", *SIZE, *small, *first, "--rounds", "3")
    assert done.exit_code == 0, done.output
    rows = ["dense", "noise-floor", "window-0.5", "random-0.5"]
    assert order == [*rows, *rows[::-1], *rows]
    result = Comparison.load(tmp_path / "results.json")
    assert [len(row.clips[0].seconds["total"]) for row in result.rows] == [3] * 4
    assert "(" in (done := run("compare", *SIZE, *small, *first, "--rounds", "2")).output
    assert "one run each" not in done.output
    keep = tmp_path / "videos" / "mine.mp4"
    keep.write_bytes(b"not of a comparison")
    stale = tmp_path / result.rows[3].clips[0].file
    assert stale.exists()
    done = run("compare", *SIZE, *small, "--methods", "window", "--densities", "0.5")
    assert done.exit_code == 0, done.output
    assert not stale.exists()
    assert keep.exists()
    assert [row.label for row in Comparison.load(tmp_path / "results.json").rows] == rows[:3]


def test_the_untimed_step_runs_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a schedule may keep the first step dense: what it loads and compiles must not be timed."""
    seen: list[str] = []
    real = module.Setting.attach

    def logged(self: Any, pipe: Any, schedule: str = "") -> Any:
        session = real(self, pipe, schedule)
        seen.append(str(session.schedule))
        return session

    monkeypatch.setattr(module.Setting, "attach", logged)
    small = ["--num-frames", "5", "--steps", "2", "--output-dir", tmp_path]
    assert run("compare", *SIZE, *small, "--methods", "draft", "--schedule", "dense 0-50%").exit_code == 0
    dense = "dense 0-100%"
    assert seen == [dense, "always", "always", dense, "always", "dense 0-50%"]


def test_a_stop_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "results.json").read_bytes()

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "timed_run", stopped)
    done = compared(folder, "--methods", "window", "--densities", "0.5")
    assert done.exit_code == 130
    assert "stopped; there are no results" in done.output
    assert (folder / "results.json").read_bytes() == before
    assert not list(folder.rglob(".*"))


def test_images(tmp_path: Path) -> None:
    model = tmp_path / "random-chroma"
    text = {"text_encoder": tiny_text.t5(16), "tokenizer": tiny_text.tokenizer()}
    vae = tiny_images.vae(1)
    pipe = tiny_images.pipeline("ChromaPipeline", CASES["chroma"].model(), vae=vae, **text)
    pipe.save_pretrained(model)
    out = tmp_path / "out"
    size = ["--height", "40", "--width", "48", "--steps", "3", "--prompt", "a cat", "--output-dir", out]
    own = ["--methods", "draft,radial", "--param", "draft.pool=(2, 3)", "--schedule", "always"]
    done = run("compare", "--model", model, *size, *own)
    assert done.exit_code == 0, done.output
    result = Comparison.load(out / "results.json")
    _, _, draft, radial = result.rows
    assert "does not apply to" in radial.refused
    assert draft.clips[0].file == "images/draft/0000-a-cat.png"
    assert "pool=(2, 3)" in draft.method
    with Image.open(out / draft.clips[0].file) as image:
        assert image.size == (48, 40)
    assert draft.summary["density"]["sparse_calls"] < 0.95
    assert "attributes" not in draft.clips[0].quality
    assert draft.summary["psnr"]["interval"] is None
    timed = run("bench", "generate", "--model", model, *size[:-2], "--param", "pool=(2, 3)", "--rounds", "1")
    assert timed.exit_code == 0, timed.output
    assert "draft" in timed.output
    assert "fps" not in json.loads((out / "results.json").read_text())["settings"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "radial,nope"], "--method must be one of auto, dense"),
        (["--methods", "dense"], "--methods dense: dense is the first row of every comparison"),
        (["--methods", "draft,,"], "--methods must be names with commas between them, got 'draft,,'"),
        (["--methods", "draft", "--densities", "0.2,x"], "--densities must be numbers with commas"),
        (["--methods", "draft", "--densities", "0"], "--density must be above 0 and at most 1, got 0"),
        (["--methods", "draft,draft"], "--methods and --densities come to draft twice"),
        (["--methods", "draft", "--param", "block=3"], "--param must be METHOD.NAME=VALUE with one of"),
        (["--methods", "draft", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--methods", "draft", "--protocol", "mine"], "unknown protocol 'mine'"),
        (["--methods", "radial", "--densities", "0.01"], "radial-0.01: RadialProcessor"),
        (["--methods", "draft", "--prompts", "gone.txt"], "--prompts gone.txt cannot be read"),
        (["--methods", "draft", "--model", "wan2.1"], "--prompt is missing: what should wan2.1 show?"),
    ],
)
def test_what_cannot_be_is_told_first(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "placed_pipeline", None)  # no weights are loaded
    done = run("compare", "--output-dir", tmp_path / "out", *SIZE, *more)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_missing_package_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else object())
    done = run("compare", "--output-dir", tmp_path / "out", "--methods", "draft")
    assert done.exit_code == 2
    assert "jinja2 is not installed: pip install 'dit-sparse[eval]'" in done.output
