"""The waiting requests, in fine cells of length.

A bucket is a range of whole cells, so that a change of edges moves no request: it costs O(cells), not O(requests). A
cell is split when an edge falls inside it. Each cell orders its requests by a key that never changes while they wait
(core/order.py); removal is lazy.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from bucketserve.core.types import Bucket, Request, RequestId

__all__ = ["Key", "Waiting", "WaitingCells"]

CELLS_PER_OCTAVE = 8
GRID = tuple(sorted({round(2 ** (i / CELLS_PER_OCTAVE)) for i in range(8 * 40)} | {0}))
Key = tuple[float, float, str, int]
"""(order key, arrival, id, entry): ties break on arrival, then id; the entry tells a request that came back from its
older place."""


@dataclass(slots=True)
class Waiting:
    """A waiting request with its place in the order."""

    request: Request
    key: Key


@dataclass(slots=True)
class _Cell:
    low: int
    high: int
    heap: list[Key] = field(default_factory=list)
    members: dict[str, Waiting] = field(default_factory=dict)
    tokens: int = 0

    def add(self, waiting: Waiting) -> None:
        self.members[waiting.request.request_id] = waiting
        self.tokens += waiting.request.prefill_tokens
        heapq.heappush(self.heap, waiting.key)

    def remove(self, request_id: RequestId) -> None:
        self.tokens -= self.members.pop(request_id).request.prefill_tokens
        if len(self.heap) > 64 and len(self.heap) > 4 * len(self.members):
            self.heap = [waiting.key for waiting in self.members.values()]
            heapq.heapify(self.heap)

    def head(self) -> Key | None:
        """Returns the first key whose request still waits under it."""
        while self.heap:
            waiting = self.members.get(self.heap[0][2])
            if waiting is not None and waiting.key == self.heap[0]:
                return self.heap[0]
            heapq.heappop(self.heap)
        return None


class WaitingCells:
    """All waiting requests of a model."""

    def __init__(self, context_tokens: int) -> None:
        """Covers lengths 0 to context_tokens."""
        lows = [edge for edge in GRID if edge <= context_tokens]
        self._lows = lows
        self._cells = [_Cell(low, high) for low, high in zip(lows, [*lows[1:], context_tokens + 1], strict=True)]
        self._by_id: dict[RequestId, Waiting] = {}
        self.num_tokens = 0
        self._num_added = 0
        self._heads: dict[Bucket, Key] = {}
        """First keys of buckets that were asked for, as long as nothing says otherwise."""

    def __len__(self) -> int:
        """Number of waiting requests."""
        return len(self._by_id)

    def __contains__(self, request_id: object) -> bool:
        """Whether a request waits."""
        return request_id in self._by_id

    def __iter__(self) -> Iterator[Waiting]:
        """Yields the waiting requests, in no order."""
        return iter(self._by_id.values())

    def get(self, request_id: RequestId) -> Request | None:
        """Returns a waiting request."""
        waiting = self._by_id.get(request_id)
        return waiting.request if waiting else None

    def key(self, request_id: RequestId) -> Key | None:
        """Returns a waiting request's key."""
        waiting = self._by_id.get(request_id)
        return waiting.key if waiting else None

    def add(self, request: Request, order_key: float) -> None:
        """Adds a request. O(log n)."""
        self._num_added += 1
        waiting = Waiting(request, (order_key, request.arrival_s, request.request_id, self._num_added))
        self._by_id[request.request_id] = waiting
        self._cell_of(request.prefill_tokens).add(waiting)
        self.num_tokens += request.prefill_tokens
        for bucket, head in self._heads.items():
            if bucket.low <= request.prefill_tokens < bucket.high and waiting.key < head:
                self._heads[bucket] = waiting.key

    def remove(self, request_id: RequestId) -> Request | None:
        """Removes a request, if it waits. Amortised O(log n)."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is None:
            return None
        self._cell_of(waiting.request.prefill_tokens).remove(request_id)
        self.num_tokens -= waiting.request.prefill_tokens
        for bucket in [bucket for bucket, head in self._heads.items() if head == waiting.key]:
            del self._heads[bucket]
        return waiting.request

    def extend(self, context_tokens: int) -> None:
        """Covers lengths up to context_tokens, which is more than before."""
        last = self._cells[-1]
        lows = [edge for edge in GRID if last.high <= edge <= context_tokens]
        last.high = lows[0] if lows else context_tokens + 1
        self._lows += lows
        self._cells += [_Cell(low, high) for low, high in zip(lows, [*lows[1:], context_tokens + 1], strict=True)]

    def split_at(self, edge: int) -> None:
        """Makes `edge` a border between cells. Costs the size of the cell that it falls into."""
        index = bisect_right(self._lows, edge) - 1
        cell = self._cells[index]
        if edge == cell.low or edge >= cell.high:
            return
        left, right = _Cell(cell.low, edge), _Cell(edge, cell.high)
        for waiting in cell.members.values():
            (left if waiting.request.prefill_tokens < edge else right).add(waiting)
        self._cells[index : index + 1] = [left, right]
        # Of buckets that are no more.
        self._heads.clear()
        self._lows.insert(index + 1, edge)

    def count(self, bucket: Bucket) -> tuple[int, int]:
        """Returns (requests, their prefill tokens) in a bucket whose edges are cell borders. O(cells)."""
        cells = self._of(bucket)
        return sum(len(cell.members) for cell in cells), sum(cell.tokens for cell in cells)

    def count_below(self, bucket: Bucket, length: int) -> int:
        """Returns how many requests of a bucket are shorter than `length`. O(cells + one cell's members)."""
        total = 0
        for cell in self._of(bucket):
            if cell.high <= length:
                total += len(cell.members)
            elif cell.low < length:
                total += sum(waiting.request.prefill_tokens < length for waiting in cell.members.values())
        return total

    def head(self, bucket: Bucket) -> Key | None:
        """Returns the key of a bucket's first request. O(cells) after that one has left."""
        head = self._heads.get(bucket)
        if head is None:
            head = min((key for cell in self._of(bucket) if (key := cell.head()) is not None), default=None)
            if head is not None:
                self._heads[bucket] = head
        return head

    def in_order(self, bucket: Bucket) -> Generator[Request, None, None]:
        """Yields a bucket's requests by key; close the generator before the cells are changed."""
        cells = self._of(bucket)
        heads = [(key, i) for i, cell in enumerate(cells) if (key := cell.head()) is not None]
        heapq.heapify(heads)
        taken: dict[int, list[Key]] = {}
        try:
            while heads:
                key, i = heads[0]
                yield self._by_id[RequestId(key[2])].request
                # Taken keys leave the heap for the time of this walk, and are put back at its end.
                taken.setdefault(i, []).append(heapq.heappop(cells[i].heap))
                following = cells[i].head()
                if following is None:
                    heapq.heappop(heads)
                else:
                    heapq.heapreplace(heads, (following, i))
        finally:
            for i, keys in taken.items():
                for key in keys:
                    heapq.heappush(cells[i].heap, key)

    def longest(self) -> int:
        """Returns the greatest prefill length of the longest cell in use; 0 if nothing waits."""
        for cell in reversed(self._cells):
            if cell.members:
                return max(waiting.request.prefill_tokens for waiting in cell.members.values())
        return 0

    def _cell_of(self, length: int) -> _Cell:
        return self._cells[bisect_right(self._lows, length) - 1]

    def _of(self, bucket: Bucket) -> list[_Cell]:
        first = bisect_right(self._lows, bucket.low) - 1
        last = bisect_right(self._lows, bucket.high - 1)
        return self._cells[first:last]
