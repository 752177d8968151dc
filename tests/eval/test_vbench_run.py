"""VBench's videos, and the official package, which stand-ins play that check what they are given."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dit_sparse.cli import app
from dit_sparse.eval.vbench import DIMENSIONS, read_results, read_videos, rows_of, score
from dit_sparse.eval.vbench_suite import jobs, read_suite

SUITE = [
    {"prompt_en": "a red circle moving left on a gray background", "dimension": ["subject_consistency"]},
    {"prompt_en": "In a still frame, a stop sign's café", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a blue square",
        "dimension": ["color", "imaging_quality"],
        "auxiliary_info": {"color": "x"},
    },
    {"prompt_en": "a blue square", "dimension": ["overall_consistency"]},
]
SIZE = ["--num-frames", "5", "--steps", "2", "--height", "32", "--width", "48"]

# What `vbench` is started by and what it then does, as far as an outsider sees: arguments in, files out.
LAUNCHER = """
import runpy, sys
flags = sys.argv[1:4]
assert flags[:2] == ["--standalone", "--nproc_per_node"], flags
open(sys.argv[4] + ".gpus", "w").write(flags[2])
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
EVALUATE = """
import argparse, json, os, sys
parser = argparse.ArgumentParser()
for name in ("videos_path", "output_path", "full_json_dir", "mode", "imaging_quality_preprocessing_mode"):
    parser.add_argument("--" + name, required=True)
parser.add_argument("--dimension", nargs="+", required=True)
args = parser.parse_args()
assert args.imaging_quality_preprocessing_mode == "longer"
(dimension,) = args.dimension
print("evaluating", dimension)
if dimension == "color":
    sys.exit("no CUDA device")
names = sorted(os.listdir(args.videos_path))
suffix = os.path.splitext(names[0])[1]
if args.mode == "vbench_standard":
    suite = [e for e in json.load(open(args.full_json_dir)) if dimension in e["dimension"]]
    wanted = [e["prompt_en"] + "-" + str(i) + suffix for e in suite for i in range(5)]
    names = [name for name in wanted if name in names]
scale = 100 if dimension == "imaging_quality" else 1
scores = [0.5 + 0.01 * i for i in range(len(names))]
paths = [os.path.join(args.videos_path, name) for name in names]
videos = [{"video_path": path, "video_results": scale * score} for path, score in zip(paths, scores)]
if dimension != "overall_consistency":
    result = {dimension: [sum(scores) / len(scores), videos]}
    file = "results_2026-11-29-00:00:00_eval_results.json"
    json.dump(result, open(os.path.join(args.output_path, file), "w"))
json.dump(names, open(os.path.join(args.output_path, "results_x_full_info.json"), "w"))
"""
FILTER = """
import os, shutil, sys
def main():
    command, one, videos, two, result = sys.argv[1:]
    assert (command, one, two) == ("static_filter", "--videos_path", "--result_path")
    target = os.path.join(result, "filtered_videos")
    os.makedirs(target)
    still = [n for n in sorted(os.listdir(videos)) if "still" in n and int(n[:-4].split("-")[-1]) % 5 == 4]
    for i, name in enumerate(still):
        shutil.copy(os.path.join(videos, name), os.path.join(target, name.rsplit("-", 1)[0] + f"-{i}.mp4"))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that finds stand-ins of torch's launcher and of vbench."""
    site = tmp_path_factory.mktemp("environment")
    for file, text in {
        "torch/__init__.py": "",
        "torch/distributed/__init__.py": "",
        "torch/distributed/run.py": LAUNCHER,
        "vbench/__init__.py": "",
        "vbench/cli/__init__.py": "",
        "vbench/cli/vbench.py": FILTER,
        "vbench/launch/evaluate.py": EVALUATE,
        "vbench/VBench_full_info.json": json.dumps(SUITE),
    }.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)
    return interpreter(site / "python", site)


