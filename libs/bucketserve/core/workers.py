"""What the core knows of each worker: its last report, and what was given to it since."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bucketserve.core.kv_book import KvBook
from bucketserve.core.messages import WorkerJoined
from bucketserve.core.outputs import OutputBook
from bucketserve.core.settings import CoreSettings
from bucketserve.core.step_times import StepTimes
from bucketserve.core.types import Batch, BatchId, Headroom, Request, RequestClass, RequestId, WorkerId, WorkerRole

__all__ = ["SHARED_S", "WorkerState", "serves"]

SHARED_S = 0.15
"""Most time that a batch which joins the end of another one takes with it."""


def serves(request: Request, fingerprint: str, tokenizer: str, has_grammars: bool, adapters: frozenset[str]) -> bool:
    """Whether a worker of that kind (WorkerState.kind) may serve the request at all."""
    if request.fingerprint and request.fingerprint != fingerprint:
        return False
    if request.needs_grammar and not has_grammars:
        return False
    if request.adapter and request.adapter not in adapters:
        return False
    return not (request.tokenizer and tokenizer and request.tokenizer != tokenizer)


@dataclass(slots=True)
class _Unaccounted:
    """A batch that the worker's report does not contain yet."""

    batch_id: BatchId
    assignment: int
    kv_tokens: int
    prefill_tokens: int
    num_requests: int


