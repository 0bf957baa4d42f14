"""KV memory: one preallocated arena per layer, in pages of as many tokens each.

A sequence's KV lies in pages anywhere in the arena, in the order of its page table. Inside a page tokens lie side by
side, so that kernels read as they would without pages.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

__all__ = ["PAGE_TOKENS", "KvLayout", "KvMemory", "bytes_per_token", "num_pages"]

PAGE_TOKENS = 32
"""Tokens of a page. Smaller pages waste less at a sequence's end, share more, and cost more to keep account of."""
PORTION_BYTES = 64 << 20
"""Of KV that is copied at once: a device gathers it in memory of that size."""


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
        """Takes the memory at once, whole pages."""
        self.num_pages = num_pages(num_tokens)
        num_tokens = self.num_pages * PAGE_TOKENS
        self.keys = [torch.zeros(at.num_heads, num_tokens, at.head_dim, dtype=dtype, device=device) for at in layouts]
        self.values = [
            torch.zeros(at.num_heads, num_tokens, at.value_dim, dtype=dtype, device=device) for at in layouts
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens for which there is room."""
        return self.num_pages * PAGE_TOKENS

    def backwards(self) -> array[int]:
        """Returns a table of all pages, the last one first: for trials, since no two of them lie side by side."""
        return array("q", range(self.num_pages - 1, -1, -1))

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

    def copy_out(self, pages: Sequence[int], num_tokens: int, into: memoryview) -> None:
        """Writes the KV of the first tokens in these pages as bytes, page after page.

        Each is layer by layer keys, then values, [kv_heads, tokens, head_dim]; the last one may have fewer tokens.
        """
        for at, tokens, data in self._portions(pages, num_tokens, into):
            # Gathered on the device, so that it leaves there in one copy.
            gathered = data if at.device == data.device else torch.empty_like(data, device=at.device)
            for arena, part in self._parts(tokens, gathered):
                part.copy_(arena.index_select(1, at).transpose(0, 1))
            if gathered is not data:
                data.copy_(gathered)

    def copy_in(self, pages: Sequence[int], num_tokens: int, data: memoryview) -> None:
        """Reads what copy_out wrote."""
        for at, tokens, portion in self._portions(pages, num_tokens, data):
            for arena, part in self._parts(tokens, portion.to(at.device)):
                arena.index_copy_(1, at, part.transpose(0, 1))

    def _portions(
        self, pages: Sequence[int], num_tokens: int, data: memoryview
    ) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
        """Yields pages, [pages], the tokens of each, and their bytes as a tensor [pages, numbers], not copied."""
        size = sum(arena.shape[0] * arena.shape[2] for arena in (*self.keys, *self.values))
        first, itemsize, (num_full, rest) = 0, self.keys[0].itemsize, divmod(num_tokens, PAGE_TOKENS)
        most = max(PORTION_BYTES // (PAGE_TOKENS * size * itemsize), 1)
        while first < num_pages(num_tokens):
            number, tokens = (min(num_full - first, most), PAGE_TOKENS) if first < num_full else (1, rest)
            count, offset = number * tokens * size, first * PAGE_TOKENS * size * itemsize
            part = torch.frombuffer(data, dtype=self.keys[0].dtype, count=count, offset=offset)
            at = torch.tensor(pages[first : first + number], dtype=torch.long, device=self.keys[0].device)
            yield at, tokens, part.view(number, tokens * size)
            first += number

    def _parts(self, tokens: int, data: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the first tokens of all pages of each arena, with its part of the data; nothing is copied.

        An arena is [kv_heads, all pages, tokens, head_dim], its part [pages, kv_heads, tokens, head_dim].

        Args:
            tokens: of each page.
            data: [pages, numbers].
        """
        offset = 0
        for pair in zip(self.keys, self.values, strict=True):
            for arena in pair:
                heads, _, head_dim = arena.shape
                count = heads * tokens * head_dim
                part = data[:, offset : offset + count].view(len(data), heads, tokens, head_dim)
                yield arena.view(heads, self.num_pages, PAGE_TOKENS, head_dim)[:, :, :tokens], part
                offset += count

    @property
    def layout(self) -> str:
        """Number type, then [kv_heads x head_dim] of each layer, equal ones counted; value_dim too where it differs.

        At the end the tokens of a page: as KV travels, its pages follow each other.
        """
        shapes = [
            f"{k.shape[0]}x{k.shape[2]}" + (f"/{v.shape[2]}" if v.shape[2] != k.shape[2] else "")
            for k, v in zip(self.keys, self.values, strict=True)
        ]
        groups = [f"{len(list(group))}*[{shape}]" for shape, group in groupby(shapes)]
        return f"{str(self.keys[0].dtype).removeprefix('torch.')} {' '.join(groups)} by {PAGE_TOKENS}"


def num_pages(num_tokens: int) -> int:
    """Returns the pages that so many tokens take."""
    return -(-num_tokens // PAGE_TOKENS)


def bytes_per_token(layouts: Sequence[KvLayout], dtype: torch.dtype) -> int:
    """Returns the KV bytes of one token: the sum over layers of heads x (head_dim + value_dim) x bytes.

    With value_dim = head_dim that is the paper's formula 1.
    """
    return sum(layout.size for layout in layouts) * dtype.itemsize
