"""Compile the Triton kernels ahead of time, for GPUs that need not be there, and record what they cost.

    python -m dit_sparse.kernels.aot
        Compile what is not in RESOURCES.md yet, or from other sources, and write it: `make aot`.
    python -m dit_sparse.kernels.aot --check
        Compile the variants of continuous integration and compare with RESOURCES.md.
    python -m dit_sparse.kernels.aot --kernel block_sparse --targets sm_80,sm_90 --label "bf16 D128"
        Compile the variants of one file whose label has this text and print a line for each.

Each ends with an error if a kernel does not compile or breaks a rule of :func:`violations`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_sparse.kernels.disassembly import inner_loop
from dit_sparse.kernels.resources import (
    COLUMNS,
    FOLDER,
    KERNELS,
    Compiled,
    Key,
    Record,
    cells,
    read,
    render,
    sources,
)
from dit_sparse.kernels.targets import TARGETS, Target, Variant

RECORD = FOLDER / "RESOURCES.md"
PROCESSES = 2


def compile_variant(target: Target, variant: Variant) -> Compiled:
    """Compile one variant and read what it costs.

    Raises:
        RuntimeError: The process runs under the Triton interpreter.
        Exception: Whatever Triton and its assemblers raise for a kernel they cannot compile.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels can only be compiled in a process without it")
    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.types[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned}
    if target.is_amd:
        gpu = GPUTarget("hip", target.name, 64)
    else:
        gpu = GPUTarget("cuda", int(target.name.removeprefix("sm_")), 32)
    log = io.StringIO()
    # With an empty cache Triton runs ptxas -v; only that run tells about this very binary.
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(
            ASTSource(variant.kernel, signature, variant.constants, attributes),
            target=gpu,
            options={"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options},
        )
    meta = kernel.metadata
    if target.is_amd:
        text = kernel.asm["amdgcn"]
        return Compiled(
            warps=meta.num_warps,
            registers=_number(r"\.vgpr_count: +(\d+)", text),
            spill_stores=_sum(r"; (\d+)-byte Folded Spill", text),
            spill_loads=_sum(r"; (\d+)-byte Folded Reload", text),
            stack=_number(r"\.private_segment_fixed_size: +(\d+)", text),
            static_shared=_number(r"\.group_segment_fixed_size: +(\d+)", text),
            shared=meta.shared,
            tensor_memory=0,
            loop=inner_loop(text),
            assembly=text,
        )
    text, report = _disassemble(kernel.asm["cubin"]), log.getvalue()
    return Compiled(
        warps=meta.num_warps,
        registers=_number(r"Used (\d+) registers", report),
        spill_stores=_number(r"(\d+) bytes spill stores", report),
        spill_loads=_number(r"(\d+) bytes spill loads", report),
        stack=_number(r"(\d+) bytes stack frame", report),
        static_shared=_sum(r"(\d+) bytes smem", report),
        shared=meta.shared,
        tensor_memory=meta.tmem_size,
        loop=inner_loop(text),
        assembly=text,
    )


def violations(target: Target, variant: Variant, compiled: Compiled) -> list[str]:
    """What is wrong with a kernel although it compiles."""
    spills = max(compiled.spill_stores, compiled.spill_loads)
    shared = compiled.static_shared + compiled.shared
    wrong = []
    if not variant.may_spill and (spills or compiled.stack):
        wrong.append(f"spills {spills} bytes, stack {compiled.stack} bytes")
    if variant.tensor_cores and not compiled.loop.tensor:
        wrong.append("no tensor-core instruction in the inner loop")
    if shared > target.shared:
        wrong.append(f"shared memory {shared} bytes of {target.shared}")
    return wrong


def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", file]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}: {text[-1000:]!r}")
    return int(found[1])


def _sum(pattern: str, text: str) -> int:
    return sum(int(n) for n in re.findall(pattern, text))


@cache
def variants(file: str) -> dict[Key, Variant]:
    """All variants in one file of kernels, the targets of each side by side."""
    found: dict[Key, Variant] = {}
    module = import_module(f"dit_sparse.kernels.{file}")
    for target in TARGETS.values():
        for variant in module.variants(target):
            key = Key(file, variant.kernel.__name__, variant.label, target.name)
            if key in found:
                raise ValueError(f"{key} is listed twice")
            found[key] = variant
    order = list(dict.fromkeys((key.kernel, key.label) for key in found))
    return {key: found[key] for key in sorted(found, key=lambda key: order.index((key.kernel, key.label)))}


