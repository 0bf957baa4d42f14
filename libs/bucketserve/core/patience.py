"""For how long a request is waited for: until its deadline, until one comes that could go on with it, while it moves.

Orphans are parked requests that no worker here may serve, or could hold if it were empty. What is stuck was prefilled,
and no worker here could decode it. For both a worker may come, or come back. Where there is no worker at all, requests
wait as ever until there has been none for as long; from then on there is no model, for these and for new ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from bucketserve.core.due import DueTimes
from bucketserve.core.fleet import Fleet
from bucketserve.core.lanes import Lane, Lanes
from bucketserve.core.lifecycle import Life, Lifecycle, State
from bucketserve.core.messages import DropReason
from bucketserve.core.types import Bucket, Request, RequestId

__all__ = ["PATIENCE_S", "PULL_S", "REJOIN_S", "Patience"]

PATIENCE_S = 30.0
"""How long a request waits apart for a worker that could serve it, when there is none: one of its fingerprint or
tokenizer, one that could hold it, or a decode worker large enough for the KV that is held. An attempt that its gateway
began earlier has waited since then, and KV since it was computed, whoever led meanwhile."""
REJOIN_S = 10.0
"""But at least so long from when a leader hears of it: its workers may be on their way to it."""
PULL_S = 45.0
"""How long a decode worker has to answer an order to pull. It gives a transfer up by itself well before."""


class Patience:
    """Owns deadlines, orphans, what is stuck and what moves. Ends nothing itself: it says what is to be dropped."""

    def __init__(self, lives: Lifecycle, fleet: Fleet) -> None:
        """Reads the workers; parks requests."""
        self._lives = lives
        self._fleet = fleet
        self._deadlines = DueTimes()
        self._orphans = DueTimes()
        """When each is given up."""
        self._pulls = DueTimes()
        """When each answer has to be here; that of some has come."""
        self._stuck: dict[RequestId, float] = {}
        """When each is given up, if it is stuck until then without a break."""
        self._held_since: dict[RequestId, float] = {}
        """Since when KV is held of which a worker has said so in this step."""
        self._took_over, self._since_s = False, -math.inf
        """Whether another led before, until the first step; and when that was."""
        self._alone_since_s: float | None = None
        """Since when nobody computes prompts; None: somebody does, or nobody has looked yet."""
        self._num_counted = 0
        """Changes of the fleet after which orphans were looked at."""

    def take_over(self) -> None:
        """Another led before: its workers are on their way here."""
        self._took_over = True

    def is_incomplete(self, now_s: float) -> bool:
        """Whether workers of the leader before may still be missing; to be asked in each step."""
        if self._took_over:
            self._took_over, self._since_s = False, now_s
        return now_s - self._since_s < REJOIN_S

    def is_alone(self, now_s: float) -> bool:
        """Whether nobody has computed prompts for PATIENCE_S, nor in this step; to be asked in each step."""
        if self._fleet.is_computing:
            self._alone_since_s = None
            return False
        if self._alone_since_s is None:
            self._alone_since_s = now_s
        return now_s - self._alone_since_s >= PATIENCE_S

    def set_deadline(self, request: Request, prefill_s: float) -> None:
        """Notes when a request that needs so many seconds to its first token can't have one by its deadline."""
        if request.deadline_s is not None:
            self._deadlines.set(request.request_id, request.deadline_s - prefill_s)

    def orphan(self, request: Request, now_s: float, since_s: float | None = None) -> None:
        """Parks a request until there is a worker for it; since_s: since when there was none, if before now."""
        self._lives.park(request)
        self._orphans.set(request.request_id, _end_of_patience_s(now_s if since_s is None else since_s, now_s))

    def adopted(self, request_id: RequestId) -> None:
        """There is a worker for a request, or it needs none any more."""
        self._orphans.forget(request_id)

    def forget(self, request_id: RequestId) -> None:
        """Forgets a request that has ended."""
        self._deadlines.forget(request_id)
        self._orphans.forget(request_id)
        self._pulls.forget(request_id)
        self._stuck.pop(request_id, None)
        self._held_since.pop(request_id, None)

    def fits(self, request: Request) -> bool:
        """Whether some worker may serve the request and could hold it if it were empty."""
        return self._fleet.serves(request) and self._fleet.could_hold(request)

    def beyond_all(self, lanes: Lanes, buckets: Sequence[Bucket], now_s: float) -> Iterator[Request]:
        """Yields waiting requests that are late and that no worker here may serve, or could hold even if it were empty.

        They were admitted while there was another worker, or none: one may still come, and they are in nobody's way.
        The caller parks each before it asks for the next.
        """
        if not len(self._fleet):
            return
        for cells in (lanes.of(lane) for lane in Lane):
            for bucket in buckets if len(cells) else ():
                while (key := cells.head(bucket)) is not None and key[0] < now_s:
                    request = cells.get(RequestId(key[2]))
                    if request is None or self.fits(request):
                        break
                    yield request

    def held(self, request_id: RequestId, since_s: float) -> None:
        """Notes since when a worker that has joined holds a request's KV: if it is stuck, it has been since then."""
        self._held_since[request_id] = since_s

    def pulling(self, request_id: RequestId, now_s: float) -> None:
        """Notes that a decode worker was told to pull a request's KV."""
        self._pulls.set(request_id, now_s + PULL_S)

    def next_s(self) -> float | None:
        """Returns when the next request is late, or an answer missing; None if nothing is waited for so."""
        return min((at_s for due in (self._deadlines, self._pulls) if (at_s := due.next_s()) is not None), default=None)

    def late(self, now_s: float) -> Iterator[Life]:
        """Yields what can't be in time any more, to be dropped; what runs may do so until its deadline itself."""
        while (due_s := self._deadlines.next_s()) is not None and due_s <= now_s:
            life = self._lives.get(request_id := self._deadlines.pop())
            if life is None:
                continue
            deadline_s = life.request.deadline_s or 0.0
            if life.is_at_worker and deadline_s > now_s:
                self._deadlines.set(request_id, deadline_s)
            else:
                yield life

    def adoptable(self) -> list[Request]:
        """Returns the orphans for which there is a worker now."""
        if self._num_counted == self._fleet.num_counted:
            return []
        self._num_counted = self._fleet.num_counted
        orphans = [life.request for request_id in self._orphans if (life := self._lives.get(request_id))]
        return [request for request in orphans if self.fits(request)]

    def given_up(self, now_s: float) -> Iterator[tuple[Life, DropReason]]:
        """Yields the orphans for which no worker has come in time, to be dropped, and why."""
        while (due_s := self._orphans.next_s()) is not None and due_s < now_s:
            if life := self._lives.get(self._orphans.pop()):
                is_served = self._fleet.serves(life.request)
                yield life, DropReason.TOO_LARGE if is_served else DropReason.NO_LIKE_WORKER

    def unanswered(self, now_s: float) -> Iterator[Life]:
        """Yields what is still being pulled though its decode worker should have said how that ended, to be dropped."""
        while (due_s := self._pulls.next_s()) is not None and due_s <= now_s:
            if life := self._lives.in_state(self._pulls.pop(), State.PULLING):
                yield life

    def stuck(self, request_ids: Iterable[RequestId], now_s: float) -> list[tuple[Life, DropReason]]:
        """Takes all that is stuck now; returns what has been for too long, to be dropped, and why."""
        since_s, self._held_since = self._held_since, {}
        self._stuck = {
            request_id: self._stuck.get(request_id) or _end_of_patience_s(since_s.get(request_id, now_s), now_s)
            for request_id in request_ids
        }
        lives = [self._lives.get(request_id) for request_id, due_s in self._stuck.items() if due_s < now_s]
        return [(life, self._why_stuck(life)) for life in lives if life is not None]

    def _why_stuck(self, life: Life) -> DropReason:
        source = self._fleet.get(life.worker_id) if life.worker_id is not None else None
        is_decoded = source is not None and self._fleet.decodes(source.fingerprint)
        return DropReason.TOO_LARGE if is_decoded else DropReason.NO_LIKE_WORKER


def _end_of_patience_s(since_s: float, now_s: float) -> float:
    """Returns when a request is given up for which there is no worker since then, as a leader hears now."""
    return max(since_s + PATIENCE_S, now_s + REJOIN_S)
