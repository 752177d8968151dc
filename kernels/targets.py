"""The GPUs the Triton kernels are made for, and what compiling a kernel ahead of time needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """One architecture.

    Attributes:
        shared: Bytes of shared memory one program may use.
        fp8: Its tensor cores multiply 8-bit floats.
        shared_total: Bytes of shared memory of one multiprocessor.
        warps, programs: How many of them one multiprocessor holds at most.
    """

    name: str
    shared: int
    fp8: bool
    shared_total: int
    warps: int
    programs: int

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")


# From "Technical Specifications per Compute Capability" of the CUDA programming guide; for gfx942 from LLVM's
# AMDGPU target (AMDGPUBaseInfo.cpp), with a wavefront as a warp.
TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", 163 << 10, fp8=False, shared_total=164 << 10, warps=64, programs=32),
        Target("sm_89", 99 << 10, fp8=True, shared_total=100 << 10, warps=48, programs=24),
        Target("sm_90", 227 << 10, fp8=True, shared_total=228 << 10, warps=64, programs=32),
        Target("sm_100", 227 << 10, fp8=True, shared_total=228 << 10, warps=64, programs=32),
        Target("sm_120", 99 << 10, fp8=True, shared_total=100 << 10, warps=48, programs=24),
        Target("gfx942", 64 << 10, fp8=True, shared_total=64 << 10, warps=32, programs=16),
    )
}


@cache
def target_of(device: torch.device) -> Target:
    """The target that stands for a device: the newest one that is no newer and needs no more shared memory.

    On the CPU, where kernels run under Triton's interpreter, the smallest one.
    """
    smallest = TARGETS["sm_89"]
    if device.type != "cuda":
        return smallest
    if torch.version.hip is not None:
        return TARGETS["gfx942"]
    gpu = torch.cuda.get_device_properties(device)
    capability = 10 * gpu.major + gpu.minor
    shared = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]
    known = [t for t in TARGETS.values() if not t.is_amd and t.shared <= shared]
    target = ([smallest] + [t for t in known if int(t.name.removeprefix("sm_")) <= capability])[-1]
    # GPUs older than any such target (RTX 3090, T4) borrow the smallest, with what they have themselves.
    return replace(target, shared=min(target.shared, shared), fp8=target.fp8 and capability >= 89)


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel: what ``triton.compile`` needs, and what is expected of the result."""

    kernel: Any
    label: str
    types: dict[str, str]
    """Triton type of every argument that is not a constexpr: {"p_q": "*bf16", "S": "i32"}."""
    constants: dict[str, Any]
    aligned: frozenset[str] = field(default_factory=frozenset)
    """Arguments that are multiples of 16 in every model: pointers and the strides of tokens and heads."""
    num_warps: int = 4
    num_stages: int = 2
    tensor_cores: bool = True
    """Whether its inner loop must use the tensor cores."""
    may_spill: bool = False
    """Whether spills are accepted: False for every forward kernel."""
    in_ci: bool = False
    """Whether continuous integration compiles it again."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of ``triton.compile``."""
