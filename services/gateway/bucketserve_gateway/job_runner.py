"""Runs batch jobs: claims requests from Redis, generates as for any client, stores results.

The requests are of class BATCH: the scheduler gives them what interactive ones leave. Here their number and bytes are
bounded, so that jobs of any size hold little memory and leave the scheduler's queue to others; and whose turn it is
follows from what runs here: the tenant that has least, of its jobs the one that has least, of these the oldest.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from functools import partial
from typing import Protocol

from bucketserve.core.errors import (
    BucketServeError,
    NotFoundError,
    OverloadedError,
    QuotaExceededError,
    UnavailableError,
    UnknownModelError,
)
from bucketserve.store.job_room import JobRoom
from bucketserve.store.jobs import JobInfo, JobStore
from bucketserve.store.sealing import SealedError
from bucketserve.v1 import inference_pb2, job_pb2
from bucketserve_gateway.admission import Admission, Room, text_bytes
from bucketserve_gateway.servicer import Generate
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.telemetry import GatewayTelemetry

__all__ = ["FOREVER", "JobRunner", "Work"]

LOOK_S = 0.5
STORE_RETRY_S = 1.0
MAX_LOSSES = 2
"""A request that was being run as so many gateways ended is not given to another one."""
ENDED_AT_ONCE = 2048
"""Requests of a job that is over, each time the runner looks."""
KEPT_AT_ONCE = 64
"""Results that are on their way to the store together."""
MAX_RUNNING_BYTES = 64 << 20
"""Of requests that run here; however large one is, it may run alone."""
ID_BYTES = 16
"""Of a token's id in a result: in the message, whose array grows by doubling, and as bytes."""
GIVE_BACK_S = 2.0
"""Most that giving back may take: a store that does not answer must not keep a gateway that is to end."""
FOREVER = ("ATTEMPTS_EXHAUSTED", "TOO_LARGE")
"""Reasons of UNAVAILABLE that waiting does not help."""


class Work(Protocol):
    """What the requests of a kind of job are, and their results."""

    async def run(self, job: JobInfo, index: int, item: bytes, room: Room) -> bytes:
        """Returns the result of a request. What is collected for it counts in a room, where nothing is before.

        Raises:
            BucketServeError: it has none, now or ever.
        """

    def failed(self, job: JobInfo, index: int, item: bytes, error: BucketServeError | None) -> bytes:
        """Returns the result of a request that failed; without an error, of one that the job's end came before."""