def interpreter(path: Path, site: Path) -> Path:
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", "vbench", *map(str, arguments)])


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with the names that VBench asks for; what is in them nobody looks at."""
    folder = tmp_path_factory.mktemp("videos")
    for job in jobs_of_suite(folder.parent):
        (folder / f"{job.name}.mp4").write_bytes(b"")
    return folder


def suite_file(folder: Path) -> Path:
    path = folder / "suite.json"
    path.write_text(json.dumps(SUITE))
    return path


def jobs_of_suite(folder: Path, **more: Any) -> list[Any]:
    return jobs(suite_file(folder), **more)


def test_names_counts_and_seeds(tmp_path: Path) -> None:
    found = jobs_of_suite(tmp_path, seed=1000)
    assert len(found) == 5 + 25 + 5
    assert len({job.seed for job in found}) == len(found)
    names = [job.name for job in found]
    assert names[:5] == [f"{SUITE[0]['prompt_en']}-{i}" for i in range(5)]
    assert names[29] == "In a still frame, a stop sign's café-24"
    assert names[-1] == "a blue square-4"  # two entries, one video
    # Seeds are those of the whole suite, whatever is asked for and whoever makes it.
    part = jobs_of_suite(tmp_path, seed=1000, dimensions=["color", "overall_consistency"])
    assert part == found[30:]
    shards = [jobs_of_suite(tmp_path, seed=1000, shard=(i, 3)) for i in range(3)]
    assert sorted((job for shard in shards for job in shard), key=found.index) == found
    with pytest.raises(ValueError, match="--shard 35/36 of 35 videos is empty"):
        jobs_of_suite(tmp_path, shard=(35, 36))


def test_rewritten_prompts_stand_beside_their_own(tmp_path: Path) -> None:
    lines = tmp_path / "longer.txt"
    lines.write_text("A circle, red.\nA sign.\n# A square\nAnother square\n")
    found = jobs_of_suite(tmp_path, augmented=lines)
    assert [found[i].prompt for i in (0, 5, 30)] == ["A circle, red.", "A sign.", "# A square"]
    assert found[5].name.startswith("In a still frame")
    part = jobs_of_suite(tmp_path, augmented=lines, dimensions=["overall_consistency"])
    assert [job.prompt for job in part] == ["Another square"] * 5
    for text, message in (
        ("a\nb\nc\n", "has 3 lines for 4 prompts of the suite"),
        ("a\nb\nc\nd\ne", "has 5 lines for 4 prompts of the suite"),
        ("a\n\nc\nd\n", "line 2 is empty"),
    ):
        lines.write_text(text)
        with pytest.raises(ValueError, match=message):
            jobs_of_suite(tmp_path, augmented=lines)


def test_what_is_no_suite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    for content, message in (
        ([{"prompt": "a"}], "is no prompt suite of VBench"),
        ([{"prompt_en": "a/b", "dimension": ["color"]}], "'a/b' cannot be the name of a file"),
        ([{"prompt_en": "a", "dimension": ["colour"]}], "--dimension must be one of subject_consistency"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_suite(path)


def test_videos_of_the_bundled_model(python: Path, tmp_path: Path) -> None:
    """Two shards make what one process makes, and a finished video is not made again."""
    asked = ["generate", "--vbench-python", python, *SIZE, "--dimension", "subject_consistency"]
    asked += ["--method", "window", "--density", "0.5", "--schedule", "always", "--seed", "7"]
    for i in range(2):
        done = invoke(*asked, "--output-dir", tmp_path / "shards", "--shard", f"{i}/2")
        assert done.exit_code == 0, done.output
    done = invoke(*asked, "--output-dir", tmp_path / "whole")
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (tmp_path / "whole/videos").iterdir())
    assert names == [f"{SUITE[0]['prompt_en']}-{i}.mp4" for i in range(5)]
    contents = [
        [(tmp_path / part / "videos" / n).read_bytes() for n in names] for part in ("shards", "whole")
    ]
    assert contents[0] == contents[1]
    assert len(set(contents[0])) == 5  # five seeds
    manifest = json.loads((tmp_path / "whole/manifests" / names[3].replace(".mp4", ".json")).read_text())
    assert manifest["seed"] == 10
    assert manifest["density"]["sparse_calls"] < 0.9
    kept = (tmp_path / "whole/videos" / names[0]).stat().st_mtime_ns
    (tmp_path / "whole/videos" / names[1]).unlink()
    done = invoke(*asked, "--output-dir", tmp_path / "whole")
    assert "5 of 5 prompts, 1 made now" in done.output
    assert (tmp_path / "whole/videos" / names[0]).stat().st_mtime_ns == kept
    done = invoke(*asked, "--output-dir", tmp_path / "whole", "--steps", "3")
    assert done.exit_code == 2
    assert "was made with settings.num_inference_steps 2 and not 3" in done.output
    # Flickering for real, beside what a few lines of arithmetic say.
    result = tmp_path / "results" / "temporal_flickering_eval_results.json"
    done = invoke("flickering", tmp_path / "whole/videos", "--output", result)
    assert done.exit_code == 0, done.output
    import imageio.v3 as imageio
    import numpy as np

    scores = []
    for name in names:
        frames = imageio.imread(tmp_path / "whole/videos" / name, plugin="FFMPEG").astype(np.float64)
        scores.append(1 - np.abs(np.diff(frames, axis=0)).mean() / 255)
    assert read_results(result)["temporal_flickering"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert 0.8 < np.mean(scores) < 1


def test_the_package_is_driven_dimension_by_dimension(python: Path, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    wanted = ["subject_consistency", "color", "temporal_flickering", "overall_consistency", "imaging_quality"]
    flags = [part for name in wanted for part in ("--dimension", name)]
    asked = ["run", videos, "--vbench-python", python, "--output-dir", out, *flags, "--gpus", "2"]
    done = invoke(*asked)
    assert done.exit_code == 2
    assert (
        "2 of 5 dimensions failed: color (exit code 1); overall_consistency (it wrote no result)"
        in done.output
    )
    files = sorted(path.name for path in out.iterdir())
    assert files.pop(0) == "about.json"
    assert files == [
        f"{name}_eval_results.json"
        for name in ("imaging_quality", "subject_consistency", "temporal_flickering")
    ]
    (still,) = json.loads((out / files[2]).read_text()).values()
    assert [Path(video["video_path"]).name[-6:] for video in still[1]] == [f"-{i}.mp4" for i in range(5)]
    assert (python.parent / "vbench/launch/evaluate.py.gpus").read_text() == "2"
    order = [line.split()[0] for line in done.output.splitlines() if " of 5)" in line]
    assert order[-1] == "temporal_flickering"  # its filter's weights come with another dimension
    assert read_videos(out / files[2]) == {}  # the filter numbers anew: no pairs with another folder
    assert len(read_videos(out / files[0])["imaging_quality"]) == 5
    before = (out / files[0]).stat().st_mtime_ns
    again = invoke(*asked)
    assert "2 of 2 dimensions failed" in again.output
    assert (out / files[0]).stat().st_mtime_ns == before
    elsewhere = shutil.copytree(videos, tmp_path / "others")
    other = invoke("run", elsewhere, *asked[2:])
    assert other.exit_code == 2
    assert f"has results with videos {videos} and not {elsewhere}" in other.output
    own = invoke(
        "run", videos, "--vbench-python", python, "--output-dir", tmp_path / "own", "--mode", "custom_input",
        "--dimension", "imaging_quality",
    )  # fmt: skip
    assert own.exit_code == 0, own.output
    assert len(read_videos(tmp_path / "own/imaging_quality_eval_results.json")["imaging_quality"]) == 35


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mode", "mine"], "--mode must be one of vbench_standard, custom_input, got 'mine'"),
        (["--dimension", "colour"], "--dimension must be one of"),
        (
            ["--mode", "custom_input", "--dimension", "color"],
            "--dimension color is for videos of VBench's own",
        ),
    ],
)
def test_what_cannot_be_is_told_first(
    more: list[str], message: str, python: Path, videos: Path, tmp_path: Path
) -> None:
    done = invoke("run", videos, "--vbench-python", python, "--output-dir", tmp_path, *more)
    assert done.exit_code == 2
    assert message in done.output


def test_videos_that_the_filter_drops_are_told(python: Path, videos: Path, tmp_path: Path) -> None:
    """And videos that another dimension loses are a failure."""
    (python.parent / "vbench/cli/vbench.py").write_text(FILTER.replace("% 5 == 4", "== 4"))
    asked = ["run", videos, "--vbench-python", python, "--output-dir", tmp_path / "out"]
    done = invoke(*asked, "--dimension", "temporal_flickering")
    (python.parent / "vbench/cli/vbench.py").write_text(FILTER)
    assert done.exit_code == 0, done.output
    assert "warning: 1 of 5 videos of temporal_flickering were evaluated" in done.output
    launch = python.parent / "vbench/launch/evaluate.py"
    launch.write_text(EVALUATE.replace("range(5)", "range(4)"))
    done = invoke(*asked, "--dimension", "subject_consistency")
    launch.write_text(EVALUATE)
    assert done.exit_code == 2
    assert "subject_consistency (4 of 5 videos of subject_consistency were evaluated)" in done.output


def test_missing_videos_and_environments_are_named(python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in (0, 1, 2, 4):
        (folder / f"{SUITE[0]['prompt_en']}-{i}.mp4").touch()
    asked = ["run", folder, "--output-dir", tmp_path / "out", "--dimension", "subject_consistency"]
    done = invoke(*asked, "--vbench-python", python)
    assert f"lacks 1 videos for subject_consistency: {SUITE[0]['prompt_en']}-3.mp4" in done.output
    (folder / "manifest.json").touch()
    assert "must hold .mp4 alone" in invoke(*asked, "--vbench-python", python).output
    nothing = interpreter(tmp_path / "python", tmp_path)
    assert (
        "has no vbench"
        in invoke(*asked[:1], videos_free(tmp_path), *asked[2:], "--vbench-python", nothing).output
    )
    gone = invoke(*asked[:1], videos_free(tmp_path), *asked[2:], "--vbench-python", tmp_path / "gone")
    assert "does not run Python" in gone.output
    assert gone.exit_code == 2


def videos_free(folder: Path) -> Path:
    path = folder / "free"
    path.mkdir(exist_ok=True)
    return path


def result_file(folder: Path, scores: dict[str, list[float]], unit: float = 1) -> Path:
    folder.mkdir(exist_ok=True)
    for name, values in scores.items():
        videos = [{"video_path": f"/x/{i}.mp4", "video_results": unit * v} for i, v in enumerate(values)]
        content = {name: [sum(values) / len(values), videos]}
        (folder / f"{name}_eval_results.json").write_text(json.dumps(content))
    return folder


def test_scores_beside_the_first_folder(tmp_path: Path) -> None:
    dense = result_file(tmp_path / "dense", {"color": [0.5, 0.7, 0.9], "scene": [0.4, 0.4]})
    sparse = result_file(tmp_path / "sparse", {"color": [0.4, 0.6, 0.8]})
    floor = result_file(tmp_path / "floor", {"color": [0.5, 0.7, 0.9]}, unit=100)
    found = score([dense, sparse], floor=floor)["rows"]
    difference = found[str(sparse)]["minus_first"]["color"]
    assert difference["mean"] == pytest.approx(-0.1)
    assert difference["interval"] == pytest.approx((-0.1, -0.1))
    assert found["noise floor"]["minus_first"]["color"]["interval"] == pytest.approx((0, 0))
    assert "scene" not in found[str(sparse)]["minus_first"]
    scene = DIMENSIONS["scene"]
    assert found[str(dense)]["normalised"]["scene"] == pytest.approx(0.4 / scene.high)
    assert set(found[str(dense)]["totals"].values()) == {None}
    done = invoke("score", dense, sparse, "--floor", floor, "--output", tmp_path / "score.json")
    assert done.exit_code == 0, done.output
    assert "not complete" in " ".join(done.output.split())
    assert json.loads((tmp_path / "score.json").read_text())["rows"].keys() == found.keys()
    fewer = result_file(tmp_path / "fewer", {"color": [0.4, 0.6]})
    part = score([dense, fewer])["rows"][str(fewer)]["minus_first"]["color"]
    assert (part["mean"], part["interval"]) == (pytest.approx(-0.2), None)  # other videos: no pairs
    lines = {line[0]: line[1:] for line in rows_of(score([dense, sparse]))[1]}
    assert list(lines)[:16] == list(DIMENSIONS)
    assert lines["scene"] == ("40.00", "-")
    (sparse / "a_eval_results.json").write_text(json.dumps({"color": [0.1, []]}))
    assert "has two results of color" in " ".join(invoke("score", dense, sparse).output.split())
    assert "has no *_eval_results.json" in invoke("score", videos_free(tmp_path)).output
