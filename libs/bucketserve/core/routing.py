"""Routing on arrival: what a plain load balancer in front of engines does, for comparison.

Each request goes to a worker as soon as it is there, whatever the worker has to do, and waits in the worker's own
queue, first come, first served. What a worker lets go for want of KV arrives once more.
"""

from __future__ import annotations

from contextlib import closing

from bucketserve.core.affinity import Affinity
from bucketserve.core.batching import Formed
from bucketserve.core.fleet import Fleet
from bucketserve.core.lanes import Lane, Lanes
from bucketserve.core.messages import PreemptAtWorker
from bucketserve.core.settings import CoreSettings, Placement
from bucketserve.core.types import Bucket, LimitedBy, Request, WorkerId, WorkerRole
from bucketserve.core.workers import WorkerState

__all__ = ["Router"]


class Router:
    """Forms a batch of each request, in order of arrival. See batching.Former."""

    def __init__(self, settings: CoreSettings, lanes: Lanes, fleet: Fleet, affinity: Affinity) -> None:
        """Reads what its owner changes between calls."""
        self._placement = settings.placement
        self._lanes = lanes
        self._fleet = fleet
        self._affinity = affinity
        self._last = WorkerId("")
        """The worker that got the request before."""
        self.preemptions: list[PreemptAtWorker] = []
        self.wake_s: float | None = None

    def form(self, now_s: float) -> Formed | None:
        """Returns the first request that some worker may serve, and where it goes; None if there is none."""
        everything = Bucket(0, self._lanes.context_tokens + 1)
        for lane in Lane:
            with closing(self._lanes.of(lane).in_order(everything)) as ordered:
                for waiting in ordered:
                    if (worker := self._choose(waiting)) is None:
                        continue
                    self._last = worker.worker_id
                    # Its books are as they are there; where it goes does not depend on it.
                    request = self._affinity.at(waiting, worker.worker_id)
                    return Formed(self._fleet.give(worker, [request], everything, LimitedBy.SUPPLY), [request], lane)
        return None

    def _choose(self, request: Request) -> WorkerState | None:
        able = [w for w in self._fleet if w.role is not WorkerRole.DECODE and w.could_serve(request)]
        able = [worker for worker in able if worker.suits(request)] or able
        newest = max((worker.generation for worker in able), default=0)
        able = [worker for worker in able if worker.generation == newest]
        return min(able, key=self._rank, default=None)

    def _rank(self, worker: WorkerState) -> tuple[int, int, WorkerId]:
        if self._placement is Placement.ROUND_ROBIN:
            return worker.worker_id <= self._last, 0, worker.worker_id
        if self._placement is Placement.LEAST_PREFILL:
            return worker.backlog_tokens(), len(worker.requests), worker.worker_id
        return len(worker.requests), -worker.free_tokens(), worker.worker_id
