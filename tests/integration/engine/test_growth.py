"""KV that grows as it is used: whoever is let go, by the engine or by order, comes again and nothing changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from bucketserve.core.types import MAX_PREEMPTIONS, RequestId
from bucketserve.engine.kv_memory import PAGE_TOKENS, num_pages
from bucketserve.engine.packed import PackedEngine
from bucketserve.ports import Sampling, SequenceSpec, StepOutput
from tests.integration.engine.models import engine, generate
from tests.integration.engine.test_equality import drain, one_thread, prompt, spec  # noqa: F401
from tests.kernel_paths import PATHS

pytestmark = pytest.mark.engine
RANDOM = Sampling(temperature=0.8, top_k=40, repetition_penalty=1.1, seed=77)
SALTS = (b"", b"a", b"b")


class Load:
    """Requests through one engine; what is let go comes again as the next attempt, as its gateway sends it."""

    def __init__(self, under_test: PackedEngine) -> None:
        self.engine = under_test
        self.whole: dict[RequestId, SequenceSpec] = {}
        self.attempt: dict[RequestId, SequenceSpec] = {}
        self.outputs: dict[RequestId, list[int]] = {}
        self.open: set[RequestId] = set()
        self.preempted: list[RequestId] = []

    def add(self, wanted: SequenceSpec, chunk: int = 0) -> None:
        name = wanted.request_id
        self.whole[name] = self.attempt[name] = wanted
        self.outputs[name] = []
        self.open.add(name)
        self.engine.add([wanted], chunk)

    def cancel(self, name: RequestId) -> None:
        self.engine.cancel([name])
        self.open.discard(name)

    def order_to_go(self, names: list[RequestId]) -> None:
        self.engine.cancel(names)
        for name in names:
            self._again(name)

    def step(self) -> StepOutput:
        output = self.engine.step()
        for name in output.preempted:
            if name in self.open:
                self._again(name)
        for token in output.tokens:
            assert token.token_id is not None
            self.outputs[token.request_id].append(token.token_id)
            if token.finish_reason is not None:
                self.open.remove(token.request_id)
        assert not output.failures
        self._check()
        return output

    def run(self) -> None:
        while self.engine.has_work():
            self.step()
        headroom = self.engine.headroom()
        assert not self.open
        assert headroom.kv_free_tokens == headroom.kv_total_tokens

    def _again(self, name: RequestId) -> None:
        former, whole, done = self.attempt[name], self.whole[name], self.outputs[name]
        assert former.num_preemptions < MAX_PREEMPTIONS
        self.preempted.append(name)
        self.attempt[name] = replace(
            whole,
            token_ids=(*whole.token_ids, *done),
            max_new_tokens=whole.max_new_tokens - len(done),
            num_resumed_tokens=len(done),
            num_preemptions=former.num_preemptions + 1,
        )
        self.engine.add([self.attempt[name]])

    def _check(self) -> None:
        """What the engine says of its memory is what its sequences have."""
        self.engine.check_integrity()
        headroom = self.engine.headroom()
        tables = [sequence.kv.pages for sequence in self.engine._table.begun() if sequence.kv is not None]
        used = len({page for pages in tables for page in pages})
        waiting = [sequence for sequence in self.engine._table.waiting.values() if sequence.kv is None]
        to_come = sum(num_pages(sequence.first_tokens) for sequence in waiting)
        free = headroom.kv_total_tokens - (used + to_come) * PAGE_TOKENS
        assert headroom.kv_free_tokens == max(free, 0)
        assert headroom.kv_kept_tokens <= headroom.kv_total_tokens - used * PAGE_TOKENS
        for sequence in self.engine._table.begun():
            # No more than what is there, what the next step needs, and what may not be taken away.
            needed = max(sequence.num_cached + 1, sequence.first_tokens)
            assert sequence.kv is not None
            assert len(sequence.kv.pages) <= num_pages(needed)


def draw(rng: random.Random, number: int, sampling: Sampling) -> list[SequenceSpec]:
    """Returns requests of which some begin alike, of the same tenant or not."""
    shared = prompt(100, seed=3)
    return [
        spec(
            f"r{i}",
            [*shared[: rng.choice((0, 0, 31, 32, 64, 100))], *prompt(rng.choice((1, 3, 20, 45)), rng.randrange(4))],
            rng.choice((3, 30, 60)),
            sampling=sampling,
            is_batch=rng.random() < 0.3,
            prefix_salt=rng.choice(SALTS),
        )
        for i in range(number)
    ]


def play(load: Load, requests: list[SequenceSpec], rng: random.Random) -> None:
    """Lets them come one after another; some are let go by order, some are cancelled."""
    for wanted in requests:
        load.add(wanted, rng.choice((0, 16, 48)))
        if rng.random() < 0.2:
            load.add(spec(f"{wanted.request_id}-gone", [*wanted.token_ids, 5], 40, prefix_salt=wanted.prefix_salt))
        for _ in range(rng.randrange(6)):
            load.step()
        gone = [name for name in load.open if name.endswith("-gone")]
        if gone and rng.random() < 0.5:
            load.cancel(gone[0])
        may_go = sorted(name for name in load.open if load.attempt[name].num_preemptions < MAX_PREEMPTIONS)
        if may_go and rng.random() < 0.3:
            load.order_to_go(rng.sample(may_go, rng.randint(1, min(2, len(may_go)))))
    load.run()


@pytest.mark.parametrize(
    ("name", "kernels", "seed"),
    [
        *(pytest.param("llama", *path.values, seed, marks=path.marks) for path in PATHS for seed in range(3)),
        *((name, "auto", 3) for name in ("gemma2", "qwen3", "llama-20")),
    ],
)
def test_greedy_tokens_are_those_of_generate(name: str, kernels: str, seed: int) -> None:
    rng = random.Random(seed)
    load = Load(engine(name, kernels=kernels, kv_budget_tokens=rng.choice((224, 320, 480))))
    requests = draw(rng, 14, Sampling())
    play(load, requests, rng)
    for wanted in requests:
        tokens = generate(name, list(wanted.token_ids), wanted.max_new_tokens)
        assert load.outputs[wanted.request_id] == tokens, wanted.request_id
    # Some of them had to go, and came back to what was kept of them.
    assert len(load.preempted) > 3
    assert load.engine.headroom().num_prefix_reused_tokens > 0


def test_sampled_tokens_do_not_depend_on_who_was_let_go() -> None:
    requests = draw(random.Random(20), 10, RANDOM)
    calm: dict[str, list[int]] = {}
    large = engine("llama")
    large.add(requests)
    drain(large, calm)
    load = Load(engine("llama", kv_budget_tokens=256))
    play(load, requests, random.Random(21))
    assert load.preempted
    assert {one.request_id: load.outputs[one.request_id] for one in requests} == calm


def test_coming_back_is_cheap_while_there_is_room_for_what_was_kept() -> None:
    load = Load(engine("llama", kv_budget_tokens=960))
    load.add(spec("r", prompt(300), 60))
    while len(load.outputs[RequestId("r")]) < 40:
        load.step()
    load.order_to_go([RequestId("r")])
    (kept,) = {load.engine.headroom().kv_kept_tokens}
    assert kept == (300 + 39) // PAGE_TOKENS * PAGE_TOKENS
    assert load.step().sample.prefill_tokens == 340 - kept
    load.run()
    assert load.outputs[RequestId("r")] == generate("llama", prompt(300), 60)


def test_memory_for_what_prompts_share_is_there_once() -> None:
    shared, number = prompt(10 * PAGE_TOKENS), 8
    load = Load(engine("llama", kv_budget_tokens=(10 + 2 * number) * PAGE_TOKENS))
    load.add(spec("first", [*shared, 5], 40))
    load.step()
    for i in range(number - 1):
        load.add(spec(f"r{i}", [*shared, 6 + i], 40))
    for _ in range(5):
        load.step()
    headroom = load.engine.headroom()
    assert headroom.num_running == number
    assert headroom.kv_free_tokens == number * PAGE_TOKENS
    load.run()
    assert not load.preempted
    for i in range(number - 1):
        assert load.outputs[RequestId(f"r{i}")] == generate("llama", [*shared, 6 + i], 40)


def test_one_tenant_s_kv_is_of_no_use_to_another() -> None:
    under_test = engine("llama")
    found = {}
    for number, salt in enumerate((b"a", b"b", b"", b"a", b"b", b"")):
        under_test.add([spec(f"r{number}", prompt(200), 3, prefix_salt=salt)])
        outputs: dict[str, list[int]] = {}
        (first, *_) = [token for output in drain(under_test, outputs) for token in output.tokens]
        found[number] = first.cached_prompt_tokens
        assert outputs[f"r{number}"] == generate("llama", prompt(200), 3)
    whole = 199 // PAGE_TOKENS * PAGE_TOKENS
    assert list(found.values()) == [0, 0, 0, whole, whole, whole]
