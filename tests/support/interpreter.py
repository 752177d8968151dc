"""Kernels on CPU tensors: a test file run again in a process under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process is the one under the interpreter."""


def run_under_interpreter(file: str, *options: str) -> None:
    """Run a test file by pytest under TRITON_INTERPRET=1 and fail as it fails."""
    command = [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
