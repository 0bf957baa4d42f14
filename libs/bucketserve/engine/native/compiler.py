"""Compiles kernels.cpp and its headers for an instruction set."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
from functools import cache
from pathlib import Path

import torch

from bucketserve.core.errors import EngineError
from bucketserve.engine.native.instruction_sets import InstructionSet

__all__ = ["CompilerTooOldError", "KernelBuildError", "compile_library", "find_compiler", "library_name"]

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-strict-aliasing", "-fopenmp", "-fPIC", "-Wno-psabi")
NO_INSTRUCTION = "no such instruction"
"""An assembler's words, whose compiler is newer."""
COMPILERS = ("g++", "c++")
TIMEOUT_S = 300.0
"""Ten seconds of work, on a core of which a container may have a tenth."""


class KernelBuildError(EngineError):
    """The kernels can't be compiled or loaded here; says why, in one line."""


class CompilerTooOldError(KernelBuildError):
    """The compiler does not know some of the instructions; it may know those of a lesser set."""


def library_name(instruction_set: InstructionSet) -> str:
    """Returns the file name under which the compiled kernels are kept: another one for whatever makes them differ.

    Neither the processor nor the compiler is part of it: a library made elsewhere, by another compiler, is as good.
    """
    sources = [path.read_bytes() for path in sorted((SOURCE, *SOURCE.parent.glob("*.h")))]
    options = [*FLAGS, *instruction_set.features, platform.machine(), Path(_openmp()).name]
    return f"kernels-{instruction_set.name}-{_digest(*sources, *(option.encode() for option in options))}.so"


def find_compiler() -> list[str]:
    """Returns the command that compiles: $CXX, or else what is there.

    Raises:
        KernelBuildError: there is none.
    """
    named = os.environ.get("CXX")
    for candidate in (named,) if named else COMPILERS:
        words = shlex.split(candidate)
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    raise KernelBuildError(f"no C++ compiler ({named or ', '.join(COMPILERS)}); install g++ for faster CPU workers")


def compile_library(compiler: list[str], instruction_set: InstructionSet, scratch: Path) -> bytes:
    """Returns a shared library, made in the folder `scratch` by the command `compiler`.

    Raises:
        CompilerTooOldError: it does not know an option of the instruction set.
        KernelBuildError: the compiler failed, hangs or was killed.
        OSError: the folder can't be used.
    """
    unlinked, output = scratch / "kernels.o", scratch / "kernels.so"
    _run([*compiler, *FLAGS, *instruction_set.options, "-c", str(SOURCE), "-o", str(unlinked)], scratch)
    _run([*compiler, "-shared", str(unlinked), _openmp(), "-o", str(output)], scratch)
    try:
        return output.read_bytes()
    except FileNotFoundError as error:
        raise KernelBuildError(f"{compiler[0]} succeeded and wrote nothing") from error


@cache
def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _openmp() -> str:
    """Returns what to link: torch's OpenMP runtime, since two of them would compete for the cores."""
    runtimes = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return str(runtimes[0]) if runtimes else "-fopenmp"


def _run(command: list[str], scratch: Path) -> None:
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": str(scratch), "LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError as error:
        raise KernelBuildError(f"can't run {command[0]}: {error.strerror}") from error
    with contextlib.suppress(OSError):
        # Where memory is short, the compiler goes before the worker that started it.
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
    try:
        _, said = process.communicate(timeout=TIMEOUT_S)
    except BaseException as error:
        # With whatever it has started itself: that holds its output open.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise KernelBuildError(f"{command[0]} did not end within {TIMEOUT_S:g} s") from error
        raise
    if os.strerror(errno.ENOSPC) in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch))
    if process.returncode < 0:
        raise KernelBuildError(f"{command[0]} was killed by signal {-process.returncode}")
    if process.returncode:
        unknown = [option for option in command if option.startswith("-m") and f"'{option}'" in said]
        if unknown or NO_INSTRUCTION in said:
            raise CompilerTooOldError(f"{command[0]} does not know {unknown[0] if unknown else 'some instructions'}")
        lines = said.strip().splitlines() or [f"exit status {process.returncode}"]
        raise KernelBuildError(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[-1])}")
