"""Greedy tokens are those of model.generate under every combination of what may happen to a request."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from _pytest.mark import ParameterSet

from bucketserve.core.types import RequestId
from bucketserve.engine.kv_memory import PAGE_TOKENS
from bucketserve.engine.native.instruction_sets import supported
from bucketserve.engine.packed import PackedEngine
from bucketserve.ports import Sampling, SequenceSpec
from tests.integration.engine.models import engine, generate
from tests.integration.engine.test_equality import one_thread, prompt, spec  # noqa: F401
from tests.kernel_paths import PATHS

pytestmark = pytest.mark.engine

SHARED = prompt(3 * PAGE_TOKENS + 5, seed=9)
"""Begins several of the prompts: longer than three blocks, not a whole number of them."""
PROMPTS = [
    prompt(1),
    prompt(45),
    [*SHARED, *prompt(20, 1)],
    [*SHARED, *prompt(133, 2)],
    SHARED,
    SHARED[: 2 * PAGE_TOKENS],
    prompt(200),
]
COMBINATIONS = list(itertools.product([False, True], repeat=5))
NAMES = ("apart", "chunked", "preempted", "warm", "reversed")


def cases() -> list[ParameterSet]:
    """Every combination of llama with the best kernels and with none; an eighth of them for everything else."""
    rng = random.Random(4)
    chosen = []
    for name in ("llama", "llama-80", "llama-20", "qwen3", "gemma2"):
        for path in PATHS:
            is_whole = name == "llama" and path.values[0] in (supported()[0], "torch")
            for flags in COMBINATIONS if is_whole else rng.sample(COMBINATIONS, len(COMBINATIONS) // 8):
                words = [word for word, is_set in zip(NAMES, flags, strict=True) if is_set]
                label = "-".join((name, str(path.values[0]), *words))
                chosen.append(pytest.param(name, (path.values[0], *flags), id=label, marks=path.marks))
    return chosen


class Run:
    """Requests through one engine or two, with what is to happen to them."""

    def __init__(self, name: str, kernels: str, is_apart: bool) -> None:
        settings = {"kernels": kernels, "kv_budget_tokens": 1408}
        self.prefill = engine(name, **settings)
        self.decode = engine(name, **settings) if is_apart else self.prefill
        self.is_apart = is_apart
        self.specs: dict[RequestId, SequenceSpec] = {}
        self.outputs: dict[RequestId, list[int]] = {}
        self.num_reused = 0

    def add(self, wanted: SequenceSpec, chunk: int) -> None:
        self.specs[wanted.request_id] = wanted
        self.outputs.setdefault(wanted.request_id, [])
        given = SequenceSpec(
            request_id=wanted.request_id,
            token_ids=wanted.token_ids,
            max_new_tokens=wanted.max_new_tokens,
            sampling=wanted.sampling,
            num_resumed_tokens=wanted.num_resumed_tokens,
            hands_over=self.is_apart,
        )
        self.prefill.add([given], chunk)

    def step(self, under_test: PackedEngine) -> None:
        output = under_test.step()
        under_test.check_integrity()
        ended = set()
        for token in output.tokens:
            self.outputs[token.request_id].append(token.token_id)
            if token.finish_reason is not None:
                ended.add(token.request_id)
                self.num_reused += token.cached_prompt_tokens
        if self.is_apart and under_test is self.prefill:
            for request_id in set(output.prefilled) - ended:
                moved = self.specs[request_id]
                kv = memoryview(bytearray(len(moved.token_ids) * under_test.info.kv_bytes_per_token))
                under_test.export_kv(request_id, kv)
                number = self.decode.known_pages(moved.token_ids, moved.prefix_salt)
                missing = kv[number * under_test.info.kv_page_bytes :]
                self.decode.import_kv(moved, self.outputs[request_id][-1:], missing)

    def drain(self, most: int = 10_000) -> None:
        for _ in range(most):
            if not (self.prefill.has_work() or self.decode.has_work()):
                return
            self.step(self.prefill)
            if self.is_apart:
                self.step(self.decode)

    def preempt(self, request_id: RequestId, chunk: int) -> None:
        """Its worker is lost: prompt and what was generated so far come again, as after a crash."""
        old, done = self.specs[request_id], self.outputs[request_id]
        self.prefill.cancel([request_id])
        self.decode.cancel([request_id])
        if len(done) < old.max_new_tokens:
            resumed = [*old.token_ids, *done]
            rest = old.max_new_tokens - len(done)
            again = spec(request_id, resumed, rest, sampling=old.sampling, num_resumed_tokens=len(done))
            self.add(again, chunk)


def play(name: str, combination: tuple[object, ...], sampling: Sampling) -> tuple[dict[RequestId, list[int]], int]:
    kernels, is_apart, is_chunked, is_preempted, is_warm, is_reversed = combination
    run = Run(name, str(kernels), bool(is_apart))
    chunk = 40 if is_chunked else 0
    if is_warm:
        # Others with the same beginnings were here before, and some of their KV has been given up since.
        run.add(spec("before", [*SHARED, *prompt(9, 7)], 3), chunk)
        run.drain()
        run.add(spec("large", prompt(900, 8), 2), chunk)
        run.drain()
        run.add(spec("again", [*SHARED, *prompt(40, 6)], 40), chunk)
        run.drain(3)
    numbered = list(enumerate(PROMPTS))
    for i, token_ids in reversed(numbered) if is_reversed else numbered:
        run.add(spec(f"r{i}", token_ids, 5 + i, sampling=sampling), chunk)
        run.drain(i % 3)
    if is_preempted:
        for i in (2, 6, 0):
            run.preempt(RequestId(f"r{i}"), chunk)
    run.drain()
    for under_test in (run.prefill, run.decode):
        headroom = under_test.headroom()
        assert headroom.kv_free_tokens == headroom.kv_total_tokens
    return {RequestId(f"r{i}"): run.outputs[RequestId(f"r{i}")] for i, _ in numbered}, run.num_reused


@pytest.mark.parametrize(("name", "combination"), cases())
def test_greedy_tokens_are_those_of_generate(name: str, combination: tuple[object, ...]) -> None:
    outputs, num_reused = play(name, combination, Sampling())
    wanted = {RequestId(f"r{i}"): generate(name, token_ids, 5 + i) for i, token_ids in enumerate(PROMPTS)}
    assert outputs == wanted
    _, is_apart, _, _, is_warm, _ = combination
    if is_warm and not is_apart:
        assert num_reused > 0


@pytest.mark.parametrize("kernels", PATHS)
def test_sampled_tokens_are_the_same_wherever_they_are_computed(kernels: str) -> None:
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=5)
    alone, _ = play("llama", ("torch", False, False, False, False, False), sampling)
    for combination in random.Random(1).sample(COMBINATIONS, 4):
        outputs, _ = play("llama", (kernels, *combination), sampling)
        assert outputs == alone, combination


@torch.inference_mode()
def test_kept_prefixes_cost_nobody_memory() -> None:
    under_test = engine("llama", kv_budget_tokens=608)
    for i in range(20):
        under_test.add([spec(f"r{i}", prompt(300, i), 20)])
        while under_test.has_work():
            under_test.step()
            under_test.check_integrity()
        # What is kept counts as free, since it is given up when wanted.
        assert under_test.headroom().kv_free_tokens == 608
    again = prompt(300, 19)
    before = under_test.headroom().num_prefix_reused_tokens
    under_test.add([spec("again", again, 4)])
    while under_test.has_work():
        under_test.step()
    # The last token is computed whatever is known.
    assert under_test.headroom().num_prefix_reused_tokens - before == 299 // PAGE_TOKENS * PAGE_TOKENS


def test_without_prefix_cache_nothing_is_kept() -> None:
    under_test = engine("llama", prefix_cache=False)
    for name in ("a", "b"):
        under_test.add([spec(name, SHARED, 4)])
        while under_test.has_work():
            under_test.step()
        headroom = under_test.headroom()
        assert (headroom.num_prefix_reused_tokens, headroom.kv_kept_tokens) == (0, 0)
