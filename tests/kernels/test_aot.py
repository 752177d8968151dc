"""Kernels compile for GPUs that are not here, use their tensor cores and fit their shared memory."""

import csv
import io
import os
import subprocess
import sys

import pytest

LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10}


def test_forward_compiles_for_ampere_and_hopper():
    pytest.importorskip("triton")
    # A process of its own: this one may run under the Triton interpreter, which cannot compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "dit_sparse.kernels.aot", "--targets", ",".join(LIMIT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert {(r["target"], r["head_dim"], r["block"]) for r in rows} == {
        (target, *shape) for target in LIMIT for shape in (("128", "128x128"), ("64", "64x64"))
    }
    for row in rows:
        assert int(row["shared_bytes"]) <= LIMIT[row["target"]], row
        assert row["tensor_core"] == {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async"}[row["target"]], row
        assert int(row["stack_bytes"]) == 0, row
