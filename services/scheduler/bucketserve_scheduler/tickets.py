"""The tickets that this scheduler holds in memory, beside their durable copy in the store, with their prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bucketserve.core.types import BatchId, Request, RequestId, WorkerId
from bucketserve.ports import StoreSnapshot
from bucketserve.rpc.convert import request_from_ticket
from bucketserve.v1 import common_pb2, scheduler_pb2
from bucketserve_scheduler.peers import GatewayPeers

__all__ = ["Entry", "TicketTable"]


@dataclass(slots=True)
class Entry:
    """A ticket and how far it got."""

    ticket: scheduler_pb2.Ticket
    arrival_s: float
    """When the request reached its gateway, on our clock."""
    spec: bytes = b""
    """The serialised RunSpec, until it is at a worker; empty as well until a gateway says a restored one again."""
    is_accepted: bool = False
    worker_id: WorkerId | None = None
    batch_id: BatchId | None = None
    batch: common_pb2.BatchInfo | None = None
    """The batch, as a worker that pulls its KV is told of it."""
    dispatched: scheduler_pb2.RunDispatched | None = None
    """What its gateway was told at dispatch, to be told again if it reconnects."""

    @property
    def is_parked(self) -> bool:
        """Whether it waits for its gateway to say its prompt again."""
        return not self.spec and self.worker_id is None


class TicketTable:
    """Entries by run id."""

    def __init__(self, gateways: GatewayPeers) -> None:
        """Keeps the gateways' lists of open runs in step."""
        self._entries: dict[RequestId, Entry] = {}
        self._parked: dict[RequestId, Entry] = {}
        """What was waiting when it was taken over, and has not ended."""
        self._gateways = gateways

    def __len__(self) -> int:
        """Number of open tickets."""
        return len(self._entries)

    def __iter__(self) -> Iterator[RequestId]:
        """Yields the ids."""
        return iter(self._entries)

    def add(self, ticket: scheduler_pb2.Ticket, arrival_s: float, now_s: float) -> Entry:
        """Takes a new ticket."""
        run_id = RequestId(ticket.run_id)
        entry = self._entries[run_id] = Entry(ticket, arrival_s)
        self._gateways.open(ticket.gateway_id, run_id, now_s)
        return entry

    def get(self, run_id: RequestId) -> Entry | None:
        """Returns an entry."""
        return self._entries.get(run_id)

    def parked_since(self, before_s: float) -> list[RequestId]:
        """Returns what was taken over before that time and was not said again since: its gateway does not have it."""
        return [rid for rid, entry in self._parked.items() if entry.is_parked and entry.arrival_s < before_s]

    def pop(self, run_id: RequestId) -> Entry | None:
        """Removes and returns an entry."""
        entry = self._entries.pop(run_id, None)
        self._parked.pop(run_id, None)
        if entry is not None:
            self._gateways.close(entry.ticket.gateway_id, run_id)
        return entry

    def restore(self, snapshot: StoreSnapshot, now_s: float) -> tuple[list[Request], dict[Request, WorkerId]]:
        """Takes what the store holds; returns the waiting requests, and those at workers."""
        waiting: list[Request] = []
        running: dict[Request, WorkerId] = {}
        for stored in snapshot.tickets:
            entry = self.add(scheduler_pb2.Ticket.FromString(stored.ticket), now_s, now_s)
            entry.is_accepted = True
            entry.worker_id, entry.batch_id = stored.worker_id, stored.batch_id
            request = request_from_ticket(entry.ticket, arrival_s=now_s)
            if stored.worker_id is None:
                self._parked[stored.request_id] = entry
                waiting.append(request)
            else:
                running[request] = stored.worker_id
        return waiting, running

    def clear(self) -> None:
        """Forgets everything."""
        for run_id in list(self._entries):
            self.pop(run_id)