@dataclass(slots=True, eq=False)
class WorkerState:
    """One worker. Mutated only by SchedulerCore and its parts."""

    worker_id: WorkerId
    role: WorkerRole
    headroom: Headroom
    context_tokens: int
    outputs: OutputBook
    """Of the model; shared by its workers."""
    kv: KvBook
    """What its sequences are likely to need."""
    fingerprint: str = ""
    tokenizer: str = ""
    step_tokens: int = 0
    """Prompt tokens of its steps at most; 0: it did not say."""
    has_grammars: bool = False
    adapters: frozenset[str] = frozenset()
    """Fingerprints of those that it has."""
    decodable_adapters: frozenset[str] = frozenset()
    """Those of workers of its fingerprint that decode what others prefilled (core/fleet.py)."""
    has_decodable_grammars: bool = False
    """Whether one of those has grammars."""
    generation: int = 0
    """Counts up with each fingerprint that is new to the fleet: new requests prefer the newest."""
    times: StepTimes = field(default_factory=StepTimes)
    num_assigned: int = 0
    """Number of the last order given to it (Batch.assignment)."""
    unaccounted: deque[_Unaccounted] = field(default_factory=deque)
    incoming: dict[RequestId, int] = field(default_factory=dict)
    """Requests whose KV is on its way here: tokens to hold, counted here and at the source until it has arrived."""
    outstanding: dict[BatchId, set[RequestId]] = field(default_factory=dict)
    """Batches whose prompts aren't all computed: the requests still to come."""
    batch_of: dict[RequestId, BatchId] = field(default_factory=dict)
    """The outstanding batch of each such request."""
    requests: set[RequestId] = field(default_factory=set)
    promised: dict[RequestId, float] = field(default_factory=dict)
    """TPOT targets of those of them that have one, in seconds."""
    batch_class: set[RequestId] = field(default_factory=set)
    """Those of them that are of batch class: they may be let go for others (core/reclaim.py)."""
    late: dict[RequestId, int] = field(default_factory=dict)
    """KV tokens that interactive ones among them are likely to need that were late when they were sent."""
    released: list[int] = field(default_factory=list)
    """KV tokens of each request that has left since its report, which may not say yet that they are free."""
    is_saved: bool = False
    """Takes nothing now, so that its memory becomes free for a deferred request (core/batching.py)."""
    is_away: bool = False
    """Its stream broke, and it may come back."""
    is_draining: bool = False
    """It wants to leave, and takes nothing new."""
    is_last: bool = False
    """It is draining, and nobody of its fingerprint stays who could do what it does (core/fleet.py)."""
    is_released: bool = False
    """It was told that nothing more comes."""
    is_delivering: bool = False
    """It has output, or may have, that no gateway has acknowledged."""
    version: int = 0
    """Counts changes that matter to placement; load and room are as of the last one (core/fleet.py keeps them)."""
    load: float = 0.0
    """Score of its load (core/placement.py): the greater, the less it has to do."""
    room: int = 0
    """KV tokens that a single request may take."""
    decodable_tokens: int = 0
    """Most tokens that a worker of its fingerprint could hold that decodes what others prefilled (core/fleet.py)."""
    bound_tokens: int = 0
    """The same, with those that take only what is bound to that fingerprint."""

    @classmethod
    def joined(cls, event: WorkerJoined, outputs: OutputBook) -> WorkerState:
        """Returns the state of a worker that has just connected."""
        state = cls(
            worker_id=event.worker_id,
            role=event.role,
            headroom=event.headroom,
            context_tokens=event.context_tokens,
            fingerprint=event.fingerprint,
            tokenizer=event.tokenizer,
            is_delivering=event.is_delivering,
            step_tokens=event.step_tokens,
            has_grammars=event.has_grammars,
            adapters=event.adapters,
            num_assigned=event.headroom.last_assignment,
            outputs=outputs,
            kv=KvBook(outputs),
        )
        state.kv.at_step(event.headroom.num_decode_steps)
        return state

    @property
    def kind(self) -> tuple[str, str, bool, frozenset[str]]:
        """Fingerprint, tokenizer, whether there are grammars, and adapters: what decides whom it may serve."""
        has_grammars, adapters = self.has_grammars, self.adapters
        if self.role is WorkerRole.PREFILL:
            # Somebody has to go on with what it computes.
            has_grammars, adapters = has_grammars and self.has_decodable_grammars, adapters & self.decodable_adapters
        return self.fingerprint, self.tokenizer, has_grammars, adapters

    @property
    def stays(self) -> bool:
        """Whether it takes whatever it may serve."""
        return not (self.is_away or self.is_draining)

    @property
    def goes_on(self) -> bool:
        """Whether it takes at least what is bound to its fingerprint: nobody else could go on with that."""
        return self.stays or (self.is_last and not self.is_away and not self.is_released)

    @property
    def takes_new(self) -> bool:
        """Whether it computes prompts that are bound to no fingerprint."""
        is_decoded = self.role is WorkerRole.BOTH or (self.role is WorkerRole.PREFILL and self.decodable_tokens > 0)
        return self.stays and is_decoded

    def next_assignment(self) -> int:
        """Returns the number of a further order to it."""
        self.num_assigned += 1
        return self.num_assigned

    def report(self, headroom: Headroom) -> None:
        """Takes a report; batches that it accounts for are no longer subtracted from it."""
        self.headroom = headroom
        self.released.clear()
        self.kv.at_step(headroom.num_decode_steps)
        while self.unaccounted and self.unaccounted[0].assignment <= headroom.last_assignment:
            self.unaccounted.popleft()

    def assign(self, batch: Batch, requests: Sequence[Request]) -> None:
        """Notes a batch given to it."""
        kv_tokens = sum(self._kv_tokens_at_first(request) for request in requests)
        self.unaccounted.append(
            _Unaccounted(batch.batch_id, batch.assignment, kv_tokens, batch.prefill_tokens, len(requests))
        )
        self.outstanding[batch.batch_id] = set(batch.request_ids)
        for request in requests:
            self.batch_of[request.request_id] = batch.batch_id
            self.take(request)

    def take(self, request: Request, *, is_held: bool = False) -> None:
        """Notes a request that is there or about to be; is_held: its prompt's KV waits there, and nothing more."""
        self.requests.add(request.request_id)
        if request.tpot_slo_s is not None:
            self.promised[request.request_id] = request.tpot_slo_s
        if request.request_class is RequestClass.BATCH:
            self.batch_class.add(request.request_id)
        if self.role is WorkerRole.PREFILL or is_held:
            self.kv.hold(request, request.prompt_tokens)
        else:
            self.kv.add(request)

    def take_back(self, request: Request) -> None:
        """Undoes the assignment of one request of a batch: it was not sent."""
        batch_id = self.batch_of.get(request.request_id)
        for batch in self.unaccounted:
            if batch.batch_id == batch_id:
                batch.kv_tokens -= self._kv_tokens_at_first(request)
                batch.prefill_tokens -= request.prefill_tokens
                batch.num_requests -= 1
        # A batch of which nothing was sent is in no report.
        self.unaccounted = deque(batch for batch in self.unaccounted if batch.num_requests)
        # Nothing of it was here.
        self.requests.discard(request.request_id)
        self.release(request)

    def expect(self, request: Request, kv_tokens: int) -> None:
        """Notes a request whose KV it is to pull, which takes that many tokens from the start."""
        self.incoming[request.request_id] = kv_tokens
        self.take(request)

    def arrived(self, request_id: RequestId) -> None:
        """Notes that the KV of a request has come."""
        self.incoming.pop(request_id, None)
        self.kv.begins(request_id)

    def prefilled(self, request_id: RequestId) -> None:
        """Notes that a request's prompt is computed."""
        self.kv.begins(request_id)
        batch_id = self.batch_of.pop(request_id, None)
        if batch_id is not None:
            left = self.outstanding[batch_id]
            left.discard(request_id)
            if not left:
                del self.outstanding[batch_id]

    def release(self, request: Request) -> None:
        """Forgets a request that has left."""
        request_id = request.request_id
        if request_id in self.requests:
            self.released.append(self.tokens_held(request))
        self.requests.discard(request_id)
        self.batch_class.discard(request_id)
        self.promised.pop(request_id, None)
        self.late.pop(request_id, None)
        self.incoming.pop(request_id, None)
        self.kv.remove(request_id)
        self.prefilled(request_id)

    def suits(self, request: Request) -> bool:
        """Whether it may be given the request, others having the choice."""
        return self.worker_id not in request.avoid and self.could_serve(request)

    # --- memory -------------------------------------------------------------------------------------------------

    def kv_tokens(self, request: Request) -> int:
        """Returns the KV tokens that a request is likely to need here in all: a prefill worker holds prompts only."""
        if self.role is WorkerRole.PREFILL:
            return request.prompt_tokens
        if request.may_be_preempted:
            return request.prompt_tokens + self.outputs.expected(request)
        return request.reserved_tokens

    def _kv_tokens_at_first(self, request: Request) -> int:
        """Returns the KV tokens that a request takes when its prompt begins."""
        return request.prompt_tokens if request.may_be_preempted else self.kv_tokens(request)

    def tokens_held(self, request: Request) -> int:
        """Returns the KV tokens that become free when a request leaves."""
        return self.kv.tokens(request.request_id)

    def free_tokens(self, without: Mapping[RequestId, Request] | None = None) -> int:
        """KV tokens free by its report, less what was assigned since and what is on its way.

        No more than what the peak of its sequences leaves.

        Args:
            without: if given, requests here that are taken to have left, as have those that did since its report.
        """
        free = self.headroom.kv_free_tokens
        if without is not None:
            free += sum(self.released) + sum(self.tokens_held(request) for request in without.values())
        for batch in self.unaccounted:
            free -= batch.kv_tokens
        if self.incoming:
            free -= sum(self.incoming.values())
        return min(free, self.headroom.kv_total_tokens - self.kv.peak(without or ()))

    def safe_tokens(self, reserve: float) -> int:
        """M_safe in tokens (paper, formula 5): the reserve is for surprises."""
        return int(self.free_tokens() * (1 - reserve))

    def room_for_one(self, reserve: float) -> int:
        """KV tokens that a single request may take: all of an empty worker's, since nothing there can surprise it."""
        free = self.free_tokens()
        return free if self._is_empty(free) else int(free * (1 - reserve))

    def could_serve(self, request: Request) -> bool:
        """Whether it could be given the request if it were empty.

        To one that only prefills it is of use only if another of its weights could go on with it. One that leaves takes
        only what nobody who stays could go on with.
        """
        is_bound = bool(request.fingerprint)
        if not (self.goes_on if is_bound else self.stays):
            return False
        decodable_tokens = self.bound_tokens if is_bound else self.decodable_tokens
        if self.role is WorkerRole.PREFILL and request.reserved_tokens > decodable_tokens:
            return False
        return serves(request, *self.kind) and self.could_hold(request)

    def could_hold(self, request: Request) -> bool:
        """Whether it could hold the request with all that it may generate, if it were empty."""
        most = request.prompt_tokens if self.role is WorkerRole.PREFILL else request.reserved_tokens
        return most <= min(self.headroom.kv_total_tokens, self.context_tokens)

    def _is_empty(self, free: int) -> bool:
        return not self.requests and free >= self.headroom.kv_total_tokens

    def may_take_late(self, request: Request, share: float) -> bool:
        """Whether what late requests need here stays within a share of its KV with one more; one alone always may."""
        tokens = sum(self.late.values()) + self.kv_tokens(request)
        return not self.late or tokens <= share * self.headroom.kv_total_tokens

    # --- load ---------------------------------------------------------------------------------------------------

    def share_tokens(self, requests: Sequence[Request]) -> int:
        """Returns what a batch takes of it, in tokens; a request takes at least what belongs to its slot.

        Where slots are scarcer than memory, a flood of tiny requests would otherwise pay back nothing for all it takes.
        """
        slot = self.headroom.kv_total_tokens // max(self.headroom.max_sequences, 1)
        return sum(max(self.kv_tokens(request), slot) for request in requests)

    def has_place(self, settings: CoreSettings, *, small: bool) -> bool:
        """Whether it may be given another batch, a small one or one of any size."""
        if small:
            is_long = self.backlog_tokens() > self.most_batch_tokens(settings)
            return is_long and bool(settings.small_batch_tokens) and len(self.outstanding) < 2
        left = self.left_tokens()
        if left and settings.is_time_aware and left * self.times.prefill_token_s() > SHARED_S:
            return False
        return left < min(settings.fill_tokens, self.most_batch_tokens(settings))

    def most_batch_tokens(self, settings: CoreSettings) -> int:
        """Returns the prompt tokens of a batch at most: no more than a step, or others would wait for the rest."""
        return min(settings.max_batch_tokens, self.step_tokens or settings.max_batch_tokens)

    def most_small_tokens(self, settings: CoreSettings) -> int:
        """Returns the same of a batch beside a long prompt."""
        return min(settings.small_batch_tokens, self.most_batch_tokens(settings))

    def num_sequences(self) -> int:
        """Sequences there or on their way."""
        number = self.headroom.num_running + self.headroom.num_waiting + len(self.incoming)
        for batch in self.unaccounted:
            number += batch.num_requests
        return number

    def free_sequences(self) -> int:
        """Sequences that it may still take."""
        return self.headroom.max_sequences - self.num_sequences()

    def backlog_tokens(self) -> int:
        """Prompt tokens given to it and not computed yet."""
        if not self.outstanding:
            # Its last report may be older than the news of that.
            return 0
        backlog = self.headroom.waiting_prefill_tokens
        for batch in self.unaccounted:
            backlog += batch.prefill_tokens
        return backlog

    def context_tokens_held(self) -> int:
        """KV tokens in use or reserved, by its report."""
        return self.headroom.kv_total_tokens - self.headroom.kv_free_tokens

    def left_tokens(self) -> int:
        """Those of its backlog that are left when a batch that is sent now can begin: after the step under way."""
        if not self.outstanding:
            return 0
        return max(self.backlog_tokens() - self.headroom.computing_prefill_tokens, 0)

    def prefill_in_s(
        self, num_tokens: int, attention: int, max_chunk_tokens: int, *, shares_steps: bool = False
    ) -> float:
        """Returns when that many further prompt tokens are computed, in seconds from now.

        They come after its backlog, or share steps with it by halves, and in chunks while it has decodes running.
        """
        backlog = self.backlog_tokens()
        tokens = num_tokens + (min(backlog, num_tokens) if shares_steps else backlog)
        running = self.headroom.num_running
        if not running:
            return self.times.step_s(tokens, attention, 0, 0)
        chunk = max_chunk_tokens or tokens
        num_steps = -(-tokens // max(chunk, 1))
        step_s = self.times.decode_s(running, self.context_tokens_held())
        return num_steps * step_s + tokens * self.times.prefill_token_s()
