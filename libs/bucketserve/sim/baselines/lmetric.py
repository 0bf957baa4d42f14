"""Prefix-aware routing after LMetric (arXiv 2603.15202, OSDI'26), in front of workers with chunked prefill.

Bound at arrival to the worker with the least

    (outstanding prefill tokens + tokens of this prompt that are not cached there) x (sequences there + 1)

where what is cached is what the router sent there, least recently used first out, bounded by the worker's KV memory.
Workers take what they were given in order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bucketserve.core.messages import BatchPrefilled, RequestFinished
from bucketserve.core.types import LimitedBy, Request, RequestId, WorkerId
from bucketserve.sim.baselines.chunked import STEP_TOKENS, chunked_mode
from bucketserve.sim.baselines.common import Baseline, KnownWorker
from bucketserve.sim.policy_spec import PolicySpec, together
from bucketserve.sim.workload import BLOCK_TOKENS

__all__ = ["LMetric", "rival"]


class LMetric(Baseline):
    """A router without a queue."""

    def __init__(self, hashes: Callable[[RequestId], Sequence[int]]) -> None:
        """hashes: of a request's prompt blocks."""
        super().__init__()
        self._hashes = hashes
        self._sent: dict[WorkerId, dict[int, None]] = {}
        """Blocks sent to a worker, least recently used first."""
        self._uncached: dict[RequestId, int] = {}
        """Prompt tokens to compute, of requests whose prompts are not computed."""
        self._outstanding: dict[WorkerId, int] = {}
        self._present: dict[WorkerId, int] = {}

    def on_submitted(self, request: Request) -> None:
        """Places it at once."""
        hashes = self._hashes(request.request_id)
        uncached = {
            worker.worker_id: max(request.prompt_tokens - self._num_cached(worker.worker_id, hashes), 1)
            for worker in self.workers.values()
        }
        best = min(self.workers.values(), key=lambda worker: self._score(worker, uncached[worker.worker_id]))
        worker_id = best.worker_id
        self._uncached[request.request_id] = uncached[worker_id]
        self._outstanding[worker_id] = self._outstanding.get(worker_id, 0) + uncached[worker_id]
        self._present[worker_id] = self._present.get(worker_id, 0) + 1
        self._note(best, hashes)
        self.dispatch(best, [request], LimitedBy.SUPPLY)

    def on_prefilled(self, event: BatchPrefilled) -> None:
        """Their prompts are no work any more."""
        for request_id in event.request_ids:
            self._outstanding[event.worker_id] -= self._uncached.pop(request_id)

    def on_finished(self, event: RequestFinished) -> None:
        """One sequence less."""
        self._present[event.worker_id] -= 1

    def _score(self, worker: KnownWorker, uncached: int) -> tuple[int, int, WorkerId]:
        present = self._present.get(worker.worker_id, 0)
        load = self._outstanding.get(worker.worker_id, 0) + uncached
        return load * (present + 1), -worker.free_tokens, worker.worker_id

    def _num_cached(self, worker_id: WorkerId, hashes: Sequence[int]) -> int:
        sent, number = self._sent.get(worker_id, {}), 0
        while number < len(hashes) and hashes[number] in sent:
            number += 1
        return number * BLOCK_TOKENS

    def _note(self, worker: KnownWorker, hashes: Sequence[int]) -> None:
        sent = self._sent.setdefault(worker.worker_id, {})
        for block in reversed(hashes):
            sent.pop(block, None)
            sent[block] = None
        while len(sent) * BLOCK_TOKENS > worker.headroom.kv_total_tokens:
            del sent[next(iter(sent))]


def rival(step_tokens: int = STEP_TOKENS) -> PolicySpec:
    """Returns the policy with steps of that many tokens."""
    return PolicySpec(
        "lmetric",
        "prefix-aware routing by outstanding prefill x sequences, chunked prefill (LMetric)",
        lambda context: LMetric(lambda request_id: context.drawn(request_id).block_hashes),
        chunked_mode(step_tokens),
        together,
        sized=rival,
    )
