"""DistServe (arXiv 2401.09670, OSDI'24): prefill and decode on different workers, each first come, first served.

Source: paper and LLMServe/DistServe@82831f1. Prefill: strictly in order, while the batch has fewer than 128 requests,
its tokens stay within a budget that saturates the device, and memory holds it beside what decode has not pulled yet.
The split of workers into roles is chosen by search, as its placement does (sim/experiment.py). One shared prefill queue
is at least as good as its dispatch to the least loaded instance at arrival.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from bucketserve.core.types import LimitedBy, Request, WorkerRole
from bucketserve.sim.baselines.common import KnownWorker
from bucketserve.sim.baselines.decode_pull import Disaggregated
from bucketserve.sim.policy_spec import PolicySpec, apart
from bucketserve.sim.sequence import TABLE_MODE, KvPolicy

__all__ = ["DISTSERVE_MODE", "DistServe", "rival"]

BATCH_TOKENS = 512
"""About the prompt length that saturates the device, as the paper chooses it."""

DISTSERVE_MODE = replace(TABLE_MODE, kv=KvPolicy.PAGED_SWAP, max_sequences=1024)


class DistServe(Disaggregated):
    """See the module."""

    def __init__(
        self, prefill_batch_tokens: int = BATCH_TOKENS, max_batch: int = 128, decode_watermark: float = 0.05
    ) -> None:
        """prefill_batch_tokens: a batch stops growing beyond it; a longer prompt runs alone."""
        super().__init__(decode_watermark)
        self._queue: deque[Request] = deque()
        self._batch_tokens = prefill_batch_tokens
        self._max_batch = max_batch

    def on_submitted(self, request: Request) -> None:
        """Queues it."""
        self._queue.append(request)

    def schedule(self, now_s: float) -> None:
        """Lets decode pull, then gives idle prefill workers the next requests."""
        self.pull()
        for worker in self.of_role(WorkerRole.PREFILL):
            if self._queue and not worker.unfilled:
                batch, limited_by = self._cut(worker)
                if batch:
                    self.dispatch(worker, batch, limited_by)

    def _cut(self, worker: KnownWorker) -> tuple[list[Request], LimitedBy]:
        batch: list[Request] = []
        tokens = 0
        while self._queue:
            head = self._queue[0]
            # One token more than the prompt: the paged worker allocates the first output's slot with it.
            needed = tokens + head.prompt_tokens + len(batch) + 1
            if needed + len(batch) + 0.01 * worker.headroom.kv_total_tokens > worker.free_tokens:
                return batch, LimitedBy.MEMORY
            if batch and tokens + head.prompt_tokens > self._batch_tokens:
                return batch, LimitedBy.TIME
            if len(batch) == self._max_batch:
                return batch, LimitedBy.COUNT
            batch.append(self._queue.popleft())
            tokens += head.prompt_tokens
        return batch, LimitedBy.SUPPLY


def rival(batch_tokens: int = BATCH_TOKENS) -> PolicySpec:
    """Returns the policy with prefill batches of that many tokens."""
    return PolicySpec(
        "distserve",
        "prefill and decode apart, each in order of arrival (DistServe)",
        lambda _: DistServe(batch_tokens),
        DISTSERVE_MODE,
        apart,
        sized=rival,
    )
