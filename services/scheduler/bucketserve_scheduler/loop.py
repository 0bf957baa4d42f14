"""The scheduling loop of one model: take events, decide, write, tell.

    gateways and workers --events--> core.step --Decision--> store (one round trip) --> gateways and workers

One task owns everything here. Servicers only post events and read messages from their peer's outbox.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from bucketserve.core.errors import PeerRefusedError, StaleEpochError, UnavailableError
from bucketserve.core.messages import (
    AdaptersChanged,
    AdmitFailed,
    BatchPrefilled,
    ContextExtended,
    Decision,
    DispatchFailed,
    Event,
    ForgetRequest,
    KvPulled,
    RequestCancelled,
    RequestFinished,
    RequestResumed,
    RequestSubmitted,
    WorkerAway,
    WorkerDraining,
    WorkerLost,
    WorkerReported,
)
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.types import BatchId, FinishReason, RequestId, WorkerId
from bucketserve.ports import Admit, Dispatch, Leadership, QueueStore
from bucketserve.rpc.convert import (
    adapters_from_pb,
    finish_reason_from_pb,
    headroom_from_pb,
    joined_from_pb,
    request_from_ticket,
    steps_from_pb,
)
from bucketserve.rpc.outbox import Outbox
from bucketserve.v1 import scheduler_pb2
from bucketserve_scheduler.peers import GatewayPeers, WorkerPeer
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_scheduler.telemetry import LoopTelemetry
from bucketserve_scheduler.tickets import TicketTable
from bucketserve_scheduler.translate import Announcer, Written, writes_of

__all__ = ["LoopDeps", "SchedulingLoop"]

MAX_EVENTS_PER_TURN = 2_000
INBOX_LIMIT = 20_000
WORKER_OUTBOX_LIMIT = 4_096
TICK_S = 0.25
STORE_RETRY_S = 0.2
PARKED_S = 30.0
"""A ticket that was taken over and that no gateway has said again for so long is nobody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopDeps:
    """What a loop needs from outside; shared by the loops of all models."""

    settings: SchedulerSettings
    scheduler_id: str
    telemetry: LoopTelemetry
    clock: Callable[[], float]
    """Seconds, never going back."""
    new_core: Callable[[int], SchedulerCore]
    """Builds a core for a context of that many tokens."""


