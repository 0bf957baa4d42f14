"""Continuous batching with chunked prefill, after Sarathi-Serve (arXiv 2403.02310): the colocated state of the art.

Each worker does both. A step computes every running decode and fills a fixed token budget with prompt chunks, so that a
long prompt never stalls the decodes. KV is paged, evictions are recomputed. A router in front of several workers binds
a request late, when a worker can begin with it: stronger than a router that binds at arrival.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from bucketserve.core.types import LimitedBy, Request
from bucketserve.sim.baselines.common import Baseline, KnownWorker
from bucketserve.sim.sequence import TABLE_MODE, KvPolicy, WorkerMode

__all__ = ["Chunked", "chunked_mode"]

STEP_TOKENS = 512


def chunked_mode(step_tokens: int = STEP_TOKENS) -> WorkerMode:
    """Returns the worker's loop with a budget of that many tokens a step, decodes included."""
    return replace(TABLE_MODE, kv=KvPolicy.PAGED_RECOMPUTE, max_step_tokens=step_tokens)


class Chunked(Baseline):
    """One queue in order of arrival; workers pull."""

    def __init__(self, step_tokens: int = STEP_TOKENS) -> None:
        """A worker is given more while less than a step's budget of prompt tokens waits at it."""
        super().__init__()
        self._queue: deque[Request] = deque()
        self._step_tokens = step_tokens

    def on_submitted(self, request: Request) -> None:
        """Queues it."""
        self._queue.append(request)

    def schedule(self, now_s: float) -> None:
        """Hands out the queue's head while a worker can begin with it."""
        while self._queue:
            able = [worker for worker in self.workers.values() if self._can_begin(worker, self._queue[0])]
            if not able:
                return
            best = max(able, key=lambda worker: (worker.free_tokens, worker.worker_id))
            self.dispatch(best, [self._queue.popleft()], LimitedBy.SUPPLY)

    def _can_begin(self, worker: KnownWorker, request: Request) -> bool:
        waiting = worker.headroom.waiting_prefill_tokens + worker.unaccounted_tokens
        room = worker.free_tokens - request.prompt_tokens
        return waiting < self._step_tokens and (
            room > 0.02 * worker.headroom.kv_total_tokens + worker.headroom.num_running or worker.is_idle
        )
