"""Who holds which range of the KV memory: the sequences, and prefixes kept for those that begin alike.

A sequence that ends leaves the KV of its whole blocks behind, until the memory is wanted. A new one that begins with
the same tokens gets that KV copied into its own range: a copy costs a hundredth of computing it, or less, and ranges
stay contiguous, so that attention reads plain views. Prefixes form a tree of blocks, whose tokens are compared, not
only their hashes: a collision must never serve somebody else's KV.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from bucketserve.core.errors import EngineError
from bucketserve.engine.kv_memory import KvMemory

__all__ = ["BLOCK_TOKENS", "KvRange", "KvSpace"]

BLOCK_TOKENS = 32
"""Prefixes are shared in whole blocks. Smaller ones find more and cost more hashing."""


@dataclass(eq=False, slots=True)
class _Block:
    """A prefix of whole blocks: one block after another prefix."""

    key: tuple[_Block | None, tuple[int, ...]]
    """The prefix before it, and the tokens of its last block."""
    ranges: dict[KvRange, None] = field(default_factory=dict)
    """Those that begin with it."""


@dataclass(eq=False, slots=True)
class KvRange:
    """A contiguous range; `start` changes when ranges are moved together."""

    start: int
    length: int
    _blocks: list[_Block] = field(default_factory=list, repr=False)
    """Prefixes whose KV others may copy from here, each one block longer than the one before."""


class KvSpace:
    """Hands out ranges of a KvMemory."""

    def __init__(self, memory: KvMemory, *, keeps_prefixes: bool) -> None:
        """Starts with everything free."""
        self.memory = memory
        self._keeps_prefixes = keeps_prefixes
        self._held: set[KvRange] = set()
        self._kept: dict[KvRange, None] = {}
        """Of sequences that have ended, the one used longest ago first."""
        self._blocks: dict[tuple[_Block | None, tuple[int, ...]], _Block] = {}
        """The tree: a block is found by the one before it and its own tokens."""

    @property
    def num_kept_tokens(self) -> int:
        """Tokens kept for reuse; their memory is to be had whenever it is wanted."""
        return sum(kept.length for kept in self._kept)

    def reserve(self, length: int) -> KvRange | None:
        """Returns a range, giving kept prefixes up and moving ranges together if need be; None if there is no room."""
        allocator = self.memory.allocator
        start = allocator.allocate(length)
        while start is None and self._kept:
            self._give_up(next(iter(self._kept)))
            start = allocator.allocate(length)
        if start is None and allocator.num_free >= length:
            self._move_together()
            start = allocator.allocate(length)
        if start is None:
            return None
        taken = KvRange(start, length)
        self._held.add(taken)
        return taken

    def reuse(self, into: KvRange, tokens: Sequence[int]) -> int:
        """Copies the KV of the longest known prefix of `tokens` into a range; returns its length in tokens."""
        block, number = self._longest(tokens)
        if block is None:
            return 0
        source = next(iter(block.ranges))
        self.memory.copy(source.start, into.start, number)
        if source in self._kept:
            self._kept[source] = self._kept.pop(source)
        return number

    def publish(self, of: KvRange, tokens: Sequence[int]) -> None:
        """Lets others copy the KV of these tokens, with which the range begins, while it is held and after."""
        self._forget(of)
        if not self._keeps_prefixes:
            return
        block = None
        for piece in _pieces(tokens):
            key = (block, piece)
            block = self._blocks.get(key) or self._blocks.setdefault(key, _Block(key))
            block.ranges[of] = None
            of._blocks.append(block)

    def release(self, held: KvRange, tokens: Sequence[int] = ()) -> None:
        """Gives a range back; the KV of `tokens`, with which it begins, is kept while nobody wants the memory."""
        self._held.remove(held)
        self._forget(held)
        whole = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        if not self._keeps_prefixes or not whole or self._longest(tokens)[1] == whole:
            self.memory.allocator.release(held.start, held.length)
            return
        if held.length > whole:
            self.memory.allocator.release(held.start + whole, held.length - whole)
            held.length = whole
        self.publish(held, tokens)
        self._kept[held] = None

    def check_integrity(self) -> None:
        """Checks that every token of the memory is free, or in exactly one range.

        Raises:
            EngineError: it is not so.
        """
        ranges = sorted((r.start, r.length) for r in (*self._held, *self._kept))
        used, free = sum(length for _, length in ranges), self.memory.allocator.num_free
        overlaps = any(a[0] + a[1] > b[0] for a, b in pairwise(ranges))
        if overlaps or used + free != self.memory.num_tokens:
            raise EngineError(f"KV memory is inconsistent: {used} used, {free} free of {self.memory.num_tokens}")

    def _longest(self, tokens: Sequence[int]) -> tuple[_Block | None, int]:
        """Returns the longest known prefix, and its length in tokens; each token is looked at once."""
        block, length = None, 0
        for piece in _pieces(tokens):
            longer = self._blocks.get((block, piece))
            if longer is None:
                break
            block, length = longer, length + BLOCK_TOKENS
        return block, length

    def _forget(self, gone: KvRange) -> None:
        for block in gone._blocks:
            del block.ranges[gone]
            if not block.ranges:
                del self._blocks[block.key]
        gone._blocks.clear()

    def _give_up(self, kept: KvRange) -> None:
        del self._kept[kept]
        self._forget(kept)
        self.memory.allocator.release(kept.start, kept.length)

    def _move_together(self) -> None:
        ranges = sorted(self._held, key=lambda held: held.start)
        for held, start in zip(ranges, self.memory.compact([(r.start, r.length) for r in ranges]), strict=True):
            held.start = start


def _pieces(tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yields the tokens of each whole block."""
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        yield tuple(tokens[end - BLOCK_TOKENS : end])
