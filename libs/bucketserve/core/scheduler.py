"""SchedulerCore: events and the time in, decisions out. The only mutable aggregate of the core.

It does no I/O, reads no clock and draws no random number: the scheduler service and the simulator drive the same code,
and a recorded log of (time, events) replays to the same decisions.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bucketserve.core.admission import Admission
from bucketserve.core.batching import BatchFormer, Formed
from bucketserve.core.demand import Demand
from bucketserve.core.edges import EdgeChooser
from bucketserve.core.fleet import Fleet
from bucketserve.core.handover import Handover
from bucketserve.core.lanes import Lane, Lanes
from bucketserve.core.layout import LayoutChooser
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
    ReleaseKv,
    RequestCancelled,
    RequestFinished,
    RequestMoved,
    RequestSubmitted,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerReported,
)
from bucketserve.core.order import latest_start_s, order_key
from bucketserve.core.roles import RoleBalancer
from bucketserve.core.settings import CoreSettings, QueueOrder
from bucketserve.core.tenants import TenantBook
from bucketserve.core.types import Bucket, Request, RequestClass, RequestId, RunningRequest, WorkerId, WorkerRole
from bucketserve.core.waste import Waste, WasteBook
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
    num_deferred: int
    num_running: int
    predicted_waste: Waste
    """Of a batch padded to its bucket's edge, over the lengths that arrive."""
    observed_waste: Waste
    """Of the batches so far, if each were padded to its longest prompt."""
    roles: Mapping[WorkerId, WorkerRole]
    """Of the workers, as they are now."""


@dataclass(slots=True)
class _Running:
    request: Request
    worker_id: WorkerId
    lane: Lane
    is_prefilled: bool = False
    prefilled_s: float | None = None
    target_id: WorkerId | None = None
    """The decode worker that its KV moves to."""


