"""Kernels compile for GPUs that are not here, and RESOURCES.md tells what they cost."""

import dataclasses
import os
import re
import signal
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from dit_sparse.kernels import aot
from dit_sparse.kernels.disassembly import Loop
from dit_sparse.kernels.resources import FOLDER, KERNELS, Compiled, Key, Record, read, render
from dit_sparse.kernels.targets import TARGETS, Variant

KEY = Key("lists", "rows_kernel", "lists", "sm_90")
GOOD = Compiled(
    warps=8,
    registers=222,
    spill_stores=0,
    spill_loads=0,
    stack=0,
    static_shared=0,
    shared=131072,
    tensor_memory=0,
    loop=Loop(12, 386),
)
VARIANT = Variant(kernel=None, label="lists", types={}, constants={})


def test_kernels_keep_the_rules_and_the_record_is_current():
    # A process of its own: this one may run under the Triton interpreter, which cannot compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dit_sparse.kernels.aot", "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 20, "continuous integration compiles a few of each file"


def test_every_kernel_is_recorded():
    written = {}
    for path in FOLDER.glob("*.py"):
        if found := re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE):
            written[path.stem] = set(found)
    recorded = {
        file: {key.kernel for key in read(aot.RECORD.read_text()).rows if key.file == file}
        for file in KERNELS
    }
    assert recorded == written


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"spill_stores": 4, "spill_loads": 8}, "spills 8 bytes, stack 0 bytes"),
        ({"stack": 16}, "spills 0 bytes, stack 16 bytes"),
        ({"loop": Loop(0, 386)}, "no tensor-core instruction in the inner loop"),
        ({"static_shared": 1, "shared": 227 << 10}, "shared memory 232449 bytes of 232448"),
    ],
)
def test_rules(change, text):
    compiled = dataclasses.replace(GOOD, **change)
    assert aot.violations(TARGETS["sm_90"], VARIANT, compiled) == ([text] if text else [])


def test_rules_a_variant_is_free_of():
    free = dataclasses.replace(VARIANT, may_spill=True, tensor_cores=False)
    compiled = dataclasses.replace(GOOD, spill_stores=4, spill_loads=4, stack=8, loop=Loop(0, 100))
    assert aot.violations(TARGETS["sm_90"], free, compiled) == []


@pytest.mark.parametrize(
    ("target", "change", "warps"),
    [
        ("sm_80", {"warps": 8, "registers": 64, "shared": 0}, 32),  # registers: half of 64
        ("sm_80", {"warps": 4, "registers": 65, "shared": 0}, 28),  # 72 with rounding: 7 programs
        ("sm_80", {"warps": 1, "registers": 16, "shared": 0}, 32),  # 32 programs at most
        ("sm_80", {"warps": 4, "registers": 32, "shared": 40 << 10}, 16),  # 4 times 41 KiB of 164
        ("sm_80", {"warps": 4, "registers": 32, "shared": (40 << 10) + 1}, 12),
        ("sm_89", {"warps": 8, "registers": 32, "shared": 0}, 48),
        ("sm_90", {}, 8),
        ("sm_100", {"shared": 0, "registers": 64, "tensor_memory": 256}, 16),  # two fill tensor memory
        ("sm_120", {"shared": 100 << 10}, 0),  # does not fit
        ("gfx942", {"warps": 4, "registers": 128, "shared": 16 << 10}, 16),  # four wavefronts a SIMD
        ("gfx942", {"warps": 4, "registers": 129, "shared": 16 << 10}, 12),
    ],
)
def test_occupancy(target, change, warps):
    assert dataclasses.replace(GOOD, **change).occupancy(TARGETS[target]) == warps


def test_record_reads_what_it_writes():
    other = Key("block_sparse", "forward_kernel", "bf16 D128 128x64", "sm_80")
    rows = {
        other: dataclasses.replace(GOOD, spill_stores=72, spill_loads=80, stack=72, static_shared=16),
        KEY: GOOD,
    }
    record = Record("3.8.0", dict.fromkeys(KERNELS, "0123abc"), rows)
    assert read(render(record)) == record


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Have `aot` see one variant, compiled to GOOD, and the given record of it."""

    def write(**change) -> None:
        current = Record(aot.triton.__version__, dict.fromkeys(KERNELS, "same"), {KEY: GOOD})
        aot.RECORD.write_text(render(current._replace(**change)))

    monkeypatch.setattr(aot, "RECORD", tmp_path / "RESOURCES.md")
    monkeypatch.setattr(aot, "sources", lambda file: "same")
    monkeypatch.setattr(aot, "variants", lambda file: {KEY: VARIANT} if file == KEY.file else {})
    monkeypatch.setattr(aot, "compile_all", lambda keys: (dict.fromkeys(keys, GOOD), []))
    return write


def test_check_accepts_a_current_record(recorded):
    recorded()
    assert aot.check() == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"triton": "3.0.0"}, "RESOURCES.md was made with Triton 3.0.0, this is"),
        ({"sources": dict.fromkeys(KERNELS, "same") | {"quant": "other"}}, "quant.py changed"),
        ({"rows": {}}, f"{KEY} is not recorded"),
        ({"rows": {KEY: GOOD, KEY._replace(label="old"): GOOD}}, "[old] sm_90 is recorded, but no variant"),
        ({"rows": {KEY: dataclasses.replace(GOOD, stack=8)}}, f"{KEY}: spills 0 bytes, stack 8 bytes"),
    ],
)
def test_check_refuses(recorded, change, text):
    recorded(**change)
    (wrong,) = aot.check()
    assert text in wrong
    assert wrong.endswith("run make aot") or "stack 8" in wrong


def test_check_compares_what_it_compiles(recorded, monkeypatch):
    monkeypatch.setattr(
        aot,
        "variants",
        lambda file: {KEY: dataclasses.replace(VARIANT, in_ci=True)} if file == KEY.file else {},
    )
    recorded(rows={KEY: dataclasses.replace(GOOD, registers=223)})
    assert aot.check() == [f"{KEY} has other figures: run make aot"]


def test_write_compiles_what_is_missing_or_changed(recorded, monkeypatch):
    other = KEY._replace(file="mass")
    new = dataclasses.replace(GOOD, registers=100)
    monkeypatch.setattr(aot, "variants", lambda file: {k: VARIANT for k in (KEY, other) if k.file == file})
    monkeypatch.setattr(aot, "compile_all", lambda keys: (dict.fromkeys(keys, new), []))
    recorded(sources=dict.fromkeys(KERNELS, "same") | {"mass": "old"}, rows={KEY: GOOD, other: GOOD})
    assert aot.write() == []
    written = read(aot.RECORD.read_text())
    assert written.rows == {KEY: GOOD, other: new}
    assert set(written.sources.values()) == {"same"}
    recorded(triton="3.0.0")
    assert aot.write() == []
    assert read(aot.RECORD.read_text()).rows == {KEY: new, other: new}


def test_a_compiler_that_crashes_loses_one_variant(monkeypatch):
    monkeypatch.setattr(aot, "_compile", signal.raise_signal)
    results = aot._lane([signal.SIGCHLD, signal.SIGKILL, signal.SIGURG])
    assert results == {
        signal.SIGCHLD: None,
        signal.SIGKILL: "the compiler ended the process",
        signal.SIGURG: None,
    }
