"""The memory of the device that an engine is on: a GPU's, or this process's share of the machine's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bucketserve.machine import memory as machine_memory

__all__ = ["CPU_KV_MOST_BYTES", "CPU_KV_SHARE", "DeviceMemory", "device_memory", "seldom"]

CPU_KV_SHARE = 0.25
CPU_KV_MOST_BYTES = 4 * 1024**3
"""Of the memory that is left on a CPU, for KV unless somebody says otherwise."""
MEMORY_AGE_S = 1.0


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of the device: total, held by this process, free."""

    total: int
    reserved: int
    free: int


def device_memory(device: torch.device) -> DeviceMemory:
    """Returns what a device has now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, torch.cuda.memory_reserved(device), free)
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    now = machine_memory()
    return DeviceMemory(now.total, resident, now.available)


def seldom(measure: Callable[[], DeviceMemory]) -> Callable[[], DeviceMemory]:
    """Returns what measures again only when the last time is MEMORY_AGE_S ago: it reads some ten files."""
    last = [measure()]
    at_s = [time.monotonic()]

    def measured() -> DeviceMemory:
        if time.monotonic() - at_s[0] > MEMORY_AGE_S:
            last[0], at_s[0] = measure(), time.monotonic()
        return last[0]

    return measured
