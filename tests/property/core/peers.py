"""Workers and clients of a world: they do what real ones do, and keep what is true, whatever the core believes."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from bucketserve.core.messages import (
    BatchPrefilled,
    Event,
    KvPulled,
    PullKv,
    RequestFinished,
    WorkerJoined,
    WorkerReported,
)
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

MAX_ATTEMPTS = 3
MAX_SEQUENCES = 8


class Phase(enum.Enum):
    """Where a run is at its worker."""

    QUEUED = "queued"
    DECODING = "decoding"
    HELD = "held"
    PULLING = "pulling"


@dataclass(slots=True)
class Run:
    """A run at a worker."""

    request: Request
    assignment: int
    """Of the order that brought it."""
    phase: Phase
    hands_over: bool = False
    num_generated: int = 0
    pull: PullKv | None = None
    """While PULLING."""

    @property
    def reserved_tokens(self) -> int:
        return self.request.prompt_tokens if self.hands_over else self.request.reserved_tokens


@dataclass(slots=True)
class Client:
    """A client's request at its gateway, over all attempts."""

    name: str
    request: Request
    """Of the present attempt."""
    attempt: int = 1
    num_generated: int = 0
    """By the present attempt."""
    is_gone: bool = False
    outcomes: list[str] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return not self.outcomes

    def next_attempt(self, lost_at: WorkerId | None, fingerprint: str) -> Request | None:
        """Returns the next attempt, of what is left, or None if it was the last one."""
        old, done = self.request, self.num_generated
        if self.attempt == MAX_ATTEMPTS:
            return None
        self.attempt += 1
        self.num_generated = 0
        self.request = replace(
            old,
            request_id=RequestId(f"{self.name}.{self.attempt}"),
            prompt_tokens=old.prompt_tokens + done,
            max_new_tokens=old.max_new_tokens - done,
            is_resumed=True,
            avoid=old.avoid | ({lost_at} if lost_at is not None else set()),
            fingerprint=fingerprint if done else old.fingerprint,
        )
        return self.request


