"""Batches: which bucket, which worker, how many requests, and what stopped it from being more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

from bucketserve.core.cells import WaitingCells
from bucketserve.core.messages import DispatchBatch
from bucketserve.core.placement import place
from bucketserve.core.settings import CoreSettings
from bucketserve.core.types import Batch, BatchId, Bucket, LimitedBy, Request, WorkerId
from bucketserve.core.workers import WorkerState

__all__ = ["BatchFormer"]


class BatchFormer:
    """Forms one batch at a time out of the waiting requests; removes nothing itself."""

    def __init__(self, settings: CoreSettings, waiting: WaitingCells) -> None:
        """Reads `waiting`, which its owner changes between calls."""
        self._settings = settings
        self._waiting = waiting
        self._num_formed = 0

    def form(
        self, buckets: Sequence[Bucket], workers: Mapping[WorkerId, WorkerState], now_s: float
    ) -> tuple[DispatchBatch, list[Request]] | None:
        """Returns the next batch and its requests; None if no worker can take anything that waits.

        Buckets are tried in the order of their most urgent request. One whose first request fits nowhere is passed
        over, unless that request is already late: then nothing goes before it, so that a large request is not starved
        by small ones that take each bit of memory as it becomes free.
        """
        heads = sorted((key, bucket) for bucket in buckets if (key := self._waiting.head(bucket)) is not None)
        for key, bucket in heads:
            with closing(self._waiting.in_order(bucket)) as ordered:
                first = next(ordered)
            worker = place(first, workers.values(), self._settings)
            if worker is not None:
                return self._cut(bucket, worker, now_s)
            if key[0] < now_s and any(w.could_hold(first) for w in workers.values()):
                return None
        return None

    def _cut(self, bucket: Bucket, worker: WorkerState, now_s: float) -> tuple[DispatchBatch, list[Request]]:
        """Takes requests from the bucket in order until something stops it; the first one fits by `place`."""
        chosen: list[Request] = []
        reserved = tokens = 0
        safe_tokens = worker.safe_tokens(self._settings.memory_reserve)
        sequences = worker.free_sequences()
        latest_s = float("inf")
        limited_by = LimitedBy.SUPPLY
        with closing(self._waiting.in_order(bucket)) as ordered:
            for request in ordered:
                total = tokens + request.prefill_tokens
                due_s = min(latest_s, _latest_s(request, now_s))
                if chosen:
                    finish_s = now_s + worker.times.prefill_s(total)
                    if len(chosen) >= sequences:
                        limited_by = LimitedBy.COUNT
                    elif reserved + request.reserved_tokens > safe_tokens:
                        limited_by = LimitedBy.MEMORY
                    elif total > self._settings.max_batch_tokens or finish_s > due_s:
                        limited_by = LimitedBy.TIME
                    if limited_by is not LimitedBy.SUPPLY:
                        break
                chosen.append(request)
                reserved += request.reserved_tokens
                tokens, latest_s = total, due_s
        return self._dispatch(bucket, worker, chosen, limited_by), chosen

    def _dispatch(
        self, bucket: Bucket, worker: WorkerState, chosen: Sequence[Request], limited_by: LimitedBy
    ) -> DispatchBatch:
        self._num_formed += 1
        worker.num_assigned += 1
        batch = Batch(
            batch_id=BatchId(f"{worker.worker_id}/{self._num_formed}"),
            worker_id=worker.worker_id,
            assignment=worker.num_assigned,
            bucket=bucket,
            request_ids=tuple(request.request_id for request in chosen),
            prefill_tokens=sum(request.prefill_tokens for request in chosen),
            padded_tokens=max(request.prefill_tokens for request in chosen) * len(chosen),
            reserved_kv_tokens=sum(request.reserved_tokens for request in chosen),
            limited_by=limited_by,
            max_chunk_tokens=self._chunk_tokens(worker, chosen),
        )
        worker.unaccounted.append((batch.assignment, batch.reserved_kv_tokens, len(chosen)))
        worker.outstanding[batch.batch_id] = set(batch.request_ids)
        worker.requests.update(batch.request_ids)
        return DispatchBatch(batch)

    def _chunk_tokens(self, worker: WorkerState, chosen: Sequence[Request]) -> int:
        """Prompt tokens per step that keep a step within the tightest TPOT target of the batch."""
        limit = self._settings.max_chunk_tokens
        targets = [request.tpot_slo_s for request in chosen if request.tpot_slo_s is not None]
        per_token_s = worker.times.prefill_s(1)
        if not targets or not per_token_s:
            return limit
        wanted = max(int(min(targets) / per_token_s), 16)
        return min(limit, wanted) if limit else wanted


def _latest_s(request: Request, now_s: float) -> float:
    """When its prefill must be over; a request that is late already asks for nothing of the others."""
    if request.ttft_slo_s is None:
        return float("inf")
    latest_s = request.arrival_s + request.ttft_slo_s
    return latest_s if latest_s > now_s else float("inf")
