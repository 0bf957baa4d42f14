"""An engine without a model: deterministic tokens, a latency model, the same KV accounting as a real one.

For tests of the serving path and for scale runs. The next token depends on all tokens before it, so that a request
resumed elsewhere goes on as if nothing had happened, and a mix-up of sequences shows. Of the sampling parameters it
knows the temperature, as zero or not, and the seed; the others change nothing. It has no grammars. Of an adapter it
knows the fingerprint, on which its tokens depend.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bucketserve.core.errors import EngineError, KvGoneError, NoAdapterError
from bucketserve.core.pace import StepPace
from bucketserve.core.preemption import SPARE_SHARE, loss
from bucketserve.core.stepping import MAX_SEQUENCES, STEP_TOKENS, plan_prefill
from bucketserve.core.types import MAX_PREEMPTIONS, FinishReason, Headroom, RequestId, StepSample
from bucketserve.engine.fingerprint import HAND_OVER, settings_fingerprint
from bucketserve.ports import (
    UNKNOWN_TOKEN,
    Adapter,
    EngineInfo,
    Logprob,
    SequenceFailure,
    SequenceSpec,
    StepOutput,
    TokenLogprobs,
    TokenOutput,
)

__all__ = ["FakeEngine", "FakeSettings", "next_token"]

MASK = (1 << 64) - 1
KV_BYTES = 8
"""A token's KV is the hash of all tokens up to the last one that has any."""
PAGE_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeSettings:
    """Size and speed. A step takes step_s + prefill_s_per_token x prompt tokens + decode_s_per_sequence x decodes."""

    kv_total_tokens: int = 100_000
    context_tokens: int = 8_192
    max_sequences: int = MAX_SEQUENCES
    max_step_tokens: int = STEP_TOKENS
    vocab_size: int = 256
    max_adapters: int = 0
    has_handles: bool = False
    """KV is handed over by handles, as engines do that fetch it from each other, not as bytes."""
    tokens_per_step: int = 1
    """How many tokens a step brings each sequence, as speculative decoding does."""
    step_s: float = 0.0
    prefill_s_per_token: float = 0.0
    decode_s_per_sequence: float = 0.0


@dataclass(slots=True)
class _Sequence:
    spec: SequenceSpec
    state: int
    """Running hash of all tokens so far."""
    num_prefilled: int = 0
    num_generated: int = 0
    max_chunk_tokens: int = 0
    first_token_s: float = 0.0

    @property
    def pace(self) -> tuple[float, float, int] | None:
        tpot_s = self.spec.tpot_slo_s
        return None if tpot_s is None else (tpot_s, self.first_token_s, self.num_generated)

    @property
    def remaining(self) -> int:
        return len(self.spec.token_ids) - self.num_prefilled

    @property
    def is_reserved(self) -> bool:
        """Whether it has all the KV that it may use from its beginning."""
        return self.spec.hands_over or self.spec.num_preemptions >= MAX_PREEMPTIONS

    @property
    def kv_tokens(self) -> int:
        """KV tokens that it has once it has begun: of its last token there is none yet."""
        if self.is_reserved:
            return self.spec.reserved_tokens
        return len(self.spec.token_ids) + max(self.num_generated - 1, 0)

    @property
    def loss(self) -> tuple[bool, int, int] | None:
        return loss(
            is_batch=self.spec.is_batch,
            num_preemptions=self.spec.num_preemptions,
            num_tokens=self.num_prefilled + self.num_generated,
        )


def next_token(state: int, vocab_size: int, seed: int) -> int:
    """Returns the token after a sequence whose hash is `state`."""
    return _mix(state ^ seed) % vocab_size


