"""Lanes of waiting requests: those that can still meet their target, and the deferred ones.

Serving late requests first makes the next ones late as well, until everybody is. So an interactive request that can't
meet its TTFT any more is deferred, as batch-class requests are from the start; each of the two kinds has a lane, since
what holds up the first of one says nothing about the other. Deferred requests take what those in time leave, and are
owed a share of all tokens dispatched while both wait: that bounds how long they can be kept waiting. If the queue's
order is first come, first served, there is one lane.
"""

from __future__ import annotations

import enum

from bucketserve.core.cells import WaitingCells
from bucketserve.core.due import DueTimes
from bucketserve.core.types import Bucket, Request, RequestId

__all__ = ["Lane", "Lanes"]


class Lane(enum.Enum):
    """Where a request waits."""

    IN_TIME = "in_time"
    LATE = "late"
    """Interactive, and can't meet its target any more."""
    BATCH = "batch"


DEFERRED = (Lane.LATE, Lane.BATCH)


class Lanes:
    """All waiting requests of a model."""

    def __init__(self, context_tokens: int, deferred_share: float) -> None:
        """deferred_share: share of tokens dispatched, while both lanes wait, that goes to deferred requests."""
        self.context_tokens = context_tokens
        self._cells = {lane: WaitingCells(context_tokens) for lane in Lane}
        self._share = deferred_share
        self._late = DueTimes()
        self._owed = 0.0
        """Tokens that deferred requests are owed; below 0: had in advance."""

    def __len__(self) -> int:
        """Number of waiting requests."""
        return sum(len(cells) for cells in self._cells.values())

    @property
    def num_tokens(self) -> int:
        """Prefill tokens of all waiting requests."""
        return sum(cells.num_tokens for cells in self._cells.values())

    @property
    def num_deferred(self) -> int:
        """Number of those that wait behind the lane in time."""
        return sum(len(self._cells[lane]) for lane in DEFERRED)

    @property
    def num_in_time_tokens(self) -> int:
        """Prefill tokens of the requests that can still meet their target."""
        return self._cells[Lane.IN_TIME].num_tokens

    @property
    def num_interactive_tokens(self) -> int:
        """Prefill tokens of interactive requests; of all if the queue's order is first come, first served."""
        return self.num_in_time_tokens + self._cells[Lane.LATE].num_tokens

    def of(self, lane: Lane) -> WaitingCells:
        """Returns a lane's requests."""
        return self._cells[lane]

    def get(self, request_id: RequestId) -> Request | None:
        """Returns a waiting request."""
        for cells in self._cells.values():
            if request := cells.get(request_id):
                return request
        return None

    def add(self, request: Request, order_key: float, late_s: float | None) -> None:
        """Adds a request. late_s: when it can't meet its target any more; None: it is of batch class, and has none."""
        lane = Lane.BATCH if late_s is None else Lane.IN_TIME
        self._cells[lane].add(request, order_key)
        if late_s is not None and late_s < float("inf"):
            self._late.set(request.request_id, late_s)

    def remove(self, request_id: RequestId) -> Request | None:
        """Removes a request, if it waits."""
        self._late.forget(request_id)
        for cells in self._cells.values():
            if request := cells.remove(request_id):
                return request
        return None

    def defer_late(self, now_s: float) -> None:
        """Moves requests to the lane of the late that can't meet their target any more. O(log n) for each, once."""
        in_time = self._cells[Lane.IN_TIME]
        while (late_s := self._late.next_s()) is not None and late_s < now_s:
            request_id = self._late.pop()
            request, key = in_time.get(request_id), in_time.key(request_id)
            if request is not None and key is not None:
                in_time.remove(request_id)
                self._cells[Lane.LATE].add(request, key[0])

    def in_turn(self) -> tuple[tuple[Lane, ...], ...]:
        """Returns the lane in time and the deferred ones, as far as they have requests, whose turn it is first."""
        groups = tuple(group for group in ((Lane.IN_TIME,), DEFERRED) if any(len(self._cells[lane]) for lane in group))
        return groups[::-1] if self._owed > 0 else groups

    def dispatched(self, lane: Lane, tokens: int) -> None:
        """Books tokens that went to a worker; what goes while nobody else waits costs nothing."""
        if lane is not Lane.IN_TIME:
            if len(self._cells[Lane.IN_TIME]):
                # What was had in advance counts up to a request: after hours of it nobody would be owed anything.
                self._owed = max(self._owed - tokens * (1 - self._share), -self.context_tokens)
        elif self.num_deferred:
            self._owed += tokens * self._share

    def extend(self, context_tokens: int) -> None:
        """Covers lengths up to context_tokens, which is more than before."""
        self.context_tokens = context_tokens
        for cells in self._cells.values():
            cells.extend(context_tokens)

    def split_at(self, edge: int) -> None:
        """Makes `edge` a border between cells."""
        for cells in self._cells.values():
            cells.split_at(edge)

    def count(self, bucket: Bucket) -> tuple[int, int]:
        """Returns (requests, their prefill tokens) in a bucket. O(cells)."""
        counts = [cells.count(bucket) for cells in self._cells.values()]
        return sum(number for number, _ in counts), sum(tokens for _, tokens in counts)

    def count_below(self, bucket: Bucket, length: int) -> int:
        """Returns how many requests of a bucket are shorter than `length`."""
        return sum(cells.count_below(bucket, length) for cells in self._cells.values())

    def longest(self) -> int:
        """Returns the greatest prefill length that waits; 0 if nothing does."""
        return max(cells.longest() for cells in self._cells.values())
