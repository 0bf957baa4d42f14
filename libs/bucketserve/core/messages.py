"""What goes into SchedulerCore.step (events) and what comes out (commands, drops)."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from bucketserve.core.types import (
    Batch,
    FinishReason,
    Headroom,
    Request,
    RequestId,
    RunningRequest,
    StepSample,
    WorkerId,
    WorkerRole,
)

__all__ = [
    "AdaptersChanged",
    "AdmitFailed",
    "AdmitRequest",
    "BatchPrefilled",
    "CancelAtWorker",
    "ChangeEdges",
    "Command",
    "ContextExtended",
    "Decision",
    "DispatchBatch",
    "DispatchFailed",
    "Drop",
    "DropReason",
    "Event",
    "Fault",
    "ForgetRequest",
    "KvPulled",
    "PlaceRequest",
    "PreemptAtWorker",
    "PullKv",
    "RefuseReason",
    "RefuseRequest",
    "ReleaseKv",
    "ReleaseWorker",
    "RequestCancelled",
    "RequestFinished",
    "RequestResumed",
    "RequestSubmitted",
    "SaveOutputs",
    "SwitchRole",
    "WorkerAway",
    "WorkerDraining",
    "WorkerJoined",
    "WorkerLost",
    "WorkerReported",
    "requests_named_by",
]


class RefuseReason(enum.Enum):
    """Why a request was not admitted."""

    QUEUE_REQUESTS = "queue_requests"
    QUEUE_TOKENS = "queue_tokens"
    TENANT_QUOTA = "tenant_quota"
    SLO_UNATTAINABLE = "slo_unattainable"
    TOO_LARGE = "too_large"
    OTHER_TOKENIZER = "other_tokenizer"
    """No worker's model has the tokenizer that made the prompt."""
    NO_GRAMMARS = "no_grammars"
    """No worker's engine can constrain output as the request asks."""
    NO_WORKER = "no_worker"
    """Nobody has computed prompts of this model for PATIENCE_S."""
    NO_ADAPTER = "no_adapter"
    """No worker has the adapter that the request names."""
    STORE_FULL = "store_full"


class DropReason(enum.Enum):
    """Why an admitted request ended without a worker finishing it."""

    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    WORKER_LOST = "worker_lost"
    WORKER_FAILED = "worker_failed"
    TOO_LARGE = "too_large"
    NO_LIKE_WORKER = "no_like_worker"
    """Nobody has the engine that could go on with what another has begun, the tokenizer, the adapter, or grammars."""
    NO_WORKER = "no_worker"
    """Nobody has computed prompts of this model for PATIENCE_S."""
    INTERNAL = "internal"
    """A step of the core failed on it."""


# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestSubmitted:
    """A gateway wants a request queued. Answered by AdmitRequest or RefuseRequest in the same step."""

    request: Request


@dataclass(frozen=True, slots=True)
class RequestResumed:
    """A gateway says a request again that was admitted before: no admission, and only a full store refuses it.

    Either the next attempt of one whose worker was lost, which goes first, or one whose prompt a new leader lacked.
    """

    request: Request


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """Nobody waits for it any more. Idempotent; unknown ids are ignored."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class AdmitFailed:
    """The store could not take the requests that AdmitRequest named; removals still work."""

    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchFailed:
    """The store did not have these requests of a batch as waiting: they were not sent and have to be stored again."""

    worker_id: WorkerId
    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True)
class ContextExtended:
    """The model's context is at least that long."""

    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    """A worker is ready, or is back after its stream or the scheduler was interrupted.

    Requests that the core believes to be at this worker but that are not among `running` are lost
    (Drop with WORKER_LOST). Running ones that it believes to be at a worker that is not here are taken to be at this
    one: their KV was pulled and nobody could be told. Other running ones are answered with CancelAtWorker.
    """

    worker_id: WorkerId
    role: WorkerRole
    headroom: Headroom
    context_tokens: int
    fingerprint: str = ""
    """Of weights, number type and engine: workers with the same generate the same."""
    tokenizer: str = ""
    """Fingerprint of its model's tokenizer; empty: it knows of none."""
    step_tokens: int = 0
    """Prompt tokens of a step of its engine at most; 0: it does not say."""
    has_grammars: bool = False
    """Whether its engine can constrain output."""
    adapters: frozenset[str] = frozenset()
    """Fingerprints of those that it has."""
    running: tuple[RunningRequest, ...] = ()
    """Requests that the worker still has from before."""
    is_delivering: bool = False
    """As in WorkerReported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReported:
    """A worker's headroom changed, or its report interval passed."""

    worker_id: WorkerId
    headroom: Headroom
    steps: tuple[StepSample, ...] = ()
    is_delivering: bool = False
    """Whether it has output that no gateway has acknowledged yet, maybe of requests that have ended at it."""


