"""From the core's decisions to writes for the store and messages for gateways and workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bucketserve.core.messages import (
    AdmitRequest,
    CancelAtWorker,
    ChangeEdges,
    Decision,
    DispatchBatch,
    DropReason,
    ForgetRequest,
    KvMoved,
    MoveKv,
    RefuseRequest,
    ReleaseKv,
    RequestMoved,
    SwitchRole,
)
from bucketserve.core.types import Batch, BatchId, RequestId, WorkerId
from bucketserve.ports import Admit, Claim, Leadership, Move, Remove, SetEdges, Write
from bucketserve.rpc.convert import batch_info, drop_reason_to_pb, refuse_reason_to_pb, role_to_pb
from bucketserve.v1 import scheduler_pb2
from bucketserve_scheduler.peers import GatewayPeers, WorkerPeer
from bucketserve_scheduler.records import Entry, RecordTable
from bucketserve_scheduler.telemetry import LoopTelemetry

__all__ = ["Announcer", "writes_of"]


def writes_of(decision: Decision, records: RecordTable) -> list[Write]:
    """Returns the store's part of a decision, in order."""
    writes: list[Write] = []
    removed: list[RequestId] = []
    for command in decision.commands:
        match command:
            case AdmitRequest(request=request):
                entry = records.get(request.request_id, request.attempt)
                if entry is not None:
                    writes.append(
                        Admit(
                            request_id=request.request_id,
                            attempt=request.attempt,
                            prefill_tokens=request.prefill_tokens,
                            payload=entry.record.SerializeToString(),
                        )
                    )
            case DispatchBatch(batch=batch):
                writes.append(Claim(worker_id=batch.worker_id, batch_id=batch.batch_id, request_ids=batch.request_ids))
            case RequestMoved(request_id=request_id, worker_id=worker_id):
                entry = records.get(request_id)
                if entry is not None:
                    batch_id = entry.batch_id or BatchId("")
                    writes.append(Move(request_id=request_id, worker_id=worker_id, batch_id=batch_id))
            case ChangeEdges(edges=edges):
                writes.append(SetEdges(edges=edges))
            case ForgetRequest(request_id=request_id):
                removed.append(request_id)
            case _:
                pass
    # A newer attempt may already be stored under the id of one that was dropped; that one stays.
    removed += [drop.request_id for drop in decision.drops if records.get(drop.request_id, drop.attempt)]
    if removed:
        writes.append(Remove(request_ids=tuple(removed)))
    return writes


