"""Finds the compiled kernels for this processor, or has them compiled, and loads them.

Folders, in order: $BUCKETSERVE_CACHE, the user's cache folder, one of the user's among temporary files. Whichever holds
the kernels is used; where none does, they are compiled into the first that can hold and run them. A library ends with
its own SHA-256: loading half of one would not raise an error, it would kill the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bucketserve.engine.native import compiler
from bucketserve.engine.native.compiler import CompilerTooOldError, KernelBuildError, library_name
from bucketserve.engine.native.instruction_sets import ALL, InstructionSet, supported

__all__ = ["build_into", "load_library"]

ROOM_BYTES = 16 * 2**20
"""Of a folder, to compile in: it takes about 2 MiB."""
DIGEST_BYTES = 32
SCRATCH = "compiling-"
OLD_S = 30 * 24 * 3600.0
"""After which a library of other sources is removed: another version that is still in use compiles once more."""

Progress = Callable[[str], None]


def load_library(name: str = "auto", on_progress: Progress = lambda text: None) -> ctypes.CDLL:
    """Returns the kernels, compiled if they are not there yet (about ten seconds).

    Args:
        name: an instruction set; auto is the best that this processor has and the compiler knows, or, where that can be
            neither found nor compiled, the best that is found.
        on_progress: told, in one line each, that it compiles, and what it had to do without and why.

    Raises:
        KernelBuildError: there are none; says why.
    """
    if name != "auto" and name not in supported():
        raise KernelBuildError(f"this processor has no {name}, only {', '.join(supported())}")
    wanted = [ALL[one] for one in (supported() if name == "auto" else (name,))]
    causes: list[str] = []
    library, may_compile = None, True
    for one in wanted:
        if library is None:
            library = _find(one, causes)
        if library is None and may_compile:
            # A compiler that is only too old is asked for a lesser set; any other failure would come again.
            library, may_compile = _build(one, causes, on_progress)
    if library is None:
        raise KernelBuildError("; ".join(causes) or "no folder to keep them in; set BUCKETSERVE_CACHE")
    if causes:
        on_progress(f"CPU kernels are those of {library._name}, since {'; '.join(causes)}")
    return library


def build_into(folder: Path, instruction_set: InstructionSet) -> Path:
    """Compiles kernels into a folder, whatever this processor is, and returns the file.

    Raises:
        KernelBuildError: they can't be compiled, or not be loaded although this processor is one of theirs.
    """
    path = folder / library_name(instruction_set)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # So that no worker takes it for what somebody left.
        with _lock(folder), _scratch(folder) as scratch:
            _store(path, compiler.compile_library(compiler.find_compiler(), instruction_set, scratch), scratch)
        path.chmod(0o644)
        if instruction_set.name in supported():
            _open(path)
    except OSError as error:
        raise KernelBuildError(f"{folder}: {_reason(error)}") from error
    return path


def _find(instruction_set: InstructionSet, causes: list[str]) -> ctypes.CDLL | None:
    """Returns the library from wherever it is; appends why one that is there is not used."""
    for folder in _folders():
        path = folder / library_name(instruction_set)
        try:
            if path.is_file():
                return _open(path)
        except (OSError, KernelBuildError) as error:
            causes.append(f"{path}: {_reason(error)}")
    return None


def _build(
    instruction_set: InstructionSet, causes: list[str], on_progress: Progress
) -> tuple[ctypes.CDLL | None, bool]:
    """Compiles once, keeps the library in the first folder that can hold and run it, and returns it loaded.

    Without one: whether a lesser instruction set may be compiled all the same.
    """
    compiled = b""
    try:
        command = compiler.find_compiler()
    except KernelBuildError as error:
        causes.append(str(error))
        return None, False
    for folder in _folders():
        path = folder / library_name(instruction_set)
        try:
            _check_usable(folder)
            with _lock(folder) as is_locked:
                # Workers that start together compile once: somebody else may have done it by now.
                if path.is_file():
                    with contextlib.suppress(OSError, KernelBuildError):
                        return _open(path), False
                if is_locked:
                    _clear(folder, path)
                with _scratch(folder) as scratch:
                    if not compiled:
                        on_progress(f"compiling CPU kernels for {instruction_set.name}, once for this machine")
                        compiled = compiler.compile_library(command, instruction_set, scratch)
                    _store(path, compiled, scratch)
                return _open(path), False
        except CompilerTooOldError as error:
            causes.append(str(error))
            return None, True
        except OSError as error:
            causes.append(f"{folder}: {_reason(error)}")
        except KernelBuildError as error:
            causes.append(str(error))
            if not compiled:
                break
    return None, False


def _folders() -> Iterator[Path]:
    """Yields folders that may hold the kernels, or may be made to."""
    own = f"bucketserve-{os.geteuid()}"
    if named := os.environ.get("BUCKETSERVE_CACHE"):
        yield Path(named).absolute()
        # On a volume that belongs to somebody else, or to everybody.
        yield Path(named).absolute() / own
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if cache.is_absolute():
        yield cache / "bucketserve"
    with contextlib.suppress(FileNotFoundError):
        yield Path(tempfile.gettempdir()) / own


def _check_usable(folder: Path) -> None:
    """Makes the folder if need be.

    Raises:
        OSError: it is not ours alone, can't be written to, is full, or nothing in it may be executed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_trusted(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError("not writable")
    filesystem = os.statvfs(folder)
    if filesystem.f_flag & os.ST_NOEXEC:
        raise OSError("mounted noexec")
    if filesystem.f_bavail * filesystem.f_frsize < ROOM_BYTES:
        raise OSError("no space left")


