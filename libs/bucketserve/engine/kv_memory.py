"""KV memory: one preallocated arena per layer, each sequence in one contiguous range of it.

A sequence's range is its prompt plus max_new_tokens, known when it is admitted, so that attention reads plain views and
nothing is copied while it runs. What that costs is fragmentation, which is measured and, when it stands in the way,
removed by moving sequences together.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["KvLayout", "KvMemory", "RangeAllocator"]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of one layer's keys and values for a token."""

    num_heads: int
    head_dim: int


class RangeAllocator:
    """Contiguous ranges of [0, size), best fit, neighbours merged on release. All units are tokens."""

    def __init__(self, size: int) -> None:
        """Starts with everything free."""
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)]

    @property
    def num_free(self) -> int:
        """Tokens free, in whatever pieces."""
        return sum(length for _, length in self._free)

    def fragmentation(self) -> float:
        """Returns the share of free memory that the largest request could not use: 1 - largest piece / free."""
        free = self.num_free
        return 1 - max(length for _, length in self._free) / free if free else 0.0

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

    def reset(self, used: int) -> None:
        """Declares [0, used) used and the rest free, after everything was moved to the front."""
        self._free = [(used, self.size - used)] if used < self.size else []


class KvMemory:
    """Keys and values of all layers, each a tensor [kv_heads, tokens, head_dim]."""

    def __init__(self, layouts: Sequence[KvLayout], num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Takes the memory at once."""
        self.num_tokens = num_tokens
        self.keys = [torch.zeros(at.num_heads, num_tokens, at.head_dim, dtype=dtype, device=device) for at in layouts]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.allocator = RangeAllocator(num_tokens)
        self.num_compactions = 0

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores new tokens.

        Args:
            layer: index of the layer.
            slots: [tokens] positions in the arena.
            keys: [kv_heads, tokens, head_dim].
            values: likewise.
        """
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)

    def compact(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Moves ranges together and returns their new starts.

        Args:
            ranges: (start, length) of everything in use, in order of start.
        """
        starts, end = [], 0
        for start, length in ranges:
            if start != end:
                for arena in (*self.keys, *self.values):
                    # Source and target may overlap: copy through a clone.
                    arena[:, end : end + length] = arena[:, start : start + length].clone()
            starts.append(end)
            end += length
        self.allocator.reset(end)
        self.num_compactions += 1
        return starts


def bytes_per_token(layouts: Sequence[KvLayout], dtype: torch.dtype) -> int:
    """Returns the KV bytes of one token: 2 x sum over layers of heads x head_dim x bytes (paper, formula 1)."""
    return 2 * sum(layout.num_heads * layout.head_dim for layout in layouts) * dtype.itemsize
