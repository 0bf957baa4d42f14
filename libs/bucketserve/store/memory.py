"""The reference store: everything in this process's memory. For tests, the simulator's cousins, and memory:// stacks.

State outlives a MemoryStore object if several share one MemoryState, as Redis outlives its clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bucketserve.core.errors import StaleEpochError
from bucketserve.core.types import BatchId, RequestId, WorkerId
from bucketserve.ports import (
    Admit,
    Dispatch,
    Leadership,
    Place,
    Remove,
    SetEdges,
    SetOutputs,
    StoredTicket,
    StoreSnapshot,
    Write,
)

__all__ = ["MemoryState", "MemoryStore"]


@dataclass(slots=True)
class MemoryState:
    """What the keys of one model hold."""

    leader: str | None = None
    leader_until_s: float = 0.0
    epoch: int = 0
    epoch_owner: str | None = None
    edges: tuple[int, ...] = ()
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tickets: dict[RequestId, bytes] = field(default_factory=dict)
    waiting: dict[RequestId, int] = field(default_factory=dict)
    places: dict[RequestId, tuple[WorkerId, BatchId]] = field(default_factory=dict)


class MemoryStore:
    """A QueueStore over a MemoryState."""

    def __init__(self, state: MemoryState | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Shares `state` with other stores of the same model; the clock runs the leader's lease, in seconds."""
        self._state = state if state is not None else MemoryState()
        self._clock = clock

    async def lead(self, owner: str, ttl_s: float, epoch: int = 0) -> Leadership | None:
        """See QueueStore."""
        state, now_s = self._state, self._clock()
        if state.leader is not None and state.leader != owner and now_s < state.leader_until_s:
            return None
        if state.leader is not None and now_s < state.leader_until_s and 0 < epoch < state.epoch:
            return None
        if state.epoch_owner != owner or state.epoch != epoch:
            state.epoch, state.epoch_owner = state.epoch + 1, owner
        state.leader, state.leader_until_s = owner, now_s + ttl_s
        return Leadership(owner=owner, epoch=state.epoch)

    async def resign(self, leadership: Leadership) -> None:
        """See QueueStore."""
        if self._state.leader == leadership.owner and self._state.epoch == leadership.epoch:
            self._state.leader = None

    async def load(self, leadership: Leadership) -> StoreSnapshot:
        """See QueueStore."""
        self._check(leadership)
        state = self._state
        tickets = []
        for request_id, ticket in sorted(state.tickets.items()):
            worker_id, batch_id = state.places.get(request_id, (None, None))
            tickets.append(StoredTicket(request_id=request_id, ticket=ticket, worker_id=worker_id, batch_id=batch_id))
        return StoreSnapshot(edges=state.edges, outputs=dict(state.outputs), tickets=tuple(tickets))

    async def apply(self, leadership: Leadership, writes: Sequence[Write]) -> Sequence[frozenset[RequestId]]:
        """See QueueStore."""
        self._check(leadership)
        return [frozenset(self._apply(write)) for write in writes]

    async def risk(self) -> str:
        """See QueueStore."""
        return ""

    async def close(self) -> None:
        """See QueueStore."""

    def _check(self, leadership: Leadership) -> None:
        if self._state.epoch != leadership.epoch:
            raise StaleEpochError(f"epoch {leadership.epoch} is over; now {self._state.epoch}")

    def _apply(self, write: Write) -> list[RequestId]:
        state = self._state
        match write:
            case Admit():
                if write.request_id not in state.places or write.request_id not in state.tickets:
                    state.places.pop(write.request_id, None)
                    state.tickets[write.request_id] = write.ticket
                    state.waiting[write.request_id] = write.prefill_tokens
                return [write.request_id]
            case Dispatch():
                place = (write.worker_id, write.batch_id)
                there = [request_id for request_id in write.request_ids if request_id in state.tickets]
                for request_id in there:
                    if state.waiting.pop(request_id, None) is not None:
                        state.places[request_id] = place
                return [request_id for request_id in there if state.places.get(request_id) == place]
            case Place():
                if write.request_id not in state.tickets:
                    return []
                state.waiting.pop(write.request_id, None)
                state.places[write.request_id] = (write.worker_id, write.batch_id)
                return [write.request_id]
            case Remove():
                removed = [rid for rid in write.request_ids if state.tickets.pop(rid, None) is not None]
                for request_id in write.request_ids:
                    state.waiting.pop(request_id, None)
                    state.places.pop(request_id, None)
                return removed
            case SetEdges():
                state.edges = write.edges
                return []
            case SetOutputs():
                state.outputs.update(write.counts)
                return []
