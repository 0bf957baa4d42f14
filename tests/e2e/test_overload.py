"""Ten times more than the system can take: bounded, refused at once with a delay, and well again at once."""

from __future__ import annotations

import asyncio
import statistics
import time

import pytest

from bucketserve.client import BucketServeClient
from bucketserve.core.errors import BucketServeError, OverloadedError
from tests.e2e.conftest import NewStack, eventually, metric, status
from tests.e2e.test_stack import run

pytestmark = pytest.mark.e2e

QUEUE = 40
SMALL = {
    "BUCKETSERVE_WORKER_MAX_SEQUENCES": "8",
    "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "10000",
    "BUCKETSERVE_SCHEDULER_MAX_QUEUED_REQUESTS": str(QUEUE),
    "BUCKETSERVE_SCHEDULER_MAX_BATCH_SHARE": "0.5",
}


async def attempt(client: BucketServeClient, **more) -> tuple[BucketServeError | None, float]:
    start_s = time.monotonic()
    try:
        tokens, _ = await run(client, 20, 20, **more)
    except BucketServeError as error:
        return error, time.monotonic() - start_s
    assert len(tokens) == 20
    return None, time.monotonic() - start_s


async def test_overload_is_refused_at_once_and_over_at_once(new_stack: NewStack) -> None:
    stack = new_stack(environ=SMALL)
    async with BucketServeClient(stack.gateway_address) as client:
        results = await asyncio.gather(*(attempt(client) for _ in range(10 * QUEUE)))
        served = [took_s for error, took_s in results if error is None]
        refused = [(error, took_s) for error, took_s in results if error is not None]
        # What the queue and the worker hold is served; the rest is told when to come back, sooner than the served wait.
        assert QUEUE <= len(served) < len(results) / 2
        assert all(isinstance(error, OverloadedError) and error.retry_delay_s > 0 for error, _ in refused)
        assert statistics.median(took_s for _, took_s in refused) < statistics.median(served)
        assert metric(stack, "scheduler", "bucketserve_scheduler_refused_total") == len(refused)
        error, _ = await attempt(client)
        assert error is None

        async def is_empty() -> bool:
            now = await status(stack)
            return now.num_waiting == now.num_running == 0

        await eventually(is_empty)


async def test_batch_work_gives_way_first(new_stack: NewStack) -> None:
    stack = new_stack(environ=SMALL)
    async with BucketServeClient(stack.gateway_address) as client:
        batch = [asyncio.create_task(attempt(client, is_batch=True)) for _ in range(3 * QUEUE)]
        await eventually(lambda: metric(stack, "scheduler", "bucketserve_scheduler_refused_total") > 0)
        urgent = await asyncio.gather(*(attempt(client) for _ in range(QUEUE // 4)))
        results = await asyncio.gather(*batch)
    assert [error for error, _ in urgent] == [None] * len(urgent)
    refused = sum(error is not None for error, _ in results)
    # Half of the queue is closed to batch work, and what came later but is urgent went before what was let in.
    assert refused >= QUEUE
    assert max(took_s for _, took_s in urgent) < max(took_s for error, took_s in results if error is None)
