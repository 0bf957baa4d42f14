"""Goes on with requests that others prefilled: pulls their KV, gives it to the engine, tells the scheduler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

import grpc

from bucketserve.core.errors import BucketServeError
from bucketserve.core.types import RequestId
from bucketserve.rpc.convert import sequence_from_record
from bucketserve.v1 import common_pb2, scheduler_pb2
from bucketserve_worker.engine_thread import EngineThread, Resumed
from bucketserve_worker.kv_source import Fetched, KvSources
from bucketserve_worker.running import RunningTable

__all__ = ["KvPuller"]

FETCH_TIMEOUT_S = 30.0


class KvPuller:
    """One task for each transfer. A transfer ends with exactly one KvMoved, unless it is called off."""

    def __init__(
        self,
        sources: KvSources,
        engine: EngineThread,
        running: RunningTable,
        *,
        on_moved: Callable[[scheduler_pb2.KvMoved], None],
        on_transfer: Callable[[scheduler_pb2.QueueRecord, Fetched | None, float, str], None],
        on_resumed: Callable[[scheduler_pb2.QueueRecord, str, int], None],
    ) -> None:
        """Tells what happens.

        Args:
            sources: where KV comes from.
            engine: goes on with what comes.
            running: the requests here.
            on_moved: the scheduler's answer.
            on_transfer: (record, what came or None, monotonic start in seconds, error) after each transfer.
            on_resumed: (record, key, epoch) when a request is given to the engine.
        """
        self._on_resumed = on_resumed
        self._sources = sources
        self._engine = engine
        self._running = running
        self._on_moved = on_moved
        self._on_transfer = on_transfer
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pulls: dict[str, scheduler_pb2.PullKv] = {}
        """What each task pulls."""
        self._at_engine: dict[RequestId, scheduler_pb2.PullKv] = {}
        """Transfers whose KV the engine is about to take."""

    def __len__(self) -> int:
        """Number of transfers under way."""
        return len(self._tasks) + len(self._at_engine)

    def pull(self, pull: scheduler_pb2.PullKv) -> None:
        """Begins a transfer; one of an older attempt is called off."""
        request_id = pull.record.request_id
        self.cancel([request_id])
        task = asyncio.create_task(self._pull(pull), name=f"pull-{request_id}")
        self._tasks[request_id], self._pulls[request_id] = task, pull
        task.add_done_callback(lambda done: self._forget(request_id, done))

    def give_up(self, request_ids: Iterable[str]) -> None:
        """Calls transfers off and says so: the source may be away, and then nobody else would."""
        for request_id in request_ids:
            pull = self._pulls.get(request_id)
            self.cancel([request_id])
            if pull is not None:
                self._tell(pull, is_ok=False)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Calls transfers off; nobody is told."""
        for request_id in request_ids:
            self._pulls.pop(request_id, None)
            if task := self._tasks.pop(request_id, None):
                task.cancel()

    def cancel_all(self) -> None:
        """Calls everything off: a scheduler that does not know of a transfer orders it again."""
        self.cancel(list(self._tasks))

    async def close(self) -> None:
        """Calls everything off and waits for it."""
        tasks = list(self._tasks.values())
        self.cancel_all()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sources.close()

    async def _pull(self, pull: scheduler_pb2.PullKv) -> None:
        start_s = time.monotonic()
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                fetched = await self._sources.fetch(pull)
        except (BucketServeError, grpc.aio.AioRpcError, TimeoutError) as error:
            detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            self._on_transfer(pull.record, None, start_s, f"{type(error).__name__}: {detail}")
            self._tell(pull, is_ok=False)
            return
        self._on_transfer(pull.record, fetched, start_s, "")
        self._resume(pull, fetched)

    def _resume(self, pull: scheduler_pb2.PullKv, fetched: Fetched) -> None:
        record = pull.record
        if fetched.transport == "in_process":
            # It was prefilled here, before a switch of roles: this is the same run under a new name.
            for older in self._running.keys_of(record.request_id, record.attempt):
                self._running.drop(older)
        token_ids = fetched.trailer.token_ids
        logprobs: Sequence[common_pb2.PositionLogprobs | None] = [*fetched.trailer.logprobs] or [None] * len(token_ids)
        key = self._running.resume(
            pull,
            list(zip(token_ids, logprobs, strict=True)),
            fetched.trailer.cached_prompt_tokens,
            prefill_s=pull.kv.prefill_us / 1e6,
        )
        self._at_engine[key] = pull
        spec = sequence_from_record(pull.record, key, pull.batch.batch_id)
        self._on_resumed(pull.record, key, pull.epoch)
        self._engine.resume(spec, token_ids, fetched.block, pull.kv.kv_bytes)

    def resumed(self, resumed: Resumed) -> None:
        """Takes the engine's answer. The scheduler must hear of it before it hears that the request is over."""
        pull = self._at_engine.pop(resumed.key)
        if resumed.error is not None:
            self._running.drop(resumed.key)
            self._on_transfer(pull.record, None, time.monotonic(), resumed.error)
        self._tell(pull, is_ok=resumed.error is None)

    def _tell(self, pull: scheduler_pb2.PullKv, *, is_ok: bool) -> None:
        self._on_moved(
            scheduler_pb2.KvMoved(
                request_id=pull.record.request_id,
                attempt=pull.record.attempt,
                source_worker_id=pull.source_worker_id,
                is_ok=is_ok,
            )
        )

    def _forget(self, request_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(request_id) is task:
            del self._tasks[request_id], self._pulls[request_id]
        if not task.cancelled():
            task.result()