def compile_all(keys: Iterable[Key]) -> tuple[dict[Key, Compiled], list[str]]:
    """Compile in parallel and print a line for each. Returns what compiled, and all that is wrong."""
    keys = list(keys)
    results: dict[Key, Compiled | str] = {}
    with ThreadPoolExecutor(PROCESSES) as lanes:
        for part in lanes.map(_lane, [keys[i::PROCESSES] for i in range(PROCESSES)]):
            results |= part
    compiled = {key: result for key in keys if isinstance(result := results[key], Compiled)}
    failed = [f"{key}: {result}" for key, result in results.items() if isinstance(result, str)]
    return compiled, failed + _violations(compiled)


def _violations(compiled: dict[Key, Compiled]) -> list[str]:
    return [
        f"{key}: {text}"
        for key, figures in compiled.items()
        for text in violations(TARGETS[key.target], variants(key.file)[key], figures)
    ]


def _lane(keys: list[Key]) -> dict[Key, Compiled | str]:
    """Compile one after another in another process, and in a new one when a compiler has taken it down."""
    results: dict[Key, Compiled | str] = {}
    while len(results) < len(keys):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            for key in keys[len(results) :]:
                try:
                    result = process.submit(_compile, key).result()
                except BrokenProcessPool:
                    results[key] = "the compiler ended the process"
                    break
                results[key] = result
                if isinstance(result, Compiled):
                    figures = zip(COLUMNS[3:], cells(key, result)[3:], strict=True)
                    print(f"{key}: {', '.join(map(' '.join, figures))}", flush=True)
    return results


def _compile(key: Key) -> Compiled | str:
    try:
        return compile_variant(TARGETS[key.target], variants(key.file)[key])
    except Exception as error:  # one that fails must not lose the others
        return f"{type(error).__name__}: {error}"


def write() -> list[str]:
    """Bring RESOURCES.md up to date, file by file. Returns all that is wrong with the kernels."""
    record = read(RECORD.read_text()) if RECORD.exists() else Record("", {}, {})
    if record.triton != triton.__version__:
        record = Record(triton.__version__, {}, {})
    wrong = []
    for file in KERNELS:
        digest = sources(file)
        kept = {}
        if record.sources.get(file) == digest:
            kept = {key: record.rows[key] for key in variants(file) if key in record.rows}
        new, failed = compile_all(key for key in variants(file) if key not in kept)
        wrong += failed + _violations(kept)
        rows = kept | new
        others = {key: figures for key, figures in record.rows.items() if key.file != file}
        rows = others | {key: rows[key] for key in variants(file) if key in rows}
        record = Record(record.triton, record.sources | {file: digest}, rows)
        part = RECORD.with_suffix(".part")
        part.write_text(render(record))
        part.replace(RECORD)
    return wrong


def check() -> list[str]:
    """All that is wrong with the kernels and, compiling a few of them again, with RESOURCES.md."""
    old = read(RECORD.read_text())
    if old.triton != triton.__version__:
        return [f"RESOURCES.md was made with Triton {old.triton}, this is {triton.__version__}: run make aot"]
    keys = [key for file in KERNELS for key in variants(file)]
    new, wrong = compile_all(key for key in keys if variants(key.file)[key].in_ci)
    kept = {key: old.rows[key] for key in keys if key in old.rows}
    changed = {file for file in KERNELS if old.sources.get(file) != sources(file)}
    stale = [f"{file}.py changed" for file in sorted(changed)]
    stale += [f"{key} is not recorded" for key in keys if key not in kept]
    stale += [f"{key} is recorded, but no variant" for key in old.rows if key not in kept]
    stale += [f"{key} has other figures" for key in new if key in kept and kept[key] != new[key]]
    wrong += _violations({key: c for key, c in kept.items() if key not in new and key.file not in changed})
    return [f"{text}: run make aot" for text in stale] + wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile the Triton kernels; without options, write RESOURCES.md."
    )
    parser.add_argument(
        "--check", action="store_true", help="compare RESOURCES.md with the kernels, write nothing"
    )
    parser.add_argument("--kernel", choices=KERNELS, help="compile what is in this file, write nothing")
    parser.add_argument("--targets", default=",".join(TARGETS), help="with --kernel: default all")
    parser.add_argument("--label", default="", help="with --kernel: only variants whose label has this text")
    parser.add_argument("--sass", type=Path, help="with --kernel and one variant: write its disassembly here")
    a = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels can only be compiled in a process without it")
    if a.kernel:
        targets = a.targets.split(",")
        keys = [key for key in variants(a.kernel) if a.label in key.label and key.target in targets]
        if not keys:
            parser.error(f"no variant of {a.kernel} is for {a.targets} with {a.label!r} in its label")
        if a.sass and len(keys) != 1:
            parser.error(f"--sass takes one variant, these are {len(keys)}")
        compiled, wrong = compile_all(keys)
        if a.sass and compiled:
            a.sass.write_text(compiled[keys[0]].assembly)
    else:
        wrong = check() if a.check else write()
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
