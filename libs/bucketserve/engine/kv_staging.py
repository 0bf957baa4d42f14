"""Where KV stays between two engines: one block of bytes per handed-over sequence, outside of any engine's memory.

The area is an anonymous file in memory (memfd), so that another process on this host can map it and copy straight out
of it, and nothing is left behind however this process ends. Its pages are taken when first used and used again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from dataclasses import dataclass, field
from functools import cache

import xxhash

from bucketserve.engine.ranges import RangeAllocator

__all__ = ["MEMFD_NAME", "KvStaging", "StagedKv", "checksum", "locality", "page_checksums"]

ALIGNMENT = 4096
MEMFD_NAME = "bucketserve-kv"


@dataclass(eq=False, slots=True)
class StagedKv:
    """A block. Release it once; its data must not be used after that."""

    data: memoryview
    shared_offset: int | None
    """Where it begins in the shared file; None if it lies in this process's own memory."""
    _staging: KvStaging | None = field(default=None, repr=False)

    def release(self) -> None:
        """Gives the memory back. Idempotent."""
        staging, self._staging = self._staging, None
        if staging is not None:
            staging._free(self)


class KvStaging:
    """The blocks of one worker. Thread-safe: the engine's thread fills blocks, the event loop frees them."""

    def __init__(self, num_bytes: int) -> None:
        """Takes address space for num_bytes, and memory only as it is used."""
        size = _whole(num_bytes)
        self._lock = threading.Lock()
        self._ranges = RangeAllocator(size)
        self.num_bytes = size
        """Size of the area."""
        self._num_blocks = 0
        self._file: int | None = None
        self._map: mmap.mmap | None = None
        with contextlib.suppress(OSError, AttributeError):
            # Not on every system; without it blocks lie in this process's own memory and go by stream.
            self._file = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC)
            os.ftruncate(self._file, size)
            self._map = mmap.mmap(self._file, size)

    @property
    def path(self) -> str | None:
        """The file by which other processes of the same locality() reach the blocks; None if there is none."""
        return f"/proc/{os.getpid()}/fd/{self._file}" if self._map is not None else None

    @property
    def num_blocks(self) -> int:
        """Blocks not released yet."""
        return self._num_blocks

    def take(self, num_bytes: int) -> StagedKv:
        """Returns a block of that many bytes; if the area has no room for it, in this process's own memory."""
        length = _whole(num_bytes)
        with self._lock:
            start = self._ranges.allocate(length) if self._map is not None else None
        if start is None or self._map is None:
            block = StagedKv(memoryview(bytearray(num_bytes)), None, self)
        else:
            block = StagedKv(memoryview(self._map)[start : start + num_bytes], start, self)
        with self._lock:
            self._num_blocks += 1
        return block

    def close(self) -> None:
        """Gives the file up. The mapping ends with the last block's view."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _free(self, block: StagedKv) -> None:
        length = _whole(len(block.data))
        with self._lock:
            self._num_blocks -= 1
            if block.shared_offset is not None:
                self._ranges.release(block.shared_offset, length)
        # A reader that was cancelled may not be done with its view yet; the view ends with it.
        with contextlib.suppress(BufferError):
            block.data.release()


def _whole(num_bytes: int) -> int:
    """Returns what a block of so many bytes takes; even an empty one takes something."""
    return max(-(-num_bytes // ALIGNMENT), 1) * ALIGNMENT


def page_checksums(kv: memoryview, page_bytes: int) -> list[int]:
    """Returns the checksum of each page of KV, of which the last one may be shorter."""
    return [checksum(kv[begin : begin + page_bytes]) for begin in range(0, len(kv), page_bytes)]


def checksum(data: memoryview) -> int:
    """Returns XXH3-64 of the data: at tens of GB/s it costs a fraction of the copy that it guards."""
    return xxhash.xxh3_64_intdigest(data)


@cache
def locality() -> str:
    """Returns a name that two processes share exactly if one can open the other's files in /proc; empty if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot_id:
            return f"{boot_id.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
