"""From prefill to decode workers: who pulls which request's KV, and when.

Decode pulls: a prefilled request's KV stays where it was computed until a decode worker has room for its prompt and the
output that is likely, so that a full decode side holds the prefill side back by itself. Requests go in the order of
arrival, batch class as if it had come its patience later; until then it leaves to interactive ones what they need
there too (core/reclaim.py). One is passed over that no decode worker of its prefill worker's fingerprint could hold
even if it were empty. While the KV moves, both sides count it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bucketserve.core.fleet import Fleet
from bucketserve.core.messages import PullKv
from bucketserve.core.reclaim import leaves_enough
from bucketserve.core.types import Request, RequestClass, RequestId, WorkerId
from bucketserve.core.workers import WorkerState

__all__ = ["Handover", "Pulls"]

Entry = tuple[float, RequestId, WorkerId, int]
"""(when it counts as having come, request, source, reserved tokens)."""
STALE_ENTRIES = 64
"""Of the queue, before it is cleaned: beyond one for each request that waits."""


@dataclass(slots=True)
class Pulls:
    """What comes of a look at those that wait."""

    pulls: list[PullKv] = field(default_factory=list)
    """Transfers to begin now."""
    stuck: list[RequestId] = field(default_factory=list)
    """Passed over since no worker there could ever take them."""
    blocked: tuple[Request, Sequence[WorkerState]] | None = None
    """The first interactive request that finds no room, and the workers that could take it."""


class Handover:
    """Prefilled requests that wait for a decode worker."""

    def __init__(self, fleet: Fleet, batch_patience_s: float) -> None:
        """Reads and books the fleet's workers."""
        self._fleet = fleet
        self._batch_patience_s = batch_patience_s
        self._waiting: dict[RequestId, Entry] = {}
        self._ready: list[Entry] = []
        """Those that wait, in order; entries of others are out of date."""
        self._waiting_tokens = 0

    def waiting_tokens(self) -> int:
        """Returns the KV tokens that prefilled requests wait for on the decode side."""
        return self._waiting_tokens

    def ready(self, request: Request, source_id: WorkerId) -> None:
        """Queues a request whose prompt is computed."""
        patience_s = self._batch_patience_s if request.request_class is RequestClass.BATCH else 0.0
        self._queue((request.arrival_s + patience_s, request.request_id, source_id, request.reserved_tokens))

    def forget(self, request_id: RequestId) -> None:
        """Forgets a request, if it waits."""
        if entry := self._waiting.pop(request_id, None):
            self._waiting_tokens -= entry[3]

    def _queue(self, entry: Entry) -> None:
        self._waiting[entry[1]] = entry
        self._waiting_tokens += entry[3]
        heapq.heappush(self._ready, entry)
        if len(self._ready) > STALE_ENTRIES + 2 * len(self._waiting):
            # Behind entries that stay, those that are out of date would gather for ever.
            self._ready = list(self._waiting.values())
            heapq.heapify(self._ready)

    def pulls(self, still_at: Callable[[RequestId, WorkerId], Request | None], now_s: float) -> Pulls:
        """Returns the transfers to begin now, and who can't go.

        Args:
            still_at: (request, source) -> the request if it is held there and nobody pulls it yet, else None.
            now_s: the time.
        """
        found = Pulls()
        passed_over: list[Entry] = []
        full: set[str] = set()
        full_for_batch: set[str] = set()
        while self._ready and full != self._fleet.fingerprints:
            entry = heapq.heappop(self._ready)
            key_s, request_id, source_id, _ = entry
            if self._waiting.get(request_id) != entry:
                continue
            self.forget(request_id)
            request = still_at(request_id, source_id)
            if request is None:
                continue
            source = self._fleet.get(source_id)
            fingerprint = source.fingerprint if source is not None else ""
            yields = request.request_class is RequestClass.BATCH and key_s > now_s
            if yields and fingerprint in full_for_batch:
                # Many may wait so, and each would be compared with every worker.
                passed_over.append(entry)
                continue
            able = self._fleet.decoders(request, fingerprint)
            target = _target(request, source_id, able, yields=yields) if fingerprint not in full else None
            if target is not None:
                target.expect(request, _needs(request, source_id, target))
                self._fleet.changed(target)
                found.pulls.append(
                    PullKv(
                        request_id=request_id,
                        source_id=source_id,
                        target_id=target.worker_id,
                        assignment=target.next_assignment(),
                    )
                )
                continue
            passed_over.append(entry)
            if not self._fleet.could_decode(request, fingerprint):
                found.stuck.append(request_id)
                continue
            # Nothing larger or younger of the same weights goes before it.
            full_for_batch.add(fingerprint)
            if not yields:
                full.add(fingerprint)
            if found.blocked is None and request.request_class is RequestClass.INTERACTIVE:
                found.blocked = request, able
        for entry in passed_over:
            self._queue(entry)
        return found


def _target(request: Request, source_id: WorkerId, able: Sequence[WorkerState], *, yields: bool) -> WorkerState | None:
    for worker in able:
        has_room = worker.free_sequences() > 0 and _needs(request, source_id, worker) <= worker.room
        if has_room and not (yields and not leaves_enough(request, worker)):
            return worker
    return None


def _needs(request: Request, source_id: WorkerId, target: WorkerState) -> int:
    """KV tokens that a transfer takes at its target, which may hold the prompt's already: its role has changed."""
    return target.kv_tokens(request) - (request.prompt_tokens if target.worker_id == source_id else 0)
