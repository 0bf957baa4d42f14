"""From prefill to decode workers: who pulls which request's KV, and when.

Decode pulls: a prefilled request's KV stays where it was computed until a decode worker has room for its prompt and the
output that is likely, so that a full decode side holds the prefill side back by itself. Requests go in the order of
arrival; one is passed over that no decode worker of its prefill worker's fingerprint could hold even if it were empty.
While the KV moves, both sides count it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from bucketserve.core.fleet import Fleet
from bucketserve.core.messages import PullKv
from bucketserve.core.types import Request, RequestId, WorkerId
from bucketserve.core.workers import WorkerState

__all__ = ["Handover"]

Entry = tuple[float, RequestId, WorkerId, int]
"""(arrival, request, source, reserved tokens)."""
STALE_ENTRIES = 64
"""Of the queue, before it is cleaned: beyond one for each request that waits."""


class Handover:
    """Prefilled requests that wait for a decode worker."""

    def __init__(self, fleet: Fleet) -> None:
        """Reads and books the fleet's workers."""
        self._fleet = fleet
        self._waiting: dict[RequestId, Entry] = {}
        self._ready: list[Entry] = []
        """Those that wait, in order; entries of others are out of date."""
        self._waiting_tokens = 0

    def waiting_tokens(self) -> int:
        """Returns the KV tokens that prefilled requests wait for on the decode side."""
        return self._waiting_tokens

    def ready(self, request: Request, source_id: WorkerId) -> None:
        """Queues a request whose prompt is computed."""
        self._queue((request.arrival_s, request.request_id, source_id, request.reserved_tokens))

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

    def pulls(self, still_at: Callable[[RequestId, WorkerId], Request | None]) -> tuple[list[PullKv], list[RequestId]]:
        """Returns the transfers to begin now, and the requests passed over since no worker there could ever take them.

        Args:
            still_at: (request, source) -> the request if it is held there and nobody pulls it yet, else None.
        """
        pulls: list[PullKv] = []
        stuck: list[RequestId] = []
        passed_over: list[Entry] = []
        full: set[str] = set()
        while self._ready and full != self._fleet.fingerprints:
            entry = heapq.heappop(self._ready)
            _, request_id, source_id, _ = entry
            if self._waiting.get(request_id) != entry:
                continue
            self.forget(request_id)
            request = still_at(request_id, source_id)
            if request is None:
                continue
            source = self._fleet.get(source_id)
            fingerprint = source.fingerprint if source is not None else ""
            target = self._target(request, source_id, fingerprint) if fingerprint not in full else None
            if target is not None:
                target.expect(request, _needs(request, source_id, target))
                self._fleet.changed(target)
                pulls.append(
                    PullKv(
                        request_id=request_id,
                        source_id=source_id,
                        target_id=target.worker_id,
                        assignment=target.next_assignment(),
                    )
                )
                continue
            passed_over.append(entry)
            if self._fleet.could_decode(request, fingerprint):
                # Nothing larger or younger of the same weights goes before it.
                full.add(fingerprint)
            else:
                stuck.append(request_id)
        for entry in passed_over:
            self._queue(entry)
        return pulls, stuck

    def _target(self, request: Request, source_id: WorkerId, fingerprint: str) -> WorkerState | None:
        for worker in self._fleet.decoders(fingerprint, request.adapter):
            if worker.free_sequences() > 0 and _needs(request, source_id, worker) <= worker.room:
                return worker
        return None


def _needs(request: Request, source_id: WorkerId, target: WorkerState) -> int:
    """KV tokens that a transfer takes at its target, which may hold the prompt's already: its role has changed."""
    return target.kv_tokens(request) - (request.prompt_tokens if target.worker_id == source_id else 0)
