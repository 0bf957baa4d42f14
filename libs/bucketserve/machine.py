"""The memory and the CPUs that this process really has: the machine's, within its control groups and its affinity."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "memory", "num_cpus"]

ROOT = Path("/")
V2 = "cgroup2"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    total: int
    """The machine's, or the smallest limit that holds."""
    available: int
    """What may still be taken without swapping or being killed: page cache counts, files that this process has mapped
    do not."""


def num_cpus(root: Path = ROOT) -> int:
    """Returns the number of threads that can run at once, at least 1: whole CPUs of the quota, within the affinity.

    Args:
        root: where /proc and /sys are.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for kind, folder in _folders("cpu", root):
        if kind == V2:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        # "max" or -1 is none.
        if quota.isdigit() and period.strip().isdigit() and int(period):
            cpus = min(cpus, int(quota) // int(period))
    return max(cpus, 1)


def memory(root: Path = ROOT) -> Memory:
    """Returns the memory of the machine as far as this process may use it; see num_cpus."""
    machine = _numbers(root / "proc/meminfo")
    total = machine.get("MemTotal:", 0) * 1024 or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = machine.get("MemAvailable:", machine.get("MemFree:", 0)) * 1024 or total
    for kind, folder in _folders("memory", root):
        names = ("memory.max", "memory.high") if kind == V2 else ("memory.limit_in_bytes",)
        used = _read(folder / ("memory.current" if kind == V2 else "memory.usage_in_bytes"))
        statistics = _numbers(folder / "memory.stat")
        prefix = "" if kind == V2 else "total_"
        cache = sum(statistics.get(f"{prefix}{name}", 0) for name in ("active_file", "inactive_file"))
        limits = [int(text) for name in names if (text := _read(folder / name)).isdigit()]
        # Of version 1, whose parents may be out of sight.
        limits += [limit for name, limit in statistics.items() if name == "hierarchical_memory_limit"]
        if limits:
            total = min(total, *limits)
        if limits and used.isdigit():
            available = min(available, min(limits) - max(int(used) - cache, 0))
    mapped = _numbers(root / "proc/self/status").get("RssFile:", 0) * 1024
    return Memory(total, max(available - mapped, 0))


def _folders(controller: str, root: Path) -> Iterator[tuple[str, Path]]:
    """Yields the control groups that bind this process, as (filesystem type, folder), from its own up to the mount."""
    own: dict[str, str] = {}
    path: str | None
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, group = line.split(":", 2)
        own |= dict.fromkeys(names.split(","), group)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        kind, *_, options = filesystem.split()
        if kind == V2:
            path = own.get("")
        elif kind == "cgroup" and controller in options.split(","):
            path = own.get(controller)
        else:
            continue
        if path is None:
            continue
        mounted, at = mount.split()[3:5]
        base = root / at.lstrip("/")
        # In a container the path may be the host's, of which this mount shows the end or nothing.
        below = path.removeprefix(mounted) if path.startswith(mounted) and ".." not in path else ""
        folder = base / below.strip("/")
        yield kind, folder
        while folder != base:
            folder = folder.parent
            yield kind, folder


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _numbers(path: Path) -> dict[str, int]:
    """Returns the values of lines of a name and a number."""
    words = [line.split() for line in _read(path).splitlines()]
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}
