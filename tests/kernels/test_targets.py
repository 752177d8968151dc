"""Devices are mapped to the targets their kernels are tuned for."""

from types import SimpleNamespace

import pytest
import torch

from dit_sparse.kernels.targets import TARGETS, target_of


@pytest.mark.parametrize(
    ("capability", "shared", "name", "fp8"),
    [
        ((7, 5), 64 << 10, "sm_89", False),  # T4: older than every target
        ((8, 0), 163 << 10, "sm_80", False),
        ((8, 6), 99 << 10, "sm_89", False),  # RTX 3090: newer than sm_80, but with less shared memory
        ((8, 7), 163 << 10, "sm_80", False),
        ((8, 9), 99 << 10, "sm_89", True),
        ((9, 0), 227 << 10, "sm_90", True),
        ((10, 3), 227 << 10, "sm_100", True),
        ((12, 1), 99 << 10, "sm_120", True),
    ],
)
def test_target_of_a_gpu(monkeypatch, capability, shared, name, fp8):
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], shared_memory_per_block_optin=shared
    )
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    target = target_of.__wrapped__(torch.device("cuda", 0))
    assert (target.name, target.shared, target.fp8) == (name, shared, fp8)


def test_target_of_the_interpreter():
    assert target_of(torch.device("cpu")) == TARGETS["sm_89"]
