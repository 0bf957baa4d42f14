"""What goes wrong while a step is computed: the others' tokens stay what they are, and the engine lives."""

from __future__ import annotations

import gc
import itertools
import math
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from bucketserve.core.types import RequestId
from bucketserve.engine import pressure, step_runner
from bucketserve.engine.packed import PackedEngine
from bucketserve.ports import Sampling, SequenceFailure
from tests.integration.engine.models import VOCAB, engine, generate
from tests.integration.engine.test_equality import drain, one_thread, prompt, spec  # noqa: F401

pytestmark = pytest.mark.engine
LENGTHS = (5, 60, 120, 9)
OUT_OF_MEMORY = {
    "cuda": lambda: torch.OutOfMemoryError("injected"),
    "cpu": lambda: torch.zeros(1 << 55),
    "python": lambda: bytearray(1 << 60),
}


def run_out(kind: str) -> None:
    """Raises what each allocator does."""
    found = OUT_OF_MEMORY[kind]()
    if isinstance(found, Exception):
        raise found


def wanted() -> dict[str, list[int]]:
    return {f"r{n}": generate("llama", prompt(n), 8) for n in LENGTHS}


def add_all(under_test: PackedEngine) -> None:
    under_test.add([spec(f"r{n}", prompt(n), 8) for n in LENGTHS])


def failures_of(history: list) -> list[SequenceFailure]:
    return [failure for output in history for failure in output.failures]


def check_free(under_test: PackedEngine) -> None:
    under_test.check_integrity()
    headroom = under_test.headroom()
    assert headroom.kv_free_tokens == headroom.kv_total_tokens


@pytest.mark.parametrize("where", ["model", "sample", "token_logprobs"])
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_splits_the_step_loses_nothing_and_is_got_over(
    monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    under_test = engine("llama", prefix_cache=False)
    before = under_test.headroom()
    if where == "model":
        run = under_test._runner._run_model

        def limited(entries):
            # As a device would that has room for the activations of 50 tokens.
            if sum(entry.num_tokens for entry in entries) > 50:
                run_out(kind)
            return run(entries)

        monkeypatch.setattr(under_test._runner, "_run_model", limited)
    else:
        plain = getattr(step_runner, where)

        def few_rows(logits, *more):
            if len(logits) > 2:
                run_out(kind)
            return plain(logits, *more)

        monkeypatch.setattr(step_runner, where, few_rows)
    add_all(under_test)
    outputs: dict[str, list[int]] = {}
    assert failures_of(drain(under_test, outputs)) == []
    assert outputs == wanted()
    after = under_test.headroom()
    assert after.num_out_of_memory > 0
    assert after.kv_total_tokens < before.kv_total_tokens
    monkeypatch.undo()
    monkeypatch.setattr(pressure, "CALM_STEPS", 2)
    under_test.add([spec("calm", prompt(9), 150)])
    drain(under_test, {})
    assert under_test.headroom().kv_total_tokens == before.kv_total_tokens
    assert under_test._pressure.max_step_tokens == 512
    check_free(under_test)


def test_an_engine_that_is_idle_after_a_shortage_gets_its_budget_back(monkeypatch: pytest.MonkeyPatch) -> None:
    under_test = engine("llama", prefix_cache=False)
    before = under_test.headroom().kv_total_tokens
    run, tries = under_test._runner._run_model, itertools.count()

    def short_at_first(entries):
        if next(tries) < 2:
            run_out("python")
        return run(entries)

    monkeypatch.setattr(under_test._runner, "_run_model", short_at_first)
    add_all(under_test)
    drain(under_test, {})
    assert not under_test.has_work()
    now_s = [time.monotonic()]
    monkeypatch.setattr(pressure, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    under_test.step()
    lowered = under_test.headroom().kv_total_tokens
    assert lowered < before
    now_s[0] += pressure.CALM_S
    under_test.step()
    assert under_test.headroom().kv_total_tokens > lowered
    for _ in range(5):
        now_s[0] += pressure.CALM_S
        under_test.step()
    assert under_test.headroom().kv_total_tokens == before
    assert under_test._pressure.max_step_tokens == 512


def test_the_failed_try_s_tensors_are_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    under_test = engine("llama")
    run = under_test._runner._run_model
    alive: list[weakref.ref] = []

    def limited(entries):
        activations = torch.zeros(1000)
        assert not any(ref() is not None for ref in alive)
        alive.append(weakref.ref(activations))
        if len(entries) > 1:
            raise torch.OutOfMemoryError("injected")
        return run(entries)

    monkeypatch.setattr(under_test._runner, "_run_model", limited)
    gc.disable()
    try:
        add_all(under_test)
        outputs: dict[str, list[int]] = {}
        drain(under_test, outputs)
    finally:
        gc.enable()
    assert outputs == wanted()


def test_one_that_never_fits_is_given_up_to_be_tried_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    under_test = engine("llama")
    run = under_test._runner._run_model

    def limited(entries):
        if any(entry.sequence.spec.request_id == "r60" for entry in entries):
            raise torch.OutOfMemoryError("injected")
        return run(entries)

    monkeypatch.setattr(under_test._runner, "_run_model", limited)
    add_all(under_test)
    outputs: dict[str, list[int]] = {}
    failures = failures_of(drain(under_test, outputs))
    assert [(failure.request_id, failure.is_retryable) for failure in failures] == [("r60", True)]
    assert outputs == {name: tokens for name, tokens in wanted().items() if name != "r60"}
    check_free(under_test)


@pytest.mark.parametrize("at_step", [0, 3])
@pytest.mark.parametrize("where", ["model", "sampling"])
def test_an_exception_fails_the_sequence_that_causes_it_and_no_other(
    monkeypatch: pytest.MonkeyPatch, where: str, at_step: int
) -> None:
    under_test = engine("llama")
    if where == "model":
        run = under_test._runner._run_model

        def broken(entries):
            if any(e.sequence.spec.request_id == "r60" and e.sequence.num_generated >= at_step for e in entries):
                raise IndexError("injected")
            return run(entries)

        monkeypatch.setattr(under_test._runner, "_run_model", broken)
    else:
        plain = step_runner._sample_row

        def broken_row(sequence, logits):
            if sequence.spec.request_id == "r60" and sequence.num_generated >= at_step:
                raise IndexError("injected")
            return plain(sequence, logits)

        monkeypatch.setattr(step_runner, "_sample_row", broken_row)
    add_all(under_test)
    outputs: dict[str, list[int]] = {}
    (failure,) = failures_of(drain(under_test, outputs))
    assert (failure.request_id, failure.is_retryable) == ("r60", False)
    assert "IndexError while computing: injected" in failure.message
    expected = wanted()
    expected["r60"] = expected["r60"][:at_step]
    assert outputs == {name: tokens for name, tokens in expected.items() if tokens}
    assert under_test.headroom().num_out_of_memory == 0
    check_free(under_test)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9, seed=1)])
