"""The engine's thread: one that hangs is noticed, and what can't be handed over harms no other sequence."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from types import SimpleNamespace

import pytest

from bucketserve.core.errors import EngineError
from bucketserve.core.types import RequestId
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.engine.kv_staging import StagedKv
from bucketserve.ports import SequenceSpec, StepOutput
from bucketserve_worker import engine_thread
from bucketserve_worker.engine_thread import EngineThread, EngineTurn
from tests.e2e.observe import eventually


async def test_a_step_that_does_not_end_is_noticed_and_idleness_is_none() -> None:
    may_go_on, turns, steps = threading.Event(), list[EngineTurn](), itertools.count()

    def sleep(seconds: float) -> None:
        if next(steps) == 2:
            may_go_on.wait(30)

    engine = EngineThread(lambda: FakeEngine(FakeSettings(step_s=0.001), sleep), turns.append)
    engine.start()
    await engine.started
    await asyncio.sleep(0.2)
    assert engine.hangs_for_s(0.05) == 0.0
    engine.add(1, [SequenceSpec(request_id=RequestId("r"), token_ids=(1, 2), max_new_tokens=9)], 0, specs={})
    await eventually(lambda: len(turns) == 2, 10)
    # More than it may, and more than ten times what its steps have taken.
    await eventually(lambda: engine.hangs_for_s(0.2) > 0.2, 10)
    may_go_on.set()
    await eventually(lambda: len(turns) >= 9, 10)
    assert engine.hangs_for_s(0.2) == 0.0
    await engine.stop()


async def test_an_engine_that_hangs_is_not_waited_for() -> None:
    may_go_on = threading.Event()

    def sleep(seconds: float) -> None:
        may_go_on.wait(30)

    engine = EngineThread(lambda: FakeEngine(FakeSettings(step_s=0.001), sleep), lambda turn: None)
    engine.start()
    await engine.started
    engine.add(1, [SequenceSpec(request_id=RequestId("r"), token_ids=(1, 2), max_new_tokens=9)], 0, specs={})
    await eventually(lambda: engine.hangs_for_s(0.05) > 0.0, 10)
    async with asyncio.timeout(engine_thread.STOP_S / 2):
        await engine.stop()
    assert not engine.ended.done()
    may_go_on.set()
    await asyncio.wait([engine.ended], timeout=10)
    assert engine.ended.done()


async def test_the_time_in_which_the_process_was_stopped_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, steps, stopped_s = list[EngineTurn](), itertools.count(), 0.0
    is_held, may_go_on = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        if next(steps) == 2:
            is_held.set()
            may_go_on.wait(30)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + stopped_s)
    monkeypatch.setattr(engine_thread, "time", clock)
    engine = EngineThread(lambda: FakeEngine(FakeSettings(step_s=0.001), sleep), turns.append)
    engine.start()
    await engine.started
    engine.add(1, [SequenceSpec(request_id=RequestId("r"), token_ids=(1, 2), max_new_tokens=9)], 0, specs={})
    await eventually(is_held.is_set, 10)
    assert engine.hangs_for_s(20.0) == 0.0
    stopped_s = 60.0
    assert engine.hangs_for_s(20.0) == 0.0
    may_go_on.set()
    await eventually(lambda: len(turns) >= 9, 10)
    # Nor does it make a later hang any less of one.
    assert engine._longest_turn_s < 20.0
    await engine.stop()


@pytest.mark.parametrize("lacking", ["to copy it", "to stage it"])
async def test_kv_for_which_there_is_no_memory_fails_its_sequence_alone(
    monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    turns: list[EngineTurn] = []
    under_test = FakeEngine(FakeSettings(step_s=0.001))
    engine = EngineThread(lambda: under_test, turns.append)
    engine.start()
    await engine.started
    before, plain = under_test.headroom(), engine.staging.take
    if lacking == "to copy it":
        export = FakeEngine.export_kv

        def no_copy(self: FakeEngine, request_id: RequestId, into: memoryview) -> None:
            if request_id == "gone":
                raise EngineError("no memory")
            export(self, request_id, into)

        monkeypatch.setattr(FakeEngine, "export_kv", no_copy)
    else:
        calls = itertools.count()

        def no_block(num_bytes: int) -> StagedKv:
            if next(calls) == 1:
                raise MemoryError
            return plain(num_bytes)

        monkeypatch.setattr(engine.staging, "take", no_block)
    names = ("a", "gone", "b")
    sequences = [
        SequenceSpec(request_id=RequestId(name), token_ids=(1, 2, 3), max_new_tokens=9, hands_over=True)
        for name in names
    ]
    engine.add(1, sequences, 0, specs=dict.fromkeys((sequence.request_id for sequence in sequences), b"spec"))
    await eventually(lambda: sum(len(turn.handed_over) + len(turn.output.failures) for turn in turns) == 3, 10)
    (failure,) = (failure for turn in turns for failure in turn.output.failures)
    assert (failure.request_id, failure.is_retryable) == ("gone", True)
    assert "no memory" in failure.message
    assert [one.key for turn in turns for one in turn.handed_over] == ["a", "b"]
    # Its token would be said by who takes it: of what failed nothing is known to anybody.
    assert {token.request_id for turn in turns for token in turn.output.tokens} == {"a", "b"}
    assert {name for turn in turns for name in turn.output.prefilled} == {"a", "b"}
    assert engine.staging.num_blocks == 2
    assert turns[-1].headroom.kv_free_tokens == before.kv_free_tokens
    assert not engine.ended.done()
    await engine.stop()


async def test_what_an_idle_engine_has_room_for_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_thread, "IDLE_S", 0.01)
    turns: list[EngineTurn] = []
    under_test = FakeEngine()
    engine = EngineThread(lambda: under_test, turns.append)
    engine.start()
    await engine.started
    under_test.settings = FakeSettings(kv_total_tokens=777)
    await eventually(lambda: bool(turns) and turns[-1].headroom.kv_total_tokens == 777, 10)
    assert turns[-1].output == StepOutput()
    await engine.stop()
