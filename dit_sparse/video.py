"""Videos and images as files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor


def write_frames(path: Path, frames: Tensor, fps: int | None) -> None:
    """uint8 [F, H, W, 3] as a video, or, without ``fps``, the only frame as an image."""
    if fps is not None:
        write_video(path, frames, fps)
        return
    from PIL import Image

    Image.fromarray(frames[0].numpy()).save(path)


def write_video(path: Path, frames: Tensor, fps: int) -> None:
    """H.264 in 4:2:0, which every player knows, at a high quality: uint8 [F, H, W, 3]."""
    _, height, width, _ = frames.shape
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec="libx264",
        quality=None,
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=["-crf", "12", "-movflags", "+faststart"],
    )
    writer.send(None)
    try:
        for frame in frames:
            writer.send(frame.contiguous().numpy().tobytes())
    finally:
        writer.close()


def read_video(path: Path) -> Tensor:
    """The frames of a video or image as a player shows them: uint8 [F, H, W, 3].

    Raises:
        ValueError: The file cannot be read.
    """
    if path.suffix.lower() == ".png":
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                return torch.from_numpy(np.array(image.convert("RGB")))[None]
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    reader = imageio_ffmpeg.read_frames(str(path))
    try:
        width, height = next(reader)["size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).strip().splitlines()[-1]}") from None
    return torch.from_numpy(np.stack(frames))


@contextmanager
def staged() -> Iterator[Callable[[Path], Path]]:
    """Gives temporary names beside the final ones; renames all at the end, removes all upon failure."""
    partials: dict[Path, Path] = {}

    def stage(path: Path) -> Path:
        partials[path] = _partial(path)
        return partials[path]

    try:
        yield stage
        for path, partial in partials.items():
            partial.replace(path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def check_writable(flag: str, path: Path) -> None:
    """Make and remove a file where :func:`staged` would; folders that are missing are made and stay.

    Raises:
        ValueError: A file cannot appear at this path; the message starts with ``flag``.
    """
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder")
    trial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except FileExistsError:
        raise ValueError(f"{flag} {path} cannot be written: {path.parent} is no folder") from None
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}") from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
