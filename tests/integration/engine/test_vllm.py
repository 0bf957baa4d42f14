"""vLLM behind our port: what the contract (tests/contract/engine) does not ask of every engine."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bucketserve.core import stepping
from bucketserve.core.errors import EngineError, ModelLoadError
from bucketserve.core.types import RequestId
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import Engine, Sampling, SequenceSpec, StepOutput
from tests.integration.engine import models

pytestmark = pytest.mark.vllm

DEMO = str(Path(__file__).resolve().parents[3] / "models" / "demo" / "model")
STEP_TOKENS, BLOCK = 64, 32
RANDOM = Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=11)
SAMPLINGS = {
    "greedy": Sampling(),
    "seeded": RANDOM,
    "penalised": Sampling(repetition_penalty=1.3),
    "penalised and seeded": replace(RANDOM, repetition_penalty=1.2, seed=2**64 - 1),
}


LOADED: list[Engine] = []
"""Closed together: what ends vLLM's process groups ends those of all its engines in a process."""


def load(model: str = DEMO, engine_args: dict[str, str] | None = None, **settings) -> Engine:
    from bucketserve.engine.vllm_loader import VllmSettings, load_vllm

    known = {"context_tokens": 512, "kv_budget_tokens": 4096, "max_step_tokens": STEP_TOKENS, "max_sequences": 16}
    arguments = {"block_size": str(BLOCK), "enforce_eager": "true"} | (engine_args or {})
    LOADED.append(load_vllm(VllmSettings(model=model, dtype="float32", engine_args=arguments, **(known | settings))))
    return LOADED[-1]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One for all tests of this file that leave nothing behind in it."""
    yield load()
    while LOADED:
        LOADED.pop().close()


def spec(name: str, num_tokens: int = 20, max_new_tokens: int = 8, **more) -> SequenceSpec:
    rng = random.Random(f"{name}{num_tokens}")
    token_ids = more.pop("token_ids", tuple(rng.randrange(8, 380) for _ in range(num_tokens)))
    return SequenceSpec(request_id=RequestId(name), token_ids=token_ids, max_new_tokens=max_new_tokens, **more)


def run(engine: Engine, *specs: SequenceSpec, chunk: int = 0) -> list[StepOutput]:
    engine.add(specs, chunk)
    history = []
    while engine.has_work():
        history.append(engine.step())
        assert len(history) < 1000
    return history


def tokens(history: list[StepOutput], name: str) -> list[int | None]:
    return [token.token_id for output in history for token in output.tokens if token.request_id == name]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_a_resumed_sequence_goes_on_as_if_nothing_had_happened(engine: Engine, sampling: Sampling) -> None:
    whole = spec("whole", 100, 24, sampling=sampling)
    alone = tokens(run(engine, whole), "whole")
    assert len(alone) == 24
    others = [spec(f"other {i}", 30 + i, 30, sampling=replace(RANDOM, seed=i)) for i in range(5)]
    resumed = [
        replace(
            whole,
            request_id=RequestId(f"from {done}"),
            token_ids=(*whole.token_ids, *alone[:done]),
            max_new_tokens=24 - done,
            num_resumed_tokens=done,
        )
        for done in (1, 5, 12, 23)
    ]
    history = run(engine, *others, *resumed, chunk=16)
    assert {one.request_id: tokens(history, one.request_id) for one in resumed} == {
        f"from {done}": alone[done:] for done in (1, 5, 12, 23)
    }


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_tokens_and_log_probabilities_are_those_of_our_own_engine(engine: Engine, sampling: Sampling) -> None:
    from bucketserve.engine.loader import LoadSettings, load_engine

    ours = load_engine(LoadSettings(model=DEMO, dtype="float32", kernels="torch", kv_budget_tokens=4096))
    specs = [spec(f"{i}", 10 + 30 * i, 12, sampling=sampling, num_logprobs=i) for i in range(4)]
    found, wanted = run(engine, *specs), run(ours, *specs)
    for one in specs:
        name, number = one.request_id, one.num_logprobs
        assert tokens(found, name) == tokens(wanted, name)
        of_one = (
            [t.logprobs for o in history for t in o.tokens if t.request_id == name] for history in (found, wanted)
        )
        for here, there in zip(*of_one, strict=True):
            assert here is not None and there is not None
            assert here.chosen.token_id == there.chosen.token_id
            assert here.chosen.logprob == pytest.approx(there.chosen.logprob, abs=1e-3)
            assert len(here.top) == len(there.top) == number
            assert [each.logprob for each in here.top] == pytest.approx([each.logprob for each in there.top], abs=1e-3)
            assert [each.logprob for each in here.top] == sorted((each.logprob for each in here.top), reverse=True)


def test_steps_hold_what_they_hold_in_any_worker() -> None:
    engine = load(prefix_cache=False)
    fake = FakeEngine(FakeSettings(kv_total_tokens=4096, context_tokens=512, max_step_tokens=STEP_TOKENS))
    waves = [
        ([spec("long", 300, 6)], 0),
        ([spec("short", 9, 20), spec("shorter", 5, 20), spec("longer", 310, 4)], 0),
        ([spec("chunked", 150, 5), spec("middle", 40, 3)], 16),
    ]
    composed: list[list[tuple[int, int, int, int]]] = [[], []]
    for of_one, history in zip((engine, fake), composed, strict=True):
        coming = list(waves)
        while coming or of_one.has_work():
            if coming and len(history) % 3 == 0:
                of_one.add(*coming.pop(0))
            sample = of_one.step().sample
            assert sample is not None
            history.append(
                (sample.prefill_tokens, sample.prefill_attention, sample.decode_sequences, sample.decode_context_tokens)
            )
            assert sample.prefill_tokens + sample.decode_sequences <= STEP_TOKENS
    assert composed[0] == composed[1]


def test_steps_beside_a_promised_tpot_are_bounded(engine: Engine) -> None:
    # Nothing is as fast as that once a step has been measured: prompts get on by the least there is.
    engine.add([spec("promised", 10, 40, tpot_slo_s=1e-9), spec("paced", 10, 40, tpot_slo_s=1e9)])
    while len(engine.step().prefilled) != 2:
        pass
    engine.add([spec("prompt", 200, 2)])
    samples = [output.sample for output in run(engine)]
    assert max(sample.prefill_tokens for sample in samples if sample is not None) <= STEP_TOKENS - 2


def test_a_step_is_as_large_as_this_cpu_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for step_s, most in ((0.0, 256), (3600.0, 2048)):
        monkeypatch.setattr(stepping, "CPU_STEP_S", step_s)
        measured = load(max_step_tokens=0)
        samples = [output.sample for output in run(measured, spec("long", 400, 2))]
        assert max(sample.prefill_tokens for sample in samples if sample is not None) == min(most, 400)


def test_only_those_of_one_salt_use_each_other_s_kv(engine: Engine) -> None:
    prompt = tuple(range(10, 10 + 3 * BLOCK + 1))
    reused = {}
    for name, salt in (("first", b"a"), ("again", b"a"), ("stranger", b"\x00\xff"), ("nobody", b"")):
        history = run(engine, spec(name, token_ids=prompt, prefix_salt=salt))
        reused[name] = {token.cached_prompt_tokens for output in history for token in output.tokens}
    assert reused == {"first": {0}, "again": {3 * BLOCK}, "stranger": {0}, "nobody": {0}}


def test_batch_class_goes_first_and_who_was_let_go_often_enough_stays() -> None:
    engine = load(kv_budget_tokens=6 * BLOCK, context_tokens=4 * BLOCK)
    specs = [spec("batch", 40, 80, is_batch=True), spec("now", 20, 80), spec("stays", 20, 80, num_preemptions=2)]
    history = run(engine, *specs)
    gone = [name for output in history for name in output.preempted]
    assert gone == ["batch"]
    assert [len(tokens(history, name)) for name in ("now", "stays")] == [80, 80]
    headroom = engine.headroom()
    assert (headroom.kv_free_tokens, headroom.kv_total_tokens) == (6 * BLOCK, 6 * BLOCK)


def test_one_whose_logits_are_not_finite_fails_alone(tmp_path: Path) -> None:
    model = models.reference("llama-32")
    broken = type(model)(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = float("nan")
    broken.save_pretrained(tmp_path)
    engine = load(str(tmp_path), context_tokens=256)
    good = [spec("greedy", 20), spec("random", 30, sampling=RANDOM)]
    bad = [spec("bad", token_ids=(5, 7, 9)), spec("worse", token_ids=(7, 8, 9), sampling=RANDOM)]
    history = run(engine, good[0], *bad, good[1])
    failures = [failure for output in history for failure in output.failures]
    assert sorted(failure.request_id for failure in failures) == ["bad", "worse"]
    assert all("not finite" in failure.message and not failure.is_retryable for failure in failures)
    assert [len(tokens(history, one.request_id)) for one in good] == [8, 8]
    # Nor does anybody suffer who has their blocks next, however long their prompts were.
    long = spec("long", token_ids=(7, *range(8, 8 + 3 * STEP_TOKENS)))
    history += run(engine, long, replace(good[1], request_id=RequestId("next"), max_new_tokens=100))
    assert [failure.request_id for output in history for failure in output.failures][2:] == ["long"]
    assert len(tokens(history, "next")) == 100
    assert not any(tokens(history, one.request_id) for one in (*bad, long))
    assert engine.headroom().num_running == engine.headroom().num_waiting == 0


def test_what_vllm_refuses_of_a_request_fails_alone(engine: Engine) -> None:
    beyond = spec("beyond", token_ids=(5, 10**9))
    # More than its limit.
    greedy = spec("curious", num_logprobs=10_000)
    history = run(engine, beyond, spec("fine"), greedy)
    failures = {failure.request_id: failure for output in history for failure in output.failures}
    assert failures.keys() == {"beyond", "curious"}
    assert not any(failure.is_retryable for failure in failures.values())
    assert len(tokens(history, "fine")) == 8


def test_nothing_is_handed_over(engine: Engine) -> None:
    assert engine.info.kv_layout == ""
    with pytest.raises(EngineError, match="role both"):
        engine.add([spec("fine"), spec("prompt", hands_over=True)])
    with pytest.raises(EngineError, match="role both"):
        engine.export_kv(RequestId("prompt"), memoryview(b""))
    assert not engine.has_work()


def test_a_crash_inside_vllm_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load()
    engine.add([spec("a")])
    engine.step()

    def crash(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the device is gone")

    executor = engine._vllm.model_executor  # type: ignore[attr-defined]
    monkeypatch.setattr(executor, "execute_model", crash)
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"no_such": "1"}, "has no engine argument no_such"),
        ({"": "1"}, "has no engine argument"),
        ({"block-size": "many"}, "refuses an engine argument: argument --block-size: "),
        ({"enforce_eager": "maybe"}, "enforce-eager is true or false, not 'maybe'"),
        ({"max_model_len": "100"}, "max_model_len is the worker's setting context_tokens"),
        ({"--max-num-seqs": "3"}, "max_num_seqs is the worker's setting max_sequences"),
        ({"scheduler_cls": "os.system"}, "scheduler_cls is not to be set"),
        ({"speculative_config": "{}"}, "speculative_config is not to be set"),
        ({"hf_overrides": "{"}, "valid dictionary"),
        ({"quantization": "no-such"}, "no-such"),
        ({"load_format": "nowhere"}, "nowhere"),
        ({"block_size": "-5"}, "can't serve model"),
        ({"kv_cache_dtype": "int3"}, "kv-cache-dtype"),
        ({"revision": "main"}, "revision has no effect"),
        ({"trust-remote-code": "true"}, "trust_remote_code has no effect"),
        ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode is not to be set"),
        ({"kv_transfer_config": '{"kv_connector": "NixlConnector"}'}, "kv_role"),
        ({"compilation_config": '{"no_such": 1}'}, "no_such"),
    ],
    ids=str,
)
def test_engine_arguments_that_can_not_be_are_said_in_one_line(arguments: dict[str, str], said: str) -> None:
    with pytest.raises(ModelLoadError) as refused:
        load(engine_args=arguments)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cuda"}, "built for cpu, not for cuda"),
        ({"device": "cuda:1"}, "built for cpu, not for cuda:1"),
        ({"device": "cpu:1"}, "built for cpu, not for cpu:1"),
        ({"context_tokens": 10**6}, "can't serve model"),
        ({"max_step_tokens": 4}, "can't serve model"),
        ({"kv_budget_tokens": BLOCK - 1}, "less than a block"),
        ({"kv_budget_tokens": 0, "kv_budget_bytes": 2**60}, "can't serve model"),
        ({"model": "/nowhere"}, "there is no such directory"),
    ],
    ids=str,
)
def test_settings_that_can_not_be_are_said_in_one_line(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ModelLoadError) as refused:
        load(**settings)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_engines_that_compute_the_same_have_one_fingerprint(engine: Engine) -> None:
    others = [
        load(engine_args={"gpu-memory-utilization": "0.5", "async_scheduling": "true"}),
        load(engine_args={"seed": "3"}),
        load(engine_args={"load_format": "dummy"}),
    ]
    prints = [each.info.fingerprint for each in (engine, *others)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    # Asked for where vLLM has no overlapping steps.
    assert tokens(run(others[0], spec("a", 100)), "a") == tokens(run(engine, spec("a", 100)), "a")


def test_the_api_that_is_used_is_that_of_the_installed_version() -> None:
    from tests.unit.engine.vllm_api import RECORD, api

    assert api() == json.loads(RECORD.read_text())
