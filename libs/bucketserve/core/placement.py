"""Which worker: filters, then the least loaded."""

from __future__ import annotations

from collections.abc import Sequence

from bucketserve.core.settings import CoreSettings
from bucketserve.core.types import Request, WorkerRole
from bucketserve.core.workers import WorkerState

__all__ = ["can_take", "load_score", "place"]


def can_take(request: Request, prefill_tokens: int, worker: WorkerState, settings: CoreSettings) -> bool:
    """Whether a worker may be given the request now, of which it has to compute that many prompt tokens."""
    if worker.role is WorkerRole.DECODE or worker.is_saved:
        return False
    # What fails most often, and costs least to ask, comes first; no worker holds less of a request than its prompt.
    if request.prompt_tokens > worker.room or worker.kv_tokens(request) > worker.room or worker.free_sequences() < 1:
        return False
    is_small = prefill_tokens <= worker.most_small_tokens(settings)
    if not (worker.has_place(settings, small=False) or (is_small and worker.has_place(settings, small=True))):
        return False
    return worker.could_serve(request)


def load_score(worker: WorkerState) -> float:
    """Returns how little a further prompt would cost there, then how much KV is free.

    Least where nothing runs; then in a step that is to compute prompts anyway, since one with prompts costs more than
    one without (other kernels, no recorded graph); then without a batch before it.
    """
    if not worker.num_sequences():
        rank = 4.0
    elif _shares_next_step(worker):
        rank = 3.0
    else:
        rank = 2.0 / (1 + len(worker.outstanding))
    return rank + max(worker.free_tokens(), 0) / max(worker.headroom.kv_total_tokens, 1)


def _shares_next_step(worker: WorkerState) -> bool:
    """Whether prompts wait for its step under way to end that make the next one at most twice as long."""
    # A step of one that only prefills has prompts in any case.
    if worker.role is not WorkerRole.BOTH or not (worker.unaccounted and worker.headroom.num_running):
        return False
    waiting_s = worker.times.prefill_token_s() * sum(batch.prefill_tokens for batch in worker.unaccounted)
    return 0 < waiting_s <= worker.times.decode_s(worker.headroom.num_running, worker.context_tokens_held())


def place(request: Request, candidates: Sequence[WorkerState], settings: CoreSettings) -> WorkerState | None:
    """Returns the worker for a batch that begins with the request, if one can take it. Ties go to the lower id.

    Of the request's prompt nothing is known to be computed anywhere; else core/affinity.py chooses.

    A worker that the request is to avoid is taken only if no other candidate could ever serve it, one of an older
    fingerprint only if none of a newer one can take it, one with a place for small batches only if none of its own has
    one for any. Candidates come ranked by their load as it was when they last changed (core/fleet.py).
    """
    if request.avoid:
        candidates = [worker for worker in candidates if worker.suits(request)] or candidates
    able = [worker for worker in candidates if can_take(request, request.prefill_tokens, worker, settings)]

    def rank(worker: WorkerState) -> tuple[int, bool, float, str]:
        is_for_small = not worker.has_place(settings, small=False)
        return -worker.generation, is_for_small, -worker.load, worker.worker_id

    return min(able, key=rank, default=None)