def _check_trusted(path: Path) -> None:
    """Refuses what others could have put there: code is loaded from it."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        raise OSError(f"belongs to user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("others may write to it")


def _open(path: Path) -> ctypes.CDLL:
    """Loads a library.

    Raises:
        OSError: it can't be read or loaded, or is not ours.
        KernelBuildError: it is damaged.
    """
    _check_trusted(path.parent)
    _check_trusted(path)
    content = path.read_bytes()
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise KernelBuildError("damaged")
    return ctypes.CDLL(str(path))


def _store(path: Path, library: bytes, scratch: Path) -> None:
    """Puts a library in its place at once, whole, in place of any other."""
    written = scratch / path.name
    with written.open("wb") as file:
        file.write(library + hashlib.sha256(library).digest())
        file.flush()
        os.fsync(file.fileno())
    written.chmod(0o600)
    written.rename(path)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Holds the folder's lock, if locks work there and nobody keeps it for too long; yields whether it does.

    Without it several may compile at once, which costs time and nothing else.
    """
    with contextlib.ExitStack() as stack:
        is_locked = False
        with contextlib.suppress(OSError):
            file = stack.enter_context((folder / "lock").open("w"))
            is_locked = _wait_for(file.fileno())
        yield is_locked


def _wait_for(file: int) -> bool:
    until_s = time.monotonic() + compiler.TIMEOUT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until_s:
                return False
            time.sleep(0.05)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def _clear(folder: Path, path: Path) -> None:
    """Removes what somebody left who was killed while compiling, and libraries that `path` has taken the place of.

    Whoever compiles without a lock leaves nothing untouched for TIMEOUT_S. Who has an old library loaded keeps it.
    """
    now_s = time.time()
    with contextlib.suppress(OSError):
        for left in folder.glob(f"{SCRATCH}*"):
            if now_s - left.stat().st_mtime > compiler.TIMEOUT_S:
                shutil.rmtree(left, ignore_errors=True)
        for old in folder.glob(f"{path.name.rpartition('-')[0]}-*.so"):
            if old != path and now_s - old.stat().st_mtime > OLD_S:
                old.unlink()


def _reason(error: Exception) -> str:
    """Returns an error's text in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
