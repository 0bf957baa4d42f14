"""A time for each of some requests, soonest first: deadlines, and when a request becomes late."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from bucketserve.core.types import RequestId

__all__ = ["DueTimes"]

STALE_ENTRIES = 64
"""Entries that are out of date, beyond one for each request, before the heap is cleaned."""


class DueTimes:
    """At most one time per request. What is forgotten leaves the heap lazily, but never gathers in it."""

    def __init__(self) -> None:
        """Starts empty."""
        self._times: dict[RequestId, float] = {}
        self._heap: list[tuple[float, RequestId]] = []

    def __iter__(self) -> Iterator[RequestId]:
        """Yields the requests that have one."""
        return iter(self._times)

    def set(self, request_id: RequestId, at_s: float) -> None:
        """Sets a request's time in place of the one that it had. Amortised O(log n)."""
        self._times[request_id] = at_s
        heapq.heappush(self._heap, (at_s, request_id))
        if len(self._heap) > STALE_ENTRIES + 2 * len(self._times):
            self._heap = [(at_s, request_id) for request_id, at_s in self._times.items()]
            heapq.heapify(self._heap)

    def forget(self, request_id: RequestId) -> None:
        """Forgets a request's time, if it has one."""
        self._times.pop(request_id, None)

    def next_s(self) -> float | None:
        """Returns the soonest time; None if there is none."""
        while self._heap and self._times.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop(self) -> RequestId:
        """Forgets the soonest time, which next_s() has returned, and returns whose it was."""
        _, request_id = heapq.heappop(self._heap)
        del self._times[request_id]
        return request_id
