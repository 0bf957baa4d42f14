"""Compiles kernels.cpp and its headers for this processor, once, and loads them.

Compiled where it runs, so that it uses the instructions that this processor has. A machine without a C++ compiler
serves with torch's own operations instead, more slowly. `python -m bucketserve.engine.native.build` compiles ahead.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from bucketserve.core.errors import EngineError

__all__ = ["KernelBuildError", "load_library"]

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC")
COMPILERS = ("g++", "c++")


class KernelBuildError(EngineError):
    """The kernels can't be compiled here; says what is missing."""


def load_library(on_progress: Callable[[str], None] = lambda text: None) -> ctypes.CDLL:
    """Returns the compiled kernels; compiles them if this processor's are not in the cache yet (about ten seconds).

    The cache is $BUCKETSERVE_CACHE, else the user's cache folder, else one of the user's among temporary files.

    Raises:
        KernelBuildError: no compiler, or it failed.
    """
    compiler = _compiler()
    name = f"kernels-{_fingerprint(compiler)}.so"
    folder = _cache_folder()
    target = folder / name
    with (folder / "lock").open("w") as lock:
        # Workers that start together compile once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            on_progress("compiling CPU kernels, once for this machine")
            _compile(compiler, target)
    return ctypes.CDLL(str(target))


def _compiler() -> str:
    named = os.environ.get("CXX")
    for candidate in (named,) if named else COMPILERS:
        if path := shutil.which(candidate):
            return path
    raise KernelBuildError(f"no C++ compiler ({named or ', '.join(COMPILERS)}); install g++ for faster CPU workers")


@cache
def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    sources = [path.read_bytes() for path in sorted((SOURCE, *SOURCE.parent.glob("*.h")))]
    parts = [*sources, " ".join(FLAGS).encode(), version, _processor().encode(), torch.__version__.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """Returns what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("vendor_id", "cpu family", "model\t", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder() -> Path:
    named = os.environ.get("BUCKETSERVE_CACHE")
    candidates = [Path(named)] if named else []
    if not named:
        candidates.append(Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "bucketserve")
        candidates.append(Path(tempfile.gettempdir()) / f"bucketserve-{os.getuid()}")
    for folder in candidates:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        # Code is loaded from here: it must be nobody else's.
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    raise KernelBuildError(f"can't write to {' or '.join(map(str, candidates))}; set BUCKETSERVE_CACHE to a folder")


def _compile(compiler: str, target: Path) -> None:
    # The OpenMP runtime must be torch's: two of them would compete for the cores.
    runtimes = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    openmp = [str(runtimes[0])] if runtimes else ["-fopenmp"]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output, unlinked = Path(scratch) / target.name, Path(scratch) / "kernels.o"
        for command in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(unlinked)],
            [compiler, "-shared", str(unlinked), *openmp, "-o", str(output)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise KernelBuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        output.rename(target)


if __name__ == "__main__":
    try:
        load_library(print)
    except KernelBuildError as error:
        print(f"CPU workers will run without their kernels: {error}", file=sys.stderr)
