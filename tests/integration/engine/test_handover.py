"""KV that moves from one engine to another: the tokens are those of model.generate, whatever happened on the way."""

from __future__ import annotations

import random

import pytest
import torch

from bucketserve.core.errors import EngineError, KvGoneError
from bucketserve.core.types import RequestId
from bucketserve.engine.kv_memory import PAGE_TOKENS, num_pages
from bucketserve.engine.kv_staging import KvStaging
from bucketserve.engine.packed import PackedEngine
from bucketserve.ports import Sampling, SequenceSpec
from tests.integration.engine.models import CONFIGS, engine, generate, reference
from tests.integration.engine.test_equality import drain, one_thread, prompt, spec  # noqa: F401

pytestmark = pytest.mark.engine
LENGTHS = (1, 2, 7, 31, 33, 64, 150, 333)


class Pair:
    """A prefill and a decode engine; KV goes from one to the other through a staging area, as it does in a worker."""

    def __init__(self, name: str, **decode_settings) -> None:
        self.prefill = engine(name)
        self.decode = engine(name, **decode_settings)
        self.staging = KvStaging(1 << 22)
        self.num_moved = 0
        """Pages whose KV went over."""
        self.specs: dict[str, SequenceSpec] = {}
        self.outputs: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[float]] = {}

    def add(self, name: str, token_ids: list[int], num_tokens: int, chunk: int = 0, **more) -> None:
        self.specs[name] = spec(name, token_ids, num_tokens, **more)
        self.prefill.add([spec(name, token_ids, num_tokens, hands_over=True, **more)], chunk)

    def step(self) -> None:
        for under_test in (self.prefill, self.decode):
            output = under_test.step()
            for token in output.tokens:
                self.outputs.setdefault(token.request_id, []).append(token.token_id)
                if token.logprobs is not None:
                    self.logprobs.setdefault(token.request_id, []).append(token.logprobs.chosen.logprob)
            ended = {token.request_id for token in output.tokens if token.finish_reason is not None}
            for request_id in output.prefilled:
                if under_test is self.prefill and request_id not in ended:
                    self.move(request_id)
            under_test.check_integrity()

    def move(self, request_id: RequestId) -> None:
        handed = self.specs[request_id]
        block = self.staging.take(len(handed.token_ids) * self.prefill.info.kv_bytes_per_token)
        self.prefill.export_kv(request_id, block.data)
        number = self.decode.known_pages(handed.token_ids, handed.prefix_salt)
        self.num_moved += num_pages(len(handed.token_ids)) - number
        missing = block.data[number * self.decode.info.kv_page_bytes :]
        self.decode.import_kv(handed, self.outputs[request_id], missing)
        block.release()

    def run(self) -> None:
        while self.prefill.has_work() or self.decode.has_work():
            self.step()