class SchedulerCore:
    """Admission, buckets, batches and placement for one model."""

    def __init__(self, settings: CoreSettings, context_tokens: int) -> None:
        """Starts empty. Lengths reach from 1 to context_tokens."""
        self._settings = settings
        self._lanes = Lanes(context_tokens, settings.deferred_share)
        self._edges = EdgeChooser(settings, context_tokens)
        self._fleet = Fleet(settings)
        self._demand = Demand()
        self._former = BatchFormer(settings, self._lanes, self._fleet, self._edges, self._demand)
        self._handover = Handover(self._fleet)
        self._roles = RoleBalancer(settings, self._fleet, self._lanes, self._handover)
        self._layout = LayoutChooser(settings, self._fleet)
        self._tenants = TenantBook()
        self._admission = Admission(settings, self._lanes, self._fleet, self._tenants)
        self._waste = WasteBook()
        self._running: dict[RequestId, _Running] = {}
        self._deadlines: list[tuple[float, str, int]] = []
        self._commands: list[Command] = []
        self._drops: list[Drop] = []

    def restore(self, *, waiting: Iterable[Request], running: Mapping[Request, WorkerId], edges: Sequence[int]) -> None:
        """Takes over what a store holds; admission limits don't apply to what was admitted before."""
        if edges:
            self._edges.restore(edges, self._lanes)
        for request in waiting:
            self._enqueue(request)
        for request, worker_id in running.items():
            self._running[request.request_id] = _Running(request, worker_id, Lane.IN_TIME)
            self._demand.took(Lane.IN_TIME, request.reserved_tokens, 0.0)
            self._watch_deadline(request, 0.0)

    def status(self) -> CoreView:
        """Returns buckets, totals and roles. O(cells + workers)."""
        views = []
        for bucket in self._edges.buckets:
            number, tokens = self._lanes.count(bucket)
            views.append(BucketView(bucket, number, tokens))
        return CoreView(
            tuple(views),
            len(self._lanes),
            len(self._lanes.of(Lane.DEFERRED)),
            len(self._running),
            self._edges.predicted_waste(),
            self._waste.observed(),
            {worker.worker_id: worker.role for worker in self._fleet},
        )

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
        if self._edges.update(self._lanes, self._fleet, now_s):
            self._commands.append(ChangeEdges(self._edges.edges))
        self._commands += self._layout.update(now_s)
        self._commands += self._roles.update(now_s)
        self._commands += self._hand_over()
        self._dispatch(now_s)
        if not len(self._lanes):
            self._admission.drain.pause()
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
                self._prefilled(event, now_s)
            case KvMoved():
                self._moved(event, now_s)
            case WorkerJoined():
                self._join(event, now_s)
            case WorkerDraining(worker_id=worker_id):
                if worker := self._fleet.get(worker_id):
                    worker.is_draining = True
                    self._fleet.changed(worker)
                    self._former.worker_left(worker)
            case WorkerLost(worker_id=worker_id):
                worker = self._fleet.leave(worker_id)
                if worker is not None:
                    self._former.worker_left(worker)
                self._lose([rid for rid, r in self._running.items() if worker_id in (r.worker_id, r.target_id)], now_s)

    def _submit(self, request: Request, now_s: float) -> None:
        known = self._lanes.get(request.request_id)
        running = self._running.get(request.request_id)
        current = known or (running.request if running else None)
        if current is not None and current.attempt >= request.attempt:
            self._commands.append(RefuseRequest(request.request_id, request.attempt, RefuseReason.DUPLICATE, 0.0))
            return
        if known is not None:
            self._dequeue(request.request_id)
        elif running is not None:
            self._stop(running, now_s)
        elif refusal := self._admission.refusal(request, now_s):
            self._commands.append(RefuseRequest(request.request_id, request.attempt, *refusal))
            return
        self._edges.arrived(request.prefill_tokens, now_s)
        self._enqueue(request)
        self._commands.append(AdmitRequest(request))

    def _cancel(self, request_id: RequestId) -> None:
        if request := self._dequeue(request_id):
            self._drops.append(Drop(request_id, request.attempt, DropReason.CANCELLED))
        elif running := self._running.get(request_id):
            for worker_id in (running.worker_id, running.target_id):
                if worker_id is not None:
                    self._commands.append(CancelAtWorker(worker_id, request_id))

    def _finish(self, event: RequestFinished, now_s: float) -> None:
        running = self._running.get(event.request_id)
        if running is None or running.request.attempt != event.attempt or running.worker_id != event.worker_id:
            return
        self._layout.finished(running.request, running.prefilled_s, event.output_tokens, now_s)
        self._end(running, now_s)
        self._admission.drain.finished(running.request.prefill_tokens, now_s)
        self._commands.append(ForgetRequest(event.request_id))

    def _report(self, event: WorkerReported) -> None:
        worker = self._fleet.get(event.worker_id)
        if worker is None:
            return
        worker.report(event.headroom)
        for sample in event.steps:
            self._fleet.learn(worker, sample)
        self._fleet.changed(worker)

    def _prefilled(self, event: BatchPrefilled, now_s: float) -> None:
        worker = self._fleet.get(event.worker_id)
        if worker is None:
            return
        for request_id in event.request_ids:
            worker.prefilled(request_id)
            running = self._running.get(request_id)
            if running is not None and running.worker_id == event.worker_id:
                running.is_prefilled, running.prefilled_s = True, now_s
        for request_id in event.held:
            self._held(request_id, event.worker_id)
        self._fleet.changed(worker)

    def _held(self, request_id: RequestId, worker_id: WorkerId) -> None:
        """Notes that a worker holds the KV of a request for a decode worker."""
        running = self._running.get(request_id)
        if running is not None and running.worker_id == worker_id:
            running.is_prefilled = True
            self._handover.ready(running.request, worker_id)

    def _moved(self, event: KvMoved, now_s: float) -> None:
        running = self._running.get(event.request_id)
        if running is None or running.request.attempt != event.attempt or running.target_id != event.target_id:
            return
        if not event.is_ok:
            # Never served as it is: its gateway submits it again and the prompt is computed anew.
            self._lose([event.request_id], now_s, DropReason.WORKER_FAILED)
            return
        self._arrived(running, event.source_id, event.target_id)

    def _arrived(self, running: _Running, source_id: WorkerId, target_id: WorkerId) -> None:
        """A request decodes at another worker from now on."""
        request_id = running.request.request_id
        running.worker_id, running.target_id = target_id, None
        self._commands.append(RequestMoved(request_id, target_id))
        if target := self._fleet.get(target_id):
            target.incoming.pop(request_id, None)
            self._fleet.changed(target)
        source = self._fleet.get(source_id)
        if source is not None and source is not target:
            source.release(request_id)
            self._fleet.changed(source)
            self._commands.append(ReleaseKv(source_id, request_id))

    def _join(self, event: WorkerJoined, now_s: float) -> None:
        if older := self._fleet.get(event.worker_id):
            self._former.worker_left(older)
        worker = WorkerState.joined(event)
        still = {at.request_id for at in event.running}
        for at in event.running:
            self._adopt(at, event.worker_id, now_s)
        here = {rid for rid, r in self._running.items() if event.worker_id in (r.worker_id, r.target_id)}
        worker.requests = here & still
        self._fleet.join(worker)
        self._lose(sorted(here - still), now_s)
        for request_id in sorted(still - here):
            self._commands.append(CancelAtWorker(event.worker_id, request_id))
        for at in event.running:
            if at.is_held:
                self._held(at.request_id, event.worker_id)

    def _adopt(self, at: RunningRequest, worker_id: WorkerId, now_s: float) -> None:
        """Believes a worker that it has a request that waits here, or whose worker is not here to say otherwise."""
        waiting = self._lanes.get(at.request_id)
        if waiting is not None and waiting.attempt == at.attempt:
            self._dequeue(at.request_id)
            self._running[at.request_id] = _Running(waiting, worker_id, Lane.IN_TIME)
            self._demand.took(Lane.IN_TIME, waiting.reserved_tokens, now_s)
            self._commands.append(RequestMoved(at.request_id, worker_id))
            return
        running = self._running.get(at.request_id)
        if running is None or running.request.attempt != at.attempt:
            return
        if running.target_id == worker_id and not at.is_held:
            # Its KV has come; the word of it was lost with the stream.
            self._arrived(running, running.worker_id, worker_id)
        elif worker_id not in (running.worker_id, running.target_id) and self._fleet.get(running.worker_id) is None:
            running.worker_id, running.target_id = worker_id, None
            self._commands.append(RequestMoved(at.request_id, worker_id))

    def _lose(
        self, request_ids: Sequence[RequestId], now_s: float, reason: DropReason = DropReason.WORKER_LOST
    ) -> None:
        for request_id in request_ids:
            running = self._running[request_id]
            self._stop(running, now_s, but_not_at_lost=True)
            self._drops.append(Drop(request_id, running.request.attempt, reason))

    # --- the queue ----------------------------------------------------------------------------------------------

    def _enqueue(self, request: Request) -> None:
        prefill_s = self._fleet.times.prefill_s(request.prefill_tokens)
        lead_tokens = self._tenants.lead(request.tenant)
        key = order_key(
            request,
            self._settings,
            prefill_s=prefill_s,
            cost_s=self._cost_s(request, prefill_s),
            lead_s=self._admission.drain.seconds_for(round(lead_tokens)) if lead_tokens else 0.0,
        )
        late_s: float | None = float("inf")
        if self._settings.queue_order is QueueOrder.SLACK:
            is_batch = request.request_class is RequestClass.BATCH
            late_s = None if is_batch else latest_start_s(request, self._settings, prefill_s)
        self._lanes.add(request, key, late_s)
        self._tenants.entered(request)
        self._admission.entered(request)
        self._watch_deadline(request, prefill_s)

    def _cost_s(self, request: Request, prefill_s: float) -> float:
        """Returns the delay that a request means to those that wait, in seconds, summed over them.

        It takes the cluster's KV memory for tokens held x time held / all tokens, and everyone behind it waits as long.
        """
        if not self._fleet.kv_total_tokens:
            return 0.0
        held_s = prefill_s + request.max_new_tokens * self._fleet.tpot_s
        memory_s = request.reserved_tokens * held_s / self._fleet.kv_total_tokens
        return memory_s * (1 + len(self._lanes.of(Lane.IN_TIME)))

    def _dequeue(self, request_id: RequestId) -> Request | None:
        request = self._lanes.remove(request_id)
        if request is not None:
            self._tenants.left(request)
            self._admission.left(request)
            self._former.forget(request_id)
        return request

    def _watch_deadline(self, request: Request, prefill_s: float) -> None:
        """Watches for the moment from which on a waiting request can't have a token by its deadline any more."""
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s - prefill_s, request.request_id, request.attempt))

    def _expire(self, now_s: float) -> None:
        """Drops what can't be in time any more; what runs is stopped at its deadline."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, name, attempt = heapq.heappop(self._deadlines)
            request_id = RequestId(name)
            waiting = self._lanes.get(request_id)
            running = self._running.get(request_id)
            if waiting is not None and waiting.attempt == attempt:
                self._dequeue(request_id)
            elif running is not None and running.request.attempt == attempt:
                deadline_s = running.request.deadline_s or 0.0
                if deadline_s > now_s:
                    heapq.heappush(self._deadlines, (deadline_s, name, attempt))
                    continue
                self._stop(running, now_s)
            else:
                continue
            self._drops.append(Drop(request_id, attempt, DropReason.DEADLINE))

    # --- batches ------------------------------------------------------------------------------------------------

    def _dispatch(self, now_s: float) -> None:
        """Cuts batches while a worker has room and a bucket has requests that fit."""
        self._former.wake_s = None
        self._demand.advance(now_s)
        if not len(self._lanes):
            return
        self._lanes.defer_late(now_s)
        self._drop_what_fits_nowhere(now_s)
        while len(self._lanes) and (formed := self._former.form(now_s)) is not None:
            batch = formed.command.batch
            for request in formed.requests:
                self._dequeue(request.request_id)
                self._running[request.request_id] = _Running(request, batch.worker_id, formed.lane)
            self._demand.took(formed.lane, batch.reserved_kv_tokens, now_s)
            self._lanes.dispatched(formed.lane, self._share_tokens(formed))
            self._waste.add(batch)
            self._commands.append(formed.command)

    def _share_tokens(self, formed: Formed) -> int:
        """Returns what a batch takes of its worker, in tokens; a request takes at least what belongs to its slot.

        Where slots are scarcer than memory, a flood of tiny requests would otherwise pay back nothing for all it takes.
        """
        worker = self._fleet.get(formed.command.batch.worker_id)
        slot = worker.headroom.kv_total_tokens // max(worker.headroom.max_sequences, 1) if worker else 0
        return sum(max(request.reserved_tokens, slot) for request in formed.requests)

    def _drop_what_fits_nowhere(self, now_s: float) -> None:
        """Ends requests that are late and that no worker here could hold even if it were empty.

        They were admitted while there was another worker, or none: until they are late one may still come.
        """
        if not len(self._fleet):
            return
        for lane in Lane:
            cells = self._lanes.of(lane)
            if not len(cells):
                continue
            for bucket in self._edges.buckets:
                while (key := cells.head(bucket)) is not None and key[0] < now_s:
                    request = cells.get(RequestId(key[2]))
                    if request is None or self._fleet.could_hold(request):
                        break
                    self._dequeue(request.request_id)
                    self._drops.append(Drop(request.request_id, request.attempt, DropReason.TOO_LARGE))

    def _hand_over(self) -> Sequence[Command]:
        moves = self._handover.moves(self._ready_at)
        for move in moves:
            self._running[move.request_id].target_id = move.target_id
        return moves

    def _ready_at(self, request_id: RequestId, source_id: WorkerId) -> Request | None:
        running = self._running.get(request_id)
        if running is None or running.worker_id != source_id or not running.is_prefilled or running.target_id:
            return None
        return running.request

    # --- the end of what runs -----------------------------------------------------------------------------------

    def _stop(self, running: _Running, now_s: float, *, but_not_at_lost: bool = False) -> None:
        """Takes a running request away from its workers; those that are still there are told to stop it."""
        for worker_id in (running.worker_id, running.target_id):
            if worker_id is None:
                continue
            worker = self._fleet.get(worker_id)
            if not but_not_at_lost or (worker is not None and running.request.request_id in worker.requests):
                self._commands.append(CancelAtWorker(worker_id, running.request.request_id))
        self._end(running, now_s)

    def _end(self, running: _Running, now_s: float) -> None:
        request_id = running.request.request_id
        del self._running[request_id]
        self._demand.took(running.lane, -running.request.reserved_tokens, now_s)
        for worker_id in (running.worker_id, running.target_id):
            if worker_id is not None and (worker := self._fleet.get(worker_id)):
                worker.release(request_id)
                self._fleet.changed(worker)

    def _wake_s(self) -> float | None:
        times = [self._deadlines[0][0]] if self._deadlines else []
        if self._former.wake_s is not None:
            times.append(self._former.wake_s)
        return min(times, default=None)
