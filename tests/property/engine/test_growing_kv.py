"""Whatever comes and goes, a growing engine holds no more KV than it has, and loses nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from bucketserve.core.types import MAX_PREEMPTIONS, RequestId
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import Sampling, SequenceSpec
from tests.chaos.oracle import expected_tokens

MOST_TOKENS = 40
MAX_STEPS = 20_000


@dataclass(frozen=True)
class Arrival:
    """A sequence that comes before a step, and is cancelled before a later one, if ever."""

    at_step: int
    spec: SequenceSpec
    cancelled_at: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    numbers = st.integers(1, MOST_TOKENS)
    made = []
    for index in range(draw(st.integers(1, 12))):
        at_step, seed = draw(st.integers(0, 30)), draw(st.integers(0, 3))
        spec = SequenceSpec(
            request_id=RequestId(f"{index}.0"),
            token_ids=tuple(range(2, 2 + draw(numbers))),
            max_new_tokens=draw(numbers),
            sampling=Sampling(temperature=bool(seed), seed=seed),
            is_batch=draw(st.booleans()),
            num_preemptions=draw(st.sampled_from([0, 0, 1, MAX_PREEMPTIONS])),
        )
        cancelled_at = draw(st.none() | st.integers(at_step + 1, at_step + 60))
        made.append(Arrival(at_step, spec, cancelled_at))
    return made


class Books:
    """What a test knows of an engine from what it says."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.whole: dict[str, SequenceSpec] = {}
        """By the first part of its name: as it came first."""
        self.attempt: dict[str, SequenceSpec] = {}
        self.tokens: dict[str, list[int]] = {}
        self.decoding: dict[str, int] = {}
        """Tokens of this attempt, of those whose prompt is computed."""
        self.over: set[str] = set()

    def add(self, spec: SequenceSpec) -> None:
        name = spec.request_id.partition(".")[0]
        self.whole[name] = self.attempt[name] = spec
        self.tokens[name] = []
        self.engine.add([spec])

    def cancel(self, name: str) -> None:
        if name not in self.over:
            self.engine.cancel([self.attempt[name].request_id])
            self.over.add(name)
            self.decoding.pop(name, None)

    def step(self) -> None:
        output = self.engine.step()
        for request_id in output.preempted:
            self._again(request_id)
        for request_id in output.prefilled:
            self.decoding[request_id.partition(".")[0]] = 0
        for token in output.tokens:
            name = token.request_id.partition(".")[0]
            assert token.request_id == self.attempt[name].request_id
            assert token.token_id is not None
            self.tokens[name].append(token.token_id)
            self.decoding[name] += 1
            if token.finish_reason is not None:
                self.over.add(name)
                del self.decoding[name]
        # Every sequence that decodes has the KV of all its tokens but the last.
        used = sum(len(self.attempt[name].token_ids) + number - 1 for name, number in self.decoding.items())
        assert used <= self.engine.settings.kv_total_tokens
        assert self.engine._free() >= 0

    def _again(self, request_id: RequestId) -> None:
        """Goes on with one that was let go, as its gateway does."""
        name = request_id.partition(".")[0]
        former, whole, done = self.attempt[name], self.whole[name], self.tokens[name]
        assert former.request_id == request_id
        assert former.num_preemptions < MAX_PREEMPTIONS
        number = former.num_preemptions + 1
        self.decoding.pop(name, None)
        self.attempt[name] = replace(
            whole,
            request_id=RequestId(f"{name}.{number}"),
            token_ids=(*whole.token_ids, *done),
            max_new_tokens=whole.max_new_tokens - len(done),
            num_resumed_tokens=len(done),
            num_preemptions=number,
        )
        self.engine.add([self.attempt[name]])


@given(
    arrivals=arrivals(),
    spare_tokens=st.integers(0, 120),
    max_step_tokens=st.integers(1, 64),
    max_sequences=st.integers(1, 12),
)
def test_all_that_come_end_with_their_tokens_and_kv_suffices(
    arrivals: list[Arrival], spare_tokens: int, max_step_tokens: int, max_sequences: int
) -> None:
    largest = max(arrival.spec.reserved_tokens for arrival in arrivals)
    engine = FakeEngine(
        FakeSettings(
            kv_total_tokens=largest + spare_tokens, max_step_tokens=max_step_tokens, max_sequences=max_sequences
        )
    )
    books = Books(engine)
    last = max(arrival.at_step for arrival in arrivals)
    for step in range(MAX_STEPS):
        for arrival in arrivals:
            name = arrival.spec.request_id.partition(".")[0]
            if arrival.at_step == step:
                books.add(arrival.spec)
            if arrival.cancelled_at == step:
                books.cancel(name)
        if step >= last and not engine.has_work():
            break
        books.step()
    assert not engine.has_work()
    assert books.over == set(books.whole)
    assert engine.headroom().kv_free_tokens == engine.settings.kv_total_tokens
    for arrival in arrivals:
        name, spec = arrival.spec.request_id.partition(".")[0], arrival.spec
        wanted = expected_tokens(spec.token_ids, spec.max_new_tokens, spec.sampling.temperature, spec.sampling.seed)
        is_whole = len(books.tokens[name]) == spec.max_new_tokens
        assert books.tokens[name] == wanted[: len(books.tokens[name])]
        assert is_whole or arrival.cancelled_at is not None