@pytest.mark.parametrize("chunk", [0, 48], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_generate(name: str, chunk: int) -> None:
    pair = Pair(name)
    order = list(LENGTHS)
    random.Random(5).shuffle(order)
    for i, length in enumerate(order):
        pair.add(f"r{length}", prompt(length), 1 + length % 9, chunk)
        for _ in range(i % 3):
            pair.step()
    pair.run()
    assert pair.outputs == {f"r{length}": generate(name, prompt(length), 1 + length % 9) for length in LENGTHS}
    assert pair.staging.num_blocks == 0
    for under_test in (pair.prefill, pair.decode):
        assert under_test.headroom().kv_free_tokens == under_test.headroom().kv_total_tokens


def test_preempted_and_resumed_anywhere_in_any_order() -> None:
    """Each request is stopped once, at a random token, and goes on elsewhere with another neighbour and chunk."""
    rng = random.Random(9)
    penalised = Sampling(temperature=0.8, presence_penalty=0.7, frequency_penalty=1.3, logit_bias=((9, 3.0),), seed=3)
    for sampling in (Sampling(), Sampling(temperature=0.8, top_k=40, repetition_penalty=1.1, seed=77), penalised):
        wanted: dict[str, list[int]] = {}
        whole = engine("qwen3")
        whole.add([spec(f"r{n}", prompt(n), 24, sampling=sampling) for n in LENGTHS])
        drain(whole, wanted)
        first = Pair("qwen3")
        for length in LENGTHS:
            first.add(f"r{length}", prompt(length), 24, rng.choice([0, 16, 48]), sampling=sampling)
        for _ in range(12):
            first.step()
        so_far = {f"r{n}": first.outputs.get(f"r{n}", [])[: rng.randrange(0, 12)] for n in LENGTHS}
        second = Pair("qwen3")
        lengths = list(LENGTHS)
        rng.shuffle(lengths)
        for length in lengths:
            tokens = so_far[f"r{length}"]
            second.add(
                f"r{length}",
                [*prompt(length), *tokens],
                24 - len(tokens),
                rng.choice([0, 16, 48]),
                sampling=sampling,
                num_resumed_tokens=len(tokens),
            )
        second.run()
        assert {name: so_far[name] + tokens for name, tokens in second.outputs.items()} == wanted


def test_log_probabilities_are_the_model_s() -> None:
    pair = Pair("llama")
    for length in (5, 40, 150):
        pair.add(f"r{length}", prompt(length), 12, 32, num_logprobs=1)
    pair.run()
    for length in (5, 40, 150):
        tokens = pair.outputs[f"r{length}"]
        with torch.inference_mode():
            logits = reference("llama")(torch.tensor([[*prompt(length), *tokens]])).logits[0, length - 1 : -1]
        wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(pair.logprobs[f"r{length}"]), wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_after_the_first_only_the_own_pages_of_each_move(name: str) -> None:
    system = prompt(5 * PAGE_TOKENS, seed=3)
    prompts = {f"r{i}": [*system, *prompt(1 + 3 * i, seed=i)] for i in range(32)}
    pair = Pair(name)
    for i, (request_id, token_ids) in enumerate(prompts.items()):
        pair.add(request_id, token_ids, 2 + i % 7, 48 if i % 3 else 0)
        if not i:
            pair.step()
            assert pair.num_moved == num_pages(len(token_ids))
            pair.num_moved = 0
    pair.run()
    assert pair.outputs == {
        request_id: generate(name, token_ids, 2 + i % 7) for i, (request_id, token_ids) in enumerate(prompts.items())
    }
    assert pair.num_moved == sum(num_pages(len(token_ids)) - 5 for token_ids in list(prompts.values())[1:])
    for under_test in (pair.prefill, pair.decode):
        assert under_test.headroom().kv_free_tokens == under_test.headroom().kv_total_tokens


def test_what_is_shared_takes_memory_once_and_no_other_tenant_s_is_used() -> None:
    pair = Pair("llama")
    system = prompt(4 * PAGE_TOKENS, seed=8)
    for i, salt in enumerate((b"a", b"a", b"b", b"")):
        pair.add(f"r{i}", [*system, *prompt(9, seed=i)], 40, prefix_salt=salt)
    while len(pair.outputs) < 4:
        pair.step()
    assert pair.num_moved == 5 + 1 + 5 + 5
    books = pair.decode.headroom()
    assert books.kv_total_tokens - books.kv_free_tokens == (5 + 1 + 5 + 5) * PAGE_TOKENS
    pair.run()
    assert pair.outputs == {f"r{i}": generate("llama", [*system, *prompt(9, seed=i)], 40) for i in range(4)}


def test_pages_are_given_up_and_sequences_let_go_while_others_come() -> None:
    """A decode engine with room for about three, of many that begin alike: what is lost on the way comes again."""
    rng = random.Random(4)
    beginnings = [prompt(3 * PAGE_TOKENS, seed=seed) for seed in range(4)]
    prompts = {f"r{i}": [*beginnings[i % 4], *prompt(rng.randrange(1, 60), seed=i)] for i in range(24)}
    wanted = {request_id: generate("llama", token_ids, 12) for request_id, token_ids in prompts.items()}
    prefill, decode = engine("llama"), engine("llama", kv_budget_tokens=14 * PAGE_TOKENS)
    outputs: dict[str, list[int]] = {}
    coming: list[tuple[SequenceSpec, list[int], bytearray, int]] = []
    num_gone = num_shared = 0
    for request_id, token_ids in prompts.items():
        prefill.add([spec(request_id, token_ids, 12, hands_over=True)])
        tokens = [token.token_id for token in prefill.step().tokens if token.token_id is not None]
        kv = bytearray(len(token_ids) * prefill.info.kv_bytes_per_token)
        prefill.export_kv(RequestId(request_id), memoryview(kv))
        # It is asked now what is there; the KV comes when two others have come.
        coming.append((spec(request_id, token_ids, 12), tokens, kv, decode.known_pages(token_ids, b"")))
        while len(coming) > 2 or (coming and request_id == "r23"):
            handed, first, data, number = coming.pop(0)
            try:
                decode.import_kv(handed, first, memoryview(data)[number * decode.info.kv_page_bytes :])
                num_shared += number
            except KvGoneError:
                num_gone += 1
                decode.import_kv(handed, first, memoryview(data))
            decode.check_integrity()
            outputs[handed.request_id] = first
            for output in drain(decode, outputs, steps=rng.randrange(1, 6)):
                for name in output.preempted:
                    # It would go on elsewhere.
                    assert wanted[name][: len(outputs[name])] == outputs.pop(name)
                    del wanted[name]
    drain(decode, outputs)
    decode.check_integrity()
    assert outputs == wanted
    assert num_gone
    assert num_shared
    assert len(outputs) > 8
    assert decode.headroom().kv_free_tokens == decode.headroom().kv_total_tokens


def test_kv_that_does_not_fit_or_is_not_what_it_says_is_refused() -> None:
    pair = Pair("llama", kv_budget_tokens=96)
    pair.add("long", prompt(90), 20)
    with pytest.raises(EngineError, match="no room"):
        pair.run()
    small: PackedEngine = engine("llama")
    with pytest.raises(EngineError, match="are not the KV"):
        small.import_kv(spec("x", prompt(10), 5), [3], memoryview(bytearray(17)))
    assert not small.has_work()
