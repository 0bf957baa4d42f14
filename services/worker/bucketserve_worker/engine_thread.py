"""The engine in its own thread: the event loop only moves messages, so health and cancel answer during a step."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bucketserve.core.errors import EngineError
from bucketserve.core.types import Headroom, RequestId
from bucketserve.ports import Engine, EngineInfo, SequenceFailure, SequenceSpec, StepOutput

__all__ = ["EngineStarted", "EngineThread", "EngineTurn"]

MAX_TURNS_AHEAD = 64
"""Turns that the event loop may be behind before the engine waits for it."""


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """The engine is warm."""

    info: EngineInfo
    headroom: Headroom


@dataclass(frozen=True, slots=True)
class EngineTurn:
    """What one turn of the thread did; headroom is as after it."""

    output: StepOutput
    cancelled: tuple[RequestId, ...]
    headroom: Headroom
    last_assignment: int


@dataclass(frozen=True, slots=True)
class _Add:
    assignment: int
    sequences: tuple[SequenceSpec, ...]
    max_chunk_tokens: int


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_ids: tuple[RequestId, ...]


class EngineThread:
    """Runs `step` while there is work and sleeps otherwise.

    on_turn is called in the event loop, in order, for every turn that did something. A failure of the engine itself
    ends the thread and makes `failed` raise it.
    """

    def __init__(self, load: Callable[[], Engine], on_turn: Callable[[EngineTurn], None]) -> None:
        """Loads nothing yet; `load` runs in the thread, since the thread owns the engine."""
        self._load = load
        self._on_turn = on_turn
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._orders: deque[_Add | _Cancel] = deque()
        self._is_stopping = False
        self._ahead = threading.Semaphore(MAX_TURNS_AHEAD)
        self._last_assignment = 0
        self.started: asyncio.Future[EngineStarted] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; `started` resolves when the engine is warm, or raises what loading raised."""
        self._thread.start()

    def add(self, assignment: int, sequences: Sequence[SequenceSpec], max_chunk_tokens: int) -> None:
        """Hands a batch over; it joins at the next step."""
        with self._wake:
            self._orders.append(_Add(assignment, tuple(sequences), max_chunk_tokens))
            self._wake.notify()

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """Stops sequences at the next step; each is named in a later turn's `cancelled`, known or not."""
        with self._wake:
            self._orders.append(_Cancel(tuple(request_ids)))
            self._wake.notify()

    def reset_assignments(self) -> None:
        """Starts counting again, for a new scheduler stream."""
        with self._wake:
            self._last_assignment = 0

    async def stop(self) -> None:
        """Ends the thread after the current step and frees the device."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.wait([self.ended])

    def _main(self) -> None:
        error: BaseException | None = None
        try:
            engine = self._load()
            self._tell(self.started, EngineStarted(engine.info, engine.headroom()))
            try:
                self._run(engine)
            finally:
                engine.close()
        except BaseException as caught:
            error = caught
        self._loop.call_soon_threadsafe(self._finish, error)

    def _run(self, engine: Engine) -> None:
        """The hot loop: take what came in, step, hand out what came of it."""
        while (orders := self._take(engine)) is not None:
            failures, cancelled = _obey(engine, orders)
            output = engine.step()
            if failures:
                output = replace(output, failures=(*output.failures, *failures))
            turn = EngineTurn(output, tuple(cancelled), engine.headroom(), self._last_assignment)
            self._ahead.acquire()
            self._loop.call_soon_threadsafe(self._deliver, turn)

    def _take(self, engine: Engine) -> list[_Add | _Cancel] | None:
        """Returns new orders, waiting for some if the engine has no work; None to stop."""
        with self._wake:
            while not (self._orders or self._is_stopping or engine.has_work()):
                self._wake.wait()
            if self._is_stopping:
                return None
            orders = list(self._orders)
            self._orders.clear()
            for order in orders:
                if isinstance(order, _Add):
                    self._last_assignment = order.assignment
            return orders

    def _deliver(self, turn: EngineTurn) -> None:
        self._ahead.release()
        self._on_turn(turn)

    def _tell(self, future: asyncio.Future[EngineStarted], value: EngineStarted) -> None:
        self._loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(value))

    def _finish(self, error: BaseException | None) -> None:
        if error is not None and not self.started.done():
            self.started.set_exception(error)
            error = None
        if not self.ended.done():
            if error is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(error)


def _obey(engine: Engine, orders: Sequence[_Add | _Cancel]) -> tuple[list[SequenceFailure], list[RequestId]]:
    """Carries orders out as they came; returns what the engine refused and what was cancelled."""
    failures: list[SequenceFailure] = []
    cancelled: list[RequestId] = []
    for order in orders:
        if isinstance(order, _Add):
            failures += _add(engine, order)
        else:
            engine.cancel(order.request_ids)
            cancelled += order.request_ids
    return failures, cancelled


def _add(engine: Engine, add: _Add) -> list[SequenceFailure]:
    """Adds a batch; if the engine refuses it, each sequence is tried alone, so that one bad one harms no other."""
    try:
        engine.add(add.sequences, add.max_chunk_tokens)
        return []
    except EngineError as error:
        if len(add.sequences) == 1:
            return [SequenceFailure(request_id=add.sequences[0].request_id, message=str(error), is_retryable=False)]
    singles = (_Add(add.assignment, (sequence,), add.max_chunk_tokens) for sequence in add.sequences)
    return [failure for single in singles for failure in _add(engine, single)]
