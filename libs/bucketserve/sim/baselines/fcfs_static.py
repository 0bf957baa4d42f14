"""First come, first served, in static batches: what serving looked like before continuous batching.

Each worker does prefill and decode. A batch is padded, preallocates prompt and output of its longest members and runs
until its last one is done; the next batch is cut when the worker is free.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from bucketserve.core.types import LimitedBy, Request
from bucketserve.sim.baselines.common import Baseline, KnownWorker
from bucketserve.sim.policy_spec import PolicySpec, together
from bucketserve.sim.sequence import TABLE_MODE, Discipline

__all__ = ["FCFS_STATIC_MODE", "FcfsStatic", "rival"]

FCFS_STATIC_MODE = replace(TABLE_MODE, discipline=Discipline.STATIC)


class FcfsStatic(Baseline):
    """Batches in order of arrival, as large as memory lets them be."""

    def __init__(self, max_batch: int = 64) -> None:
        """Cuts at most max_batch requests at a time."""
        super().__init__()
        self._queue: deque[Request] = deque()
        self._max_batch = max_batch

    def on_submitted(self, request: Request) -> None:
        """Queues it."""
        self._queue.append(request)

    def schedule(self, now_s: float) -> None:
        """Gives each idle worker the next requests in order."""
        for worker in self.workers.values():
            if self._queue and worker.is_idle:
                self.dispatch(worker, *self._cut(worker))

    def _cut(self, worker: KnownWorker) -> tuple[list[Request], LimitedBy]:
        batch: list[Request] = []
        prompt = output = 0
        while self._queue:
            head = self._queue[0]
            prompt, output = max(prompt, head.prompt_tokens), max(output, head.max_new_tokens)
            if batch and (len(batch) + 1) * (prompt + output) > worker.headroom.kv_total_tokens:
                return batch, LimitedBy.MEMORY
            if len(batch) == self._max_batch:
                return batch, LimitedBy.COUNT
            batch.append(self._queue.popleft())
        return batch, LimitedBy.SUPPLY


def rival() -> PolicySpec:
    """Returns the policy."""
    return PolicySpec(
        "fcfs-static", "static batches in order of arrival", lambda _: FcfsStatic(), FCFS_STATIC_MODE, together
    )
