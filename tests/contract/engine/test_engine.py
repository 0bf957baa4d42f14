"""What every engine does (ports.Engine), fake or real: the worker and the scheduler's books rest on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bucketserve.core.errors import EngineError, KvGoneError, NoAdapterError
from bucketserve.core.types import MAX_PREEMPTIONS, FinishReason, RequestId
from bucketserve.ports import Adapter, Engine, Sampling, SequenceSpec, StepOutput, StructuredOutput, StructureKind
from tests.contract.engine.conftest import CONTEXT, STEP_TOKENS
from tests.integration.engine.models import VOCAB

Build = Callable[..., Engine]
RANDOM = Sampling(temperature=0.9, top_k=50, seed=11)
PENALISED = Sampling(presence_penalty=0.5, frequency_penalty=1.5, logit_bias=((7, 2.0), (9, -100.0)))
STRUCTURED = StructuredOutput(StructureKind.REGEX, "[a-z]+")
BOOKS = ("kv_total_tokens", "kv_free_tokens", "num_running", "num_waiting", "waiting_prefill_tokens")


def spec(name: str, num_tokens: int = 10, max_new_tokens: int = 8, **more) -> SequenceSpec:
    rng = random.Random(num_tokens)
    token_ids = more.pop("token_ids", tuple(rng.randrange(2, VOCAB) for _ in range(num_tokens)))
    return SequenceSpec(request_id=RequestId(name), token_ids=token_ids, max_new_tokens=max_new_tokens, **more)


def books(engine: Engine) -> tuple[int, ...]:
    headroom = engine.headroom()
    return tuple(getattr(headroom, name) for name in BOOKS)


def run(engine: Engine, *specs: SequenceSpec, chunk: int = 0) -> dict[str, list[int]]:
    """Adds sequences, and returns the tokens of everything that is in the engine."""
    if specs:
        engine.add(specs, chunk)
    return tokens_of(drain(engine))


def drain(engine: Engine) -> list[StepOutput]:
    history = []
    while engine.has_work():
        history.append(engine.step())
        assert len(history) < 5000
    return history


def tokens_of(history: list[StepOutput]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for output in history:
        for token in output.tokens:
            tokens.setdefault(token.request_id, []).extend([] if token.token_id is None else [token.token_id])
    return tokens


def alone(build: Build, *specs: SequenceSpec) -> dict[str, list[int]]:
    """Returns what each sequence generates by itself."""
    engine = build()
    return {one.request_id: run(engine, one)[one.request_id] for one in specs}


def test_nothing_is_done_while_there_is_nothing(build: Build) -> None:
    engine = build()
    before = books(engine)
    assert not engine.has_work()
    assert engine.step() == StepOutput()
    engine.cancel([RequestId("nobody")])
    assert books(engine) == before
    assert before[0] == before[1]


def test_each_sequence_generates_what_it_does_alone_whatever_runs_beside_it(build: Build) -> None:
    specs = [spec("a", 7), spec("b", 100, 5), spec("c", 33, 20, sampling=RANDOM), spec("d", 64, 1)]
    engine = build()
    before = books(engine)
    engine.add(specs[:1])
    first = engine.step()
    engine.add(specs[1:], 16)
    history = [first, *drain(engine)]
    assert tokens_of(history) == alone(build, *specs)
    assert sorted(name for output in history for name in output.prefilled) == ["a", "b", "c", "d"]
    for output in history:
        # The first token comes with the word that the prompt is computed.
        assert set(output.prefilled) <= {token.request_id for token in output.tokens}
    assert books(engine) == before


def test_ends_say_why_and_free_everything(build: Build) -> None:
    engine = build()
    before = books(engine)
    tokens = run(build(), spec("a", 20))["a"]
    stop = next(token for token in tokens if tokens.index(token) >= 2)
    engine.add([spec("stops", 20, stop_token_ids=frozenset({stop})), spec("one", 30, 1), spec("full", 20)])
    ends = {t.request_id: t for output in drain(engine) for t in output.tokens if t.finish_reason is not None}
    assert {name: end.finish_reason for name, end in ends.items()} == {
        "stops": FinishReason.STOP,
        "one": FinishReason.LENGTH,
        "full": FinishReason.LENGTH,
    }
    # A stop token is no part of the output; the last token of a full one is.
    assert (ends["stops"].token_id, ends["stops"].matched_stop_token_id) == (None, stop)
    assert ends["full"].token_id == tokens[-1]
    assert run(build(), spec("a", 20, stop_token_ids=frozenset({stop})))["a"] == tokens[: tokens.index(stop)]
    assert run(build(), spec("a", 20, stop_token_ids=frozenset({tokens[0]})))["a"] == []
    assert books(engine) == before


@pytest.mark.parametrize("sampling", [Sampling(), RANDOM, PENALISED], ids=["greedy", "random", "penalised"])
def test_a_sequence_goes_on_at_any_token_as_if_it_had_not_been_interrupted(build: Build, sampling: Sampling) -> None:
    whole = spec("whole", 40, 9, sampling=sampling)
    engine = build()
    tokens = run(engine, whole)["whole"]
    resumed = [
        replace(
            whole,
            request_id=RequestId(f"from {done}"),
            token_ids=(*whole.token_ids, *tokens[:done]),
            max_new_tokens=9 - done,
            num_resumed_tokens=done,
        )
        for done in range(1, 9)
    ]
    assert run(engine, *resumed, chunk=16) == {f"from {done}": tokens[done:] for done in range(1, 9)}
    assert run(engine, replace(whole, request_id=RequestId("again"))) == {"again": tokens}


def test_another_seed_is_another_output(build: Build) -> None:
    engine = build()
    outputs = run(engine, *(spec(f"s{seed}", 10, sampling=replace(RANDOM, seed=seed)) for seed in range(4)))
    assert len({tuple(tokens) for tokens in outputs.values()}) == 4


def test_what_can_never_fit_is_refused_and_nothing_with_it_is_taken(build: Build) -> None:
    engine, small = build(), build(kv_tokens=96)
    before = books(engine)
    with pytest.raises(EngineError, match="never fit"):
        engine.add([spec("fits"), spec("large", CONTEXT - 9, 10)])
    with pytest.raises(EngineError, match="never fit"):
        small.add([spec("fits"), spec("large", 86, 11)])
    assert not engine.has_work()
    assert not small.has_work()
    assert books(engine) == before
    # To the token.
    assert len(run(engine, spec("whole", CONTEXT - 10, 10))["whole"]) == 10
    assert len(run(small, spec("whole", 86, 10))["whole"]) == 10


@pytest.mark.parametrize("bad", [{"token_ids": ()}, {"max_new_tokens": 0}, {"max_new_tokens": -1}], ids=str)
def test_what_would_never_end_is_refused_and_nothing_with_it_is_taken(build: Build, bad: dict[str, object]) -> None:
    engine = build()
    before = books(engine)
    with pytest.raises(EngineError, match="prompt"):
        engine.add([spec("good"), spec("bad", **bad)])
    assert not engine.has_work()
    assert books(engine) == before


def test_of_what_is_handed_over_only_the_prompt_has_to_fit(handing_over: Build) -> None:
    engine = handing_over(kv_tokens=96)
    engine.add([spec("prompt", 96, 50, hands_over=True)])
    engine.cancel([RequestId("prompt")])
    with pytest.raises(EngineError, match="never fit"):
        engine.add([spec("prompt", 97, 50, hands_over=True)])


@pytest.mark.parametrize("phase", ["queued", "decoding"])
def test_an_id_that_is_here_is_refused_and_the_one_here_goes_on(build: Build, phase: str) -> None:
    engine = build()
    engine.add([spec("a")])
    history = [engine.step()] if phase == "decoding" else []
    with pytest.raises(EngineError, match="already here"):
        engine.add([spec("b"), spec("a", 30)])
    with pytest.raises(EngineError, match="already here" if engine.info.kv_layout else "role both"):
        engine.import_kv(spec("a"), [3], memoryview(bytes(10 * engine.info.kv_bytes_per_token)))
    with pytest.raises(EngineError, match="already here"):
        engine.add([spec("c"), spec("c", 30)])
    assert tokens_of([*history, *drain(engine)]) == alone(build, spec("a"))
    # An id is free again once its sequence has ended.
    assert run(engine, spec("a", 30)) == alone(build, spec("a", 30))


def test_what_does_not_fit_yet_waits(build: Build) -> None:
    specs = [spec(f"r{i}", 20 + i, 5) for i in range(7)]
    few, narrow = build(max_sequences=2), build(kv_tokens=64)
    for engine in (few, narrow):
        before = books(engine)
        engine.add(specs)
        history = []
        while engine.has_work():
            history.append(engine.step())
            headroom = engine.headroom()
            assert headroom.num_running <= 2
            assert headroom.kv_free_tokens >= 0
        assert tokens_of(history) == alone(build, *specs)
        assert books(engine) == before


def test_steps_with_decodes_are_counted(build: Build) -> None:
    engine = build()
    engine.add([spec("a", STEP_TOKENS + 10, 4)])
    counts = []
    while engine.has_work():
        engine.step()
        counts.append(engine.headroom().num_decode_steps)
    # Two steps for the prompt, the second with the first token; then one or several tokens each.
    assert counts == [0, 0, *range(1, len(counts) - 1)]
    assert 3 <= len(counts) <= 5


def test_who_is_let_go_comes_again_and_nothing_is_lost(build: Build) -> None:
    specs = [spec(f"r{i}", 20 + i, 40) for i in range(6)]
    engine = build(kv_tokens=128)
    before, attempts = books(engine), {one.request_id: one for one in specs}
    tokens: dict[str, list[int]] = {one.request_id: [] for one in specs}
    num_preempted = 0
    engine.add(specs)
    while engine.has_work():
        output = engine.step()
        assert engine.headroom().kv_free_tokens >= 0
        for name, of_one in tokens_of([output]).items():
            tokens[name] += of_one
        assert not set(output.preempted) & {token.request_id for token in output.tokens}
        for name in output.preempted:
            num_preempted += 1
            former, whole = attempts[name], specs[int(name[1:])]
            attempts[name] = replace(
                whole,
                token_ids=(*whole.token_ids, *tokens[name]),
                max_new_tokens=40 - len(tokens[name]),
                num_resumed_tokens=len(tokens[name]),
                num_preemptions=former.num_preemptions + 1,
            )
            engine.add([attempts[name]])
    assert tokens == alone(build, *specs)
    assert num_preempted > 0
    assert max(one.num_preemptions for one in attempts.values()) <= MAX_PREEMPTIONS
    assert books(engine) == before


@pytest.mark.parametrize("phase", ["queued", "prefilling", "decoding"])
def test_a_cancelled_sequence_is_gone_and_the_others_go_on(build: Build, phase: str) -> None:
    check_cancelled(build, phase)


def test_a_cancelled_sequence_that_is_held_is_gone_and_the_others_go_on(handing_over: Build) -> None:
    check_cancelled(handing_over, "held")


def check_cancelled(build: Build, phase: str) -> None:
    engine = build()
    before = books(engine)
    other, gone = spec("other", 15, 12), spec("gone", 3 * STEP_TOKENS, 20, hands_over=phase == "held")
    engine.add([other])
    history = [engine.step()]
    engine.add([gone])
    if phase == "prefilling":
        history.append(engine.step())
        assert engine.headroom().waiting_prefill_tokens < 3 * STEP_TOKENS
    while phase in ("decoding", "held") and "gone" not in history[-1].prefilled:
        history.append(engine.step())
    assert engine.headroom().num_waiting == (phase in ("queued", "prefilling"))
    engine.cancel([RequestId("gone"), RequestId("nobody"), RequestId("gone")])
    after = drain(engine)
    assert "gone" not in tokens_of(after)
    assert tokens_of([*history, *after])["other"] == alone(build, other)["other"]
    assert books(engine) == before
    # Its id may be used again, and what comes under it is its own.
    assert run(engine, spec("gone", 12)) == alone(build, spec("gone", 12))


def prefilled(engine: Engine, handed: SequenceSpec) -> list[int]:
    """Computes a prompt that is to be handed over; returns the tokens that came with it."""
    engine.add([replace(handed, hands_over=True)])
    history = [engine.step()]
    while handed.request_id not in history[-1].prefilled:
        history.append(engine.step())
    return tokens_of(history)[handed.request_id]


@pytest.mark.parametrize("sampling", [Sampling(), RANDOM, PENALISED], ids=["greedy", "random", "penalised"])
def test_a_sequence_goes_on_in_the_engine_that_takes_its_kv(handing_over: Build, sampling: Sampling) -> None:
    source, target = handing_over(), handing_over()
    before = books(source), books(target)
    handed, other = spec("handed", 90, 7, sampling=sampling), spec("other", 12, 9)
    target.add([other])
    history = [target.step()]
    tokens = prefilled(source, handed)
    assert len(tokens) == 1
    kv = bytearray(90 * source.info.kv_bytes_per_token)
    for wrong in (kv[:-1], kv + b"x", b""):
        with pytest.raises(EngineError):
            source.export_kv(handed.request_id, memoryview(bytearray(wrong)))
    source.export_kv(handed.request_id, memoryview(kv))
    assert books(source) == before[0]
    with pytest.raises(EngineError, match="not here"):
        source.export_kv(handed.request_id, memoryview(kv))
    for wrong in (kv[:-1], kv + b"x", b""):
        with pytest.raises(EngineError):
            target.import_kv(handed, tokens, memoryview(bytearray(wrong)))
    target.import_kv(handed, tokens, memoryview(kv))
    kv[:] = bytes(len(kv))
    done = tokens_of([*history, *drain(target)])
    assert {"handed": tokens + done["handed"], "other": done["other"]} == alone(handing_over, handed, other)
    assert books(target) == before[1]


def handed_over(source: Engine, handed: SequenceSpec) -> tuple[list[int], memoryview]:
    """Returns the first token of a sequence, and its KV, which has left its engine."""
    tokens = prefilled(source, handed)
    kv = memoryview(bytearray(len(handed.token_ids) * source.info.kv_bytes_per_token))
    source.export_kv(handed.request_id, kv)
    return tokens, kv


def test_pages_that_are_here_need_not_come(handing_over: Build) -> None:
    source, target = handing_over(), handing_over()
    before = books(target)
    page_tokens, page_bytes = target.info.kv_page_tokens, target.info.kv_page_bytes
    system = spec("", 2 * page_tokens).token_ids
    # Ends in a page, at its beginning, where pages end, and with nothing of its own.
    tails = {"first": 20, "in": 7, "at": 1, "own": page_tokens, "none": 0}
    specs = [spec(name, token_ids=(*system, *spec("", tail).token_ids)) for name, tail in tails.items()]
    wanted = alone(handing_over, *specs)
    outputs = {}
    for number, one in enumerate(specs):
        outputs[one.request_id], kv = handed_over(source, one)
        assert target.known_pages(one.token_ids, b"") == (2 if number else 0)
        assert target.known_pages(one.token_ids, b"another's") == 0
        # Without its last token it may have a whole page less.
        num_whole = min((len(one.token_ids) - 1) // page_tokens, 2)
        assert target.known_pages(one.token_ids[:-1], b"") == (num_whole if number else 0)
        target.import_kv(one, outputs[one.request_id], kv[2 * page_bytes if number else 0 :])
    done = tokens_of(drain(target))
    assert {name: [*outputs[name], *done[name]] for name in outputs} == wanted
    assert books(target) == before


def test_of_pages_that_are_here_no_more_the_kv_has_to_come_after_all(handing_over: Build) -> None:
    source, target = handing_over(), handing_over()
    before = books(target)
    handed = spec("handed", 90)
    tokens, kv = handed_over(source, handed)
    with pytest.raises(KvGoneError):
        target.import_kv(handed, tokens, kv[2 * target.info.kv_page_bytes :])
    # Another tenant's does not count.
    target.import_kv(replace(handed, request_id=RequestId("stranger"), prefix_salt=b"another's"), tokens, kv)
    with pytest.raises(KvGoneError):
        target.import_kv(handed, tokens, kv[target.info.kv_page_bytes :])
    target.import_kv(handed, tokens, kv)
    done = tokens_of(drain(target))
    assert [*tokens, *done["handed"]] == [*tokens, *done["stranger"]] == alone(handing_over, handed)["handed"]
    assert books(target) == before


def test_room_is_made_for_kv_of_which_some_is_here(handing_over: Build) -> None:
    source, target = handing_over(), handing_over(kv_tokens=192)
    target.add([spec("goes", 70, 40, prefix_salt=b"another's")])
    while not target.step().prefilled:
        pass
    outputs = {}
    for number, name in enumerate(("one", "other")):
        handed = spec(name, 90, 5)
        outputs[name], kv = handed_over(source, handed)
        assert target.known_pages(handed.token_ids, b"") == 2 * number
        target.import_kv(handed, outputs[name], kv[2 * number * target.info.kv_page_bytes :])
    history = drain(target)
    assert [name for output in history for name in output.preempted] == ["goes"]
    done = tokens_of(history)
    wanted = alone(handing_over, spec("one", 90, 5))["one"]
    assert [*outputs["one"], *done["one"]] == [*outputs["other"], *done["other"]] == wanted


def test_only_what_is_to_be_handed_over_can_be(handing_over: Build) -> None:
    engine = handing_over()
    engine.add([spec("stays"), spec("comes", 3 * STEP_TOKENS, hands_over=True)])
    engine.step()
    for name, num_tokens in (("stays", 10), ("comes", 3 * STEP_TOKENS), ("nobody", 5)):
        with pytest.raises(EngineError, match="not here"):
            engine.export_kv(RequestId(name), memoryview(bytearray(num_tokens * engine.info.kv_bytes_per_token)))
    engine.cancel([RequestId("comes")])
    assert tokens_of(drain(engine)).keys() <= {"stays"}


def test_an_engine_makes_room_for_kv_that_has_come(handing_over: Build) -> None:
    source, target = handing_over(), handing_over(kv_tokens=192)
    handed = spec("handed", 90, 20)
    tokens = prefilled(source, handed)
    kv = bytearray(90 * source.info.kv_bytes_per_token)
    source.export_kv(handed.request_id, memoryview(kv))
    target.add([spec("other", 115, 40)])
    target.step()
    target.import_kv(handed, tokens, memoryview(kv))
    outputs = drain(target)
    assert [name for output in outputs for name in output.preempted] == ["other"]
    assert tokens + tokens_of(outputs)["handed"] == alone(handing_over, handed)["handed"]


def test_who_was_let_go_for_what_was_then_cancelled_is_named_all_the_same(handing_over: Build) -> None:
    source, target = handing_over(), handing_over(kv_tokens=192)
    handed = spec("handed", 90, 20)
    tokens = prefilled(source, handed)
    kv = bytearray(90 * source.info.kv_bytes_per_token)
    source.export_kv(handed.request_id, memoryview(kv))
    before = books(target)
    target.add([spec("other", 115, 40)])
    target.step()
    target.import_kv(handed, tokens, memoryview(kv))
    target.cancel([handed.request_id])
    assert target.has_work()
    assert target.step() == StepOutput(preempted=(RequestId("other"),))
    assert not target.has_work()
    assert books(target) == before


def test_kv_for_which_there_is_no_room_is_refused(handing_over: Build) -> None:
    source, target = handing_over(), handing_over(kv_tokens=192)
    handed = spec("handed", 90, 20)
    tokens = prefilled(source, handed)
    kv = bytearray(90 * source.info.kv_bytes_per_token)
    source.export_kv(handed.request_id, memoryview(kv))
    # One that may not be let go: else there would be room.
    target.add([replace(spec("other", 115, 40), num_preemptions=MAX_PREEMPTIONS)])
    history = [target.step()]
    before = books(target)
    with pytest.raises(EngineError, match="no room"):
        target.import_kv(handed, tokens, memoryview(kv))
    with pytest.raises(EngineError, match="no room"):
        target.import_kv(replace(handed, max_new_tokens=CONTEXT), tokens, memoryview(kv))
    with pytest.raises(EngineError, match="no room"):
        # For what it has there is, for what it may generate there will never be.
        handing_over(kv_tokens=96).import_kv(handed, tokens, memoryview(kv))
    assert books(target) == before
    assert tokens_of([*history, *drain(target)]) == alone(handing_over, spec("other", 115, 40))
    target.import_kv(handed, tokens, memoryview(kv))
    assert tokens + tokens_of(drain(target))["handed"] == alone(handing_over, handed)["handed"]


def test_what_fails_in_a_step_fails_alone(build: Build) -> None:
    engine = build()
    before = books(engine)
    good = [spec("a", 20), spec("b", 30, 5)]
    # No model has a token of that number.
    hands_over = bool(engine.info.kv_layout)
    bad = [spec("bad", token_ids=(5, -1, 7)), spec("held", token_ids=(5, 6, -VOCAB - 1), hands_over=hands_over)]
    engine.add([good[0], bad[0], good[1], bad[1]])
    history = drain(engine)
    failures = [failure for output in history for failure in output.failures]
    assert sorted(failure.request_id for failure in failures) == ["bad", "held"]
    assert not any(failure.is_retryable for failure in failures)
    assert all(failure.message for failure in failures)
    assert tokens_of(history) == alone(build, *good)
    assert not {"bad", "held"} & {name for output in history for name in output.prefilled}
    assert books(engine) == before


def test_what_names_an_adapter_that_is_not_here_is_refused(build: Build, tmp_path: Path) -> None:
    engine = build()
    before = books(engine)
    with pytest.raises(NoAdapterError):
        engine.add([spec("a"), spec("b", adapter="F")])
    assert books(engine) == before
    assert not engine.has_work()
    assert engine.unload_adapter("F")
    # As the contract's engines are built they take none.
    assert engine.info.max_adapters == 0
    with pytest.raises(EngineError):
        engine.load_adapter(Adapter(fingerprint="F", directory=tmp_path))


def test_structured_output_is_refused_where_there_are_no_grammars(build: Build) -> None:
    engine = build()
    assert not engine.info.has_grammars
    before = books(engine)
    with pytest.raises(EngineError, match="grammars"):
        engine.add([spec("a"), spec("b", structured_output=STRUCTURED)])
    assert books(engine) == before
    assert not engine.has_work()


def test_kv_of_structured_output_is_refused_where_there_are_no_grammars(handing_over: Build) -> None:
    source, target = handing_over(), handing_over()
    before = books(target)
    handed = spec("handed", 90)
    tokens, kv = handed_over(source, handed)
    with pytest.raises(EngineError, match="grammars"):
        target.import_kv(replace(handed, structured_output=STRUCTURED), tokens, kv)
    assert books(target) == before
    assert not target.has_work()
    target.import_kv(handed, tokens, kv)
    assert [*tokens, *tokens_of(drain(target))["handed"]] == alone(handing_over, handed)["handed"]