class _NativeWork:
    """The requests of JobService: messages of the native API."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate

    async def run(self, job: JobInfo, index: int, item: bytes, room: Room) -> bytes:
        request = inference_pb2.GenerateRequest.FromString(item)
        result = job_pb2.FetchJobResultsResponse(index=index, request_id=request.request_id)
        # A name of its own: the scheduler may still know the run of a runner that is gone.
        request.request_id = f"{job.job_id}/{index}/{uuid.uuid4().hex[:8]}"
        texts = list[str]()
        async with contextlib.aclosing(self._generate(request, {}, None)) as responses:  # type: ignore[type-var]
            async for response in responses:
                match response.WhichOneof("event"):
                    case "chunk":
                        room.grow(text_bytes(response.chunk.text) + len(response.chunk.token_ids) * ID_BYTES)
                        texts.append(response.chunk.text)
                        result.token_ids.extend(response.chunk.token_ids)
                    case "finished":
                        result.finished.CopyFrom(response.finished)
        result.text = "".join(texts)
        return result.SerializeToString()

    def failed(self, job: JobInfo, index: int, item: bytes, error: BucketServeError | None) -> bytes:
        request = inference_pb2.GenerateRequest.FromString(item)
        reason, message = (error.reason, str(error)) if error else ("CANCELLED", "the job is over")
        return job_pb2.FetchJobResultsResponse(
            index=index, request_id=request.request_id, error_reason=reason, error_message=message
        ).SerializeToString()


class JobRunner:
    """Owns the job requests that run in this process: (job id, index) -> task."""

    def __init__(
        self,
        store: JobStore,
        generate: Generate,
        gateway_id: str,
        settings: GatewaySettings,
        telemetry: GatewayTelemetry,
        admission: Admission,
        room: JobRoom | None = None,
        *,
        batches: Work | None = None,
    ) -> None:
        """Runs nothing yet. The owner's name is new with every process: leases of the one before must run out."""
        self._store = store
        self._native = _NativeWork(generate)
        self._batches = batches
        self._owner = f"{gateway_id}/{uuid.uuid4().hex[:8]}"
        self._settings = settings
        self._telemetry = telemetry
        self._admission = admission
        self._room = room
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._running: dict[tuple[str, int], tuple[str, int]] = {}
        """Tenant and bytes of each request in _tasks."""
        self._waiting: set[tuple[str, int]] = set()
        """Those of _tasks that could not be served for a reason of their own, and are to be tried again."""

    async def run(self) -> None:
        """Looks for work, for ever; on cancellation gives back what has not finished."""
        try:
            while True:
                try:
                    await self._renew()
                    await self._claim()
                except UnavailableError as error:
                    # What runs goes on; its results wait for the store.
                    self._telemetry.job_store_unavailable(str(error))
                    await asyncio.sleep(STORE_RETRY_S)
                except Exception as error:
                    # Jobs are not worth the gateway, whose other streams would end with this task.
                    self._telemetry.unexpected("job-runner", error)
                    await asyncio.sleep(STORE_RETRY_S)
                await asyncio.sleep(LOOK_S)
        finally:
            await self._give_back()

    async def _claim(self) -> None:
        """Takes work, turn by turn, from the jobs that have least running here."""
        jobs = await self._store.open_jobs(self._sealed)
        for job in [job for job in jobs if job.is_over]:
            jobs.remove(job)
            try:
                await self._end(job)
            except SealedError as error:
                self._sealed(error)
        while jobs and len(self._tasks) - len(self._waiting) < self._settings.job_concurrency:
            of_tenant = Counter(tenant for tenant, _ in self._running.values())
            of_job = Counter(job_id for job_id, _ in self._running)
            # The oldest of equals, since that is how they come.
            job = min(jobs, key=lambda job: (of_tenant[job.tenant], of_job[job.job_id]))
            # A job whose model has no worker may have all places for itself, and takes none from other jobs.
            waiting = sum(job_id != job.job_id for job_id, _ in self._waiting)
            free = self._settings.job_concurrency - len(self._tasks) + waiting
            if free <= 0:
                jobs.remove(job)
                continue
            # Some places are kept for jobs that have none.
            most = min(free - max(self._settings.job_concurrency // 8, 1), -(-free // len(jobs)))
            if not of_job[job.job_id]:
                most = max(most, 1)
            num_bytes = sum(size for _, size in self._running.values())
            if num_bytes >= MAX_RUNNING_BYTES:
                return
            if most <= 0 or not await self._claim_from(job, most, MAX_RUNNING_BYTES - num_bytes):
                jobs.remove(job)

    async def _claim_from(self, job: JobInfo, most: int, max_bytes: int) -> bool:
        """Starts at most so many requests of a job; returns whether there was one."""
        try:
            claimed = await self._store.claim(job.job_id, self._owner, most, self._settings.job_lease_s, max_bytes)
        except SealedError as error:
            self._sealed(error)
            return False
        losses = await self._store.losses(job.job_id, [index for index, _ in claimed])
        for (index, item), num_lost in zip(claimed, losses, strict=True):
            key = (job.job_id, index)
            # One that the store has lost can't be run.
            run = self._run_item if item and num_lost < MAX_LOSSES else self._give_up_item
            task = asyncio.create_task(run(job, index, item), name=f"job-{index}")
            self._tasks[key] = task
            self._running[key] = (job.tenant, len(item))
            task.add_done_callback(partial(self._done, key))
        if claimed and self._room is not None:
            await self._room.keep(job.submission, job.ttl_s)
        return bool(claimed)

    async def _renew(self) -> None:
        """Keeps the leases; stops what is not ours any more or whose job was cancelled."""
        for job_id, indices in self._by_job().items():
            ours = await self._store.renew(job_id, self._owner, indices, self._settings.job_lease_s)
            for index in indices:
                task = self._tasks.get((job_id, index))
                if index not in ours and task is not None:
                    task.cancel()

    async def _end(self, job: JobInfo) -> None:
        """Gives requests of a job that is over, those that run here among them, a result that says so."""
        mine = {index: task for (job_id, index), task in self._tasks.items() if job_id == job.job_id}
        for task in mine.values():
            task.cancel()
        if mine:
            await asyncio.wait(mine.values())
            await self._store.release(job.job_id, self._owner, list(mine))
        claimed = await self._store.claim(job.job_id, self._owner, ENDED_AT_ONCE, self._settings.job_lease_s)
        work = self._work_of(job)
        for start in range(0, len(claimed), KEPT_AT_ONCE):
            some = claimed[start : start + KEPT_AT_ONCE]
            await asyncio.gather(
                *(self._keep(job, index, work.failed(job, index, item, None), is_error=True) for index, item in some)
            )

    async def _run_item(self, job: JobInfo, index: int, item: bytes) -> None:
        # Until the result is stored.
        with self._admission.room() as room:
            await self._run_in(room, job, index, item)

    async def _run_in(self, room: Room, job: JobInfo, index: int, item: bytes) -> None:
        work, is_error = self._work_of(job), True
        while True:
            try:
                room.resize(0)
                result, is_error = await work.run(job, index, item, room), False
            except (OverloadedError, UnavailableError) as error:
                if room.is_too_small:
                    never = UnavailableError("its result is too large for this gateway", reason="TOO_LARGE")
                    result = work.failed(job, index, item, never)
                elif error.reason in FOREVER:
                    result = work.failed(job, index, item, error)
                else:
                    # What was collected is gone.
                    room.resize(0)
                    is_its_own = isinstance(error, UnavailableError | QuotaExceededError)
                    await self._pause((job.job_id, index), max(error.retry_delay_s, LOOK_S), is_its_own=is_its_own)
                    continue
            except UnknownModelError:
                # It was known when the job came: its adapter's worker is away, or this gateway knows of none yet.
                await self._pause((job.job_id, index), LOOK_S, is_its_own=True)
                continue
            except BucketServeError as error:
                result = work.failed(job, index, item, error)
            except Exception as error:
                # A result like any other: without one the request would be run again for ever.
                self._telemetry.unexpected("job", error)
                result = work.failed(job, index, item, BucketServeError("internal error"))
            break
        await self._finish(job, index, result, is_error=is_error)

    async def _pause(self, key: tuple[str, int], delay_s: float, *, is_its_own: bool) -> None:
        """Waits before a request is tried again; is_its_own: others may be served meanwhile."""
        if is_its_own:
            self._waiting.add(key)
        try:
            await asyncio.sleep(delay_s)
        finally:
            self._waiting.discard(key)

    async def _give_up_item(self, job: JobInfo, index: int, item: bytes) -> None:
        """Stores that a request ends the gateways that run it, or that the store has lost it."""
        error = UnavailableError(f"{MAX_LOSSES} gateways ended while they ran it", reason="ATTEMPTS_EXHAUSTED")
        if not item:
            error = UnavailableError("the store has lost the request", reason="REQUEST_LOST")
        await self._finish(job, index, self._work_of(job).failed(job, index, item, error), is_error=True)

    def _sealed(self, error: SealedError) -> None:
        """Reports a job that can't be opened here; the others go on."""
        self._telemetry.job_store_unavailable(str(error))

    def _work_of(self, job: JobInfo) -> Work:
        if not job.note:
            return self._native
        assert self._batches is not None, "whoever runs batches was given what they are"
        return self._batches

    async def _finish(self, job: JobInfo, index: int, result: bytes, *, is_error: bool) -> None:
        while True:
            try:
                await self._keep(job, index, result, is_error=is_error)
                return
            except UnavailableError:
                await asyncio.sleep(STORE_RETRY_S)

    async def _keep(self, job: JobInfo, index: int, result: bytes, *, is_error: bool) -> None:
        is_stored = await self._store.finish(job.job_id, self._owner, index, result, is_error=is_error)
        self._telemetry.job_request_done(is_stored, is_error)

    def _done(self, key: tuple[str, int], task: asyncio.Task[None]) -> None:
        # A request that was lost and claimed again has a new task, which stays.
        if self._tasks.get(key) is task:
            del self._tasks[key], self._running[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._telemetry.unexpected("job", error)

    def _by_job(self) -> dict[str, list[int]]:
        """Returns the indices that run here, by job."""
        jobs: dict[str, list[int]] = {}
        for job_id, index in self._tasks:
            jobs.setdefault(job_id, []).append(index)
        return jobs

    async def _give_back(self) -> None:
        jobs, tasks = self._by_job(), list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Without the store the leases run out by themselves.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GIVE_BACK_S):
                await asyncio.gather(*(self._release(job_id, indices) for job_id, indices in jobs.items()))

    async def _release(self, job_id: str, indices: list[int]) -> None:
        with contextlib.suppress(UnavailableError, NotFoundError):
            await self._store.release(job_id, self._owner, indices)