@dataclass(frozen=True, slots=True)
class AdaptersChanged:
    """The worker has these adapters from now on, by fingerprint; what it has of others it finishes."""

    worker_id: WorkerId
    adapters: frozenset[str]


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """The worker wants to leave. ReleaseWorker follows once nothing needs it any more (core/leaving.py)."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class WorkerAway:
    """Its stream broke: nothing can be given to it until it joins again, or is lost."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """Lease over or stream broken. Its requests are dropped with WORKER_LOST; their gateways resume them."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPrefilled:
    """The prompts of a batch (or a part of it) are computed."""

    worker_id: WorkerId
    assignment: int
    request_ids: tuple[RequestId, ...]
    held: tuple[RequestId, ...] = ()
    """Those among them whose KV now waits for a decode worker."""
    cached_tokens: tuple[int, ...] = ()
    """Prompt tokens of each request that the worker had already; empty: it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFinished:
    """A request left its worker: complete, cancelled or failed."""

    request_id: RequestId
    worker_id: WorkerId
    assignment: int
    """Of the order that brought it."""
    output_tokens: int
    reason: FinishReason = FinishReason.LENGTH
    is_retryable: bool = True
    """For an error: whether another worker may do better. If not, its gateway hears of it from the worker alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPulled:
    """The transfer that PullKv asked for is over; until then both workers count the request's KV."""

    request_id: RequestId
    target_id: WorkerId
    assignment: int
    is_ok: bool


Event = (
    RequestSubmitted
    | RequestResumed
    | RequestCancelled
    | AdmitFailed
    | DispatchFailed
    | ContextExtended
    | WorkerJoined
    | WorkerReported
    | AdaptersChanged
    | WorkerAway
    | WorkerDraining
    | WorkerLost
    | BatchPrefilled
    | RequestFinished
    | KvPulled
)


def requests_named_by(event: Event) -> tuple[RequestId, ...]:
    """Returns the requests that an event is about; a worker's running ones are not its fault."""
    match event:
        case RequestSubmitted(request=request) | RequestResumed(request=request):
            return (request.request_id,)
        case BatchPrefilled(request_ids=ids) | AdmitFailed(request_ids=ids) | DispatchFailed(request_ids=ids):
            return ids
        case RequestCancelled(request_id=request_id):
            return (request_id,)
        case RequestFinished(request_id=request_id) | KvPulled(request_id=request_id):
            return (request_id,)
        case _:
            return ()


# --- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AdmitRequest:
    """Store the request as waiting and tell its gateway."""

    request: Request
    is_anew: bool = False
    """Whether the store did not have it as waiting when it was dispatched: whatever it has of it is not true."""


@dataclass(frozen=True, slots=True)
class RefuseRequest:
    """Tell the gateway; nothing is stored."""

    request_id: RequestId
    reason: RefuseReason
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class ChangeEdges:
    """The buckets are now [0, edges[0]), [edges[0], edges[1]) ...; the last edge is the context length + 1."""

    edges: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SaveOutputs:
    """Store these parts of what is known of output lengths, for the next leader (core/outputs.py)."""

    counts: Mapping[str, tuple[int, ...]]
    """Class and length cell -> requests by length cell of their output."""


@dataclass(frozen=True, slots=True)
class DispatchBatch:
    """Note in the store that the batch is at its worker, then send it; DispatchFailed names what the store lacked."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class CancelAtWorker:
    """Tell a worker to stop a request at its next step."""

    worker_id: WorkerId
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class PreemptAtWorker:
    """Tell a worker to let a request go at its next step; RequestFinished with PREEMPTED follows."""

    worker_id: WorkerId
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class ForgetRequest:
    """The request finished at its worker: remove its record."""

    request_id: RequestId
    was_cancelled: bool = False
    """Its worker stopped it before it was complete: a gateway that waits for it all the same has to try again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullKv:
    """Tell a decode worker to pull a prefilled request's KV and to go on with it. Answered by KvPulled."""

    request_id: RequestId
    source_id: WorkerId
    target_id: WorkerId
    assignment: int
    """Number of the order to the target (Batch.assignment)."""


@dataclass(frozen=True, slots=True)
class ReleaseKv:
    """Tell a worker that nobody needs the KV any more that it holds of a request."""

    worker_id: WorkerId
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class ReleaseWorker:
    """Tell a draining worker that it gets nothing more: it may go when it is done."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """A request is at that worker, wherever it was believed to be: note it in the store."""

    request_id: RequestId
    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class SwitchRole:
    """Tell a worker what it does from the next batch on; what it has goes on as it was."""

    worker_id: WorkerId
    role: WorkerRole


Command = (
    AdmitRequest
    | RefuseRequest
    | ChangeEdges
    | SaveOutputs
    | DispatchBatch
    | PullKv
    | PlaceRequest
    | ReleaseKv
    | ReleaseWorker
    | SwitchRole
    | CancelAtWorker
    | PreemptAtWorker
    | ForgetRequest
)


@dataclass(frozen=True, slots=True)
class Drop:
    """An admitted request ends here: remove its record and tell its gateway why."""

    request_id: RequestId
    reason: DropReason


@dataclass(frozen=True, slots=True)
class Fault:
    """An event that the core could not take. The requests that it names were given up."""

    event: Event
    error: Exception


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, in order."""

    commands: tuple[Command, ...] = ()
    drops: tuple[Drop, ...] = ()
    wake_s: float | None = field(default=None)
    """Call step again at this time at the latest, even without events; None: only on events."""
    faults: tuple[Fault, ...] = ()
    """Events that could not be taken, for the log."""
