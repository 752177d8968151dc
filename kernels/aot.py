"""Compile the Triton kernels ahead of time, for GPUs that need not be there.

    python -m dit_sparse.kernels.aot --targets sm_80,sm_90

prints one line per target and configuration: registers, shared memory and the tensor-core instruction used.
A process under TRITON_INTERPRET=1 cannot compile.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_sparse.kernels.block_sparse import config, forward_kernel, precision

# Shared memory one program may use, in bytes, from NVIDIA's table of compute capabilities.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSOR_CORE = re.compile(r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync)\b")


@dataclass(frozen=True)
class Case:
    """One configuration: dtype, head dim and (query, key) block."""

    dtype: str
    head_dim: int
    block: tuple[int, int]
    has_valid: bool = True


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave. Registers are per thread, shared memory is in bytes."""

    target: str
    case: Case
    registers: int
    stack: int
    shared: int
    tensor_core: str


CASES = (Case("bf16", 128, (128, 128)), Case("bf16", 64, (64, 64)))


def compile_forward(target: str, case: Case) -> Compiled:
    """Compile the forward kernel.

    Args:
        target: One of :data:`SHARED`.

    Raises:
        ValueError: An unknown target or dtype.
        RuntimeError: The process runs under the Triton interpreter.
    """
    if target not in SHARED or case.dtype not in DTYPES:
        raise ValueError(
            f"unknown target {target!r} or dtype {case.dtype!r}; "
            f"known are {', '.join(SHARED)}; {', '.join(DTYPES)}"
        )
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels can only be compiled in a process without it")
    dtype = DTYPES[case.dtype]
    tiles = config(case.head_dim, dtype.itemsize, case.block, SHARED[target])
    constants: dict[str, Any] = {
        "D": case.head_dim,
        "BQ": case.block[0],
        "BK": case.block[1],
        "TILE_M": tiles.tile_m,
        "TILE_N": tiles.tile_n,
        "TILE_D": tiles.tile_d,
        "HAS_VALID": case.has_valid,
        "PRECISION": precision(dtype),
    }
    signature = {name: _type(name, case.dtype, constants) for name in forward_kernel.arg_names}
    # Allocations and the strides of whole heads and tokens are multiples of 16 in every model.
    aligned = [n for n in forward_kernel.arg_names if n.startswith("p_") or n[:3] in ("s_q", "s_k", "s_v")]
    attrs = {(forward_kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    kernel = triton.compile(
        ASTSource(forward_kernel, signature, constants, attrs),
        target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
    ptx = kernel.asm["ptx"]
    registers, stack = _resources(kernel.asm["cubin"])
    found = TENSOR_CORE.search(ptx)
    return Compiled(target, case, registers, stack, kernel.metadata.shared, found[1] if found else "none")


def _type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name.startswith("p_"):
        kinds = {"p_lse": "*fp32", "p_list": "*i32", "p_full": "*i32", "p_count": "*i32", "p_valid": "*i1"}
        return kinds.get(name, f"*{dtype}")
    return "fp32" if name == "SCALE_LOG2" else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack (where spills go), out of cuobjdump."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(registers[1]), int(stack[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time.")
    parser.add_argument(
        "--targets", default="sm_80,sm_90", help=f"comma-separated, out of {', '.join(SHARED)}"
    )
    print("target,dtype,head_dim,block,registers,stack_bytes,shared_bytes,tensor_core")
    for target in parser.parse_args().targets.split(","):
        for case in CASES:
            c = compile_forward(target, case)
            block = "x".join(map(str, case.block))
            row = (target, case.dtype, case.head_dim, block, c.registers, c.stack, c.shared, c.tensor_core)
            print(*row, sep=",")


if __name__ == "__main__":
    main()
