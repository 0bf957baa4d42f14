"""From prefill to decode workers: who pulls which request's KV, and when.

Decode pulls: a prefilled request's KV stays where it was computed until a decode worker has room for its prompt and all
its output, so that a full decode side holds the prefill side back by itself. Requests go in the order of their keys.
While the KV moves, both sides count it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from bucketserve.core.fleet import Fleet
from bucketserve.core.messages import MoveKv
from bucketserve.core.types import Request, RequestId, WorkerId
from bucketserve.core.workers import WorkerState

__all__ = ["Handover"]


class Handover:
    """Prefilled requests that wait for a decode worker."""

    def __init__(self, fleet: Fleet) -> None:
        """Reads and books the fleet's workers."""
        self._fleet = fleet
        self._ready: list[tuple[float, RequestId, WorkerId, int]] = []
        self._waiting_tokens = 0

    def waiting_tokens(self) -> int:
        """Returns the KV tokens that prefilled requests wait for on the decode side."""
        return self._waiting_tokens

    def ready(self, request: Request, source_id: WorkerId) -> None:
        """Queues a request whose prompt is computed."""
        heapq.heappush(self._ready, (request.arrival_s, request.request_id, source_id, request.reserved_tokens))
        self._waiting_tokens += request.reserved_tokens

    def moves(self, still_at: Callable[[RequestId, WorkerId], Request | None]) -> list[MoveKv]:
        """Returns the transfers to begin now.

        Args:
            still_at: (request, source) -> the request if it is prefilled there and not moving yet, else None.
        """
        moves: list[MoveKv] = []
        while self._ready:
            _, request_id, source_id, tokens = self._ready[0]
            request = still_at(request_id, source_id)
            if request is not None:
                target = next(
                    (
                        worker
                        for worker in self._fleet.decoders()
                        if worker.free_sequences() > 0 and _needs(request, source_id, worker) <= worker.room
                    ),
                    None,
                )
                if target is None:
                    break
                target.incoming[request_id] = _needs(request, source_id, target)
                target.requests.add(request_id)
                self._fleet.changed(target)
                moves.append(MoveKv(request_id=request_id, source_id=source_id, target_id=target.worker_id))
            heapq.heappop(self._ready)
            self._waiting_tokens -= tokens
        return moves


def _needs(request: Request, source_id: WorkerId, target: WorkerState) -> int:
    """KV tokens that a transfer takes at its target, which may hold the prompt's already: its role has changed."""
    return request.reserved_tokens - (request.prompt_tokens if target.worker_id == source_id else 0)
