"""Workers and clients of a world: they do what real ones do, and keep what is true, whatever the core believes."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, replace

from bucketserve.core.messages import (
    BatchPrefilled,
    Event,
    KvPulled,
    PreemptAtWorker,
    PullKv,
    RequestFinished,
    WorkerJoined,
    WorkerReported,
)
from bucketserve.core.preemption import SPARE_SHARE, loss
from bucketserve.core.prefixes import BLOCK_TOKENS
from bucketserve.core.types import (
    MAX_PREEMPTIONS,
    Batch,
    FinishReason,
    Headroom,
    Request,
    RequestClass,
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

    @property
    def is_growing(self) -> bool:
        """Whether it takes KV as it uses it."""
        return not self.hands_over and self.request.may_be_preempted

    @property
    def grown_tokens(self) -> int:
        """KV tokens that it has once it has begun."""
        if not self.is_growing:
            return self.reserved_tokens
        return self.request.prompt_tokens + max(self.num_generated - 1, 0)


@dataclass(slots=True)
class Client:
    """A client's request at its gateway, over all attempts."""

    name: str
    request: Request
    """Of the present attempt."""
    output_tokens: int
    """Of what is left, as many as the model generates."""
    attempts: dict[RequestId, Request] = field(default_factory=dict)
    attempt: int = 1
    num_generated: int = 0
    """By the present attempt."""
    is_gone: bool = False
    outcomes: list[str] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return not self.outcomes

    @property
    def is_last_attempt(self) -> bool:
        return self.attempt - self.request.num_preemptions == MAX_ATTEMPTS

    def is_of(self, request_id: RequestId) -> bool:
        """Whether it waits for that attempt."""
        return self.is_open and not self.is_gone and self.request.request_id == request_id

    def next_attempt(self, lost_at: WorkerId | None, fingerprint: str, *, is_preempted: bool = False) -> Request:
        """Returns the next attempt, of what is left."""
        old, done = self.request, self.num_generated
        self.attempt += 1
        self.num_generated = 0
        self.output_tokens -= done
        self.request = replace(
            old,
            request_id=RequestId(f"{self.name}.{self.attempt}"),
            prompt_tokens=old.prompt_tokens + done,
            max_new_tokens=old.max_new_tokens - done,
            is_resumed=True,
            num_preemptions=old.num_preemptions + is_preempted,
            avoid=old.avoid | ({lost_at} if lost_at is not None else set()),
            fingerprint=fingerprint if done else old.fingerprint,
        )
        self.attempts[self.request.request_id] = self.request
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
    resumptions: list[Request] = field(default_factory=list)
    """Of those that it let go, as their gateways want to go on."""
    num_decode_steps: int = 0
    is_connected: bool = False
    is_draining: bool = False
    is_released: bool = False
    """It was told on this stream that nothing more comes."""
    last_assignment: int = 0
    runs: dict[RequestId, Run] = field(default_factory=dict)
    inbox: list[object] = field(default_factory=list)
    outbox: list[Event] = field(default_factory=list)
    blocks: set[int] = field(default_factory=set)
    """Whose KV it has computed."""
    adapters: frozenset[str] = frozenset()
    is_queueing: bool = False
    """Whether requests come on arrival: more than it has room for wait here."""

    # --- the stream ---------------------------------------------------------------------------------------------

    def connect(self) -> WorkerJoined:
        """A new stream: what was under way on the older one is lost, and pulls are called off."""
        self.hang_up()
        self.is_connected, self.is_released = True, False
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
            fingerprint=self.fingerprint,
            tokenizer=self.tokenizer,
            adapters=self.adapters,
            running=running,
        )

    def hang_up(self) -> None:
        self.is_connected = False
        self.inbox.clear()
        self.outbox.clear()

    def die(self) -> None:
        self.hang_up()
        self.runs.clear()
        self.blocks.clear()
        self.is_draining = False
        self.num_decode_steps = 0

    def headroom(self) -> Headroom:
        runs = self.runs.values()
        waiting = [run for run in runs if run.phase is Phase.QUEUED]
        return Headroom(
            kv_total_tokens=self.capacity,
            kv_free_tokens=max(self.free() - self.to_come(), 0),
            max_sequences=MAX_SEQUENCES,
            num_decode_steps=self.num_decode_steps,
            num_running=sum(run.phase is Phase.DECODING for run in runs),
            num_waiting=len(waiting),
            waiting_prefill_tokens=sum(run.request.prefill_tokens for run in waiting),
            last_assignment=self.last_assignment,
        )

    def used(self) -> int:
        return sum(run.grown_tokens for run in self.runs.values() if self.has_begun(run))

    def has_begun(self, run: Run) -> bool:
        """Whether it has KV here: one that is pulled has from when it has come."""
        is_own = run.pull is not None and run.pull.source_id == self.worker_id
        return run.phase in (Phase.DECODING, Phase.HELD) or is_own

    def to_come(self) -> int:
        """KV tokens that those which wait take when they begin."""
        return sum(run.grown_tokens for run in self.runs.values() if run.phase is Phase.QUEUED)

    def free(self) -> int:
        return self.capacity - self.used()

    def growth(self) -> int:
        """KV tokens that the next step takes."""
        return sum(run.phase is Phase.DECODING and run.is_growing for run in self.runs.values())

    def fits(self, run: Run) -> bool:
        """Whether a prompt may begin."""
        is_empty = not any(self.has_begun(other) for other in self.runs.values())
        spare = 0 if is_empty else math.ceil(self.capacity * SPARE_SHARE)
        has_slot = sum(other.phase is Phase.DECODING for other in self.runs.values()) < MAX_SEQUENCES
        return has_slot and run.grown_tokens <= self.free() - self.growth() - spare

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
                case PreemptAtWorker(request_id=request_id):
                    self.let_go(request_id)
                case str() as request_id:
                    self.cancel(RequestId(request_id))
            # Never more than it really has.
            assert self.used() <= self.capacity
            known = [run for run in self.runs.values() if self.has_begun(run) or not self.is_queueing]
            assert sum(run.phase is not Phase.HELD for run in known) <= MAX_SEQUENCES
        if orders:
            self.report()

    def begin_pull(self, pull: PullKv) -> None:
        self.last_assignment = pull.assignment
        request = self.clients[pull.request_id].attempts[pull.request_id]
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
        if (request_id := self.first(Phase.QUEUED)) is None or not self.fits(self.runs[request_id]):
            return
        run = self.runs[request_id]
        self.generate(request_id)
        is_done = self.is_done(request_id)
        run.phase = Phase.HELD if run.hands_over and not is_done else Phase.DECODING
        held = (request_id,) if run.phase is Phase.HELD else ()
        hashes = run.request.block_hashes
        num_known = next((i for i, block in enumerate(hashes) if block not in self.blocks), len(hashes))
        self.blocks.update(hashes)
        self.outbox.append(
            BatchPrefilled(
                worker_id=self.worker_id,
                assignment=run.assignment,
                request_ids=(request_id,),
                held=held,
                cached_tokens=(min(num_known * BLOCK_TOKENS, run.request.prompt_tokens - 1),),
            )
        )
        if is_done:
            self.say_complete(request_id)

    def generate(self, request_id: RequestId) -> None:
        """Delivers a token to the client, if this is still its attempt."""
        run, client = self.runs[request_id], self.clients[request_id]
        run.num_generated += 1
        if client.request.request_id == request_id:
            client.num_generated = max(client.num_generated, run.num_generated)

    def is_done(self, request_id: RequestId) -> bool:
        """Whether the model has nothing more to say; an older attempt, that nobody hears, goes on to its limit."""
        run, client = self.runs[request_id], self.clients[request_id]
        most = run.request.max_new_tokens
        return run.num_generated >= (client.output_tokens if client.request.request_id == request_id else most)

    def decode(self, num_steps: int = 1) -> None:
        """Steps with decodes: each run takes a token, and its KV grows by as much, if it does."""
        for _ in range(num_steps):
            self.make_room()
            decoding = [request_id for request_id, run in self.runs.items() if run.phase is Phase.DECODING]
            self.num_decode_steps += bool(decoding)
            for request_id in decoding:
                self.generate(request_id)
                if self.is_done(request_id):
                    self.say_complete(request_id)
            assert self.used() <= self.capacity

    def make_room(self) -> None:
        """Lets runs go until the next step has room."""
        while self.free() < self.growth():
            losses = {rid: cost for rid, run in reversed(self.runs.items()) if (cost := self.loss(run)) is not None}
            # Whoever may not be let go has all that it may use.
            assert losses
            self.let_go(min(losses, key=losses.__getitem__))

    def loss(self, run: Run) -> tuple[bool, int, int] | None:
        if run.phase is not Phase.DECODING:
            return None
        return loss(
            is_batch=run.request.request_class is RequestClass.BATCH,
            num_preemptions=run.request.num_preemptions,
            num_tokens=run.request.prompt_tokens + run.num_generated,
        )

    def let_go(self, request_id: RequestId) -> None:
        """A run makes room; it may have ended, or its KV waits or moves."""
        run = self.runs.get(request_id)
        if run is None or run.phase not in (Phase.QUEUED, Phase.DECODING):
            return
        assert run.request.num_preemptions < MAX_PREEMPTIONS
        self.say_finished(request_id, FinishReason.PREEMPTED)
        client = self.clients[request_id]
        if client.is_of(request_id):
            request = client.next_attempt(None, self.fingerprint, is_preempted=True)
            self.clients[request.request_id] = client
            self.resumptions.append(request)

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
        if is_ok and not self.has_begun(run) and run.grown_tokens > self.free():
            is_ok = False
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

    def say_complete(self, request_id: RequestId) -> None:
        run = self.runs[request_id]
        is_all = run.num_generated == run.request.max_new_tokens
        self.say_finished(request_id, FinishReason.LENGTH if is_all else FinishReason.STOP)

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
