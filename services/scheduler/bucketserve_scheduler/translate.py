"""From the core's decisions to writes for the store and messages for gateways and workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bucketserve.core.messages import (
    AdmitRequest,
    CancelAtWorker,
    ChangeEdges,
    Decision,
    DispatchBatch,
    DropReason,
    ForgetRequest,
    KvPulled,
    PlaceRequest,
    PreemptAtWorker,
    PullKv,
    RefuseRequest,
    ReleaseKv,
    ReleaseWorker,
    SaveOutputs,
    SwitchRole,
)
from bucketserve.core.types import Batch, BatchId, RequestId, WorkerId
from bucketserve.ports import Admit, Dispatch, Leadership, Place, Remove, SetEdges, SetOutputs, Write
from bucketserve.rpc.convert import batch_info, drop_reason_to_pb, refuse_reason_to_pb, role_to_pb
from bucketserve.v1 import scheduler_pb2
from bucketserve_scheduler.peers import GatewayPeers, WorkerPeer
from bucketserve_scheduler.telemetry import LoopTelemetry
from bucketserve_scheduler.tickets import Entry, TicketTable

__all__ = ["Announcer", "Written", "writes_of"]

Response = scheduler_pb2.SubmitResponse


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a decision's writes."""

    dispatched: Mapping[BatchId, frozenset[RequestId]] = field(default_factory=dict)
    """The requests of each batch that the store had as waiting."""
    not_admitted: frozenset[RequestId] = frozenset()
    """Those for which it had no room."""


def writes_of(decision: Decision, tickets: TicketTable) -> list[Write]:
    """Returns the store's part of a decision, in order but for removals, which come first: they make room."""
    removed = [command.request_id for command in decision.commands if isinstance(command, ForgetRequest)]
    removed += [drop.request_id for drop in decision.drops]
    removed += [c.request_id for c in decision.commands if isinstance(c, RefuseRequest)]
    anew = [c.request.request_id for c in decision.commands if isinstance(c, AdmitRequest) and c.is_anew]
    writes: list[Write] = [Remove(request_ids=(*removed, *anew))] if removed or anew else []
    for command in decision.commands:
        match command:
            case AdmitRequest(request=request):
                entry = tickets.get(request.request_id)
                if entry is not None and request.request_id not in removed:
                    writes.append(
                        Admit(
                            request_id=request.request_id,
                            prefill_tokens=request.prefill_tokens,
                            ticket=entry.ticket.SerializeToString(),
                        )
                    )
            case DispatchBatch(batch=batch):
                writes.append(
                    Dispatch(worker_id=batch.worker_id, batch_id=batch.batch_id, request_ids=batch.request_ids)
                )
            case PlaceRequest(request_id=request_id, worker_id=worker_id):
                entry = tickets.get(request_id)
                if entry is not None and request_id not in removed:
                    batch_id = entry.batch_id or BatchId("")
                    writes.append(Place(request_id=request_id, worker_id=worker_id, batch_id=batch_id))
            case ChangeEdges(edges=edges):
                writes.append(SetEdges(edges=edges))
            case SaveOutputs(counts=counts):
                writes.append(SetOutputs(counts=counts))
            case _:
                pass
    return writes


