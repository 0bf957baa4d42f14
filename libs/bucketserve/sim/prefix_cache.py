"""Prompt blocks whose KV a worker still has: a hit spares computing them. Least recently used goes first, as in vLLM.

A block's hash stands for everything up to its end, so that equal hashes mean equal prefixes (`Lengths.block_hashes`).
What running sequences computed is found as well, in their memory; what nobody uses lies in memory that is free, and
makes way. A hit saves work, not memory: every sequence counts its whole context.
"""

from __future__ import annotations

from collections.abc import Sequence

from bucketserve.sim.workload import BLOCK_TOKENS

__all__ = ["PrefixCache"]


class PrefixCache:
    """Owns the hashes, not the memory."""

    def __init__(self) -> None:
        """Starts empty."""
        self._users: dict[int, int] = {}
        """Sequences that hold a block in their own memory."""
        self._idle: dict[int, None] = {}
        """Blocks that nobody holds, least recently used first."""

    def num_tokens_of(self, hashes: Sequence[int]) -> int:
        """Returns how many leading tokens of a prompt are there."""
        number = 0
        for block in hashes:
            if block in self._idle:
                # Used again: it goes to the end of the order.
                self._idle[block] = self._idle.pop(block)
            elif block not in self._users:
                break
            number += 1
        return number * BLOCK_TOKENS

    def hold(self, hashes: Sequence[int]) -> None:
        """Notes that a sequence has these blocks."""
        for block in hashes:
            self._idle.pop(block, None)
            self._users[block] = self._users.get(block, 0) + 1

    def release(self, hashes: Sequence[int]) -> None:
        """Notes that a sequence is gone. The end of a prefix goes before its beginning."""
        for block in reversed(hashes):
            self._users[block] -= 1
            if not self._users[block]:
                del self._users[block]
                self._idle[block] = None

    def shrink(self, free_tokens: int) -> None:
        """Forgets what does not fit into the free memory any more."""
        while len(self._idle) * BLOCK_TOKENS > max(free_tokens, 0):
            del self._idle[next(iter(self._idle))]
