"""Contiguous ranges of a memory, best fit."""

from __future__ import annotations

from bisect import insort

__all__ = ["RangeAllocator"]


class RangeAllocator:
    """Contiguous ranges of [0, size), best fit, neighbours merged on release."""

    def __init__(self, size: int) -> None:
        """Starts with everything free."""
        self._free: list[tuple[int, int]] = [(0, size)]

    def allocate(self, length: int) -> int | None:
        """Returns the start of a range, or None if no piece is large enough."""
        fitting = [(piece, start) for start, piece in self._free if piece >= length]
        if not fitting:
            return None
        piece, start = min(fitting)
        self._free.remove((start, piece))
        if piece > length:
            insort(self._free, (start + length, piece - length))
        return start

    def release(self, start: int, length: int) -> None:
        """Gives a range back."""
        insort(self._free, (start, length))
        merged: list[tuple[int, int]] = []
        for piece_start, piece in self._free:
            if merged and merged[-1][0] + merged[-1][1] == piece_start:
                merged[-1] = (merged[-1][0], merged[-1][1] + piece)
            else:
                merged.append((piece_start, piece))
        self._free = merged
