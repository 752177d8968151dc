"""The tables of FIDELITY.md: this project, arithmetic and two libraries agree on the same clips."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dit_sparse.eval import conventions
from dit_sparse.eval.conventions import BY_HAND, POOLED_BY_HAND, SSIM_PEERS, made_clips, wrapped_psnr
from dit_sparse.eval.fidelity import identical_frames, psnr, ssim


@pytest.mark.parametrize("name", BY_HAND)
def test_psnr_is_what_arithmetic_and_libraries_say(name: str) -> None:
    """To 1e-4 dB: errors are means of float32 squares."""
    a, b = made_clips()[name]
    for found in (psnr(a, b), conventions.torchmetrics_psnr(a, b), conventions.skimage_psnr(a, b)):
        assert found == pytest.approx(BY_HAND[name], abs=1e-4)
    assert psnr(a, b, "pooled") == pytest.approx(POOLED_BY_HAND[name], abs=1e-4)


@pytest.mark.parametrize("protocol", SSIM_PEERS)
@pytest.mark.parametrize("name", BY_HAND)
def test_ssim_is_what_its_peer_says(name: str, protocol: str) -> None:
    """To 2e-5: torchmetrics computes variances of 0..255 in float32."""
    a, b = made_clips()[name]
    _, peer = SSIM_PEERS[protocol]
    assert ssim(a, b, protocol) == pytest.approx(peer(a, b), abs=2e-5)


def test_bytes_that_wrap_see_nothing() -> None:
    clips = made_clips()
    for shift in (16, 32):
        a, b = clips[f"all pixels off by {shift}"]
        assert wrapped_psnr(a, b) == math.inf
        assert psnr(a, b) < 25
    unrelated = np.random.default_rng(1).integers(0, 256, (2, 2, 64, 64, 3), dtype=np.uint8)
    assert wrapped_psnr(*unrelated) > 27 > 8 > psnr(*unrelated)


def test_the_report_has_every_clip_and_protocol() -> None:
    a, b = made_clips()["half of the pixels off by 10"]
    assert identical_frames(*made_clips()["one frame of four off by 5"]) == 3
    text = conventions.report((a, b))
    for name in BY_HAND:
        assert text.count(f"| {name} |") == 2 + len(SSIM_PEERS)
    assert "| all pixels off by 16 | 24.0484 | 24.0484 | 24.0484 | 24.0484 |" in text
    assert "| inf |" in text
