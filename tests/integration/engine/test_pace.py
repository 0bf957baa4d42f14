"""A long prompt beside a stream that was promised a TPOT: in the engines' own time, counted instead of measured."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from bucketserve.core.types import RequestId
from bucketserve.engine import packed
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import Engine, SequenceSpec, StepOutput
from tests.integration.engine.models import VOCAB, engine

pytestmark = pytest.mark.engine
STEP_S, TOKEN_S, DECODE_S = 0.005, 0.001, 0.005
TPOT_S = 0.050
CHAT, DOCUMENT = RequestId("chat"), RequestId("document")


class Clock:
    """Stands still but for what steps take."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


def fake(clock: Clock, _: pytest.MonkeyPatch) -> Engine:
    settings = FakeSettings(step_s=STEP_S, prefill_s_per_token=TOKEN_S, decode_s_per_sequence=DECODE_S)
    return FakeEngine(settings, sleep=clock.pass_s, clock=clock)


def transformers(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Engine:
    under_test = engine("llama", prefix_cache=False)
    monkeypatch.setattr(packed, "time", SimpleNamespace(perf_counter=clock))
    compute = under_test._runner._run_model

    def timed(entries):
        prefill_tokens = sum(entry.num_tokens for entry in entries if entry.sequence.remaining > 0)
        num_decoding = sum(entry.sequence.remaining <= 0 for entry in entries)
        clock.pass_s(STEP_S + TOKEN_S * prefill_tokens + DECODE_S * num_decoding)
        return compute(entries)

    monkeypatch.setattr(under_test._runner, "_run_model", timed)
    return under_test


def spec(name: RequestId, num_tokens: int, max_new_tokens: int, tpot_s: float | None = None) -> SequenceSpec:
    ids = tuple(2 + i % (VOCAB - 2) for i in range(num_tokens))
    return SequenceSpec(request_id=name, token_ids=ids, max_new_tokens=max_new_tokens, tpot_slo_s=tpot_s)


def times_of_chat(under_test: Engine, clock: Clock, tpot_s: float | None) -> tuple[list[float], list[StepOutput]]:
    """When the chat's tokens come while a document joins after its third; and all outputs until both have ended."""
    under_test.add([spec(CHAT, 8, 100, tpot_s)])
    times: list[float] = []
    outputs: list[StepOutput] = []
    while under_test.has_work():
        outputs.append(under_test.step())
        if any(token.request_id == CHAT for token in outputs[-1].tokens):
            times.append(clock())
        if len(times) == 3:
            under_test.add([spec(DOCUMENT, 400, 1)], 300)
    return times, outputs


@pytest.mark.parametrize("build", [fake, transformers])
def test_a_document_beside_a_chat_with_a_promised_tpot(build, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    times, outputs = times_of_chat(build(clock, monkeypatch), clock, TPOT_S)
    assert len(times) == 100
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert max(gaps) <= 2.2 * TPOT_S
    first_s = times[0]
    for number, at_s in enumerate(times[1:], start=1):
        # Whatever of its lead was lent: no token comes later than promised, but for what was not known at first.
        assert at_s - first_s <= number * TPOT_S * 1.1
    # And the document gets on as fast as that allows: in steps of some 40 tokens, not of the least.
    done = next(i for i, output in enumerate(outputs) if DOCUMENT in output.prefilled)
    assert done < 20


@pytest.mark.parametrize("build", [fake, transformers])
def test_without_a_promise_the_scheduler_s_chunk_is_all_that_counts(build, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    _, outputs = times_of_chat(build(clock, monkeypatch), clock, None)
    assert max(output.sample.prefill_tokens for output in outputs if output.sample) == 300
