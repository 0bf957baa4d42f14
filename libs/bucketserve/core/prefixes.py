"""Which worker has computed which prompt's beginning lately, so that it need not be computed again.

A prompt is known by chain hashes of its blocks: each stands for everything up to its block's end, so that equal hashes
mean equal beginnings. What is known of a worker is what it has computed, least recently used first out, within what its
KV memory could hold; its reports correct how much that is. A chain is used from its end to its beginning, so that the
end is forgotten first, and whoever has a block has all before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from bucketserve.core.types import WorkerId

__all__ = ["BLOCK_TOKENS", "MAX_BLOCKS", "PrefixIndex"]

BLOCK_TOKENS = 64
"""Prompt tokens per hash."""
MAX_BLOCKS = 1024
"""Of a prompt; what is behind them is taken as not known anywhere."""
CORRECTION = 0.125
"""Share by which a report changes what a worker is believed to keep."""


@dataclass(slots=True)
class _Kept:
    """What one worker is believed to keep."""

    bit: int
    """The worker's in PrefixIndex._holders."""
    most: int
    """Blocks that its KV memory could hold."""
    limit: float
    """Blocks that it is believed to keep."""
    blocks: dict[int, None] = field(default_factory=dict)
    """Least recently used first."""


class PrefixIndex:
    """Hash -> workers. Looking up takes O(log blocks), noting O(blocks) of a prompt."""

    def __init__(self) -> None:
        """Knows nobody."""
        self._kept: dict[WorkerId, _Kept] = {}
        self._holders: dict[int, int] = {}
        """The workers that have a block, a bit each."""
        self._names: dict[int, WorkerId] = {}
        """Of each bit."""

    def join(self, worker_id: WorkerId, kv_tokens: int) -> None:
        """Takes a worker with a KV memory of so many tokens, of which nothing is known."""
        self.leave(worker_id)
        bit = 1
        while bit in self._names:
            bit <<= 1
        self._names[bit] = worker_id
        most = kv_tokens // BLOCK_TOKENS
        self._kept[worker_id] = _Kept(bit, most, most)

    def leave(self, worker_id: WorkerId) -> None:
        """Forgets a worker and all that it had."""
        kept = self._kept.pop(worker_id, None)
        if kept is not None:
            del self._names[kept.bit]
            self._forget(kept, len(kept.blocks))

    def tokens_at(self, worker_id: WorkerId, hashes: Sequence[int]) -> int:
        """Returns how many leading tokens of a prompt a worker is believed to have."""
        kept = self._kept.get(worker_id)
        return 0 if kept is None else _depth(hashes, kept.blocks) * BLOCK_TOKENS

    def holders(self, hashes: Sequence[int]) -> tuple[int, Iterator[WorkerId]]:
        """Returns how many leading tokens of a prompt somebody is believed to have, and who."""
        depth = _depth(hashes, self._holders)
        return depth * BLOCK_TOKENS, self._named(self._holders[hashes[depth - 1]] if depth else 0)

    def note(self, worker_id: WorkerId, hashes: Sequence[int]) -> None:
        """Notes that a worker has a prompt of these blocks."""
        kept = self._kept.get(worker_id)
        if kept is None:
            return
        blocks, bit = kept.blocks, kept.bit
        for block in reversed(hashes):
            if block in blocks:
                del blocks[block]
            else:
                self._holders[block] = self._holders.get(block, 0) | bit
            blocks[block] = None
        self._forget(kept, len(blocks) - int(kept.limit))

    def correct(self, worker_id: WorkerId, believed: int, found: int) -> None:
        """Takes a worker's word of how many leading tokens it had of a prompt, when so many were believed to be there.

        One that had fewer keeps less than was thought: the least recently used goes. One that never has any, since its
        engine keeps nothing, is soon believed to have none.
        """
        kept = self._kept.get(worker_id)
        if kept is None or not (believed or found):
            return
        if found < believed - believed % BLOCK_TOKENS:
            kept.limit *= 1 - CORRECTION
            self._forget(kept, len(kept.blocks) - int(kept.limit))
        else:
            kept.limit = min(max(kept.limit, found // BLOCK_TOKENS) * (1 + CORRECTION), kept.most)

    def _forget(self, kept: _Kept, number: int) -> None:
        """Forgets the blocks that were not used for longest."""
        for block in list(islice(kept.blocks, max(number, 0))):
            del kept.blocks[block]
            left = self._holders[block] & ~kept.bit
            if left:
                self._holders[block] = left
            else:
                del self._holders[block]

    def _named(self, bits: int) -> Iterator[WorkerId]:
        while bits:
            bit = bits & -bits
            bits ^= bit
            yield self._names[bit]


def _depth(hashes: Sequence[int], blocks: dict[int, None] | dict[int, int]) -> int:
    """Returns how many leading hashes are there, by halves: whoever has one has all before it."""
    low, high = 0, len(hashes)
    while low < high:
        middle = (low + high + 1) // 2
        if hashes[middle - 1] in blocks:
            low = middle
        else:
            high = middle - 1
    return low
