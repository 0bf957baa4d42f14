"""What happened to each request. Every one ends in exactly one terminal state, or the simulation is void."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from bucketserve.core.messages import DropReason, RefuseReason
from bucketserve.core.types import Batch, LimitedBy, RequestClass, RequestId
from bucketserve.core.waste import Waste, WasteBook
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.window import Window
from bucketserve.sim.workload import SimRequest

__all__ = ["BatchBook", "Ledger", "Outcome", "Record"]


class Outcome(enum.Enum):
    """Terminal states."""

    FINISHED = "finished"
    REFUSED = "refused"
    DROPPED = "dropped"


@dataclass(slots=True)
class Record:
    """One request's life, in seconds of virtual time."""

    request: SimRequest
    ttft_slo_s: float
    tpot_slo_s: float
    is_admitted: bool = False
    dispatched_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    num_evictions: int = 0
    """How often it lost its KV memory to others."""
    num_generated: int = 0
    """Tokens of its output that attempts before the present one generated."""
    outcome: Outcome | None = None
    reason: RefuseReason | DropReason | None = None

    @property
    def is_interactive(self) -> bool:
        """Whether it has targets at all."""
        return self.request.request_class is RequestClass.INTERACTIVE

    @property
    def ttft_s(self) -> float | None:
        """Time from arrival to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per further token; None if there was none."""
        if self.outcome is not Outcome.FINISHED or self.end_s is None or self.first_token_s is None:
            return None
        further = self.request.output_tokens - 1
        return (self.end_s - self.first_token_s) / further if further else None

    @property
    def is_within_slo(self) -> bool:
        """Whether it finished with both targets met."""
        if self.outcome is not Outcome.FINISHED or self.ttft_s is None:
            return False
        tpot_s = self.tpot_s
        return self.ttft_s <= self.ttft_slo_s and (tpot_s is None or tpot_s <= self.tpot_slo_s)

    def is_missed(self, now_s: float) -> bool:
        """Whether it is certain by now that it misses a target."""
        if self.outcome is not None:
            return not self.is_within_slo
        ttft_s = now_s - self.request.arrival_s if self.ttft_s is None else self.ttft_s
        return ttft_s > self.ttft_slo_s


@dataclass(slots=True)
class BatchBook:
    """The batches that were dispatched."""

    num_batches: int = 0
    num_requests: int = 0
    limited_by: dict[LimitedBy, int] = field(default_factory=dict)
    _waste: WasteBook = field(default_factory=WasteBook)

    def add(self, batch: Batch) -> None:
        """Notes a dispatched batch."""
        self.num_batches += 1
        self.num_requests += len(batch.request_ids)
        self.limited_by[batch.limited_by] = self.limited_by.get(batch.limited_by, 0) + 1
        self._waste.add(batch)

    @property
    def waste(self) -> Waste:
        """What padding each batch to its longest prompt would waste."""
        return self._waste.observed()


class Ledger:
    """Owns the records."""

    def __init__(self) -> None:
        """Starts empty."""
        self.records: dict[RequestId, Record] = {}
        self.batches = BatchBook()
        self.num_open = 0

    def open(self, request_id: RequestId, record: Record) -> None:
        """Notes an arrival."""
        self.records[request_id] = record
        self.num_open += 1

    def admitted(self, request_id: RequestId) -> None:
        """Notes an admission."""
        self._open_record(request_id).is_admitted = True

    def dispatched(self, batch: Batch, now_s: float) -> None:
        """Notes a batch: its requests were admitted, and none runs already."""
        self.batches.add(batch)
        for request_id in batch.request_ids:
            record = self._open_record(request_id)
            if not record.is_admitted or record.dispatched_s is not None:
                raise SimulationError(f"{request_id} was dispatched twice or never admitted")
            record.dispatched_s = now_s

    def preempted(self, request_id: RequestId, next_id: RequestId, num_generated: int) -> None:
        """Notes that a request goes on as its next attempt, after so many tokens more."""
        record = self._open_record(request_id)
        record.num_evictions += 1
        record.num_generated += num_generated
        record.is_admitted, record.dispatched_s = False, None
        self.records[next_id] = self.records.pop(request_id)

    def first_token(self, request_id: RequestId, now_s: float) -> None:
        """Notes the first token; those of requests dropped meanwhile reach nobody."""
        record = self.records[request_id]
        if record.outcome is None and record.first_token_s is None:
            record.first_token_s = now_s

    def ended(
        self, request_id: RequestId, outcome: Outcome, now_s: float, reason: RefuseReason | DropReason | None = None
    ) -> None:
        """Notes the terminal state.

        Raises:
            SimulationError: it is in one already.
        """
        record = self._open_record(request_id)
        record.outcome, record.end_s, record.reason = outcome, now_s, reason
        self.num_open -= 1

    def measured(self, window: Window) -> list[Record]:
        """Returns the interactive requests that arrived in the window; all interactive ones if none did."""
        interactive = [record for record in self.records.values() if record.is_interactive]
        return [record for record in interactive if record.request.arrival_s in window] or interactive

    def _open_record(self, request_id: RequestId) -> Record:
        record = self.records.get(request_id)
        if record is None or record.outcome is not None:
            raise SimulationError(f"{request_id} is unknown or over: {record}")
        return record
