"""What every engine does that fetches KV from another of its kind (ports.Engine.hand_over, take_over)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bucketserve.core.errors import EngineError
from bucketserve.core.types import MAX_PREEMPTIONS, RequestId
from bucketserve.ports import Engine, Sampling, SequenceSpec
from tests.contract.engine.conftest import STEP_TOKENS
from tests.contract.engine.test_engine import (
    PENALISED,
    RANDOM,
    STRUCTURED,
    Build,
    alone,
    books,
    drain,
    prefilled,
    spec,
    tokens_of,
)


def handed_over(source: Engine, handed: SequenceSpec) -> tuple[list[int], bytes]:
    """Computes a prompt; returns its first token and the handle."""
    tokens = prefilled(source, handed)
    handle = source.hand_over(handed.request_id)
    assert handle is not None
    # Some send in the step that follows.
    source.step()
    return tokens, handle


@pytest.mark.parametrize("sampling", [Sampling(), RANDOM, PENALISED], ids=["greedy", "random", "penalised"])
def test_a_sequence_goes_on_in_the_engine_that_fetches_its_kv(by_handle: Build, sampling: Sampling) -> None:
    source, target = by_handle(), by_handle()
    assert source.info.kv_layout == target.info.kv_layout != ""
    before = books(source), books(target)
    handed, other = spec("handed", 90, 7, sampling=sampling), spec("other", 12, 9)
    target.add([other])
    history = [target.step()]
    tokens, handle = handed_over(source, handed)
    assert len(tokens) == 1
    with pytest.raises(EngineError, match="not here"):
        source.hand_over(handed.request_id)
    for wrong in (replace(handed, token_ids=handed.token_ids[1:]), spec("handed", 91)):
        with pytest.raises(EngineError, match="not of this prompt"):
            target.take_over(wrong, tokens, handle)
    for data in (b"", handle[:-1], handle + b"x", b"x" * len(handle)):
        with pytest.raises(EngineError, match="handle"):
            target.take_over(handed, tokens, data)
    target.take_over(handed, tokens, handle)
    with pytest.raises(EngineError, match="already here"):
        target.take_over(handed, tokens, handle)
    history += drain(target)
    done = tokens_of(history)
    assert {"handed": tokens + done["handed"], "other": done["other"]} == alone(by_handle, handed, other)
    assert not any("handed" in output.prefilled for output in history)
    drain(source)
    assert (books(source), books(target)) == before


def test_only_what_is_to_be_handed_over_can_be(by_handle: Build) -> None:
    engine = by_handle()
    engine.add([spec("stays"), spec("comes", 3 * STEP_TOKENS, hands_over=True), spec("ends", 5, 1, hands_over=True)])
    engine.step()
    for name in ("stays", "comes", "ends", "nobody"):
        with pytest.raises(EngineError, match="not here"):
            engine.hand_over(RequestId(name))
    engine.cancel([RequestId("comes")])
    assert "comes" not in tokens_of(drain(engine))


def test_what_is_to_be_handed_over_may_be_cancelled(by_handle: Build) -> None:
    engine = by_handle()
    tokens = prefilled(engine, spec("gone", 20))
    engine.cancel([RequestId("gone")])
    with pytest.raises(EngineError, match="not here"):
        engine.hand_over(RequestId("gone"))
    # Its id is free again.
    assert prefilled(engine, spec("gone", 20)) == tokens


def test_room_is_made_for_what_is_fetched_or_it_is_refused(by_handle: Build) -> None:
    source, target = by_handle(), by_handle(kv_tokens=192)
    handed = spec("handed", 90, 20)
    tokens, handle = handed_over(source, handed)
    stays = replace(spec("stays", 115, 40), num_preemptions=MAX_PREEMPTIONS)
    target.add([stays])
    target.step()
    for one in (handed, replace(handed, max_new_tokens=250)):
        with pytest.raises(EngineError, match="no room"):
            target.take_over(one, tokens, handle)
    target.cancel([stays.request_id])
    target.add([spec("goes", 115, 40)])
    target.step()
    target.take_over(handed, tokens, handle)
    outputs = drain(target)
    assert [name for output in outputs for name in output.preempted] == ["goes"]
    assert tokens + tokens_of(outputs)["handed"] == alone(by_handle, handed)["handed"]


def test_a_handle_of_structured_output_is_refused_where_there_are_no_grammars(by_handle: Build) -> None:
    source, target = by_handle(), by_handle()
    assert not target.info.has_grammars
    before = books(target)
    handed = spec("handed", 90)
    tokens, handle = handed_over(source, handed)
    with pytest.raises(EngineError, match="grammars"):
        target.take_over(replace(handed, structured_output=STRUCTURED), tokens, handle)
    assert books(target) == before
    assert not target.has_work()
    target.take_over(handed, tokens, handle)
    assert [*tokens, *tokens_of(drain(target))["handed"]] == alone(by_handle, handed)["handed"]


def test_an_engine_that_hands_over_bytes_has_no_handles(handing_over: Build) -> None:
    engine = handing_over()
    handed = spec("handed", 20)
    tokens = prefilled(engine, handed)
    assert engine.hand_over(handed.request_id) is None
    with pytest.raises(EngineError, match="as bytes"):
        engine.take_over(replace(handed, request_id=RequestId("other")), tokens, b"x")
    engine.export_kv(handed.request_id, memoryview(bytearray(20 * engine.info.kv_bytes_per_token)))
