"""Continuous batching with chunked prefill, after Sarathi-Serve (arXiv 2403.02310): what vLLM does by default.

Each worker does both. A step computes every running decode and fills a fixed token budget with prompt chunks, so that a
long prompt never stalls the decodes. KV is paged, evictions are recomputed. A router in front of several workers binds
a request late, when a worker can begin with it: stronger than a router that binds at arrival.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

from bucketserve.core.types import LimitedBy, Request
from bucketserve.sim.baselines.common import Baseline, KnownWorker
from bucketserve.sim.policy_spec import PolicySpec, together
from bucketserve.sim.sequence import TABLE_MODE, KvPolicy, WorkerMode

__all__ = ["Chunked", "chunked_mode", "rival"]

STEP_TOKENS = 512
"""Sarathi's choice for A100: a step of that many tokens takes a few decode steps' time."""
Rank = tuple[float, float, str]


def chunked_mode(step_tokens: int = STEP_TOKENS) -> WorkerMode:
    """Returns the worker's loop with a budget of that many tokens a step, decodes included."""
    return replace(TABLE_MODE, kv=KvPolicy.PAGED_RECOMPUTE, max_step_tokens=step_tokens)


class Chunked(Baseline):
    """One queue in order of arrival; workers pull."""

    def __init__(self, step_tokens: int = STEP_TOKENS) -> None:
        """A worker is given more while less than a step's budget of prompt tokens waits at it."""
        super().__init__()
        self._queue: list[tuple[Rank, Request]] = []
        self._step_tokens = step_tokens

    def rank(self, request: Request) -> Rank:
        """Returns its place in the queue, fixed when it arrives; the least goes first."""
        return (request.arrival_s, 0.0, request.request_id)

    def on_submitted(self, request: Request) -> None:
        """Queues it."""
        heapq.heappush(self._queue, (self.rank(request), request))

    def schedule(self, now_s: float) -> None:
        """Hands out the queue's head while a worker can begin with it."""
        while self._queue and self.hand_out(self._queue[0][1]):
            heapq.heappop(self._queue)

    def hand_out(self, request: Request) -> bool:
        """Gives a request to the worker with the most free memory that can begin with it; False if none can."""
        able = [worker for worker in self.workers.values() if self._can_begin(worker, request)]
        if not able:
            return False
        best = max(able, key=lambda worker: (worker.free_tokens, worker.worker_id))
        self.dispatch(best, [request], LimitedBy.SUPPLY)
        return True

    def _can_begin(self, worker: KnownWorker, request: Request) -> bool:
        waiting = worker.headroom.waiting_prefill_tokens + worker.unaccounted_tokens
        room = worker.free_tokens - request.prompt_tokens
        return waiting < self._step_tokens and (
            room > 0.02 * worker.headroom.kv_total_tokens + worker.headroom.num_running or worker.is_idle
        )


def rival(step_tokens: int = STEP_TOKENS) -> PolicySpec:
    """Returns the policy with steps of that many tokens."""
    return PolicySpec(
        "chunked",
        "continuous batching, chunked prefill, in order of arrival (vLLM)",
        lambda _: Chunked(step_tokens),
        chunked_mode(step_tokens),
        together,
        sized=rival,
    )