class Announcer:
    """Tells gateways and workers what was decided, once it is durable."""

    def __init__(
        self,
        tickets: TicketTable,
        gateways: GatewayPeers,
        workers: Mapping[WorkerId, WorkerPeer],
        telemetry: LoopTelemetry,
        *,
        on_undeliverable: Callable[[KvPulled], None],
    ) -> None:
        """Reads the peers, owns none of them; on_undeliverable(failure) when an order to pull can't be given."""
        self._on_undeliverable = on_undeliverable
        self._tickets = tickets
        self._gateways = gateways
        self._workers = workers
        self._telemetry = telemetry

    def announce(self, decision: Decision, written: Written, leadership: Leadership, now_s: float) -> None:
        """Sends every message that follows from a decision, as far as it could be written."""
        self._free(decision)
        for command in decision.commands:
            match command:
                case AdmitRequest(request=request):
                    if request.request_id not in written.not_admitted:
                        self._accept(request.request_id)
                case RefuseRequest():
                    self._refuse(command)
                case DispatchBatch(batch=batch):
                    self._dispatch(batch, written.dispatched[batch.batch_id], leadership, now_s)
                case PullKv():
                    self._pull(command, leadership)
                case PlaceRequest(request_id=request_id, worker_id=worker_id):
                    self._place(request_id, worker_id)
                case SwitchRole(worker_id=worker_id, role=role):
                    switch = scheduler_pb2.SwitchRole(role=role_to_pb(role))
                    self._to_worker(worker_id, scheduler_pb2.WorkResponse(switch_role=switch))
                    self._telemetry.role_switched(worker_id, role)
                case ReleaseWorker(worker_id=worker_id):
                    # Behind every batch that came before.
                    self._to_worker(worker_id, scheduler_pb2.WorkResponse(no_more_work=scheduler_pb2.NoMoreWork()))
                case ForgetRequest():
                    self._forget(command)
                case _:
                    pass
        for drop in decision.drops:
            self._drop(drop.request_id, drop.reason)

    def _forget(self, end: ForgetRequest) -> None:
        if entry := self._tickets.pop(end.request_id):
            self._gateways.served(entry.ticket.gateway_id, end.request_id)
            if end.was_cancelled:
                # It was away for so long that its runs were stopped, and is back: it waits for this one.
                self._gateways.tell_end(end.request_id)

    def repeat(self, entry: Entry) -> None:
        """Answers a run that was submitted again with what became of it."""
        gateway_id, run_id = entry.ticket.gateway_id, entry.ticket.run_id
        if entry.is_accepted:
            self._gateways.send(gateway_id, Response(accepted=scheduler_pb2.RunAccepted(run_id=run_id)))
        if entry.dispatched is not None:
            self._gateways.send(gateway_id, Response(dispatched=entry.dispatched))

    def _accept(self, run_id: RequestId) -> None:
        entry = self._tickets.get(run_id)
        if entry is None:
            return
        if not entry.is_accepted:
            entry.is_accepted = True
            self._telemetry.admitted(entry.ticket)
        self._gateways.send(entry.ticket.gateway_id, Response(accepted=scheduler_pb2.RunAccepted(run_id=run_id)))

    def _refuse(self, refusal: RefuseRequest) -> None:
        self._telemetry.refused(refusal.reason)
        if entry := self._tickets.pop(refusal.request_id):
            refused = scheduler_pb2.RunRefused(
                run_id=refusal.request_id,
                reason=refuse_reason_to_pb(refusal.reason),
                retry_delay_ms=round(refusal.retry_after_s * 1e3),
            )
            self._gateways.send(entry.ticket.gateway_id, Response(refused=refused))

    def _free(self, decision: Decision) -> None:
        """Sends cancellations and releases, then preemptions, before batches, which need what they free."""
        cancels: dict[WorkerId, list[str]] = {}
        preempts: dict[WorkerId, list[str]] = {}
        for command in decision.commands:
            if isinstance(command, CancelAtWorker | ReleaseKv):
                cancels.setdefault(command.worker_id, []).append(command.request_id)
            elif isinstance(command, PreemptAtWorker):
                preempts.setdefault(command.worker_id, []).append(command.request_id)
        for worker_id, run_ids in cancels.items():
            cancel = scheduler_pb2.CancelRuns(run_ids=run_ids)
            self._to_worker(worker_id, scheduler_pb2.WorkResponse(cancel=cancel))
        for worker_id, run_ids in preempts.items():
            preempt = scheduler_pb2.PreemptRuns(run_ids=run_ids)
            self._to_worker(worker_id, scheduler_pb2.WorkResponse(preempt=preempt))

    def _drop(self, run_id: RequestId, reason: DropReason) -> None:
        if entry := self._tickets.pop(run_id):
            self._telemetry.dropped(reason)
            dropped = scheduler_pb2.RunDropped(run_id=run_id, reason=drop_reason_to_pb(reason))
            self._gateways.send(entry.ticket.gateway_id, Response(dropped=dropped))

    def _dispatch(self, batch: Batch, written: frozenset[RequestId], leadership: Leadership, now_s: float) -> None:
        """Sends the runs of a batch that the store had as waiting, and tells their gateways."""
        info = batch_info(batch)
        entries = [e for run_id in batch.request_ids if run_id in written and (e := self._tickets.get(run_id))]
        if not entries:
            return
        assignment = scheduler_pb2.BatchAssignment(
            assignment=batch.assignment,
            epoch=leadership.epoch,
            batch=info,
            max_chunk_tokens=batch.max_chunk_tokens,
            runs=[scheduler_pb2.AssignedRun(run_id=entry.ticket.run_id, spec=entry.spec) for entry in entries],
        )
        self._to_worker(batch.worker_id, scheduler_pb2.WorkResponse(batch=assignment))
        for entry in entries:
            # Its worker has the prompt from here on, and hands it over with the KV.
            entry.spec = b""
            entry.worker_id, entry.batch_id, entry.batch = batch.worker_id, batch.batch_id, info
            entry.dispatched = scheduler_pb2.RunDispatched(
                run_id=entry.ticket.run_id,
                worker_id=batch.worker_id,
                waited_us=max(round((now_s - entry.arrival_s) * 1e6), 0),
            )
            self._gateways.send(entry.ticket.gateway_id, Response(dispatched=entry.dispatched))
        self._telemetry.dispatched(batch, entries, now_s)

    def _pull(self, order: PullKv, leadership: Leadership) -> None:
        entry, source = self._tickets.get(order.request_id), self._workers.get(order.source_id)
        kv = source.held.pop(order.request_id, None) if source is not None else None
        if entry is None or source is None or kv is None:
            # The source has gone meanwhile, or has nothing any more.
            self._on_undeliverable(
                KvPulled(
                    request_id=order.request_id, target_id=order.target_id, assignment=order.assignment, is_ok=False
                )
            )
            return
        pull = scheduler_pb2.PullKv(
            run_id=order.request_id,
            source_worker_id=order.source_id,
            source_address=source.hello.address,
            kv=kv,
            epoch=leadership.epoch,
            assignment=order.assignment,
        )
        if entry.batch is not None:
            pull.batch.CopyFrom(entry.batch)
        self._to_worker(order.target_id, scheduler_pb2.WorkResponse(pull=pull))

    def _place(self, run_id: RequestId, worker_id: WorkerId) -> None:
        """Tells the gateway which worker has a run from now on."""
        entry = self._tickets.get(run_id)
        if entry is None:
            return
        entry.worker_id, entry.spec = worker_id, b""
        dispatched = scheduler_pb2.RunDispatched(run_id=run_id)
        if entry.dispatched is not None:
            # A copy: the one before may still be on its way.
            dispatched.CopyFrom(entry.dispatched)
        dispatched.worker_id = worker_id
        entry.dispatched = dispatched
        self._gateways.send(entry.ticket.gateway_id, Response(dispatched=dispatched))

    def _to_worker(self, worker_id: WorkerId, message: scheduler_pb2.WorkResponse) -> None:
        # A worker that is gone or does not read has its WorkerLost on the way, one that is back its WorkerJoined: what
        # it was not told of comes back through that.
        if (peer := self._workers.get(worker_id)) and peer.is_joined:
            peer.outbox.send(message)
