"""What all baselines share: a book of workers, admission of everything, batches on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bucketserve.core.messages import (
    AdmitRequest,
    BatchPrefilled,
    Command,
    Decision,
    DispatchBatch,
    Event,
    ForgetRequest,
    KvPulled,
    RequestFinished,
    RequestSubmitted,
    WorkerJoined,
    WorkerReported,
)
from bucketserve.core.types import (
    Batch,
    BatchId,
    Bucket,
    Headroom,
    LimitedBy,
    Request,
    RequestId,
    WorkerId,
    WorkerRole,
)

__all__ = ["Baseline", "KnownWorker"]


@dataclass(slots=True)
class KnownWorker:
    """A worker as a baseline sees it."""

    worker_id: WorkerId
    role: WorkerRole
    headroom: Headroom
    num_assigned: int = 0
    unaccounted_tokens: int = 0
    """Prompt tokens given to it since its last report."""
    unfilled: set[RequestId] = field(default_factory=set)
    """Requests whose prompts it has not computed yet."""

    @property
    def free_tokens(self) -> int:
        """KV tokens free by its last report, less what was given to it since."""
        return self.headroom.kv_free_tokens - self.unaccounted_tokens

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing at all to do."""
        busy = self.headroom.num_running + self.headroom.num_waiting
        return not busy and self.headroom.last_assignment == self.num_assigned


class Baseline:
    """Takes events apart; a policy overrides the hooks and `schedule`."""

    def __init__(self) -> None:
        """Knows nobody yet."""
        self.workers: dict[WorkerId, KnownWorker] = {}
        self.requests: dict[RequestId, Request] = {}
        """Admitted and not finished."""
        self.commands: list[Command] = []
        self.wake_s: float | None = None
        self._num_batches = 0

    def step(self, events: Sequence[Event], now_s: float) -> Decision:
        """Returns what to do about the events at that time."""
        self.commands, self.wake_s = [], None
        for event in events:
            match event:
                case RequestSubmitted(request=request):
                    self.requests[request.request_id] = request
                    self.commands.append(AdmitRequest(request))
                    self.on_submitted(request)
                case WorkerJoined():
                    self.workers[event.worker_id] = KnownWorker(event.worker_id, event.role, event.headroom)
                case WorkerReported():
                    worker = self.workers[event.worker_id]
                    worker.headroom, worker.unaccounted_tokens = event.headroom, 0
                    self.on_reported(event)
                case BatchPrefilled():
                    self.workers[event.worker_id].unfilled.difference_update(event.request_ids)
                    self.on_prefilled(event)
                case RequestFinished():
                    del self.requests[event.request_id]
                    self.on_finished(event)
                    self.commands.append(ForgetRequest(event.request_id))
                case KvPulled():
                    self.on_pulled(event)
        self.schedule(now_s)
        return Decision(tuple(self.commands), (), self.wake_s)

    def on_submitted(self, request: Request) -> None:
        """Takes a new request."""

    def on_prefilled(self, event: BatchPrefilled) -> None:
        """Takes note of computed prompts."""

    def on_reported(self, event: WorkerReported) -> None:
        """Takes note of measured steps."""

    def on_finished(self, event: RequestFinished) -> None:
        """Takes note of a request's end."""

    def on_pulled(self, event: KvPulled) -> None:
        """Takes note of a completed transfer."""

    def schedule(self, now_s: float) -> None:
        """Appends to `commands`; may set `wake_s`."""

    def of_role(self, *roles: WorkerRole) -> list[KnownWorker]:
        """Returns the workers that have one of the roles."""
        return [worker for worker in self.workers.values() if worker.role in roles]

    def dispatch(
        self, worker: KnownWorker, requests: Iterable[Request], limited_by: LimitedBy, bucket: Bucket | None = None
    ) -> None:
        """Sends a batch to a worker."""
        chosen = list(requests)
        self._num_batches += 1
        worker.num_assigned += 1
        longest = max(request.prefill_tokens for request in chosen)
        batch = Batch(
            batch_id=BatchId(f"{worker.worker_id}/{self._num_batches}"),
            worker_id=worker.worker_id,
            assignment=worker.num_assigned,
            bucket=bucket or Bucket(0, longest + 1),
            request_ids=tuple(request.request_id for request in chosen),
            prefill_tokens=sum(request.prefill_tokens for request in chosen),
            padded_tokens=longest * len(chosen),
            reserved_kv_tokens=sum(request.reserved_tokens for request in chosen),
            limited_by=limited_by,
        )
        worker.unaccounted_tokens += batch.prefill_tokens
        worker.unfilled.update(batch.request_ids)
        self.commands.append(DispatchBatch(batch))
