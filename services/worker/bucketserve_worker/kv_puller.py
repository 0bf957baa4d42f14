"""Goes on with requests that others prefilled: pulls their KV, gives it to the engine, tells the scheduler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import grpc

from bucketserve.core.types import RequestId
from bucketserve.rpc.convert import sequence_from_spec
from bucketserve.v1 import scheduler_pb2
from bucketserve_worker.engine_thread import EngineThread, Resumed
from bucketserve_worker.kv_source import Fetched, KvSources
from bucketserve_worker.running import Finished, RunningTable

__all__ = ["KvPuller"]

FETCH_TIMEOUT_S = 30.0
"""For a transfer, a second try included."""


@dataclass(slots=True)
class _Given:
    """A transfer whose KV the engine is about to take."""

    pull: scheduler_pb2.PullKv
    until_s: float
    """When it is given up, by the event loop's clock."""
    may_begin_anew: bool = True
    """Whether all of it is pulled if pages are gone that it relied on: nobody has called it off."""


class KvPuller:
    """One task for each transfer. A transfer ends with exactly one KvPulled, unless it is called off."""

    def __init__(
        self,
        sources: KvSources,
        engine: EngineThread,
        running: RunningTable,
        *,
        on_pulled: Callable[[scheduler_pb2.KvPulled], None],
        on_transfer: Callable[[scheduler_pb2.PullKv, Fetched | None, float, str], None],
        on_began: Callable[[RequestId, int], None],
    ) -> None:
        """Tells what happens.

        Args:
            sources: where KV comes from.
            engine: goes on with what comes.
            running: the requests here.
            on_pulled: the scheduler's answer.
            on_transfer: (order, what came or None, monotonic start in seconds, error) after each transfer.
            on_began: (key, epoch) when a run is given to the engine.
        """
        self._on_began = on_began
        self._sources = sources
        self._engine = engine
        self._running = running
        self._on_pulled = on_pulled
        self._on_transfer = on_transfer
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pulls: dict[str, scheduler_pb2.PullKv] = {}
        """What each task pulls."""
        self._at_engine: dict[RequestId, _Given] = {}

    def __len__(self) -> int:
        """Number of transfers under way."""
        return len(self._tasks) + len(self._at_engine)

    def pull(self, pull: scheduler_pb2.PullKv) -> None:
        """Begins a transfer; an older one of the same run is called off."""
        self._begin(pull, asyncio.get_running_loop().time() + FETCH_TIMEOUT_S)

    def _begin(self, pull: scheduler_pb2.PullKv, until_s: float, *, is_whole: bool = False) -> None:
        run_id = pull.run_id
        self.cancel([run_id])
        task = asyncio.create_task(self._pull(pull, until_s, is_whole=is_whole), name=f"pull-{run_id}")
        self._tasks[run_id], self._pulls[run_id] = task, pull
        task.add_done_callback(lambda done: self._forget(run_id, done))

    def give_up(self, run_ids: Collection[str]) -> None:
        """Calls transfers off and says so: the source may be away, and then nobody else would."""
        for run_id in run_ids:
            pull = self._pulls.get(run_id)
            self.cancel([run_id])
            if pull is not None:
                self._tell(pull, is_ok=False)

    def cancel(self, run_ids: Collection[str]) -> None:
        """Calls transfers off; nobody is told."""
        for given in self._at_engine.values():
            given.may_begin_anew &= given.pull.run_id not in run_ids
        for run_id in run_ids:
            self._pulls.pop(run_id, None)
            if task := self._tasks.pop(run_id, None):
                task.cancel()

    def cancel_all(self) -> None:
        """Calls everything off: a scheduler that does not know of a transfer orders it again."""
        self.cancel([*self._tasks, *(given.pull.run_id for given in self._at_engine.values())])

    async def sweep(self) -> None:
        """Lets go of what is kept of sources that are gone."""
        await self._sources.sweep()

    async def close(self) -> None:
        """Calls everything off and waits for it."""
        tasks = list(self._tasks.values())
        self.cancel_all()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sources.close()

    async def _pull(self, pull: scheduler_pb2.PullKv, until_s: float, *, is_whole: bool) -> None:
        """Brings KV to the engine, also of pages that are here if is_whole."""
        start_s = time.monotonic()
        fetched = None
        try:
            async with asyncio.timeout_at(until_s):
                fetched = await self._sources.fetch(pull, is_whole=is_whole)
            self._on_transfer(pull, fetched, start_s, "")
            self._resume(pull, fetched, until_s)
        except (Exception, asyncio.CancelledError) as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                # Called off: whoever did it has said so.
                raise
            # Whatever it is, the scheduler has to hear of it: the run is neither here nor there.
            if fetched is not None:
                fetched.block.release()
            detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            self._on_transfer(pull, None, start_s, f"{type(error).__name__}: {detail}")
            self._tell(pull, is_ok=False)

    def _resume(self, pull: scheduler_pb2.PullKv, fetched: Fetched, until_s: float) -> None:
        if fetched.transport == "in_process":
            # It was prefilled here, before a switch of roles: this is the same run under a new name.
            for older in self._running.keys_of(pull.run_id):
                self._running.drop(older)
        key, running = self._running.resume(pull, fetched.trailer)
        self._on_began(key, pull.epoch)
        sequence = sequence_from_spec(running.spec, key, pull.batch.batch_id)
        self._at_engine[key] = _Given(pull, until_s)
        trailer = fetched.trailer
        self._engine.resume(sequence, trailer.token_ids, fetched.block, fetched.kv_bytes, trailer.handle)

    def resumed(self, resumed: Resumed) -> list[Finished]:
        """Takes the engine's answer; returns what has ended by it.

        The scheduler hears of the transfer before it hears of the end, and is told of both: since the order was given
        the stream to it may have been opened anew, and then it knows the run as one that is here.
        """
        given = self._at_engine.pop(resumed.key)
        pull = given.pull
        # It may have been given up meanwhile, for want of its gateway.
        is_here = self._running.get(resumed.key) is not None
        if resumed.lacks_pages and is_here and given.may_begin_anew:
            # As if the engine had never been asked. The source holds it until the scheduler hears from us.
            self._running.drop(resumed.key)
            self._begin(pull, given.until_s, is_whole=True)
            return []
        self._tell(pull, is_ok=resumed.error is None and is_here)
        if resumed.error is None:
            return []
        self._on_transfer(pull, None, time.monotonic(), resumed.error)
        return self._running.fail([resumed.key], resumed.error)

    def _tell(self, pull: scheduler_pb2.PullKv, *, is_ok: bool) -> None:
        self._on_pulled(scheduler_pb2.KvPulled(run_id=pull.run_id, assignment=pull.assignment, is_ok=is_ok))

    def _forget(self, run_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(run_id) is task:
            del self._tasks[run_id], self._pulls[run_id]
        if not task.cancelled():
            task.result()
