"""The engine's thread: one that hangs is noticed."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from types import SimpleNamespace

import pytest

from bucketserve.core.types import RequestId
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import SequenceSpec
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
