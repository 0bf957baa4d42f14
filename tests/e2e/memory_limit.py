"""Limits on the memory of processes that run: by cgroups where this process may make some, else by watching.

A limit of the address space would not do: what is mapped and not used counts there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["limited", "peak_bytes"]

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited(limits: Mapping[int, int]) -> Iterator[str]:
    """Limits processes, {pid: bytes}, while it is open; yields what does it: cgroup v1, cgroup v2 or watching.

    Where a cgroup does, the kernel ends a process that wants more. In any case ask peak_bytes at the end.
    """
    groups: list[Path] = []
    kind = "cgroup v1" if (V1 / "cgroup.procs").exists() else "cgroup v2"
    parent, limit_file = (V1, "memory.limit_in_bytes") if kind == "cgroup v1" else (V2, "memory.max")
    try:
        try:
            for pid, num_bytes in limits.items():
                group = parent / f"bucketserve-abuse-{os.getpid()}-{pid}"
                group.mkdir()
                groups.append(group)
                (group / limit_file).write_text(str(num_bytes))
                (group / "cgroup.procs").write_text(str(pid))
        except OSError:
            _remove(groups, parent)
            kind = "watching"
        yield kind
    finally:
        _remove(groups, parent)


def peak_bytes(pid: int) -> int:
    """Returns the most resident memory that a process has had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def _remove(groups: list[Path], parent: Path) -> None:
    """Takes the processes out of their groups, which can then go."""
    for group in groups:
        with contextlib.suppress(OSError):
            for pid in (group / "cgroup.procs").read_text().split():
                (parent / "cgroup.procs").write_text(pid)
            group.rmdir()
    groups.clear()
