"""``dit-sparse eval fidelity`` on files: videos, images, tensors, folders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from dit_sparse.cli import app
from dit_sparse.eval.fidelity import frame_psnr, psnr, ssim
from dit_sparse.eval.fidelity_files import compare, read
from dit_sparse.video import write_video


def clip(seed: int, noise: float = 0.0) -> Tensor:
    """uint8 [5, 32, 48, 3]: a smooth ramp, and noise on it."""
    ramp = torch.linspace(0.2, 0.8, 48).expand(5, 32, 48)[..., None].repeat(1, 1, 1, 3)
    generator = torch.Generator().manual_seed(seed)
    return (
        ((ramp + noise * torch.randn(ramp.shape, generator=generator)).clamp(0, 1) * 255)
        .round()
        .to(torch.uint8)
    )


def tensors(path: Path, frames: Tensor) -> Path:
    save_file({"frames": frames.contiguous()}, path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", "fidelity", *map(str, arguments)])


def test_tensors_lose_nothing_and_videos_are_what_a_player_shows(tmp_path: Path) -> None:
    a, b = clip(0), clip(1, 0.05)
    result = compare(tensors(tmp_path / "a.safetensors", a), [tensors(tmp_path / "b.safetensors", b)])
    row = result["rows"][str(tmp_path / "b.safetensors")]
    assert row["psnr"]["mean"] == pytest.approx(psnr(a, b), abs=1e-5)
    assert row["ssim"]["mean"] == pytest.approx(ssim(a, b), abs=1e-6)
    assert row["videos"]["."]["per_frame"]["psnr"] == pytest.approx(frame_psnr(a, b).tolist(), abs=1e-5)
    assert result["read_from"] == ["safetensors"]
    for name, frames in (("a.mp4", a), ("b.mp4", b)):
        write_video(tmp_path / name, frames, fps=8)
    shown = compare(tmp_path / "a.mp4", [tmp_path / "b.mp4"])["rows"][str(tmp_path / "b.mp4")]
    assert read(tmp_path / "b.mp4").shape == b.shape
    assert shown["psnr"]["mean"] != pytest.approx(row["psnr"]["mean"], abs=1e-3)  # the codec's loss
    assert shown["psnr"]["mean"] == pytest.approx(row["psnr"]["mean"], abs=3)


def test_an_image_is_a_video_of_one_frame(tmp_path: Path) -> None:
    a, b = clip(0)[0], clip(1, 0.05)[0]
    for name, frame in (("a.png", a), ("b.png", b)):
        Image.fromarray(frame.numpy()).save(tmp_path / name)
    row = compare(tmp_path / "a.png", [tmp_path / "b.png"])["rows"][str(tmp_path / "b.png")]
    assert row["psnr"]["mean"] == pytest.approx(psnr(a[None], b[None]), abs=1e-5)
    assert row["frames"] == 1


def test_folders_pair_up_prompts(tmp_path: Path) -> None:
    """Means with their intervals, the paired difference between two methods, and the noise floor."""
    levels = {"dense": 0.0, "good": 0.02, "bad": 0.05, "again": 0.002}
    for folder, noise in levels.items():
        (tmp_path / folder).mkdir()
        for i in range(6):
            base = clip(0).float() / 255 + 0.02 * i
            wiggle = (
                noise * (1 + i / 10) * torch.randn(base.shape, generator=torch.Generator().manual_seed(i))
            )
            frames = ((base + wiggle).clamp(0, 1) * 255).round().to(torch.uint8)
            tensors(tmp_path / folder / f"{i:02d}.safetensors", frames)
    output = tmp_path / "out.json"
    done = run(
        tmp_path / "dense", tmp_path / "good", tmp_path / "bad", "--floor", tmp_path / "again",
        "--output", output, "--protocol", "pooled",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    assert result["protocol"]["name"] == "pooled"
    assert "over all frames" in result["protocol"]["psnr"]
    good, bad = (result["rows"][str(tmp_path / name)] for name in ("good", "bad"))
    floor = result["rows"]["noise floor"]
    assert floor["psnr"]["mean"] > good["psnr"]["mean"] > bad["psnr"]["mean"]
    low, high = good["psnr"]["interval"]
    assert low < good["psnr"]["mean"] < high
    paired = bad["minus_first"]["psnr"]
    assert paired["mean"] == pytest.approx(bad["psnr"]["mean"] - good["psnr"]["mean"], abs=1e-6)
    # The prompts differ by more than the pairs do.
    assert paired["interval"][1] - paired["interval"][0] < 0.5 * (high - low)
    assert len(good["videos"]) == 6
    assert "noise floor" in done.output


def test_identical_frames_are_counted(tmp_path: Path) -> None:
    a = clip(0)
    same = tensors(tmp_path / "a.safetensors", a)
    result = run(same, same, "--output", tmp_path / "o.json")
    assert "no frame differs" in result.output
    assert "5 of 5" in result.output
    row = json.loads((tmp_path / "o.json").read_text())["rows"][str(same)]
    assert row["psnr"]["mean"] is None
    assert row["identical_frames"] == row["frames"] == 5


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    a = tensors(tmp_path / "a.safetensors", clip(0))
    small = tensors(tmp_path / "small.safetensors", clip(0)[:, :16])
    other = tmp_path / "other.safetensors"
    save_file({"video": clip(0)}, other)
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((a, tmp_path / "none.mp4"), "none.mp4 does not exist"),
        ((a, small), "differ in size"),
        ((a, other), "must hold one tensor 'frames', got ['video']"),
        ((a, broken), "broken.mp4 cannot be read"),
        ((a, tmp_path / "empty"), "is a folder"),
        ((tmp_path / "empty", a), "has no videos"),
        ((a, a, "--protocol", "mine"), "unknown protocol 'mine'"),
        ((a, a, "--output", tmp_path / "o.txt"), "--output must end in .json"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert message in lines[0]
