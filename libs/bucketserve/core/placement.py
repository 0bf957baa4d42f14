"""Which worker: filters, then scorers in [0, 1], then the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bucketserve.core.settings import CoreSettings
from bucketserve.core.types import Request, WorkerRole
from bucketserve.core.workers import WorkerState

__all__ = ["SCORERS", "can_take", "place"]

Scorer = Callable[[Request, WorkerState], float]


def can_take(request: Request, worker: WorkerState, settings: CoreSettings) -> bool:
    """Whether a worker may be given the request now."""
    if worker.is_draining or worker.role is WorkerRole.DECODE or request.reserved_tokens > worker.context_tokens:
        return False
    if len(worker.outstanding) >= settings.max_outstanding_batches or worker.free_sequences() < 1:
        return False
    # The reserve is for surprises beside other sequences; an empty worker may be filled by one request.
    safe = worker.free_tokens() if worker.is_empty() else worker.safe_tokens(settings.memory_reserve)
    return request.reserved_tokens <= safe


def by_free_kv(request: Request, worker: WorkerState) -> float:
    """Prefers workers with much free KV: a larger batch fits."""
    return max(worker.free_tokens(), 0) / max(worker.headroom.kv_total_tokens, 1)


def by_queue(request: Request, worker: WorkerState) -> float:
    """Prefers workers without a batch before this one: it starts at once."""
    return 1.0 / (1 + len(worker.outstanding))


SCORERS: tuple[tuple[float, Scorer], ...] = ((2.0, by_queue), (1.0, by_free_kv))
"""Weight and scorer. Prefix affinity has its place here once workers report what they hold."""


def place(request: Request, workers: Iterable[WorkerState], settings: CoreSettings) -> WorkerState | None:
    """Returns the worker for a batch that begins with the request, if one can take it. Ties go to the lower id."""
    able = [worker for worker in workers if can_take(request, worker, settings)]
    if not able:
        return None

    def rank(worker: WorkerState) -> tuple[float, str]:
        return (-sum(weight * scorer(request, worker) for weight, scorer in SCORERS), worker.worker_id)

    return min(able, key=rank)
