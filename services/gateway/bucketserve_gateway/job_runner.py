"""Runs batch jobs: claims requests from Redis, generates as for any client, stores results.

The requests are of class BATCH: the scheduler gives them what interactive ones leave. Here only their number is
bounded, so that jobs of any size hold little memory and leave the scheduler's queue to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial

from bucketserve.core.errors import (
    BucketServeError,
    NotFoundError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
)
from bucketserve.store.jobs import JobStore
from bucketserve.v1 import inference_pb2, job_pb2
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.telemetry import GatewayTelemetry

__all__ = ["JobRunner"]

LOOK_S = 0.5
STORE_RETRY_S = 1.0
FOREVER = ("ATTEMPTS_EXHAUSTED", "TOO_LARGE")
"""Reasons of UNAVAILABLE that waiting does not help."""

Generate = Callable[
    [inference_pb2.GenerateRequest, Mapping[str, str], float | None], AsyncIterator[inference_pb2.GenerateResponse]
]


class JobRunner:
    """Owns the job requests that run in this process: (job id, index) -> task."""

    def __init__(
        self,
        store: JobStore,
        generate: Generate,
        gateway_id: str,
        settings: GatewaySettings,
        telemetry: GatewayTelemetry,
    ) -> None:
        """Runs nothing yet. The owner's name is new with every process: leases of the one before must run out."""
        self._store = store
        self._generate = generate
        self._owner = f"{gateway_id}/{uuid.uuid4().hex[:8]}"
        self._settings = settings
        self._telemetry = telemetry
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}

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
        """Takes work from the oldest job that has some."""
        free = self._settings.job_concurrency - len(self._tasks)
        if free <= 0:
            return
        for job in await self._store.open_jobs():
            claimed = await self._store.claim(job.job_id, self._owner, free, self._settings.job_lease_s)
            for index, item in claimed:
                key = (job.job_id, index)
                task = asyncio.create_task(self._run_item(job.job_id, index, item), name=f"job-{index}")
                self._tasks[key] = task
                task.add_done_callback(partial(self._done, key))
            free -= len(claimed)
            if free <= 0:
                return

    async def _renew(self) -> None:
        """Keeps the leases; stops what is not ours any more or whose job was cancelled."""
        for job_id, indices in self._by_job().items():
            ours = await self._store.renew(job_id, self._owner, indices, self._settings.job_lease_s)
            for index in indices:
                task = self._tasks.get((job_id, index))
                if index not in ours and task is not None:
                    task.cancel()

    async def _run_item(self, job_id: str, index: int, item: bytes) -> None:
        request = inference_pb2.GenerateRequest.FromString(item)
        result = job_pb2.FetchJobResultsResponse(index=index, request_id=request.request_id)
        while True:
            # A name of its own: the scheduler may still know the run of a runner that is gone.
            request.request_id = f"{job_id}/{index}/{uuid.uuid4().hex[:8]}"
            try:
                await self._generate_into(result, request)
            except (OverloadedError, UnavailableError) as error:
                if error.reason not in FOREVER:
                    await asyncio.sleep(max(error.retry_delay_s, LOOK_S))
                    continue
                result.error_reason, result.error_message = error.reason, str(error)
            except RequestCancelledError:
                # By the scheduler, to which this gateway was lost for a while; nobody has called off the job.
                await asyncio.sleep(LOOK_S)
                continue
            except BucketServeError as error:
                result.error_reason, result.error_message = error.reason, str(error)
            except Exception as error:
                # A result like any other: without one the request would be run again for ever.
                self._telemetry.unexpected("job", error)
                result.error_reason, result.error_message = "INTERNAL", "internal error"
            break
        await self._finish(job_id, index, result)

    async def _generate_into(
        self, result: job_pb2.FetchJobResultsResponse, request: inference_pb2.GenerateRequest
    ) -> None:
        text, token_ids = [], list[int]()
        async with contextlib.aclosing(self._generate(request, {}, None)) as responses:  # type: ignore[type-var]
            async for response in responses:
                match response.WhichOneof("event"):
                    case "chunk":
                        text.append(response.chunk.text)
                        token_ids += response.chunk.token_ids
                    case "finished":
                        result.finished.CopyFrom(response.finished)
        result.text = "".join(text)
        result.token_ids.extend(token_ids)

    async def _finish(self, job_id: str, index: int, result: job_pb2.FetchJobResultsResponse) -> None:
        payload, is_error = result.SerializeToString(), bool(result.error_reason)
        while True:
            try:
                is_stored = await self._store.finish(job_id, self._owner, index, payload, is_error=is_error)
                break
            except UnavailableError:
                await asyncio.sleep(STORE_RETRY_S)
        self._telemetry.job_request_done(is_stored, is_error)

    def _done(self, key: tuple[str, int], task: asyncio.Task[None]) -> None:
        # A request that was lost and claimed again has a new task, which stays.
        if self._tasks.get(key) is task:
            del self._tasks[key]
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
        for job_id, indices in jobs.items():
            # Without the store the leases run out by themselves.
            with contextlib.suppress(UnavailableError, NotFoundError):
                await self._store.release(job_id, self._owner, indices)
