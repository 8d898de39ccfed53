"""Builds our C++ sources, once for each machine and version of PyTorch, into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-shared", "-fPIC")


class Unavailable(RuntimeError):
    """A source can't be built or loaded here; the message, one line, says why."""


def load(source: Path) -> ctypes.CDLL:
    """The library of a source that may use PyTorch's headers; compiled (some seconds) if it isn't in the cache.

    Raises:
        Unavailable: there is no compiler, or it or the library fails.
    """
    try:
        return ctypes.CDLL(str(_built(source)))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        raise Unavailable(" ".join(str(error).split())) from None


def _built(source: Path) -> Path:
    """The shared library, named by everything that it depends on."""
    compiler = _compiler()
    torch_root = Path(torch.__file__).parent
    key = repr((source.read_bytes(), torch.__version__, compiler, FLAGS, platform.machine(), _cpu_flags()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainwright"
    library = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # Several processes may build at once: each in a folder of its own, and the last rename wins.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "built.so"
        paths = [f"-I{torch_root / 'include'}", str(source), "-o", str(built), f"-L{torch_root / 'lib'}"]
        command = [*compiler, *FLAGS, *paths, "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            lines = done.stderr.splitlines()
            first = next((line for line in lines if "error" in line), lines[-1] if lines else f"exit {done.returncode}")
            raise RuntimeError(f"{shlex.join(compiler)} failed: {first}")
        os.replace(built, library)
    return library


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise RuntimeError("no C++ compiler is installed: install g++, or name one in the environment variable CXX")


def _cpu_flags() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
