"""Compile C++, most of all ``cpu.cpp``, at its first use, for the machine it runs on, and keep the result.

The source needs no header of PyTorch, so that it compiles in seconds and outlives updates of PyTorch. The
library lies in ``$XDG_CACHE_HOME/dit_sparse`` (``~/.cache`` by default) under a name made of the source, the
compiler, its flags and the instruction set: another machine with the same home builds its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC"]


@torch.compiler.assume_constant_result
def compiled() -> tuple[bool, str]:
    """Whether there are compiled kernels; and in words which, or why not."""
    library, words = load()
    return library is not None, words


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels, or None; and the words of :func:`compiled`."""
    compiler = _compiler()
    try:
        return library(SOURCE.read_text()), f"kernels compiled by {compiler} for this machine"
    except FileNotFoundError:
        return None, f"there is no C++ compiler {compiler!r} (set CXX to name another)"
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or [f"exit status {error.returncode}"]
        return None, f"{compiler} could not compile {SOURCE.name}: {last[0]}"
    except OSError as error:
        return None, f"the compiled {SOURCE.name} cannot be kept or loaded: {error}"


def cache_folder() -> Path:
    """Where this package keeps what it compiles and measures: ``$XDG_CACHE_HOME/dit_sparse``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_sparse"


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def library(source: str) -> ctypes.CDLL:
    """The functions of a C++ source.

    Raises:
        FileNotFoundError: There is no compiler.
        subprocess.CalledProcessError: It could not compile this.
        OSError: The result cannot be kept or loaded.
    """
    compiler = _compiler()
    # The predefined macros say what -march=native means here.
    machine = _run([compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\0".join([source, machine, *FLAGS]).encode()).hexdigest()[:16]
    path = cache_folder() / f"cpu-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            text, part, built = (Path(folder) / f"cpu.{suffix}" for suffix in ("cpp", "o", "so"))
            text.write_text(source)
            _run([compiler, *FLAGS, "-c", str(text), "-o", str(part)])
            # Linked without -fopenmp: the threads must be those of the OpenMP that PyTorch has loaded.
            _run([compiler, "-shared", str(part), "-o", str(built)])
            built.replace(path)
    return ctypes.CDLL(str(path))


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