def test_a_sequence_whose_logits_are_not_finite_fails_alone_and_leaves_no_kv(
    monkeypatch: pytest.MonkeyPatch, value: float, sampling: Sampling
) -> None:
    under_test = engine("llama")
    run = under_test._runner._run_model

    def poisoned(entries):
        logits = run(entries)
        if logits is not None:
            rows = [entry.sequence for entry in entries if entry.completes]
            for row, sequence in enumerate(rows):
                if sequence.spec.request_id == "r60" and sequence.num_generated == 2:
                    logits[row, VOCAB // 2] = value
        return logits

    monkeypatch.setattr(under_test._runner, "_run_model", poisoned)
    under_test.add([spec(f"r{n}", prompt(n), 8, sampling=sampling, num_logprobs=1) for n in LENGTHS])
    outputs: dict[str, list[int]] = {}
    (failure,) = failures_of(drain(under_test, outputs))
    assert (failure.request_id, failure.is_retryable) == ("r60", False)
    assert "not finite" in failure.message
    assert {name: len(tokens) for name, tokens in outputs.items()} == {"r5": 8, "r60": 2, "r120": 8, "r9": 8}
    check_free(under_test)
    monkeypatch.undo()
    reused = under_test.headroom().num_prefix_reused_tokens
    under_test.add([spec("again", prompt(60), 8)])
    drain(under_test, outputs)
    assert under_test.headroom().num_prefix_reused_tokens == reused
    assert outputs["again"] == generate("llama", prompt(60), 8)


def test_kv_that_can_not_be_copied_in_is_refused_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from bucketserve.core.errors import EngineError

    under_test = engine("llama")
    monkeypatch.setattr(under_test._table.space.memory, "copy_in", lambda *arguments: run_out("cuda"))
    kv = memoryview(bytearray(10 * under_test.info.kv_bytes_per_token))
    with pytest.raises(EngineError, match="can't be copied"):
        under_test.import_kv(spec(RequestId("x"), prompt(10), 5), [3], kv)
    check_free(under_test)


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_kv_that_can_not_be_copied_out_stays_where_it_is(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from bucketserve.core.errors import EngineError

    under_test = engine("llama")
    under_test.add([spec("x", prompt(40), 5, hands_over=True), spec("other", prompt(60), 8)])
    outputs: dict[str, list[int]] = {}
    drain(under_test, outputs, steps=1)
    into = memoryview(bytearray(40 * under_test.info.kv_bytes_per_token))
    monkeypatch.setattr(under_test._table.space.memory, "copy_out", lambda *arguments: run_out(kind))
    with pytest.raises(EngineError, match="can't be copied"):
        under_test.export_kv(RequestId("x"), into)
    monkeypatch.undo()
    under_test.check_integrity()
    under_test.export_kv(RequestId("x"), into)
    drain(under_test, outputs)
    assert outputs["other"] == generate("llama", prompt(60), 8)
    check_free(under_test)


def test_a_broken_device_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    under_test = engine("llama")

    def broken(entries):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(under_test._runner, "_run_model", broken)
    add_all(under_test)
    with pytest.raises(torch.AcceleratorError):
        under_test.step()