class Announcer:
    """Tells gateways and workers what was decided, once it is durable."""

    def __init__(
        self,
        records: RecordTable,
        gateways: GatewayPeers,
        workers: Mapping[WorkerId, WorkerPeer],
        telemetry: LoopTelemetry,
        *,
        on_undeliverable: Callable[[KvMoved], None],
    ) -> None:
        """Reads the peers, owns none of them; on_undeliverable(failure) when an order to pull can't be given."""
        self._on_undeliverable = on_undeliverable
        self._records = records
        self._gateways = gateways
        self._workers = workers
        self._telemetry = telemetry

    def announce(
        self,
        decision: Decision,
        claimed: Mapping[BatchId, frozenset[RequestId]],
        leadership: Leadership,
        now_s: float,
    ) -> None:
        """Sends every message that follows from a decision."""
        self._cancel(decision)
        for command in decision.commands:
            match command:
                case AdmitRequest(request=request):
                    self._accept(request.request_id, request.attempt)
                case RefuseRequest():
                    self._refuse(command)
                case DispatchBatch(batch=batch):
                    self._dispatch(batch, claimed[batch.batch_id], leadership, now_s)
                case MoveKv():
                    self._pull(command, leadership)
                case RequestMoved(request_id=request_id, worker_id=worker_id):
                    self._moved(request_id, worker_id)
                case SwitchRole(worker_id=worker_id, role=role):
                    switch = scheduler_pb2.SwitchRole(role=role_to_pb(role))
                    self._to_worker(worker_id, scheduler_pb2.WorkResponse(switch_role=switch))
                    self._telemetry.role_switched(worker_id, role)
                case ForgetRequest(request_id=request_id):
                    entry = self._records.pop(request_id)
                    if entry is not None and entry.has_failed:
                        self._drop(entry, DropReason.WORKER_FAILED)
                case _:
                    pass
        for drop in decision.drops:
            if entry := self._records.pop(drop.request_id, drop.attempt):
                self._drop(entry, drop.reason)

    def repeat(self, entry: Entry, record: scheduler_pb2.QueueRecord) -> None:
        """Answers a record that was submitted again: with what became of it, or, to another gateway, a refusal."""
        gateway_id = record.gateway_id
        if gateway_id != entry.record.gateway_id:
            rejected = scheduler_pb2.RecordRejected(
                request_id=record.request_id,
                attempt=record.attempt,
                reason=scheduler_pb2.REJECT_REASON_DUPLICATE,
            )
            self._gateways.send(gateway_id, scheduler_pb2.SubmitResponse(rejected=rejected))
            return
        if entry.is_accepted:
            accepted = scheduler_pb2.RecordAccepted(request_id=record.request_id, attempt=entry.record.attempt)
            self._gateways.send(gateway_id, scheduler_pb2.SubmitResponse(accepted=accepted))
        if entry.dispatched is not None:
            self._gateways.send(gateway_id, scheduler_pb2.SubmitResponse(dispatched=entry.dispatched))

    def _accept(self, request_id: RequestId, attempt: int) -> None:
        if entry := self._records.get(request_id, attempt):
            entry.is_accepted = True
            self._telemetry.admitted(entry.record)
            accepted = scheduler_pb2.RecordAccepted(request_id=request_id, attempt=attempt)
            self._gateways.send(entry.record.gateway_id, scheduler_pb2.SubmitResponse(accepted=accepted))

    def _refuse(self, refusal: RefuseRequest) -> None:
        self._telemetry.refused(refusal.reason)
        if entry := self._records.pop(refusal.request_id, refusal.attempt):
            rejected = scheduler_pb2.RecordRejected(
                request_id=refusal.request_id,
                attempt=refusal.attempt,
                reason=refuse_reason_to_pb(refusal.reason),
                retry_delay_ms=round(refusal.retry_after_s * 1e3),
            )
            self._gateways.send(entry.record.gateway_id, scheduler_pb2.SubmitResponse(rejected=rejected))

    def _cancel(self, decision: Decision) -> None:
        """Sends cancellations and releases, one message per worker; before batches, which may bring a newer attempt."""
        cancels: dict[WorkerId, list[str]] = {}
        for command in decision.commands:
            if isinstance(command, CancelAtWorker | ReleaseKv):
                cancels.setdefault(command.worker_id, []).append(command.request_id)
        for worker_id, request_ids in cancels.items():
            message = scheduler_pb2.CancelRecords(request_ids=request_ids)
            self._to_worker(worker_id, scheduler_pb2.WorkResponse(cancel=message))

    def _drop(self, entry: Entry, reason: DropReason) -> None:
        record = entry.record
        self._telemetry.dropped(reason)
        dropped = scheduler_pb2.RecordDropped(
            request_id=record.request_id, attempt=record.attempt, reason=drop_reason_to_pb(reason)
        )
        self._gateways.send(record.gateway_id, scheduler_pb2.SubmitResponse(dropped=dropped))

    def _dispatch(self, batch: Batch, claimed: frozenset[RequestId], leadership: Leadership, now_s: float) -> None:
        info = batch_info(batch)
        dispatched_us = round(now_s * 1e6)
        entries = [entry for request_id in batch.request_ids if (entry := self._records.get(request_id))]
        entries = [entry for entry in entries if entry.record.request_id in claimed]
        assignment = scheduler_pb2.BatchAssignment(
            assignment=batch.assignment,
            epoch=leadership.epoch,
            batch=info,
            records=[entry.record for entry in entries],
            max_chunk_tokens=batch.max_chunk_tokens,
            dispatched_unix_us=dispatched_us,
        )
        self._to_worker(batch.worker_id, scheduler_pb2.WorkResponse(batch=assignment))
        for entry in entries:
            entry.worker_id, entry.batch_id = batch.worker_id, batch.batch_id
            entry.dispatched = scheduler_pb2.RecordDispatched(
                request_id=entry.record.request_id,
                attempt=entry.record.attempt,
                worker_id=batch.worker_id,
                dispatched_unix_us=dispatched_us,
                batch=info,
            )
            self._gateways.send(entry.record.gateway_id, scheduler_pb2.SubmitResponse(dispatched=entry.dispatched))
        self._telemetry.dispatched(batch, [entry.record for entry in entries], now_s)

    def _pull(self, move: MoveKv, leadership: Leadership) -> None:
        entry, source = self._records.get(move.request_id), self._workers.get(move.source_id)
        kv = source.held.pop(move.request_id, None) if source is not None else None
        if entry is None or source is None or kv is None:
            # The source has gone meanwhile, or has nothing any more.
            attempt = entry.record.attempt if entry is not None else 0
            self._on_undeliverable(
                KvMoved(
                    request_id=move.request_id,
                    attempt=attempt,
                    source_id=move.source_id,
                    target_id=move.target_id,
                    is_ok=False,
                )
            )
            return
        pull = scheduler_pb2.PullKv(
            record=entry.record,
            source_worker_id=move.source_id,
            source_address=source.hello.address,
            kv=kv,
            epoch=leadership.epoch,
        )
        if entry.dispatched is not None:
            pull.batch.CopyFrom(entry.dispatched.batch)
        self._to_worker(move.target_id, scheduler_pb2.WorkResponse(pull=pull))

    def _moved(self, request_id: RequestId, worker_id: WorkerId) -> None:
        """Tells the gateway which worker to send a stop to from now on."""
        entry = self._records.get(request_id)
        if entry is None:
            return
        entry.worker_id = worker_id
        if entry.dispatched is not None:
            # A copy: the one before may still be on its way.
            dispatched = scheduler_pb2.RecordDispatched()
            dispatched.CopyFrom(entry.dispatched)
            dispatched.worker_id = worker_id
            entry.dispatched = dispatched
            self._gateways.send(entry.record.gateway_id, scheduler_pb2.SubmitResponse(dispatched=entry.dispatched))

    def _to_worker(self, worker_id: WorkerId, message: scheduler_pb2.WorkResponse) -> None:
        # A worker that is gone or does not read has its WorkerLost on the way: its requests come back through that.
        if peer := self._workers.get(worker_id):
            peer.outbox.send(message)
