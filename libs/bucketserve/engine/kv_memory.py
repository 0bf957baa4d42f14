"""KV memory: one preallocated arena per layer, each sequence in one contiguous range of it.

A sequence's range is its prompt plus max_new_tokens, known when it is admitted, so that attention reads plain views and
nothing is copied while it runs. What that costs is fragmentation, which is measured and, when it stands in the way,
removed by moving sequences together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from bucketserve.engine.ranges import RangeAllocator

__all__ = ["KvLayout", "KvMemory"]

MOVED_TOKENS = 256
"""Copied at once when ranges are moved together."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of one layer's keys and values for a token."""

    num_heads: int
    head_dim: int
    value_dim: int
    """Usually head_dim; models with latent attention (MLA) have smaller values."""

    @property
    def size(self) -> int:
        """Numbers that a token takes."""
        return self.num_heads * (self.head_dim + self.value_dim)


class KvMemory:
    """Keys and values of all layers, each a tensor [kv_heads, tokens, head_dim or value_dim]."""

    def __init__(self, layouts: Sequence[KvLayout], num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Takes the memory at once."""
        self.num_tokens = num_tokens
        self.keys = [torch.zeros(at.num_heads, num_tokens, at.head_dim, dtype=dtype, device=device) for at in layouts]
        self.values = [
            torch.zeros(at.num_heads, num_tokens, at.value_dim, dtype=dtype, device=device) for at in layouts
        ]
        # Taken now: moving ranges together is for when memory is short.
        self._buffers = {
            (heads, dim): torch.empty(heads, MOVED_TOKENS, dim, dtype=dtype, device=device)
            for heads, dim in {(arena.shape[0], arena.shape[2]) for arena in (*self.keys, *self.values)}
        }
        self.allocator = RangeAllocator(num_tokens)
        self.num_compactions = 0

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores new tokens.

        Args:
            layer: index of the layer.
            slots: [tokens] positions in the arena.
            keys: [kv_heads, tokens, head_dim].
            values: [kv_heads, tokens, value_dim].
        """
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copies the KV of a range to another that does not overlap it."""
        for arena in (*self.keys, *self.values):
            arena[:, target : target + num_tokens] = arena[:, source : source + num_tokens]

    def copy_out(self, start: int, num_tokens: int, into: memoryview) -> None:
        """Writes a range's KV as bytes: layer by layer keys, then values, each [kv_heads, num_tokens, head_dim]."""
        for arena, part in self._parts(num_tokens, into):
            part.copy_(arena[:, start : start + num_tokens])

    def copy_in(self, start: int, num_tokens: int, data: memoryview) -> None:
        """Reads what copy_out wrote."""
        for arena, part in self._parts(num_tokens, data):
            arena[:, start : start + num_tokens] = part.to(arena.device)

    def _parts(self, num_tokens: int, data: memoryview) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields each arena with its part of the bytes, as a tensor over the same memory."""
        offset = 0
        for pair in zip(self.keys, self.values, strict=True):
            for arena in pair:
                heads, _, head_dim = arena.shape
                count = heads * num_tokens * head_dim
                part = torch.frombuffer(data, dtype=arena.dtype, count=count, offset=offset)
                yield arena, part.view(heads, num_tokens, head_dim)
                offset += count * arena.itemsize

    @property
    def layout(self) -> str:
        """Number type, then [kv_heads x head_dim] of each layer, equal ones counted; value_dim too where it differs."""
        shapes = [
            f"{k.shape[0]}x{k.shape[2]}" + (f"/{v.shape[2]}" if v.shape[2] != k.shape[2] else "")
            for k, v in zip(self.keys, self.values, strict=True)
        ]
        groups = [f"{len(list(group))}*[{shape}]" for shape, group in groupby(shapes)]
        return f"{str(self.keys[0].dtype).removeprefix('torch.')} " + " ".join(groups)

    def compact(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Moves ranges together and returns their new starts.

        Args:
            ranges: (start, length) of everything in use, in order of start.
        """
        starts, end = [], 0
        for start, length in ranges:
            if start != end:
                for arena in (*self.keys, *self.values):
                    _move(arena, self._buffers[arena.shape[0], arena.shape[2]], start, end, length)
            starts.append(end)
            end += length
        self.allocator.reset(end)
        self.num_compactions += 1
        return starts


def _move(arena: torch.Tensor, buffer: torch.Tensor, start: int, target: int, length: int) -> None:
    """Moves tokens of an arena to a lower place, which may overlap theirs, without taking memory."""
    for offset in range(0, length, MOVED_TOKENS):
        number = min(MOVED_TOKENS, length - offset)
        moved = buffer[:, :number].copy_(arena[:, start + offset : start + offset + number])
        arena[:, target + offset : target + offset + number] = moved


def bytes_per_token(layouts: Sequence[KvLayout], dtype: torch.dtype) -> int:
    """Returns the KV bytes of one token: the sum over layers of heads x (head_dim + value_dim) x bytes.

    With value_dim = head_dim that is the paper's formula 1.
    """
    return sum(layout.size for layout in layouts) * dtype.itemsize