class SchedulingLoop:
    """Owns one model's core, tickets and workers."""

    def __init__(
        self, model: str, context_tokens: int, store: QueueStore, gateways: GatewayPeers, deps: LoopDeps
    ) -> None:
        """Starts with nothing; run() does the work."""
        self.model = model
        self.core = deps.new_core(context_tokens)
        self.leadership: Leadership | None = None
        self.workers: dict[WorkerId, WorkerPeer] = {}
        self._context_tokens = context_tokens
        self._store = store
        self._gateways = gateways
        self._deps = deps
        self._inbox: asyncio.Queue[Event | scheduler_pb2.SubmitRun | WorkerPeer] = asyncio.Queue(INBOX_LIMIT)
        """What has happened; a peer has joined."""
        self._tickets = TicketTable(gateways)
        self._own_events: list[Event] = []
        """What came of telling peers, for the next turn."""
        self._announcer = Announcer(
            self._tickets, gateways, self.workers, deps.telemetry, on_undeliverable=self._own_events.append
        )
        self._expected: dict[WorkerId, float] = {}
        """Workers that should come back -> when they count as lost."""
        self.num_batches = 0
        self.num_finished = 0
        self._renew_s = 0.0
        self._tick_s = 0.0
        self._is_leaving = False

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._tickets)

    # --- what servicers call ------------------------------------------------------------------------------------

    async def submit(self, run: scheduler_pb2.SubmitRun) -> None:
        """Queues a run; the answer goes to its gateway. A repeated one is answered with what is known of it."""
        await self._know_context(run.ticket.context_tokens)
        await self._inbox.put(run)

    async def cancel(self, run_id: RequestId) -> None:
        """Ends a run wherever it is."""
        await self._inbox.put(RequestCancelled(run_id))

    async def connect(self, hello: scheduler_pb2.WorkerHello) -> WorkerPeer:
        """Registers a worker; batches come through the returned peer's outbox once the core has taken it in.

        Raises:
            PeerRefusedError: another process is connected under the same id.
        """
        worker_id = WorkerId(hello.worker_id)
        if older := self.workers.get(worker_id):
            if older.hello.instance != hello.instance:
                self._deps.telemetry.worker_refused(self.model, worker_id)
                raise PeerRefusedError(f"worker id {worker_id!r} is in use by another process")
            older.outbox.close()
        peer = WorkerPeer(
            worker_id=worker_id,
            hello=hello,
            outbox=Outbox(WORKER_OUTBOX_LIMIT),
            report=hello.report,
            reported_s=self._deps.clock(),
            held={RequestId(at.run_id): at.held for at in hello.running if at.HasField("held")},
        )
        self.workers[worker_id] = peer
        self._deps.telemetry.worker_joined(self.model, worker_id, len(hello.running))
        self._expected.pop(worker_id, None)
        await self._know_context(hello.context_tokens)
        await self._inbox.put(peer)
        if hello.is_draining:
            await self._drain(peer)
        return peer

    async def disconnect(self, peer: WorkerPeer) -> None:
        """Gives a worker whose stream ended nothing more, and a moment to come back, unless it is back already."""
        peer.outbox.close()
        if self.workers.get(peer.worker_id) is peer:
            del self.workers[peer.worker_id]
            self._expected[peer.worker_id] = self._deps.clock() + self._deps.settings.worker_grace_s
            self._deps.telemetry.worker_disconnected(self.model, peer.worker_id)
            await self._inbox.put(WorkerAway(peer.worker_id))

    async def hear(self, peer: WorkerPeer, message: scheduler_pb2.WorkRequest) -> None:
        """Takes one message of a worker; those of a stream that was replaced are ignored."""
        if self.workers.get(peer.worker_id) is not peer:
            return
        match message.WhichOneof("message"):
            case "report":
                peer.report, peer.reported_s = message.report, self._deps.clock()
                await self._inbox.put(
                    WorkerReported(
                        worker_id=peer.worker_id,
                        headroom=headroom_from_pb(message.report),
                        steps=steps_from_pb(message.report),
                        is_delivering=message.report.is_delivering,
                    )
                )
            case "prefilled":
                for kv in message.prefilled.held:
                    peer.held[RequestId(kv.run_id)] = kv
                await self._inbox.put(
                    BatchPrefilled(
                        worker_id=peer.worker_id,
                        assignment=message.prefilled.assignment,
                        request_ids=tuple(RequestId(run_id) for run_id in message.prefilled.run_ids),
                        held=tuple(RequestId(kv.run_id) for kv in message.prefilled.held),
                        cached_tokens=tuple(message.prefilled.cached_prompt_tokens),
                    )
                )
            case "finished":
                run_id, reason = RequestId(message.finished.run_id), finish_reason_from_pb(message.finished.reason)
                peer.held.pop(run_id, None)
                if reason is FinishReason.ERROR and self._tickets.get(run_id) is None:
                    # It had ended, and its output could not be brought to the gateway.
                    self._gateways.tell_end(run_id)
                await self._inbox.put(
                    RequestFinished(
                        request_id=run_id,
                        worker_id=peer.worker_id,
                        assignment=message.finished.assignment,
                        output_tokens=message.finished.output_tokens,
                        reason=reason,
                        is_retryable=message.finished.is_retryable,
                    )
                )
            case "kv_pulled":
                await self._inbox.put(
                    KvPulled(
                        request_id=RequestId(message.kv_pulled.run_id),
                        target_id=peer.worker_id,
                        assignment=message.kv_pulled.assignment,
                        is_ok=message.kv_pulled.is_ok,
                    )
                )
            case "adapters":
                peer.hello.adapters.CopyFrom(message.adapters)
                await self._inbox.put(AdaptersChanged(peer.worker_id, adapters_from_pb(message.adapters)))
            case "draining":
                await self._drain(peer)

    async def _know_context(self, context_tokens: int) -> None:
        if context_tokens > self._context_tokens:
            self._context_tokens = context_tokens
            await self._inbox.put(ContextExtended(context_tokens))

    async def _drain(self, peer: WorkerPeer) -> None:
        peer.is_draining = True
        await self._inbox.put(WorkerDraining(peer.worker_id))

    def leave(self) -> None:
        """Lets run() end after the turn in hand."""
        self._is_leaving = True

    def part(self) -> None:
        """Ends every worker's stream once it has been sent everything; for a loop that has ended."""
        for peer in self.workers.values():
            peer.outbox.finish()
        self.workers.clear()

    def abandon(self) -> None:
        """Ends every worker's stream, so that they look for the scheduler that leads, and forgets the tickets.

        For a loop that is cancelled and not used again.
        """
        for peer in list(self.workers.values()):
            peer.outbox.close()
        self.workers.clear()
        self._tickets.clear()

    # --- the loop -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Leads the model whenever it can; ends by leave() or cancellation."""
        try:
            while not self._is_leaving:
                self.leadership = await self._become_leader()
                with contextlib.suppress(StaleEpochError):
                    await self._recover(self.leadership)
                    wake_s: float | None = 0.0
                    while not self._is_leaving:
                        wake_s = await self._turn(self.leadership, wake_s)
                    return
                self._step_down()
        finally:
            self._deps.telemetry.leads_no_more(self.model)
            if self.leadership is not None:
                with contextlib.suppress(UnavailableError, StaleEpochError):
                    await self._store.resign(self.leadership)

    async def _turn(self, leadership: Leadership, wake_s: float | None) -> float | None:
        """One round: take events, decide, write, tell. Returns when the core wants the next one."""
        taken = await self._take(wake_s)
        # What came of the last turn comes first: a worker that joined since is not the one that it was about.
        events = [*self._own_events, *taken, *self._watch_leases()]
        self._own_events.clear()
        now_s = self._deps.clock()
        with self._deps.telemetry.step(self.model, self.core):
            decision = self.core.step(events, now_s)
        for fault in decision.faults:
            self._deps.telemetry.fault(self.model, fault)
        written = await self._write(leadership, decision)
        self._announcer.announce(decision, written, leadership, now_s)
        self.num_batches += len(written.dispatched)
        self.num_finished += sum(isinstance(command, ForgetRequest) for command in decision.commands)
        await self._renew(leadership)
        return decision.wake_s

    async def _take(self, wake_s: float | None) -> list[Event]:
        """Waits for events until the core wants to wake, and takes all there are."""
        now_s = self._deps.clock()
        timeout_s = TICK_S if wake_s is None else min(max(wake_s - now_s, 0.0), TICK_S)
        items: list[Event | scheduler_pb2.SubmitRun | WorkerPeer] = []
        if self._inbox.empty() and timeout_s > 0 and not self._own_events:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    items.append(await self._inbox.get())
        else:
            await asyncio.sleep(0)
        while len(items) < MAX_EVENTS_PER_TURN and not self._inbox.empty():
            items.append(self._inbox.get_nowait())
        return [event for item in items if (event := self._as_event(item)) is not None]

    def _as_event(self, item: Event | scheduler_pb2.SubmitRun | WorkerPeer) -> Event | None:
        """Returns what the core is to know."""
        if isinstance(item, WorkerPeer):
            item.is_joined = True
            return joined_from_pb(item.hello)
        return self._look_at(item) if isinstance(item, scheduler_pb2.SubmitRun) else item

    def _look_at(self, item: scheduler_pb2.SubmitRun) -> Event | None:
        """Returns what the core is to know of a run; one that is already here is only answered again.

        Runs are looked at here rather than on arrival, since after a restart gateways submit theirs again while the
        store's tickets are still being read.
        """
        now_s, run_id = self._deps.clock(), RequestId(item.ticket.run_id)
        arrival_s = now_s - item.age_us / 1e6
        entry = self._tickets.get(run_id)
        if entry is not None and not entry.is_parked:
            self._announcer.repeat(entry)
            return None
        if entry is None and self._gateways.tell_end(run_id):
            # The gateway had not heard of it. To start the same attempt again could be to run it twice.
            return None
        if entry is None:
            entry = self._tickets.add(item.ticket, arrival_s, now_s)
        entry.arrival_s, entry.spec = arrival_s, item.spec
        deadline_s = now_s + item.remaining_us / 1e6 if item.HasField("remaining_us") else None
        request = request_from_ticket(
            item.ticket,
            arrival_s=arrival_s,
            attempt_s=now_s - item.attempt_age_us / 1e6,
            deadline_s=deadline_s,
            block_hashes=item.block_hashes,
        )
        is_admitted = item.is_admitted or entry.is_accepted
        return RequestResumed(request) if is_admitted else RequestSubmitted(request)

    async def _write(self, leadership: Leadership, decision: Decision) -> Written:
        """Makes a decision durable; what the store did not take becomes events of the next turn.

        While the store is away it is tried again and again: what runs goes on, what is new waits.
        """
        writes = writes_of(decision, self._tickets)
        if not writes:
            return Written()
        while True:
            try:
                with self._deps.telemetry.store_round_trip():
                    effects = await self._store.apply(leadership, writes)
                break
            except UnavailableError as error:
                self._deps.telemetry.store_unavailable(self.model, str(error))
                await asyncio.sleep(STORE_RETRY_S)
        dispatched: dict[BatchId, frozenset[RequestId]] = {}
        refused: set[RequestId] = set()
        for write, effect in zip(writes, effects, strict=True):
            if isinstance(write, Admit) and not effect:
                refused.add(write.request_id)
            elif isinstance(write, Dispatch):
                dispatched[write.batch_id] = effect
                if lost := tuple(rid for rid in write.request_ids if rid not in effect and rid not in refused):
                    self._deps.telemetry.dispatch_failed(self.model, len(lost))
                    self._own_events.append(DispatchFailed(worker_id=write.worker_id, request_ids=lost))
        # A full store may have a ticket of an earlier leader: that was dispatched, and is not to be refused.
        refused.difference_update(*dispatched.values())
        if refused:
            self._own_events.append(AdmitFailed(tuple(sorted(refused))))
        return Written(dispatched, frozenset(refused))

    # --- leadership and leases ----------------------------------------------------------------------------------

    async def _become_leader(self) -> Leadership:
        settings = self._deps.settings
        while True:
            try:
                leadership = await self._store.lead(self._deps.scheduler_id, settings.leader_lease_s)
            except UnavailableError as error:
                self._deps.telemetry.store_unavailable(self.model, str(error))
                leadership = None
            if leadership is not None:
                self._renew_s = self._deps.clock() + settings.leader_lease_s / 3
                self._deps.telemetry.leading(self.model, leadership.epoch)
                return leadership
            await asyncio.sleep(settings.leader_lease_s / 4)

    async def _renew(self, leadership: Leadership) -> None:
        """Renews the leadership every third of its lease.

        Raises:
            StaleEpochError: it went to someone else, or the store lost it.
        """
        now_s = self._deps.clock()
        if now_s < self._renew_s:
            return
        try:
            lease_s = self._deps.settings.leader_lease_s
            renewed = await self._store.lead(leadership.owner, lease_s, leadership.epoch)
        except UnavailableError as error:
            # The fencing epoch keeps us from harm if someone else leads by the time the store is back.
            self._deps.telemetry.store_unavailable(self.model, str(error))
            return
        if renewed is None or renewed.epoch != leadership.epoch:
            raise StaleEpochError(f"{self.model}: leadership lost")
        self._renew_s = now_s + self._deps.settings.leader_lease_s / 3

    async def _recover(self, leadership: Leadership) -> None:
        """Rebuilds the core from the store. Workers that hold requests have one lease to come back."""
        while True:
            try:
                snapshot = await self._store.load(leadership)
                break
            except UnavailableError as error:
                self._deps.telemetry.store_unavailable(self.model, str(error))
                await asyncio.sleep(STORE_RETRY_S)
        now_s = self._deps.clock()
        parked, running = self._tickets.restore(snapshot, now_s)
        self.core.restore(parked=parked, running=running, edges=snapshot.edges, outputs=snapshot.outputs)
        lost_s = now_s + self._deps.settings.worker_lease_s
        self._expected.update((id_, lost_s) for id_ in set(running.values()) if id_ not in self.workers)

    def _step_down(self) -> None:
        """Forgets everything and cuts every peer: they reconnect and say again what they have."""
        self._deps.telemetry.stepped_down(self.model)
        self.leadership = None
        for worker in self.workers.values():
            worker.outbox.close()
        self.workers.clear()
        self._expected.clear()
        self._gateways.cut_all()
        self._tickets.clear()
        self._own_events.clear()
        self.core = self._deps.new_core(self._context_tokens)
        self._deps.telemetry.leads_no_more(self.model)
        while not self._inbox.empty():
            self._inbox.get_nowait()

    def _watch_leases(self) -> list[Event]:
        """Returns what silence means: lost workers, cancelled requests of lost gateways."""
        now_s = self._deps.clock()
        if now_s < self._tick_s:
            return []
        self._tick_s = now_s + TICK_S
        events: list[Event] = []
        for peer in list(self.workers.values()):
            if now_s - peer.reported_s > self._deps.settings.worker_lease_s:
                peer.outbox.close()
                del self.workers[peer.worker_id]
                self._deps.telemetry.worker_lost(self.model, peer.worker_id, "no report within its lease")
                events.append(WorkerLost(peer.worker_id))
        for worker_id, lost_s in list(self._expected.items()):
            if now_s > lost_s:
                del self._expected[worker_id]
                self._deps.telemetry.worker_lost(self.model, worker_id, "did not come back")
                events.append(WorkerLost(worker_id))
        events += [RequestCancelled(rid) for rid in self._tickets.parked_since(now_s - PARKED_S)]
        expired = self._gateways.expire(self._deps.settings.gateway_lease_s, now_s)
        events += [RequestCancelled(request_id) for request_id in expired]
        return events