@dataclass(slots=True)
class Worker:
    """A worker process. What it is told and what it says wait in order until they are let through."""

    worker_id: WorkerId
    capacity: int
    role: WorkerRole
    fingerprint: str
    tokenizer: str
    context_tokens: int
    clients: dict[RequestId, Client]
    """Of every run, to deliver to."""
    is_connected: bool = False
    is_draining: bool = False
    last_assignment: int = 0
    runs: dict[RequestId, Run] = field(default_factory=dict)
    inbox: list[object] = field(default_factory=list)
    outbox: list[Event] = field(default_factory=list)

    # --- the stream ---------------------------------------------------------------------------------------------

    def connect(self) -> WorkerJoined:
        """A new stream: what was under way on the older one is lost, and pulls are called off."""
        self.hang_up()
        self.is_connected = True
        for request_id in [rid for rid, run in self.runs.items() if run.phase is Phase.PULLING]:
            self.call_off(request_id)
        running = tuple(
            RunningRequest(request_id=rid, assignment=run.assignment, is_held=run.phase is Phase.HELD)
            for rid, run in self.runs.items()
        )
        return WorkerJoined(
            worker_id=self.worker_id,
            role=self.role,
            headroom=self.headroom(),
            context_tokens=self.context_tokens,
            pays_padding=False,
            fingerprint=self.fingerprint,
            tokenizer=self.tokenizer,
            running=running,
        )

    def hang_up(self) -> None:
        self.is_connected = False
        self.inbox.clear()
        self.outbox.clear()

    def die(self) -> None:
        self.hang_up()
        self.runs.clear()
        self.is_draining = False

    def headroom(self) -> Headroom:
        runs = self.runs.values()
        waiting = [run for run in runs if run.phase is Phase.QUEUED]
        return Headroom(
            kv_total_tokens=self.capacity,
            kv_free_tokens=self.capacity - self.used(),
            max_sequences=MAX_SEQUENCES,
            num_running=sum(run.phase is Phase.DECODING for run in runs),
            num_waiting=len(waiting),
            waiting_prefill_tokens=sum(run.request.prefill_tokens for run in waiting),
            last_assignment=self.last_assignment,
        )

    def used(self) -> int:
        return sum(run.reserved_tokens for run in self.runs.values())

    def report(self) -> None:
        steps = (StepSample(prefill_tokens=100, duration_s=0.01), StepSample(decode_sequences=2, duration_s=0.005))
        self.outbox.append(WorkerReported(worker_id=self.worker_id, headroom=self.headroom(), steps=steps))

    # --- what it is told ----------------------------------------------------------------------------------------

    def obey(self) -> None:
        """Does what it was told, in order."""
        orders, self.inbox = self.inbox, []
        for order in orders:
            match order:
                case (Batch() as batch, list() as requests):
                    self.last_assignment = batch.assignment
                    for request in requests:
                        hands_over = self.role is WorkerRole.PREFILL
                        run = Run(request, batch.assignment, Phase.QUEUED, hands_over=hands_over)
                        self.runs[request.request_id] = run
                case PullKv() as pull:
                    self.begin_pull(pull)
                case WorkerRole() as role:
                    self.role = role
                case str() as request_id:
                    self.cancel(RequestId(request_id))
            # Never more than it really has.
            assert self.used() <= self.capacity
            assert sum(run.phase is not Phase.HELD for run in self.runs.values()) <= MAX_SEQUENCES
        if orders:
            self.report()

    def begin_pull(self, pull: PullKv) -> None:
        self.last_assignment = pull.assignment
        request = self.clients[pull.request_id].request
        run = self.runs.get(pull.request_id)
        is_own = pull.source_id == self.worker_id
        if is_own and (run is None or run.phase is not Phase.HELD):
            self.say_pulled(pull, is_ok=False)
            return
        # What it pulls from itself goes by its older name until it has come.
        assignment = run.assignment if is_own and run is not None else pull.assignment
        self.runs[pull.request_id] = Run(request, assignment, Phase.PULLING, pull=pull)

    def cancel(self, request_id: RequestId) -> None:
        run = self.runs.get(request_id)
        if run is None:
            return
        if run.pull is not None:
            self.say_pulled(run.pull, is_ok=False)
            if run.pull.source_id != self.worker_id:
                del self.runs[request_id]
                return
        self.say_finished(request_id, FinishReason.CANCELLED)

    def call_off(self, request_id: RequestId) -> None:
        run = self.runs[request_id]
        if run.pull is not None and run.pull.source_id == self.worker_id:
            run.phase, run.hands_over, run.pull = Phase.HELD, True, None
        else:
            del self.runs[request_id]

    # --- what it does -------------------------------------------------------------------------------------------

    def first(self, phase: Phase) -> RequestId | None:
        return next((rid for rid, run in self.runs.items() if run.phase is phase), None)

    def prefill_one(self) -> None:
        if (request_id := self.first(Phase.QUEUED)) is None:
            return
        run = self.runs[request_id]
        self.generate(request_id)
        is_done = run.num_generated == run.request.max_new_tokens
        run.phase = Phase.HELD if run.hands_over and not is_done else Phase.DECODING
        held = (request_id,) if run.phase is Phase.HELD else ()
        self.outbox.append(
            BatchPrefilled(
                worker_id=self.worker_id,
                assignment=run.assignment,
                request_ids=(request_id,),
                held=held,
            )
        )
        if is_done:
            self.say_finished(request_id, FinishReason.LENGTH)

    def generate(self, request_id: RequestId) -> None:
        """Delivers a token to the client, if this is still its attempt."""
        run, client = self.runs[request_id], self.clients[request_id]
        run.num_generated += 1
        if client.request.request_id == request_id:
            client.num_generated = max(client.num_generated, run.num_generated)

    def decode(self) -> None:
        for request_id, run in self.runs.items():
            if run.phase is Phase.DECODING and run.num_generated < run.request.max_new_tokens - 1:
                self.generate(request_id)

    def finish_one(self, *, ends_alone: bool) -> None:
        """Ends a run as the model does; those whose client has gone only if ends_alone."""
        for request_id, run in self.runs.items():
            if run.phase is Phase.DECODING and (ends_alone or not self.clients[request_id].is_gone):
                self.say_finished(request_id, FinishReason.STOP)
                return

    def fail_one(self) -> None:
        for request_id, run in self.runs.items():
            if run.phase is not Phase.PULLING:
                self.say_finished(request_id, FinishReason.ERROR)
                return

    def end_pull(self, request_id: RequestId, *, is_ok: bool) -> None:
        run = self.runs[request_id]
        pull = run.pull
        assert pull is not None
        if is_ok:
            run.phase, run.num_generated, run.pull, run.assignment = Phase.DECODING, 1, None, pull.assignment
            # The report that counts it comes before the word of it.
            self.report()
        else:
            self.call_off(request_id)
        self.say_pulled(pull, is_ok=is_ok)

    def say_pulled(self, pull: PullKv, *, is_ok: bool) -> None:
        self.outbox.append(
            KvPulled(request_id=pull.request_id, target_id=self.worker_id, assignment=pull.assignment, is_ok=is_ok)
        )

    def say_finished(self, request_id: RequestId, reason: FinishReason) -> None:
        run, client = self.runs.pop(request_id), self.clients[request_id]
        is_complete = reason in (FinishReason.STOP, FinishReason.LENGTH)
        if is_complete and client.request.request_id == request_id and client.is_open:
            client.outcomes.append("finished")
        self.outbox.append(
            RequestFinished(
                request_id=request_id,
                worker_id=self.worker_id,
                assignment=run.assignment,
                output_tokens=run.num_generated,
                reason=reason,
            )
        )
