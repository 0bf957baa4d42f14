"""SchedulerCore: events and the time in, decisions out. The only mutable aggregate of the core.

It does no I/O, reads no clock and draws no random number: the scheduler service and the simulator drive the same code,
and a recorded log of (time, events) replays to the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bucketserve.core.admission import Admission
from bucketserve.core.affinity import Affinity
from bucketserve.core.batching import BatchFormer, Former
from bucketserve.core.edges import EdgeChooser
from bucketserve.core.fleet import Fleet
from bucketserve.core.handover import Handover
from bucketserve.core.lanes import Lanes
from bucketserve.core.leaving import Leaving
from bucketserve.core.lifecycle import Life, Lifecycle, State
from bucketserve.core.messages import (
    AdaptersChanged,
    AdmitFailed,
    AdmitRequest,
    BatchPrefilled,
    CancelAtWorker,
    ChangeEdges,
    Command,
    ContextExtended,
    Decision,
    DispatchFailed,
    Drop,
    DropReason,
    Event,
    Fault,
    ForgetRequest,
    KvPulled,
    PlaceRequest,
    RefuseReason,
    RefuseRequest,
    ReleaseKv,
    RequestCancelled,
    RequestFinished,
    RequestResumed,
    RequestSubmitted,
    SaveOutputs,
    WorkerAway,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerReported,
    requests_named_by,
)
from bucketserve.core.patience import Patience
from bucketserve.core.queue import Queue
from bucketserve.core.reclaim import Reclaimer
from bucketserve.core.roles import RoleBalancer
from bucketserve.core.routing import Router
from bucketserve.core.settings import CoreSettings, Placement, QueueOrder
from bucketserve.core.tenants import TenantBook
from bucketserve.core.types import NO_WORKER_RETRY_S, FinishReason, Request, RequestId, RunningRequest, WorkerId
from bucketserve.core.views import CoreView, view
from bucketserve.core.waste import WasteBook
from bucketserve.core.workers import WorkerState

__all__ = ["SchedulerCore"]


class SchedulerCore:
    """Admission, buckets, batches and placement for one model."""

    def __init__(self, settings: CoreSettings, context_tokens: int) -> None:
        """Starts empty. Lengths reach from 1 to context_tokens, until ContextExtended or a worker knows better."""
        self._settings = settings
        self._lanes = Lanes(context_tokens, settings.deferred_share)
        self._edges = EdgeChooser(settings, context_tokens)
        self._fleet = Fleet(settings)
        self._lives = Lifecycle(self._fleet)
        self._affinity = Affinity(settings, self._fleet)
        self._former: Former = (
            BatchFormer(settings, self._lanes, self._fleet, self._edges, self._lives, self._affinity)
            if settings.placement is Placement.LATE
            else Router(settings, self._lanes, self._fleet, self._affinity)
        )
        self._handover = Handover(self._fleet, settings.batch_patience_s)
        self._reclaimer = Reclaimer(self._lives)
        self._roles = RoleBalancer(settings, self._fleet, self._lanes, self._handover)
        self._tenants = TenantBook()
        self._admission = Admission(settings, self._lanes, self._fleet, self._tenants)
        self._queue = Queue(settings, self._lanes, self._fleet, self._tenants, self._admission)
        self._waste = WasteBook()
        self._patience = Patience(self._lives, self._fleet)
        self._leaving = Leaving(self._lives, self._fleet)
        self._commands: list[Command] = []
        self._drops: list[Drop] = []

    def restore(
        self,
        *,
        parked: Iterable[Request],
        running: Mapping[Request, WorkerId],
        edges: Sequence[int],
        outputs: Mapping[str, Sequence[int]],
    ) -> None:
        """Takes over what a store holds: what waits is parked until its gateway says it again (RequestResumed)."""
        for request in parked:
            self._lives.park(request)
        for request, worker_id in running.items():
            self._lives.place(self._lives.park(request), worker_id, 0)
        self._fleet.outputs.restore(outputs)
        if edges or outputs:
            self._leaving.take_over()
            self._patience.take_over()
        if edges:
            self._extend(edges[-1] - 1)
            self._edges.restore(edges, self._lanes)

    def status(self) -> CoreView:
        """Returns buckets, totals and roles. O(cells + workers)."""
        return view(self._lanes, self._edges, self._lives, self._fleet, self._waste)

    def step(self, events: Sequence[Event], now_s: float) -> Decision:
        """Returns what to do about the events at that time.

        Args:
            events: in the order in which they happened.
            now_s: never less than in the step before.
        """
        self._commands, self._drops = [], []
        self._patience.is_incomplete(now_s)
        self._patience.is_alone(now_s)
        faults = [fault for event in events if (fault := self._try(event, now_s))]
        for life in self._patience.late(now_s):
            self._drop(life, DropReason.DEADLINE, now_s, at=life.workers)
        for life in self._patience.unanswered(now_s):
            self._drop(life, DropReason.WORKER_FAILED, now_s)
        if self._edges.update(self._lanes, self._fleet, now_s):
            self._commands.append(ChangeEdges(self._edges.edges))
        if counts := self._fleet.outputs.to_save(now_s):
            self._commands.append(SaveOutputs(counts))
        self._commands += self._roles.update(now_s)
        self._mind_orphans(now_s)
        self._hand_over(now_s)
        self._dispatch(now_s)
        if not len(self._lanes):
            self._admission.drain.pause()
        self._commands += self._leaving.released(now_s)
        return Decision(tuple(self._commands), tuple(self._drops), self._wake_s(), tuple(faults))

    # --- events -------------------------------------------------------------------------------------------------

    def _try(self, event: Event, now_s: float) -> Fault | None:
        """Takes an event; should that fail, gives up the requests that it names, so that all others go on."""
        try:
            self._take(event, now_s)
        except Exception as error:
            for request_id in requests_named_by(event):
                if life := self._lives.get(request_id):
                    self._drop(life, DropReason.INTERNAL, now_s)
                elif isinstance(event, RequestSubmitted | RequestResumed):
                    self._drops.append(Drop(request_id, DropReason.INTERNAL))
            return Fault(event, error)
        return None

    def _take(self, event: Event, now_s: float) -> None:
        match event:
            case RequestSubmitted(request=request):
                self._submit(request, now_s)
            case RequestResumed(request=request):
                self._resume(request, now_s)
            case RequestCancelled(request_id=request_id):
                self._cancel(request_id, now_s)
            case AdmitFailed(request_ids=request_ids):
                self._not_stored(request_ids, now_s)
            case DispatchFailed():
                self._not_sent(event, now_s)
            case RequestFinished():
                self._finish(event, now_s)
            case BatchPrefilled():
                self._prefilled(event)
            case KvPulled():
                self._pulled(event, now_s)
            case _:
                self._take_of_fleet(event, now_s)

    def _take_of_fleet(self, event: Event, now_s: float) -> None:
        match event:
            case WorkerReported():
                self._report(event)
            case AdaptersChanged(worker_id=worker_id, adapters=adapters):
                if worker := self._fleet.get(worker_id):
                    self._fleet.set_adapters(worker, adapters)
            case ContextExtended(context_tokens=context_tokens):
                self._extend(context_tokens)
            case WorkerJoined():
                self._join(event, now_s)
            case WorkerAway(worker_id=worker_id) | WorkerDraining(worker_id=worker_id):
                if worker := self._fleet.get(worker_id):
                    leaves = self._fleet.away if isinstance(event, WorkerAway) else self._fleet.drain
                    leaves(worker)
            case WorkerLost(worker_id=worker_id):
                worker = self._fleet.leave(worker_id)
                self._affinity.index.leave(worker_id)
                if worker is not None and worker.is_delivering and not worker.is_released:
                    self._leaving.lost(worker, now_s)
                for life in self._lives.at(worker_id):
                    self._drop(life, DropReason.WORKER_LOST, now_s)

    def _submit(self, request: Request, now_s: float) -> None:
        if self._lives.get(request.request_id) is not None:
            return
        request = self._affinity.expected(request)
        refusal = self._admission.refusal(request, now_s, may_wait=self._patience.is_incomplete(now_s))
        if refusal is None and self._patience.is_alone(now_s):
            refusal = RefuseReason.NO_WORKER, NO_WORKER_RETRY_S
        if refusal:
            self._commands.append(RefuseRequest(request.request_id, *refusal))
            return
        self._admit(request, now_s)

    def _resume(self, request: Request, now_s: float) -> None:
        life = self._lives.get(request.request_id)
        if life is None or life.state is State.PARKED:
            if life is not None and (life.request.tenant, life.request.request_class) != (
                request.tenant,
                request.request_class,
            ):
                raise ValueError("said again as another tenant's or class's")
            self._admit(self._affinity.expected(request), now_s)

    def _admit(self, request: Request, now_s: float) -> None:
        self._leaving.came(request.request_id)
        self._edges.arrived(request.prefill_tokens, now_s)
        self._enqueue(request, now_s)
        self._commands.append(AdmitRequest(request))

    def _cancel(self, request_id: RequestId, now_s: float) -> None:
        life = self._lives.get(request_id)
        if life is None:
            return
        if life.is_at_worker:
            # Its worker says when it has stopped; until then its memory is counted.
            life.is_cancelled = True
            self._commands += [CancelAtWorker(worker_id, request_id) for worker_id in life.workers]
        else:
            self._drop(life, DropReason.CANCELLED, now_s)

    def _not_stored(self, request_ids: Sequence[RequestId], now_s: float) -> None:
        for request_id in request_ids:
            if life := self._lives.in_state(request_id, State.WAITING, State.PREFILL):
                if life.state is State.PREFILL:
                    self._lives.take_back(life)
                if life.request.fingerprint:
                    # It was admitted before: its gateway says it again.
                    self._leaving.expect(life, now_s)
                self._end(life, now_s)
                self._commands.append(RefuseRequest(request_id, RefuseReason.STORE_FULL, self._admission.retry_s()))

    def _not_sent(self, event: DispatchFailed, now_s: float) -> None:
        for request_id in event.request_ids:
            life = self._lives.in_state(request_id, State.PREFILL)
            if life is not None and life.worker_id == event.worker_id:
                self._lives.take_back(life)
                if life.is_cancelled:
                    self._drop(life, DropReason.CANCELLED, now_s)
                    continue
                self._enqueue(life.request, now_s)
                self._commands.append(AdmitRequest(life.request, is_anew=True))

    def _finish(self, event: RequestFinished, now_s: float) -> None:
        life = self._lives.get(event.request_id)
        worker = self._fleet.get(event.worker_id)
        is_lost = event.reason is FinishReason.ERROR and event.is_retryable
        if life is None and is_lost and worker is not None:
            self._leaving.lost(worker, now_s, event.request_id)
        if life is None or not life.is_of(event.worker_id, event.assignment):
            return
        if is_lost:
            self._drop(life, DropReason.WORKER_FAILED, now_s, at=(life.target_id,))
            return
        if life.target_id is not None:
            # Its source ended it; what the target has of it is of no use.
            self._commands.append(CancelAtWorker(life.target_id, event.request_id))
        if event.reason is FinishReason.PREEMPTED:
            # What it was charged with pays for its next attempt.
            self._leaving.expect(life, now_s)
            self._end(life, now_s)
        else:
            self._end(life, now_s, event.output_tokens)
            self._admission.drain.finished(life.request.prefill_tokens, now_s)
        if event.reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._fleet.outputs.ended(life.request, event.output_tokens)
            if worker is not None:
                # Its next report says whether the output has arrived.
                worker.is_delivering = True
        # That it was preempted its gateway hears from the worker, after all that was generated.
        self._commands.append(ForgetRequest(event.request_id, event.reason is FinishReason.CANCELLED))

    def _report(self, event: WorkerReported) -> None:
        worker = self._fleet.get(event.worker_id)
        if worker is None:
            return
        is_same_size = event.headroom.kv_total_tokens == worker.headroom.kv_total_tokens
        worker.report(event.headroom)
        worker.is_delivering = event.is_delivering
        for sample in event.steps:
            self._fleet.learn(worker, sample)
        if not is_same_size:
            # After a shortage of memory: what it can't hold any more waits for another, or for that to pass.
            self._fleet.resized()
        self._fleet.changed(worker)

    def _prefilled(self, event: BatchPrefilled) -> None:
        worker = self._fleet.get(event.worker_id)
        if worker is None:
            return
        cached = dict(zip(event.request_ids, event.cached_tokens, strict=False))
        for request_id in event.request_ids:
            life = self._lives.in_state(request_id, State.PREFILL, State.DECODE)
            if life is not None and life.is_of(event.worker_id, event.assignment):
                worker.prefilled(request_id)
                self._lives.prefilled(life)
                self._affinity.computed(life.request, event.worker_id, cached.get(request_id))
        for request_id in event.held:
            self._hold(request_id, event.worker_id, event.assignment)
        self._fleet.changed(worker)

    def _hold(self, request_id: RequestId, worker_id: WorkerId, assignment: int) -> None:
        """Notes that a worker holds the KV of a request for a decode worker."""
        life = self._lives.in_state(request_id, State.PREFILL, State.DECODE)
        if life is not None and life.is_of(worker_id, assignment):
            self._lives.hold(life)
            self._handover.ready(life.request, worker_id)

    def _pulled(self, event: KvPulled, now_s: float) -> None:
        life = self._lives.in_state(event.request_id, State.PULLING)
        if life is None or (life.target_id, life.target_assignment) != (event.target_id, event.assignment):
            return
        if event.is_ok:
            self._arrived(life)
        else:
            # Never served as it is: its gateway submits it again and the prompt is computed anew.
            self._drop(life, DropReason.WORKER_FAILED, now_s)

    def _arrived(self, life: Life) -> None:
        """A request decodes at the worker that pulled its KV."""
        request_id = life.request.request_id
        source_id = self._lives.pulled(life)
        self._place(life)
        if source_id is not None:
            self._commands.append(ReleaseKv(source_id, request_id))

    def _place(self, life: Life) -> None:
        if life.worker_id is not None:
            self._commands.append(PlaceRequest(life.request.request_id, life.worker_id))

    def _join(self, event: WorkerJoined, now_s: float) -> None:
        self._extend(event.context_tokens)
        worker = WorkerState.joined(event, self._fleet.outputs)
        for at in event.running:
            if self._adopt(at, event.worker_id, now_s) and (life := self._lives.get(at.request_id)):
                worker.take(life.request, is_held=at.is_held)
        self._fleet.join(worker)
        self._affinity.index.join(event.worker_id, event.headroom.kv_total_tokens)
        for life in self._lives.at(event.worker_id):
            if life.request.request_id not in worker.requests:
                self._drop(life, DropReason.WORKER_LOST, now_s)
            else:
                self._lives.heard_of(life)
        for at in event.running:
            adopted = self._lives.get(at.request_id) if at.request_id in worker.requests else None
            if adopted is not None:
                # The order to let it go may be lost with the stream.
                adopted.is_leaving = False
            # One that was cancelled while its worker was away has to be cancelled again.
            if adopted is None or adopted.is_cancelled:
                self._commands.append(CancelAtWorker(event.worker_id, at.request_id))
            if at.is_held:
                self._patience.held(at.request_id, now_s - at.held_s)
                self._hold(at.request_id, event.worker_id, at.assignment)

    def _adopt(self, at: RunningRequest, worker_id: WorkerId, now_s: float) -> bool:
        """Believes a worker that it has a request that waits here, or whose worker is not here to say otherwise.

        Returns whether the request is known to be there from now on. It is not if the worker speaks of an older life of
        it, which nobody waits for.
        """
        life = self._lives.get(at.request_id)
        if life is None:
            return False
        if not life.is_at_worker:
            self._dequeue(at.request_id)
            self._lives.place(life, worker_id, at.assignment)
            self._place(life)
        elif life.target_id == worker_id and life.target_assignment == at.assignment:
            # Its KV has come; the word of it was lost with the stream.
            self._arrived(life)
        elif life.worker_id == worker_id:
            # Not known: it was taken over from a store.
            life.assignment = life.assignment or at.assignment
            if life.is_of(worker_id, at.assignment) and life.target_id == worker_id:
                # It was to pull what it holds itself, after a change of its role; the order was lost with the stream.
                self._lives.call_off(life)
        elif life.state is State.HELD and not at.is_held:
            # It has pulled what the other holds, by order of whoever led before.
            self._handover.forget(at.request_id)
            self._lives.pull(life, worker_id, at.assignment)
            self._arrived(life)
        elif worker_id not in life.workers and (life.worker_id is None or self._fleet.get(life.worker_id) is None):
            self._lives.move(life, worker_id, at.assignment)
            self._place(life)
        return life.is_of(worker_id, at.assignment)

    # --- the queue ----------------------------------------------------------------------------------------------

    def _extend(self, context_tokens: int) -> None:
        if context_tokens > self._lanes.context_tokens:
            self._edges.extend(context_tokens, self._lanes)

    def _enqueue(self, request: Request, now_s: float) -> None:
        """Queues a request; one that no worker here may serve is set aside."""
        prefill_s = self._fleet.times.prefill_s(request.prefill_tokens)
        self._patience.set_deadline(request, prefill_s)
        if not self._fleet.serves(request):
            self._patience.orphan(request, now_s, request.attempt_s)
            return
        self._patience.adopted(request.request_id)
        self._lives.wait(request)
        self._queue.enter(request, prefill_s)

    def _dequeue(self, request_id: RequestId) -> None:
        self._patience.adopted(request_id)
        self._queue.leave(request_id)

    def _mind_orphans(self, now_s: float) -> None:
        for request in self._patience.adoptable():
            self._enqueue(request, now_s)
        for life, reason in self._patience.given_up(now_s):
            self._drop(life, reason, now_s)
        if len(self._lanes) and self._patience.is_alone(now_s):
            # One that leaves goes on with what is bound to its fingerprint.
            for life in [life for life in self._lives if life.state is State.WAITING]:
                if not life.request.fingerprint or not self._fleet.serves(life.request):
                    self._drop(life, DropReason.NO_WORKER, now_s)

    # --- batches ------------------------------------------------------------------------------------------------

    def _dispatch(self, now_s: float) -> None:
        """Cuts batches while a worker has room and a bucket has requests that fit."""
        self._former.wake_s, self._former.preemptions = None, []
        if not len(self._lanes):
            return
        self._lanes.defer_late(now_s)
        for request in self._patience.beyond_all(self._lanes, self._edges.buckets, now_s):
            self._dequeue(request.request_id)
            self._patience.orphan(request, now_s)
        while len(self._lanes) and (formed := self._former.form(now_s)) is not None:
            batch = formed.command.batch
            for request in formed.requests:
                self._dequeue(request.request_id)
            self._lives.dispatch(formed.requests, batch)
            self._waste.add(batch)
            self._commands.append(formed.command)
            if worker := self._fleet.get(batch.worker_id):
                self._lanes.dispatched(formed.lane, worker.share_tokens(formed.requests))
                self._make_time(formed.requests, worker)
        self._commands += self._former.preemptions

    def _hand_over(self, now_s: float) -> None:
        found = self._handover.pulls(self._lives.held_at, now_s)
        for pull in found.pulls:
            if life := self._lives.get(pull.request_id):
                self._lives.pull(life, pull.target_id, pull.assignment)
                self._patience.pulling(pull.request_id, now_s)
                self._commands.append(pull)
                if target := self._fleet.get(pull.target_id):
                    self._make_time([life.request], target)
        if found.blocked is not None:
            self._commands += self._reclaimer.room_for(*found.blocked, self._settings.memory_reserve)
        for life, reason in self._patience.stuck(found.stuck, now_s):
            self._drop(life, reason, now_s)

    def _make_time(self, requests: Sequence[Request], worker: WorkerState) -> None:
        """Lets batch class go where it leaves too little time to interactive requests, unless arrival alone counts."""
        if self._settings.queue_order is QueueOrder.SLACK:
            self._commands += self._reclaimer.time_for(requests, worker)

    # --- the end ------------------------------------------------------------------------------------------------

    def _drop(
        self, life: Life, reason: DropReason, now_s: float, *, at: Sequence[WorkerId | None] | None = None
    ) -> None:
        """Ends a request before its worker has finished it.

        Args:
            life: the request.
            reason: why, unless it was cancelled before.
            now_s: the time.
            at: who is told to stop it; default: those of its workers that have it in their books.
        """
        request_id = life.request.request_id
        if at is None:
            at = [w for w in life.workers if (known := self._fleet.get(w)) and request_id in known.requests]
        self._commands += [CancelAtWorker(worker_id, request_id) for worker_id in at if worker_id is not None]
        if reason in (DropReason.WORKER_LOST, DropReason.WORKER_FAILED) and not life.is_cancelled:
            self._leaving.expect(life, now_s)
        self._end(life, now_s)
        self._drops.append(Drop(request_id, DropReason.CANCELLED if life.is_cancelled else reason))

    def _end(self, life: Life, now_s: float, output_tokens: int | None = None) -> None:
        request_id = life.request.request_id
        self._dequeue(request_id)
        self._patience.forget(request_id)
        self._handover.forget(request_id)
        self._tenants.ended(life.request, output_tokens, has_run=life.is_at_worker)
        self._lives.end(life)

    def _wake_s(self) -> float | None:
        times = (self._patience.next_s(), self._former.wake_s, self._leaving.next_s())
        return min((at_s for at_s in times if at_s is not None), default=None)
