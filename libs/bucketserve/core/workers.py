"""What the core knows of each worker: its last report, and what was given to it since."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from bucketserve.core.messages import WorkerJoined
from bucketserve.core.types import BatchId, Headroom, Request, RequestId, StepSample, WorkerId, WorkerRole

__all__ = ["StepTimes", "WorkerState"]


@dataclass(slots=True)
class StepTimes:
    """Prefill speed of a worker, fitted online: exponentially weighted seconds and tokens of steps with prompts."""

    seconds: float = 0.0
    tokens: float = 0.0

    def learn(self, sample: StepSample) -> None:
        """Takes a measured step."""
        if sample.prefill_tokens:
            self.seconds = 0.95 * self.seconds + sample.duration_s
            self.tokens = 0.95 * self.tokens + sample.prefill_tokens

    def prefill_s(self, num_tokens: int) -> float:
        """Returns the predicted duration of that many prompt tokens; 0 before anything was measured."""
        return num_tokens * self.seconds / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class WorkerState:
    """One worker. Mutated only by SchedulerCore."""

    worker_id: WorkerId
    role: WorkerRole
    headroom: Headroom
    context_tokens: int
    pays_padding: bool
    times: StepTimes = field(default_factory=StepTimes)
    num_assigned: int = 0
    """Sequence number of the last batch given to it."""
    unaccounted: deque[tuple[int, int, int]] = field(default_factory=deque)
    """Batches that its report does not contain yet: (assignment, reserved tokens, requests)."""
    outstanding: dict[BatchId, set[RequestId]] = field(default_factory=dict)
    """Batches whose prompts aren't all computed: the requests still to come."""
    requests: set[RequestId] = field(default_factory=set)
    is_draining: bool = False

    @classmethod
    def joined(cls, event: WorkerJoined) -> WorkerState:
        """Returns the state of a worker that has just connected."""
        return cls(
            worker_id=event.worker_id,
            role=event.role,
            headroom=event.headroom,
            context_tokens=event.context_tokens,
            pays_padding=event.pays_padding,
        )

    def report(self, headroom: Headroom) -> None:
        """Takes a report; batches that it accounts for are no longer subtracted from it."""
        self.headroom = headroom
        while self.unaccounted and self.unaccounted[0][0] <= headroom.last_assignment:
            self.unaccounted.popleft()

    def free_tokens(self) -> int:
        """KV tokens free by its report, less what was assigned since."""
        return self.headroom.kv_free_tokens - sum(tokens for _, tokens, _ in self.unaccounted)

    def safe_tokens(self, reserve: float) -> int:
        """M_safe in tokens (paper, formula 5). An empty worker may give everything to the one request it holds."""
        return int(self.free_tokens() * (1 - reserve))

    def free_sequences(self) -> int:
        """Sequences that it may still take."""
        assigned = sum(number for _, _, number in self.unaccounted)
        return self.headroom.max_sequences - self.headroom.num_running - self.headroom.num_waiting - assigned

    def could_hold(self, request: Request) -> bool:
        """Whether it could hold the request if it were empty."""
        return request.reserved_tokens <= min(self.headroom.kv_total_tokens, self.context_tokens)

    def is_empty(self) -> bool:
        """Whether nothing runs or waits there."""
        return not self.requests and self.free_tokens() >= self.headroom.kv_total_tokens

    def release(self, request_id: RequestId) -> None:
        """Forgets a request that has left."""
        self.requests.discard(request_id)
        self.prefilled(request_id)

    def prefilled(self, request_id: RequestId) -> None:
        """Notes that a request's prompt is computed."""
        for batch_id, left in list(self.outstanding.items()):
            left.discard(request_id)
            if not left:
                del self.outstanding[batch_id]
