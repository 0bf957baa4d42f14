"""An engine without a model: deterministic tokens, a latency model, the same KV accounting as a real one.

For tests of the serving path and for scale runs. The next token depends on all tokens before it, so that a request
resumed elsewhere goes on as if nothing had happened, and a mix-up of sequences shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bucketserve.core.errors import EngineError
from bucketserve.core.pace import StepPace
from bucketserve.core.stepping import MAX_SEQUENCES, STEP_TOKENS, plan_prefill
from bucketserve.core.types import FinishReason, Headroom, RequestId, StepSample
from bucketserve.engine.fingerprint import settings_fingerprint
from bucketserve.ports import (
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
NO_TOKEN = "the prompt has a token that is in no vocabulary"
KV_BYTES = 8
"""A token's KV is the hash of all tokens up to the last one that has any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeSettings:
    """Size and speed. A step takes step_s + prefill_s_per_token x prompt tokens + decode_s_per_sequence x decodes."""

    kv_total_tokens: int = 100_000
    context_tokens: int = 8_192
    max_sequences: int = MAX_SEQUENCES
    max_step_tokens: int = STEP_TOKENS
    vocab_size: int = 256
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

    @property
    def info(self) -> EngineInfo:
        """See ports.Engine."""
        return EngineInfo(
            name="fake",
            device="none",
            dtype="none",
            context_tokens=self.settings.context_tokens,
            kv_bytes_per_token=KV_BYTES,
            pays_padding=False,
            kv_layout="fake",
            fingerprint=settings_fingerprint({"engine": "fake", "vocab_size": self.settings.vocab_size}),
        )

    def headroom(self) -> Headroom:
        """See ports.Engine."""
        reserved = sum(s.spec.reserved_tokens for group in (self._waiting, self._running) for s in group.values())
        return Headroom(
            kv_total_tokens=self.settings.kv_total_tokens,
            kv_free_tokens=max(self.settings.kv_total_tokens - reserved, 0),
            max_sequences=self.settings.max_sequences,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            waiting_prefill_tokens=sum(s.remaining for s in self._waiting.values()),
            kv_bytes_per_token=KV_BYTES,
        )

    def add(self, sequences: Sequence[SequenceSpec], max_chunk_tokens: int = 0) -> None:
        """See ports.Engine."""
        most = min(self.settings.context_tokens, self.settings.kv_total_tokens)
        for spec in sequences:
            if spec.reserved_tokens > most:
                raise EngineError(f"{spec.reserved_tokens} tokens can never fit: the context is {most} tokens here")
        self._check_new([spec.request_id for spec in sequences])
        for spec in sequences:
            state = _hash(spec.token_ids)
            self._waiting[spec.request_id] = _Sequence(spec, state, max_chunk_tokens=max_chunk_tokens)

    def export_kv(self, request_id: RequestId, into: memoryview) -> None:
        """See ports.Engine."""
        sequence = self._running.get(request_id)
        if sequence is None or not sequence.spec.hands_over:
            raise EngineError(f"sequence {request_id} is not here to be handed over")
        num_tokens = len(sequence.spec.token_ids)
        if len(into) != num_tokens * KV_BYTES:
            raise EngineError(f"{len(into)} bytes are not the KV of {num_tokens} tokens")
        # Its state knows the tokens generated as well: their KV is not there yet.
        into[:] = _hash(sequence.spec.token_ids).to_bytes(KV_BYTES, "big") * num_tokens
        del self._running[request_id]

    def import_kv(self, spec: SequenceSpec, generated: Sequence[int], kv: memoryview) -> None:
        """See ports.Engine."""
        self._check_new([spec.request_id])
        num_tokens = len(spec.token_ids) + len(generated) - 1
        state = bytes(kv[:KV_BYTES])
        if len(kv) != num_tokens * KV_BYTES or bytes(kv) != state * num_tokens:
            raise EngineError(f"{len(kv)} bytes are not the KV of {num_tokens} tokens")
        if spec.reserved_tokens > min(self._unreserved(), self.settings.context_tokens):
            raise EngineError(f"no room for {spec.reserved_tokens} tokens whose KV has come")
        sequence = _Sequence(spec, int.from_bytes(state, "big"), num_tokens, len(generated), first_token_s=self.clock())
        for token_id in generated:
            sequence.state = _mix(sequence.state ^ token_id)
        self._running[spec.request_id] = sequence

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """See ports.Engine."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)
            self._running.pop(request_id, None)

    def has_work(self) -> bool:
        """See ports.Engine."""
        return bool(self._waiting or self._running)

    def step(self) -> StepOutput:
        """See ports.Engine."""
        if not self.has_work():
            return StepOutput()
        start_s = self.clock()
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
        tokens = [output for s in (*decoding, *prefilled) for output in [self._generate(s)]]
        sample = StepSample(
            prefill_tokens=prefill_tokens,
            prefill_attention=attention,
            decode_sequences=len(decoding),
            decode_context_tokens=context,
            duration_s=self.clock() - start_s,
        )
        self._pace.learn(sample)
        return StepOutput(
            tokens=tuple(tokens),
            prefilled=tuple(s.spec.request_id for s in prefilled),
            failures=tuple(failed),
            sample=sample,
        )

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

    def _unreserved(self) -> int:
        """Returns the KV tokens that no sequence has: those that wait have none before their first piece."""
        begun = (s for s in self._waiting.values() if s.num_prefilled)
        held = sum(s.spec.reserved_tokens for group in (self._running.values(), begun) for s in group)
        return self.settings.kv_total_tokens - held

    def _ready(self) -> list[_Sequence]:
        """Returns the waiting sequences for which there are slots and memory, in order."""
        slots, free = self.settings.max_sequences - len(self._running), self._unreserved()
        ready: list[_Sequence] = []
        for sequence in self._waiting.values():
            if not sequence.num_prefilled:
                free -= sequence.spec.reserved_tokens
            if len(ready) >= slots or free < 0:
                break
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
                    failed.append(SequenceFailure(request_id=piece.request_id, message=NO_TOKEN, is_retryable=False))
                    continue
                self._running[piece.request_id] = sequence
                done.append(sequence)
        return sum(piece.num_tokens for piece in pieces), attention, done, failed

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


def _hash(token_ids: Sequence[int]) -> int:
    state = 0
    for token_id in token_ids:
        state = _mix(state ^ token_id)
    return state


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
