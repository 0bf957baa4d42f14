"""The engine in its own thread: the event loop only moves messages, so health and cancel answer during a step."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from bucketserve.core.errors import EngineError, KvGoneError, NoAdapterError
from bucketserve.core.types import Headroom, RequestId
from bucketserve.engine.kv_staging import KvStaging, StagedKv, checksum, page_checksums
from bucketserve.ports import Adapter, Engine, EngineInfo, SequenceFailure, SequenceSpec, StepOutput, TokenOutput
from bucketserve.rpc.convert import logprobs_to_pb
from bucketserve.v1 import scheduler_pb2, worker_pb2
from bucketserve_worker.running import run_of

__all__ = ["EngineStarted", "EngineThread", "EngineTurn", "HandedOver", "Resumed"]

T = TypeVar("T")

STOP_S = 10.0
SLOWER_THAN_EVER, SLOWER_AT_FIRST = 10, 4
LOOK_S = 1.0
"""Most that counts between two looks at a turn: who did not look for longer was stopped, and so was the engine."""
IDLE_S = 1.0
"""An engine that has nothing to do makes a turn that often: what it has room for may change all the same."""
MAX_TURNS_AHEAD = 64
"""Turns that the event loop may be behind before the engine waits for it."""


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """The engine is warm."""

    info: EngineInfo
    headroom: Headroom


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A prefilled sequence that has left the engine."""

    key: RequestId
    num_tokens: int
    """Tokens whose KV is in the block; none if a handle of it goes along, for it counts where it is."""
    kv_bytes: int
    block: StagedKv
    """The KV, then a KvTrailer with the first token, which is in the turn's output as well.

    The trailer's checksums of the pages were taken before anybody else could touch them.
    """
    checksum: int
    """Of the trailer."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """A sequence whose KV came from elsewhere is in the engine, or could not be taken: then error says why."""

    key: RequestId
    error: str | None
    lacks_pages: bool = False
    """Pages that were here are not any more: with all of its KV it could be taken."""


@dataclass(frozen=True, slots=True)
class EngineTurn:
    """What one turn of the thread did; headroom is as after it."""

    output: StepOutput
    cancelled: tuple[RequestId, ...]
    headroom: Headroom
    last_assignment: int
    """Number of the last batch that the headroom accounts for."""
    handed_over: tuple[HandedOver, ...] = ()
    resumed: tuple[Resumed, ...] = ()
    preempted: tuple[RequestId, ...] = ()
    """By order; whom the engine itself let go is in its output."""


@dataclass(frozen=True, slots=True)
class _Add:
    assignment: int
    sequences: tuple[SequenceSpec, ...]
    max_chunk_tokens: int
    specs: Mapping[RequestId, bytes]


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True)
class _Preempt:
    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True)
class _Import:
    spec: SequenceSpec
    generated: tuple[int, ...]
    block: StagedKv
    kv_bytes: int
    handle: bytes


@dataclass(frozen=True, slots=True)
class _Load:
    adapter: Adapter
    done: asyncio.Future[str]


@dataclass(frozen=True, slots=True)
class _Unload:
    fingerprint: str
    done: asyncio.Future[bool]


@dataclass(slots=True)
class _Obeyed:
    """What came of orders."""

    failures: list[SequenceFailure] = field(default_factory=list)
    """What the engine refused."""
    cancelled: list[RequestId] = field(default_factory=list)
    preempted: list[RequestId] = field(default_factory=list)
    resumed: list[Resumed] = field(default_factory=list)


_Order = _Add | _Cancel | _Preempt | _Import | _Load | _Unload


class EngineThread:
    """Runs `step` while there is work, and every IDLE_S otherwise.

    on_turn is called in the event loop, in order, for every turn that did something. A failure of the engine itself
    ends the thread and makes `failed` raise it.
    """

    def __init__(self, load: Callable[[], Engine], on_turn: Callable[[EngineTurn], None]) -> None:
        """Loads nothing yet; `load` runs in the thread, since the thread owns the engine."""
        self._load = load
        self._on_turn = on_turn
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._orders: deque[_Order] = deque()
        self._hands_over: dict[RequestId, tuple[int, bytes]] = {}
        """Sequences to hand over once they are prefilled: their tokens, and the serialised RunSpec. Of the thread."""
        self._is_stopping = False
        self._ahead = threading.Semaphore(MAX_TURNS_AHEAD)
        self._turn_began_s: float | None = None
        """When the turn in hand began; None between turns."""
        self._longest_turn_s = 0.0
        self._hangs = False
        """Whether it did at the last look."""
        self._looked_s = time.monotonic()
        self._watched = (0.0, 0.0)
        """When the turn began that was looked at last, and for how long it has been seen, seconds."""
        self._last_assignment = 0
        self.started: asyncio.Future[EngineStarted] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self.staging: KvStaging
        """Where KV is between engines; there once the engine is."""
        self._engine: Engine
        """The thread's; others may ask it for known pages."""
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; `started` resolves when the engine is warm, or raises what loading raised."""
        self._thread.start()

    def add(
        self,
        assignment: int,
        sequences: Sequence[SequenceSpec],
        max_chunk_tokens: int,
        specs: Mapping[RequestId, bytes],
    ) -> None:
        """Hands a batch over; it joins at the next step. specs: serialised RunSpecs of what will be handed over."""
        with self._wake:
            self._orders.append(_Add(assignment, tuple(sequences), max_chunk_tokens, specs))
            self._wake.notify()

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """Stops sequences at the next step; each is named in a later turn's `cancelled`, known or not."""
        with self._wake:
            self._orders.append(_Cancel(tuple(request_ids)))
            self._wake.notify()

    def preempt(self, request_ids: Sequence[RequestId]) -> None:
        """Lets sequences go at the next step; each is named in a later turn's `preempted`, known or not."""
        with self._wake:
            self._orders.append(_Preempt(tuple(request_ids)))
            self._wake.notify()

    def resume(
        self, spec: SequenceSpec, generated: Sequence[int], block: StagedKv, kv_bytes: int, handle: bytes = b""
    ) -> None:
        """Hands over a sequence whose KV was computed elsewhere, and the block; a turn's `resumed` says how it went.

        handle: of KV that is not in the block, and that the engine fetches itself.
        """
        with self._wake:
            self._orders.append(_Import(spec, tuple(generated), block, kv_bytes, handle))
            self._wake.notify()

    def known_pages(self, spec: scheduler_pb2.RunSpec) -> int:
        """Returns of how many leading pages of a prompt the engine has KV now; the thread is not waited for."""
        return self._engine.known_pages(spec.token_ids, spec.prefix_salt)

    async def load_adapter(self, adapter: Adapter) -> str:
        """Loads an adapter between two steps; returns why it can't be served, or nothing.

        Raises:
            EngineError: the engine has ended.
        """
        done: asyncio.Future[str] = self._loop.create_future()
        return await self._ask(_Load(adapter, done), done)

    async def unload_adapter(self, fingerprint: str) -> bool:
        """Returns whether an adapter is gone: one that a sequence uses stays, and one that the engine can't unload now.

        Raises:
            EngineError: the engine has ended.
        """
        done: asyncio.Future[bool] = self._loop.create_future()
        return await self._ask(_Unload(fingerprint, done), done)

    async def _ask(self, order: _Load | _Unload, done: asyncio.Future[T]) -> T:
        with self._wake:
            self._orders.append(order)
            self._wake.notify()
        either: list[asyncio.Future[Any]] = [done, self.ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise EngineError("the engine has ended")
        return done.result()

    def hangs_for_s(self, limit_s: float) -> float:
        """Returns for how long the turn in hand has been seen, if that is more than it may take; else 0.

        To be called at least every LOOK_S. The time in which a process was stopped is no turn's.

        Args:
            limit_s: what any turn may take; one that is known to be slower may take ten times its longest, and the
                first ones, which may have to warm up, four times this.
        """
        now_s, began_s = time.monotonic(), self._turn_began_s
        passed_s, self._looked_s = min(now_s - self._looked_s, LOOK_S), now_s
        self._hangs = False
        if began_s is None:
            return 0.0
        seen_s = self._watched[1] if self._watched[0] == began_s else 0.0
        took_s = min(now_s - began_s, seen_s + passed_s)
        self._watched = (began_s, took_s)
        slack = SLOWER_AT_FIRST if not self._longest_turn_s else 1
        self._hangs = took_s > max(limit_s * slack, SLOWER_THAN_EVER * self._longest_turn_s)
        return took_s if self._hangs else 0.0

    def _took_s(self, began_s: float) -> float:
        """Returns how long a turn took that ends now, without the time in which the process was stopped."""
        turn_s, seen_s = self._watched
        return min(time.monotonic() - began_s, (seen_s if turn_s == began_s else 0.0) + LOOK_S)

    async def stop(self) -> None:
        """Ends the thread after the current step and frees the device; does not wait for one that is known to hang."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        # One that hangs ends with the process.
        if self._thread.is_alive() and not self._hangs:
            await asyncio.wait([self.ended], timeout=STOP_S)

    def _main(self) -> None:
        error: BaseException | None = None
        try:
            engine = self._engine = self._load()
            self.staging = KvStaging(engine.headroom().kv_total_tokens * engine.info.kv_bytes_per_token)
            self._tell(self.started, EngineStarted(engine.info, engine.headroom()))
            try:
                self._run(engine)
            finally:
                engine.close()
                self.staging.close()
        except BaseException as caught:
            error = caught
        self._loop.call_soon_threadsafe(self._finish, error)

    def _run(self, engine: Engine) -> None:
        """The hot loop: take what came in, step, hand out what came of it."""
        while (orders := self._take(engine)) is not None:
            began_s = self._turn_began_s = time.monotonic()
            obeyed = self._obey(engine, orders)
            output = engine.step()
            if obeyed.failures:
                output = replace(output, failures=(*output.failures, *obeyed.failures))
            for request_id in (*output.preempted, *(failure.request_id for failure in output.failures)):
                self._hands_over.pop(request_id, None)
            output, handed_over = self._hand_over(engine, output) if self._hands_over else (output, ())
            turn = EngineTurn(
                output,
                tuple(obeyed.cancelled),
                engine.headroom(),
                self._last_assignment,
                handed_over,
                resumed=tuple(obeyed.resumed),
                preempted=tuple(obeyed.preempted),
            )
            self._turn_began_s = None
            if output.sample is not None:
                self._longest_turn_s = max(self._longest_turn_s, self._took_s(began_s))
            self._ahead.acquire()
            self._loop.call_soon_threadsafe(self._deliver, turn)

    def _take(self, engine: Engine) -> list[_Order] | None:
        """Returns new orders, waiting a while for some if the engine has no work; None to stop."""
        with self._wake:
            while not (self._orders or self._is_stopping or engine.has_work()):
                if not self._wake.wait(IDLE_S):
                    break
            if self._is_stopping:
                return None
            orders = list(self._orders)
            self._orders.clear()
            for order in orders:
                if isinstance(order, _Add):
                    self._last_assignment = order.assignment
            return orders

    def _obey(self, engine: Engine, orders: Sequence[_Order]) -> _Obeyed:
        """Carries orders out as they came."""
        obeyed = _Obeyed()
        for order in orders:
            match order:
                case _Add():
                    obeyed.failures += _add(engine, order)
                    for sequence in order.sequences:
                        if sequence.hands_over:
                            spec = order.specs[sequence.request_id]
                            self._hands_over[sequence.request_id] = len(sequence.token_ids), spec
                case _Cancel():
                    engine.cancel(order.request_ids)
                    obeyed.cancelled += order.request_ids
                case _Preempt():
                    engine.cancel(order.request_ids)
                    obeyed.preempted += order.request_ids
                case _Import():
                    obeyed.resumed.append(_import(engine, order))
                case _Load(adapter=adapter, done=done):
                    self._tell(done, _load(engine, adapter))
                case _Unload(fingerprint=fingerprint, done=done):
                    self._tell(done, _unload(engine, fingerprint))
        for request_id in (*obeyed.cancelled, *obeyed.preempted):
            self._hands_over.pop(request_id, None)
        return obeyed

    def _hand_over(self, engine: Engine, output: StepOutput) -> tuple[StepOutput, tuple[HandedOver, ...]]:
        """Moves the KV of what was prefilled, and has not ended with that, out of the engine.

        Returns:
            The step's output, in which a sequence whose KV could not be moved is a failure alone; the others.
        """
        first = {token.request_id: token for token in output.tokens}
        handed_over, failures = [], {}
        for request_id in output.prefilled:
            num_tokens, spec = self._hands_over.pop(request_id, (0, b""))
            if num_tokens and first[request_id].finish_reason is None:
                try:
                    handed_over.append(self._move(engine, first[request_id], num_tokens, spec))
                except (EngineError, MemoryError) as error:
                    engine.cancel([request_id])
                    message = f"its KV can't be handed over: {str(error) or 'no memory'}"
                    failures[request_id] = SequenceFailure(request_id=request_id, message=message, is_retryable=True)
        if failures:
            output = replace(
                output,
                tokens=tuple(token for token in output.tokens if token.request_id not in failures),
                prefilled=tuple(request_id for request_id in output.prefilled if request_id not in failures),
                failures=(*output.failures, *failures.values()),
            )
        return output, tuple(handed_over)

    def _move(self, engine: Engine, first: TokenOutput, num_tokens: int, spec: bytes) -> HandedOver:
        """Returns the KV of a prompt of so many tokens, or the handle of it, staged; the engine has forgotten it.

        Raises:
            EngineError: it can't be copied.
            MemoryError: there is no room to stage it.
        """
        request_id = first.request_id
        handle = engine.hand_over(request_id)
        if handle is not None:
            num_tokens = 0
        kv_bytes, page_bytes = num_tokens * engine.info.kv_bytes_per_token, engine.info.kv_page_bytes
        trailer = _trailer(first, spec, handle)
        # They take as much room whatever they are.
        trailer.page_checksums.extend([0] * -(-kv_bytes // page_bytes))
        block = self.staging.take(kv_bytes + trailer.ByteSize())
        kv, rest = block.data[:kv_bytes], block.data[kv_bytes:]
        if handle is None:
            try:
                engine.export_kv(request_id, kv)
            except EngineError:
                block.release()
                raise
        trailer.page_checksums[:] = page_checksums(kv, page_bytes)
        rest[:] = trailer.SerializeToString()
        return HandedOver(request_id, num_tokens, kv_bytes, block, checksum(rest))

    def _deliver(self, turn: EngineTurn) -> None:
        self._ahead.release()
        self._on_turn(turn)

    def _tell(self, future: asyncio.Future[Any], value: object) -> None:
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


def _trailer(first: TokenOutput, spec: bytes, handle: bytes | None) -> worker_pb2.KvTrailer:
    """Returns what goes along with the KV, or in its place, but for checksums."""
    trailer = worker_pb2.KvTrailer(
        cached_prompt_tokens=first.cached_prompt_tokens,
        spec=spec,
        run_id=run_of(first.request_id),
        handle=handle or b"",
    )
    if first.token_id is not None:
        trailer.token_ids.append(first.token_id)
    if first.logprobs is not None:
        trailer.logprobs.append(logprobs_to_pb(first.logprobs))
    return trailer


def _import(engine: Engine, order: _Import) -> Resumed:
    """Copies a block into the engine and lets it go."""
    error: EngineError | None = None
    try:
        if order.handle:
            engine.take_over(order.spec, order.generated, order.handle)
        else:
            engine.import_kv(order.spec, order.generated, order.block.data[: order.kv_bytes])
    except EngineError as caught:
        error = caught
    order.block.release()
    message = None if error is None else str(error)
    return Resumed(order.spec.request_id, message, lacks_pages=isinstance(error, KvGoneError))


def _load(engine: Engine, adapter: Adapter) -> str:
    """Returns why an adapter can't be served; empty: it is loaded."""
    try:
        engine.load_adapter(adapter)
    except EngineError as error:
        return str(error)
    return ""


def _unload(engine: Engine, fingerprint: str) -> bool:
    """Returns whether an adapter is gone."""
    try:
        return engine.unload_adapter(fingerprint)
    except EngineError:
        # It is here still, and is tried again as one that is used.
        return False


def _add(engine: Engine, add: _Add) -> list[SequenceFailure]:
    """Adds a batch; if the engine refuses it, each sequence is tried alone, so that one bad one harms no other."""
    try:
        engine.add(add.sequences, add.max_chunk_tokens)
        return []
    except EngineError as error:
        if len(add.sequences) == 1:
            (name,), may_go_on = (s.request_id for s in add.sequences), isinstance(error, NoAdapterError)
            return [SequenceFailure(request_id=name, message=str(error), is_retryable=may_go_on)]
    singles = (replace(add, sequences=(sequence,)) for sequence in add.sequences)
    return [failure for single in singles for failure in _add(engine, single)]
