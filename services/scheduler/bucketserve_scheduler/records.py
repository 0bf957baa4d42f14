"""The queue records that this scheduler holds in memory, beside their durable copy in the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bucketserve.core.types import BatchId, Request, RequestId, WorkerId
from bucketserve.ports import StoreSnapshot
from bucketserve.rpc.convert import request_from_record
from bucketserve.v1 import common_pb2, scheduler_pb2
from bucketserve_scheduler.peers import GatewayPeers

__all__ = ["Entry", "RecordTable"]


@dataclass(slots=True)
class Entry:
    """A record and how far it got."""

    record: scheduler_pb2.QueueRecord
    is_accepted: bool = False
    worker_id: WorkerId | None = None
    batch_id: BatchId | None = None
    dispatched: scheduler_pb2.RecordDispatched | None = None
    """What its gateway was told at dispatch, to be told again if it reconnects."""
    has_failed: bool = False
    """Its worker gave it up; the gateway is told when the core has let it go."""


class RecordTable:
    """Entries by request id; only the newest attempt of a request has one."""

    def __init__(self, gateways: GatewayPeers) -> None:
        """Keeps the gateways' lists of open requests in step."""
        self._entries: dict[RequestId, Entry] = {}
        self._gateways = gateways

    def __len__(self) -> int:
        """Number of open records."""
        return len(self._entries)

    def __iter__(self) -> Iterator[RequestId]:
        """Yields the ids."""
        return iter(self._entries)

    def known(self, record: scheduler_pb2.QueueRecord) -> Entry | None:
        """Returns the entry of this attempt or of a newer one, if there is one."""
        entry = self._entries.get(RequestId(record.request_id))
        return entry if entry is not None and entry.record.attempt >= record.attempt else None

    def add(self, record: scheduler_pb2.QueueRecord, model: str, now_s: float) -> None:
        """Takes a new record, or a newer attempt in place of an older one."""
        request_id = RequestId(record.request_id)
        self._entries[request_id] = Entry(record)
        self._gateways.open(record.gateway_id, request_id, model, now_s)

    def get(self, request_id: RequestId, attempt: int | None = None) -> Entry | None:
        """Returns an entry; with an attempt given, only if it is that one."""
        entry = self._entries.get(request_id)
        if entry is None or (attempt is not None and entry.record.attempt != attempt):
            return None
        return entry

    def pop(self, request_id: RequestId, attempt: int | None = None) -> Entry | None:
        """Removes and returns an entry; with an attempt given, only if it is that one."""
        entry = self.get(request_id, attempt)
        if entry is not None:
            del self._entries[request_id]
            self._gateways.close(entry.record.gateway_id, request_id)
        return entry

    def note_finished(self, finished: scheduler_pb2.RecordFinished) -> None:
        """Remembers that a worker failed a request, as against finished it."""
        entry = self.get(RequestId(finished.request_id), finished.attempt)
        if entry is not None and finished.reason == common_pb2.FINISH_REASON_ERROR:
            entry.has_failed = True

    def restore(
        self, snapshot: StoreSnapshot, model: str, now_s: float
    ) -> tuple[list[Request], dict[Request, WorkerId]]:
        """Takes what the store holds; returns the waiting requests, and the running ones with their workers."""
        waiting: list[Request] = []
        running: dict[Request, WorkerId] = {}
        for stored in snapshot.records:
            record = scheduler_pb2.QueueRecord.FromString(stored.payload)
            self.add(record, model, now_s)
            entry = self._entries[stored.request_id]
            entry.is_accepted = True
            entry.worker_id, entry.batch_id = stored.worker_id, stored.batch_id
            request = request_from_record(record)
            if stored.worker_id is None:
                waiting.append(request)
            else:
                running[request] = stored.worker_id
        return waiting, running

    def clear(self) -> None:
        """Forgets everything."""
        for request_id in list(self._entries):
            self.pop(request_id)
