"""SchedulerCore: events and the time in, decisions out. The only mutable aggregate of the core.

It does no I/O, reads no clock and draws no random number: the scheduler service and the simulator drive the same code,
and a recorded log of (time, events) replays to the same decisions.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bucketserve.core.batching import BatchFormer
from bucketserve.core.cells import WaitingCells
from bucketserve.core.drain import DrainRate
from bucketserve.core.edges import EdgeChooser
from bucketserve.core.messages import (
    AdmitRequest,
    BatchPrefilled,
    CancelAtWorker,
    ChangeEdges,
    Command,
    Decision,
    Drop,
    DropReason,
    Event,
    ForgetRequest,
    KvMoved,
    RefuseReason,
    RefuseRequest,
    RequestCancelled,
    RequestFinished,
    RequestSubmitted,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerReported,
)
from bucketserve.core.order import order_key
from bucketserve.core.settings import CoreSettings
from bucketserve.core.types import Bucket, Request, RequestId, WorkerId
from bucketserve.core.workers import WorkerState

__all__ = ["BucketView", "CoreView", "SchedulerCore"]


@dataclass(frozen=True, slots=True)
class BucketView:
    """A bucket as it stands."""

    bucket: Bucket
    num_waiting: int
    waiting_tokens: int


@dataclass(frozen=True, slots=True)
class CoreView:
    """The core as it stands, for status and metrics."""

    buckets: tuple[BucketView, ...]
    num_waiting: int
    num_running: int


@dataclass(slots=True)
class _Running:
    request: Request
    worker_id: WorkerId


class SchedulerCore:
    """Admission, buckets, batches and placement for one model."""

    def __init__(self, settings: CoreSettings, context_tokens: int) -> None:
        """Starts empty. Lengths reach from 1 to context_tokens."""
        self._settings = settings
        self._waiting = WaitingCells(context_tokens)
        self._edges = EdgeChooser(settings, context_tokens)
        self._former = BatchFormer(settings, self._waiting)
        self._workers: dict[WorkerId, WorkerState] = {}
        self._running: dict[RequestId, _Running] = {}
        self._deadlines: list[tuple[float, str, int]] = []
        self._tenant_tokens: dict[str, int] = {}
        self._drain = DrainRate()
        self._commands: list[Command] = []
        self._drops: list[Drop] = []

    def restore(self, *, waiting: Iterable[Request], running: Mapping[Request, WorkerId], edges: Sequence[int]) -> None:
        """Takes over what a store holds; admission limits don't apply to what was admitted before."""
        if edges:
            self._edges.restore(edges, self._waiting)
        for request in waiting:
            self._enqueue(request)
        for request, worker_id in running.items():
            self._running[request.request_id] = _Running(request, worker_id)
            self._watch_deadline(request)

    def status(self) -> CoreView:
        """Returns buckets and totals. O(cells)."""
        views = []
        for bucket in self._edges.buckets:
            number, tokens = self._waiting.count(bucket)
            views.append(BucketView(bucket, number, tokens))
        return CoreView(tuple(views), len(self._waiting), len(self._running))

    def step(self, events: Sequence[Event], now_s: float) -> Decision:
        """Returns what to do about the events at that time.

        Args:
            events: in the order in which they happened.
            now_s: never less than in the step before.
        """
        self._commands, self._drops = [], []
        for event in events:
            self._take(event, now_s)
        self._expire(now_s)
        if self._edges.update(self._waiting, self._workers.values(), now_s):
            self._commands.append(ChangeEdges(self._edges.edges))
        self._dispatch(now_s)
        return Decision(tuple(self._commands), tuple(self._drops), self._wake_s())

    # --- events -------------------------------------------------------------------------------------------------

    def _take(self, event: Event, now_s: float) -> None:
        match event:
            case RequestSubmitted(request=request):
                self._submit(request, now_s)
            case RequestCancelled(request_id=request_id):
                self._cancel(request_id)
            case RequestFinished():
                self._finish(event, now_s)
            case WorkerReported():
                self._report(event)
            case BatchPrefilled():
                self._prefilled(event)
            case WorkerJoined():
                self._join(event)
            case WorkerDraining(worker_id=worker_id):
                if worker := self._workers.get(worker_id):
                    worker.is_draining = True
            case WorkerLost(worker_id=worker_id):
                self._workers.pop(worker_id, None)
                self._lose([rid for rid, running in self._running.items() if running.worker_id == worker_id])
            case KvMoved():
                # No worker has role prefill or decode yet, so that nothing was asked to move.
                pass

    def _submit(self, request: Request, now_s: float) -> None:
        known = self._waiting.get(request.request_id)
        running = self._running.get(request.request_id)
        current = known or (running.request if running else None)
        if current is not None and current.attempt >= request.attempt:
            self._refuse(request, RefuseReason.DUPLICATE, 0.0)
            return
        if known is not None:
            self._dequeue(request.request_id)
        elif running is not None:
            del self._running[request.request_id]
            self._commands.append(CancelAtWorker(running.worker_id, request.request_id))
            if worker := self._workers.get(running.worker_id):
                worker.release(request.request_id)
        elif refusal := self._reason_to_refuse(request):
            self._refuse(request, refusal, self._retry_after_s(request, refusal))
            return
        self._edges.arrived(request.prefill_tokens, now_s)
        self._enqueue(request)
        self._commands.append(AdmitRequest(request))

    def _cancel(self, request_id: RequestId) -> None:
        if request := self._dequeue(request_id):
            self._drops.append(Drop(request_id, request.attempt, DropReason.CANCELLED))
        elif running := self._running.get(request_id):
            self._commands.append(CancelAtWorker(running.worker_id, request_id))

    def _finish(self, event: RequestFinished, now_s: float) -> None:
        running = self._running.get(event.request_id)
        if running is None or running.request.attempt != event.attempt or running.worker_id != event.worker_id:
            return
        del self._running[event.request_id]
        if worker := self._workers.get(event.worker_id):
            worker.release(event.request_id)
        self._drain.finished(running.request.prefill_tokens, now_s)
        self._commands.append(ForgetRequest(event.request_id))

    def _report(self, event: WorkerReported) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is None:
            return
        worker.report(event.headroom)
        for sample in event.steps:
            worker.times.learn(sample)

    def _prefilled(self, event: BatchPrefilled) -> None:
        if worker := self._workers.get(event.worker_id):
            for request_id in event.request_ids:
                worker.prefilled(request_id)

    def _join(self, event: WorkerJoined) -> None:
        worker = WorkerState.joined(event)
        self._workers[event.worker_id] = worker
        still = set(event.running)
        here = {rid for rid, running in self._running.items() if running.worker_id == event.worker_id}
        worker.requests = here & still
        self._lose(sorted(here - still))
        for request_id in sorted(still - here):
            self._commands.append(CancelAtWorker(event.worker_id, request_id))

    def _lose(self, request_ids: Sequence[RequestId]) -> None:
        for request_id in request_ids:
            running = self._running.pop(request_id)
            self._drops.append(Drop(request_id, running.request.attempt, DropReason.WORKER_LOST))

    # --- admission ----------------------------------------------------------------------------------------------

    def _reason_to_refuse(self, request: Request) -> RefuseReason | None:
        settings = self._settings
        if request.reserved_tokens > self._waiting.context_tokens:
            return RefuseReason.TOO_LARGE
        if self._workers and not any(worker.could_hold(request) for worker in self._workers.values()):
            return RefuseReason.TOO_LARGE
        if len(self._waiting) >= settings.max_queued_requests:
            return RefuseReason.QUEUE_REQUESTS
        if self._waiting.num_tokens + request.prefill_tokens > settings.max_queued_tokens:
            return RefuseReason.QUEUE_TOKENS
        tenant_tokens = self._tenant_tokens.get(request.tenant, 0) + request.prefill_tokens
        if tenant_tokens > settings.max_queued_tokens * settings.max_tenant_share:
            return RefuseReason.TENANT_QUOTA
        if request.reject_if_unattainable and request.ttft_slo_s is not None:
            ahead_s = self._drain.seconds_for(self._waiting.num_tokens)
            if ahead_s + self._prefill_s(request) > request.ttft_slo_s:
                return RefuseReason.SLO_UNATTAINABLE
        return None

    def _refuse(self, request: Request, reason: RefuseReason, retry_after_s: float) -> None:
        self._commands.append(RefuseRequest(request.request_id, request.attempt, reason, retry_after_s))

    def _retry_after_s(self, request: Request, reason: RefuseReason) -> float:
        """When as many tokens as the request has will have left the queue, by the measured rate."""
        if reason is RefuseReason.TOO_LARGE:
            return 0.0
        if reason is RefuseReason.SLO_UNATTAINABLE:
            late_s = self._drain.seconds_for(self._waiting.num_tokens) + self._prefill_s(request)
            return min(max(late_s - (request.ttft_slo_s or 0.0), 0.1), 60.0)
        return min(max(self._drain.seconds_for(request.prefill_tokens), 0.1), 60.0)

    def _prefill_s(self, request: Request) -> float:
        """Predicted duration of its prefill alone on the fastest worker."""
        return min((w.times.prefill_s(request.prefill_tokens) for w in self._workers.values()), default=0.0)

    # --- the queue ----------------------------------------------------------------------------------------------

    def _enqueue(self, request: Request) -> None:
        self._waiting.add(request, order_key(request, self._settings, self._prefill_s(request)))
        self._tenant_tokens[request.tenant] = self._tenant_tokens.get(request.tenant, 0) + request.prefill_tokens
        self._watch_deadline(request)

    def _dequeue(self, request_id: RequestId) -> Request | None:
        request = self._waiting.remove(request_id)
        if request is not None:
            left = self._tenant_tokens[request.tenant] - request.prefill_tokens
            self._tenant_tokens[request.tenant] = left
            if left == 0:
                del self._tenant_tokens[request.tenant]
        return request

    def _watch_deadline(self, request: Request) -> None:
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, request.request_id, request.attempt))

    def _expire(self, now_s: float) -> None:
        """Drops what can't be in time any more; what runs is stopped."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, name, attempt = heapq.heappop(self._deadlines)
            request_id = RequestId(name)
            waiting = self._waiting.get(request_id)
            running = self._running.get(request_id)
            if waiting is not None and waiting.attempt == attempt:
                self._dequeue(request_id)
            elif running is not None and running.request.attempt == attempt:
                del self._running[request_id]
                self._commands.append(CancelAtWorker(running.worker_id, request_id))
                if worker := self._workers.get(running.worker_id):
                    worker.release(request_id)
            else:
                continue
            self._drops.append(Drop(request_id, attempt, DropReason.DEADLINE))

    # --- batches ------------------------------------------------------------------------------------------------

    def _dispatch(self, now_s: float) -> None:
        """Cuts batches while a worker has room and a bucket has requests that fit."""
        if not len(self._waiting):
            return
        self._drop_what_fits_nowhere(now_s)
        while (formed := self._former.form(self._edges.buckets, self._workers, now_s)) is not None:
            command, requests = formed
            for request in requests:
                self._dequeue(request.request_id)
                self._running[request.request_id] = _Running(request, command.batch.worker_id)
            self._commands.append(command)

    def _drop_what_fits_nowhere(self, now_s: float) -> None:
        """Ends requests that are late and that no worker here could hold even if it were empty.

        They were admitted while there was another worker, or none: until they are late one may still come.
        """
        for bucket in self._edges.buckets:
            while self._workers and (key := self._waiting.head(bucket)) is not None and key[0] < now_s:
                request = self._waiting.get(RequestId(key[2]))
                if request is None or any(worker.could_hold(request) for worker in self._workers.values()):
                    break
                self._dequeue(request.request_id)
                self._drops.append(Drop(request.request_id, request.attempt, DropReason.TOO_LARGE))

    def _wake_s(self) -> float | None:
        return self._deadlines[0][0] if self._deadlines else None