@dataclass(slots=True)
class FakeEngine:
    """See ports.Engine."""

    settings: FakeSettings = field(default_factory=FakeSettings)
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.perf_counter
    _pace: StepPace = field(default_factory=StepPace)
    _waiting: dict[RequestId, _Sequence] = field(default_factory=dict)
    _running: dict[RequestId, _Sequence] = field(default_factory=dict)
    _preempted: list[RequestId] = field(default_factory=list)
    """Let go since the last step."""
    _num_decode_steps: int = 0
    _adapters: set[str] = field(default_factory=set)

    @property
    def info(self) -> EngineInfo:
        """See ports.Engine."""
        return EngineInfo(
            name="fake",
            device="none",
            dtype="none",
            context_tokens=self.settings.context_tokens,
            kv_bytes_per_token=KV_BYTES,
            kv_layout="fake by handle" if self.settings.has_handles else f"fake by {PAGE_TOKENS}",
            kv_page_tokens=PAGE_TOKENS,
            fingerprint=settings_fingerprint(
                {"engine": "fake", "vocab_size": self.settings.vocab_size, "hand_over": HAND_OVER}
            ),
            step_tokens=self.settings.max_step_tokens,
            max_adapters=self.settings.max_adapters,
        )

    def headroom(self) -> Headroom:
        """See ports.Engine."""
        to_come = sum(s.kv_tokens for s in self._waiting.values() if not s.num_prefilled)
        return Headroom(
            kv_total_tokens=self.settings.kv_total_tokens,
            kv_free_tokens=max(self._free() - to_come, 0),
            max_sequences=self.settings.max_sequences,
            num_decode_steps=self._num_decode_steps,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            waiting_prefill_tokens=sum(s.remaining for s in self._waiting.values()),
            kv_bytes_per_token=KV_BYTES,
        )

    def add(self, sequences: Sequence[SequenceSpec], max_chunk_tokens: int = 0) -> None:
        """See ports.Engine."""
        for spec in sequences:
            spec.check(self._most_tokens)
            self._check_means(spec)
        self._check_new([spec.request_id for spec in sequences])
        for spec in sequences:
            state = _hash(spec)
            self._waiting[spec.request_id] = _Sequence(spec, state, max_chunk_tokens=max_chunk_tokens)

    def hand_over(self, request_id: RequestId) -> bytes | None:
        """See ports.Engine. Its state is all that there is of it: nothing stays here."""
        if not self.settings.has_handles:
            return None
        sequence = self._to_hand_over(request_id)
        del self._running[request_id]
        return _hash(sequence.spec).to_bytes(KV_BYTES, "big")

    def take_over(self, spec: SequenceSpec, generated: Sequence[int], handle: bytes) -> None:
        """See ports.Engine."""
        if not self.settings.has_handles:
            raise EngineError("this engine takes KV as bytes, not by a handle")
        if handle != _hash(spec).to_bytes(KV_BYTES, "big"):
            raise EngineError("the handle is not of this prompt's KV")
        self._go_on(spec, generated, _hash(spec))

    def export_kv(self, request_id: RequestId, into: memoryview) -> None:
        """See ports.Engine."""
        sequence = self._to_hand_over(request_id)
        num_tokens = len(sequence.spec.token_ids)
        if len(into) != num_tokens * KV_BYTES:
            raise EngineError(f"{len(into)} bytes are not the KV of {num_tokens} tokens")
        # Its state knows the tokens generated as well: their KV is not there yet.
        into[:] = _hash(sequence.spec).to_bytes(KV_BYTES, "big") * num_tokens
        del self._running[request_id]

    def known_pages(self, token_ids: Sequence[int], salt: bytes) -> int:
        """See ports.Engine: those of sequences that decode here. Memory is counted as if each had its own."""
        # A copy, since another thread than the owner's may ask.
        running = (s.spec for s in self._running.copy().values() if s.spec.prefix_salt == salt)
        return max((_num_shared_pages(token_ids, spec.token_ids) for spec in running), default=0)

    def import_kv(self, spec: SequenceSpec, generated: Sequence[int], kv: memoryview) -> None:
        """See ports.Engine."""
        num_tokens = len(spec.token_ids) + len(generated) - 1
        num_left_out, rest = divmod(num_tokens - len(kv) // KV_BYTES, PAGE_TOKENS)
        state = bytes(kv[:KV_BYTES]) or _hash(spec).to_bytes(KV_BYTES, "big")
        if rest or num_left_out < 0 or bytes(kv) != state * (num_tokens - num_left_out * PAGE_TOKENS):
            raise EngineError(f"{len(kv)} bytes are not the KV of {num_tokens} tokens")
        if num_left_out > (num_known := self.known_pages(spec.token_ids, spec.prefix_salt)):
            raise KvGoneError(f"{num_left_out} pages of KV were here, now {num_known}")
        self._go_on(spec, generated, int.from_bytes(state, "big"))

    def _to_hand_over(self, request_id: RequestId) -> _Sequence:
        sequence = self._running.get(request_id)
        if sequence is None or not sequence.spec.hands_over:
            raise EngineError(f"sequence {request_id} is not here to be handed over")
        return sequence

    def _go_on(self, spec: SequenceSpec, generated: Sequence[int], state: int) -> None:
        """Adds a sequence whose KV has come."""
        self._check_new([spec.request_id])
        self._check_means(spec)
        sequence = _Sequence(
            spec,
            state,
            num_prefilled=len(spec.token_ids),
            num_generated=len(generated),
            first_token_s=self.clock(),
        )
        may_go = [s for s in self._begun() if s.loss is not None]
        free_at_most = self._free() + sum(s.kv_tokens for s in may_go)
        if spec.reserved_tokens > self._most_tokens or sequence.kv_tokens > free_at_most:
            raise EngineError(f"no room for {spec.reserved_tokens} tokens whose KV has come")
        for token_id in generated:
            sequence.state = _mix(sequence.state ^ token_id)
        # Those that run may have grown since it was sent for.
        self._make_room(lambda: sequence.kv_tokens <= self._free())
        self._running[spec.request_id] = sequence

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """See ports.Engine."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)
            self._running.pop(request_id, None)

    def has_work(self) -> bool:
        """See ports.Engine."""
        return bool(self._waiting or self._running or self._preempted)

    def step(self) -> StepOutput:
        """See ports.Engine."""
        start_s = self.clock()
        # Those that may not be let go have all they may use, and together they fit: what lacks is lacking to others.
        self._make_room(lambda: self._growth() <= self._free())
        preempted, self._preempted = tuple(self._preempted), []
        if not self.has_work():
            return StepOutput(preempted=preempted)
        decoding = list(self._running.values())
        context = sum(len(s.spec.token_ids) + s.num_generated for s in decoding)
        prefill_tokens, attention, prefilled, failed = self._prefill(decoding, context)
        settings = self.settings
        busy_s = (
            settings.step_s
            + settings.prefill_s_per_token * prefill_tokens
            + settings.decode_s_per_sequence * len(decoding)
        )
        if busy_s > 0:
            self.sleep(busy_s)
        tokens = [output for s in (*decoding, *prefilled) for output in self._generate_some(s)]
        sample = StepSample(
            prefill_tokens=prefill_tokens,
            prefill_attention=attention,
            decode_sequences=len(decoding),
            decode_context_tokens=context,
            duration_s=self.clock() - start_s,
        )
        self._pace.learn(sample)
        self._num_decode_steps += bool(decoding)
        return StepOutput(
            tokens=tuple(tokens),
            prefilled=tuple(s.spec.request_id for s in prefilled),
            failures=tuple(failed),
            preempted=preempted,
            sample=sample,
        )

    def load_adapter(self, adapter: Adapter) -> None:
        """See ports.Engine."""
        if adapter.fingerprint not in self._adapters and len(self._adapters) >= self.settings.max_adapters:
            raise EngineError(f"there are {len(self._adapters)} adapters here, and max_adapters is no more")
        self._adapters.add(adapter.fingerprint)

    def unload_adapter(self, fingerprint: str) -> bool:
        """See ports.Engine."""
        if any(s.spec.adapter == fingerprint for s in (*self._waiting.values(), *self._running.values())):
            return False
        self._adapters.discard(fingerprint)
        return True

    def close(self) -> None:
        """See ports.Engine."""
        self._waiting.clear()
        self._running.clear()

    def _check_new(self, request_ids: Sequence[RequestId]) -> None:
        seen = {*self._waiting, *self._running}
        for request_id in request_ids:
            if request_id in seen:
                raise EngineError(f"sequence {request_id} is already here")
            seen.add(request_id)

    def _check_means(self, spec: SequenceSpec) -> None:
        """Raises EngineError: it asks for what is not here."""
        if spec.structured_output is not None:
            raise EngineError("the fake engine has no grammars")
        if spec.adapter and spec.adapter not in self._adapters:
            raise NoAdapterError("the adapter is not here any more")

    def _begun(self) -> list[_Sequence]:
        """Returns the sequences that have KV: those that wait have none before their first piece."""
        return [*self._running.values(), *(s for s in self._waiting.values() if s.num_prefilled)]

    @property
    def _most_tokens(self) -> int:
        """Tokens that a sequence may have, generated ones included."""
        return min(self.settings.context_tokens, self.settings.kv_total_tokens)

    def _free(self) -> int:
        """Returns the KV tokens that no sequence has."""
        return self.settings.kv_total_tokens - sum(s.kv_tokens for s in self._begun())

    def _growth(self) -> int:
        """Returns the KV tokens that decodes take in the next step: one for each token of those whose KV grows."""
        most = self.settings.tokens_per_step
        growing = (s for s in self._running.values() if not s.is_reserved)
        return sum(min(most, s.spec.max_new_tokens - s.num_generated) for s in growing)

    def _make_room(self, has_room: Callable[[], bool]) -> None:
        """Lets sequences go until there is room; their names are in the next step's output."""
        while not has_room():
            # Of equals the last to begin goes.
            losses = {s.spec.request_id: cost for s in reversed(self._begun()) if (cost := s.loss) is not None}
            request_id = min(losses, key=losses.__getitem__)
            self.cancel([request_id])
            self._preempted.append(request_id)

    def _ready(self) -> list[_Sequence]:
        """Returns the waiting sequences for which there are slots and memory, in order."""
        if not self._waiting:
            return []
        slots, free = self.settings.max_sequences - len(self._running), self._free() - self._growth()
        spare = math.ceil(self.settings.kv_total_tokens * SPARE_SHARE)
        is_empty, may_begin = not self._begun(), True
        ready: list[_Sequence] = []
        for sequence in self._waiting.values():
            if len(ready) >= slots:
                break
            if not sequence.num_prefilled:
                free -= sequence.kv_tokens
                may_begin = may_begin and free >= (0 if is_empty and not ready else spare)
            if sequence.num_prefilled or may_begin:
                ready.append(sequence)
        return ready

    def _prefill(
        self, decoding: Sequence[_Sequence], context_tokens: int
    ) -> tuple[int, int, list[_Sequence], list[SequenceFailure]]:
        """Computes prompt pieces; returns tokens, attention, and the sequences that are complete or have failed."""
        waiting = self._ready()
        paced = self._pace.prompt_tokens(
            (pace for s in decoding if (pace := s.pace)),
            num_decoding=len(decoding),
            context_tokens=context_tokens,
            prompt_end=max((len(s.spec.token_ids) for s in waiting), default=0),
            now_s=self.clock(),
        )
        limits = [limit for limit in (*(s.max_chunk_tokens for s in waiting), paced) if limit]
        pieces = plan_prefill(
            ((s.spec.request_id, s.remaining) for s in waiting),
            num_decoding=len(decoding),
            max_step_tokens=self.settings.max_step_tokens,
            max_chunk_tokens=min(limits, default=0),
        )
        attention = 0
        done: list[_Sequence] = []
        failed: list[SequenceFailure] = []
        for piece in pieces:
            sequence = self._waiting[piece.request_id]
            sequence.num_prefilled += piece.num_tokens
            attention += piece.num_tokens * sequence.num_prefilled
            if sequence.remaining == 0:
                del self._waiting[piece.request_id]
                if min(sequence.spec.token_ids) < 0:
                    # As in a model, which has no such row in its embedding.
                    failed.append(SequenceFailure(request_id=piece.request_id, message=UNKNOWN_TOKEN))
                    continue
                self._running[piece.request_id] = sequence
                done.append(sequence)
        return sum(piece.num_tokens for piece in pieces), attention, done, failed

    def _generate_some(self, sequence: _Sequence) -> Iterator[TokenOutput]:
        for _ in range(1 if sequence.spec.hands_over else self.settings.tokens_per_step):
            output = self._generate(sequence)
            yield output
            if output.finish_reason is not None:
                return

    def _generate(self, sequence: _Sequence) -> TokenOutput:
        spec = sequence.spec
        seed = spec.sampling.seed if spec.sampling.temperature > 0 else 0
        token_id = next_token(sequence.state, self.settings.vocab_size, seed)
        if token_id in spec.stop_token_ids:
            del self._running[spec.request_id]
            return TokenOutput(
                request_id=spec.request_id,
                token_id=None,
                finish_reason=FinishReason.STOP,
                matched_stop_token_id=token_id,
            )
        sequence.state = _mix(sequence.state ^ token_id)
        sequence.num_generated += 1
        if sequence.num_generated == 1:
            sequence.first_token_s = self.clock()
        is_last = sequence.num_generated == spec.max_new_tokens
        if is_last:
            del self._running[spec.request_id]
        return TokenOutput(
            request_id=spec.request_id,
            token_id=token_id,
            logprobs=_logprobs(token_id, spec.num_logprobs, self.settings.vocab_size),
            finish_reason=FinishReason.LENGTH if is_last else None,
        )


def _hash(spec: SequenceSpec) -> int:
    state = 0
    for token_id in (*spec.adapter.encode(), *spec.token_ids):
        state = _mix(state ^ token_id)
    return state


def _num_shared_pages(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many whole pages two sequences begin with alike."""
    number, end = 0, PAGE_TOKENS
    while end <= min(len(one), len(other)) and tuple(one[end - PAGE_TOKENS : end]) == other[end - PAGE_TOKENS : end]:
        number, end = number + 1, end + PAGE_TOKENS
    return number


def _logprobs(token_id: int, number: int | None, vocab_size: int) -> TokenLogprobs | None:
    """The chosen token is certain; alternatives follow it in the vocabulary."""
    if number is None:
        return None
    top = [Logprob((token_id + i) % vocab_size, 0.0 if i == 0 else -100.0) for i in range(number)]
    return TokenLogprobs(Logprob(token_id, 0.0), tuple(top))


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every bit of the input reaches every bit of the output."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
