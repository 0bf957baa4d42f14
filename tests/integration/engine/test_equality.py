"""Greedy output equals model.generate, token for token, in float32, whatever runs beside it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from bucketserve.core.types import FinishReason, RequestId
from bucketserve.engine.packed import PackedEngine
from bucketserve.ports import Sampling, SequenceSpec, StepOutput
from tests.integration.engine.models import CONFIGS, VOCAB, engine, generate, reference
from tests.kernel_paths import PATHS

pytestmark = pytest.mark.engine
LENGTHS = (1, 2, 7, 31, 32, 33, 64, 150, 333, 700)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(length * 1000 + seed)
    return [rng.randrange(2, VOCAB) for _ in range(length)]


def spec(name: str, token_ids: list[int], num_tokens: int, **more) -> SequenceSpec:
    return SequenceSpec(request_id=RequestId(name), token_ids=tuple(token_ids), max_new_tokens=num_tokens, **more)


def drain(under_test: PackedEngine, outputs: dict[str, list[int]], steps: int = 10_000) -> list[StepOutput]:
    history = []
    while under_test.has_work() and len(history) < steps:
        output = under_test.step()
        history.append(output)
        for token in output.tokens:
            if token.token_id is not None:
                outputs.setdefault(token.request_id, []).append(token.token_id)
    return history


@pytest.mark.parametrize("kernels", PATHS)
@pytest.mark.parametrize("chunk", [0, 48], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_batch_joining_at_different_times(name: str, chunk: int, kernels: str) -> None:
    under_test = engine(name, kernels=kernels)
    wanted = {f"r{length}": generate(name, prompt(length), 6 + length % 9) for length in LENGTHS}
    outputs: dict[str, list[int]] = {}
    order = list(LENGTHS)
    random.Random(3).shuffle(order)
    for i, length in enumerate(order):
        under_test.add([spec(f"r{length}", prompt(length), 6 + length % 9)], chunk)
        if i == 4:
            under_test.add([spec("cancelled", prompt(90, 5), 50)], chunk)
        if i == 7:
            under_test.cancel([RequestId("cancelled")])
        drain(under_test, outputs, steps=i % 3)
        under_test.check_integrity()
    drain(under_test, outputs)
    outputs.pop("cancelled", None)
    assert outputs == wanted
    under_test.check_integrity()
    assert under_test.headroom().kv_free_tokens == under_test.headroom().kv_total_tokens


def test_tight_memory_makes_sequences_wait_but_changes_nothing() -> None:
    lengths = (200, 20, 150, 40, 300, 10, 90)
    wanted = {f"r{n}": generate("llama", prompt(n), 5 + n % 23) for n in lengths}
    # 300 + 6 must fit wherever earlier ones leave room.
    under_test = engine("llama", kv_budget_tokens=416)
    outputs: dict[str, list[int]] = {}
    under_test.add([spec(f"r{n}", prompt(n), 5 + n % 23) for n in lengths])
    while under_test.has_work():
        drain(under_test, outputs, steps=1)
        under_test.check_integrity()
    assert outputs == wanted


PENALISED = Sampling(presence_penalty=1.0, frequency_penalty=0.5, logit_bias=((3, 2.5), (5, -100.0)))
NOT_PENALISED = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": ()}


def test_resumed_sequences_go_on_as_if_nothing_had_happened() -> None:
    for sampling in (Sampling(), Sampling(temperature=0.9, top_p=0.9, seed=11), PENALISED):
        whole: dict[str, list[int]] = {}
        under_test = engine("llama")
        under_test.add([spec("r", prompt(40), 20, sampling=sampling)])
        drain(under_test, whole)
        rest: dict[str, list[int]] = {}
        other = engine("llama")
        other.add([spec("x", prompt(77), 30), spec("y", prompt(3), 30)])
        drain(other, {}, steps=4)
        resumed = spec("r", [*prompt(40), *whole["r"][:8]], 12, sampling=sampling, num_resumed_tokens=8)
        other.add([resumed])
        drain(other, rest)
        assert rest["r"] == whole["r"][8:]
        plain: dict[str, list[int]] = {}
        under_test.add([spec("r", prompt(40), 20, sampling=replace(sampling, **NOT_PENALISED))])
        drain(under_test, plain)
        assert (plain == whole) is (sampling is not PENALISED)


def test_a_seed_decides_whatever_runs_beside_it() -> None:
    sampling = Sampling(temperature=1.0, top_k=50, min_p=0.01, repetition_penalty=1.2, seed=123)
    alone: dict[str, list[int]] = {}
    first = engine("qwen2")
    first.add([spec("r", prompt(25), 25, sampling=sampling)])
    drain(first, alone)
    beside: dict[str, list[int]] = {}
    second = engine("qwen2")
    second.add([spec(f"o{i}", prompt(10 + i), 40, sampling=Sampling(temperature=2.0, seed=i)) for i in range(5)])
    drain(second, {}, steps=3)
    second.add([spec("r", prompt(25), 25, sampling=sampling)], 16)
    drain(second, beside)
    assert beside["r"] == alone["r"]
    other: dict[str, list[int]] = {}
    third = engine("qwen2")
    third.add([spec("r", prompt(25), 25, sampling=Sampling(temperature=1.0, top_k=50, seed=124))])
    drain(third, other)
    assert other["r"] != alone["r"]


def test_logprobs_are_those_of_a_plain_forward() -> None:
    under_test = engine("llama")
    under_test.add([spec("r", prompt(30), 5, num_logprobs=3), spec("other", prompt(200), 5)])
    tokens = [t for output in drain(under_test, {}) for t in output.tokens if t.request_id == "r"]
    ids = prompt(30)
    for token in tokens:
        with torch.inference_mode():
            expected = torch.log_softmax(reference("llama")(torch.tensor([ids])).logits[0, -1].float(), dim=-1)
        assert token.logprobs is not None
        best = torch.topk(expected, 3)
        assert [entry.token_id for entry in token.logprobs.top] == best.indices.tolist()
        assert [entry.logprob for entry in token.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert token.logprobs.chosen.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-4)
        ids.append(token.token_id)


def test_stop_tokens_end_a_sequence_and_are_not_output() -> None:
    wanted = generate("llama", prompt(12), 10)
    stop = wanted[4]
    under_test = engine("llama")
    under_test.add([spec("r", prompt(12), 10, stop_token_ids=frozenset({stop}))])
    outputs: dict[str, list[int]] = {}
    last = drain(under_test, outputs)[-1].tokens[-1]
    assert outputs["r"] == wanted[: wanted.index(stop)]
    assert (last.token_id, last.finish_reason, last.matched_stop_token_id) == (None, FinishReason.STOP, stop)
