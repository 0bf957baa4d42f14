"""A client that goes away, and a deadline that passes, in every phase: the work stops by the next step, nothing stays.

What is left in the stack (KV, leases, keys, requests, files, tasks) is looked at by the fixture after each test.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import pytest

from bucketserve.client import BucketServeClient, Chunk
from bucketserve.core.errors import DeadlineError
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric, status

pytestmark = pytest.mark.e2e

DEADLINE_S = 2.5
"""Longer than it takes to get into any of the phases, shorter than the lease of a worker that is paused."""
PROMPT, OUTPUT = 600, 1400
SLOW = {
    "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "20000",
    "BUCKETSERVE_WORKER_MAX_STEP_TOKENS": "16",
}
SLOW_PREFILL = {**SLOW, "BUCKETSERVE_WORKER_FAKE_PREFILL_US_PER_TOKEN": "5000"}
LARGE_STEPS = {**SLOW, "BUCKETSERVE_WORKER_MAX_STEP_TOKENS": "2048"}
WAYS = ["goes_away", "deadline"]


class Leaver:
    """A request of a client that leaves, one way or the other."""

    def __init__(self, client: BucketServeClient, way: str) -> None:
        self._client = client
        self._way = way
        self.num_tokens = 0
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        timeout_s = DEADLINE_S if self._way == "deadline" else None
        events = self._client.generate(token_ids=[5] * PROMPT, max_tokens=OUTPUT, ignore_eos=True, timeout_s=timeout_s)
        async for event in events:
            if isinstance(event, Chunk):
                self.num_tokens += len(event.token_ids)

    async def leave(self) -> None:
        """Goes away, or waits until the deadline has passed."""
        if self._way == "deadline":
            with pytest.raises(DeadlineError):
                await self._task
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


@contextlib.asynccontextmanager
async def paused(stack: LocalStack, worker: str) -> AsyncIterator[None]:
    """A worker that takes no orders for a while, but is there."""
    stack.services[worker].signal(signal.SIGSTOP)
    try:
        yield
    finally:
        stack.services[worker].signal(signal.SIGCONT)


async def nothing_runs(stack: LocalStack) -> bool:
    now = await status(stack)
    reports = [worker.report for worker in now.workers]
    return (
        now.num_waiting == now.num_running == 0
        and len(reports) == len(stack.worker_names())
        and all(each.num_running == each.num_waiting == 0 for each in reports)
        and all(each.kv_free_tokens == each.kv_total_tokens for each in reports)
        and metric(stack, "gateway", "bucketserve_gateway_open_requests") == 0
    )


def prefilled(stack: LocalStack) -> float:
    return sum(metric(stack, name, "bucketserve_worker_prefill_tokens_total") for name in stack.worker_names())


def generated(stack: LocalStack) -> float:
    return sum(metric(stack, name, "vllm:generation_tokens_total") for name in stack.worker_names())


@pytest.mark.stack(environ={**SLOW, "BUCKETSERVE_WORKER_MAX_SEQUENCES": "1"})
@pytest.mark.parametrize("way", WAYS)
async def test_client_goes_away_while_it_is_queued(stack: LocalStack, way: str) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        holder = asyncio.create_task(client.generate_text("And", max_tokens=2000, ignore_eos=True))
        await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") == 1)
        before = prefilled(stack)
        leaver = Leaver(client, way)

        async def num_waiting() -> int:
            return (await status(stack)).num_waiting

        await eventually(num_waiting, DEADLINE_S)
        await leaver.leave()

        async def is_forgotten() -> bool:
            return await num_waiting() == 0 and metric(stack, "gateway", "bucketserve_gateway_open_requests") == 1

        await eventually(is_forgotten, 10)
        # The one in front of it is none the worse, and it never came to a worker.
        assert not holder.done()
        assert prefilled(stack) == before
        holder.cancel()
        await asyncio.wait([holder])
        await eventually(lambda: nothing_runs(stack), 10)


@pytest.mark.parametrize("way", WAYS)
async def test_client_goes_away_while_its_batch_is_claimed(new_stack: NewStack, way: str) -> None:
    # Of its own: a scheduler that knows how slow it is would not even begin what is due before it can be prefilled.
    stack = new_stack(environ=SLOW_PREFILL)
    async with BucketServeClient(stack.gateway_address) as client:
        async with paused(stack, "worker-0"):
            leaver = Leaver(client, way)

            async def is_claimed() -> bool:
                return (await status(stack)).num_running == 1

            await eventually(is_claimed, DEADLINE_S)
            await leaver.leave()
        await eventually(lambda: nothing_runs(stack), 10)
    assert prefilled(stack) < PROMPT
    assert leaver.num_tokens == generated(stack) == 0


@pytest.mark.parametrize("way", WAYS)
async def test_client_goes_away_during_prefill(new_stack: NewStack, way: str) -> None:
    stack = new_stack(environ=SLOW_PREFILL)
    # 16 tokens a step, 5 ms each: three seconds and more in all.
    async with BucketServeClient(stack.gateway_address) as client:
        leaver = Leaver(client, way)
        await eventually(lambda: prefilled(stack) > 0, DEADLINE_S)
        await leaver.leave()
        await eventually(lambda: nothing_runs(stack), 10)
    assert prefilled(stack) < PROMPT
    assert leaver.num_tokens == generated(stack) == 0


@pytest.mark.stack(roles=("prefill", "decode"), environ=LARGE_STEPS)
@pytest.mark.parametrize("way", WAYS)
async def test_client_goes_away_while_kv_is_in_flight(stack: LocalStack, way: str) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        # The decode worker has its order to pull, and can't.
        async with paused(stack, "worker-1"):
            leaver = Leaver(client, way)
            await eventually(lambda: metric(stack, "worker-0", "bucketserve_worker_kv_held_tokens") > 0, DEADLINE_S)
            await leaver.leave()
        await eventually(lambda: nothing_runs(stack), 10)
    assert metric(stack, "worker-0", "bucketserve_worker_kv_held_tokens") == 0
    assert generated(stack) < 100


@pytest.mark.stack(environ=LARGE_STEPS)
@pytest.mark.parametrize("way", WAYS)
async def test_client_goes_away_during_decode(stack: LocalStack, way: str) -> None:
    await leave_during_decode(stack, way)


@pytest.mark.stack(roles=("prefill", "decode"), environ=LARGE_STEPS)
@pytest.mark.parametrize("way", WAYS)
async def test_client_goes_away_during_decode_at_a_decode_worker(stack: LocalStack, way: str) -> None:
    await leave_during_decode(stack, way)


async def leave_during_decode(stack: LocalStack, way: str) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        leaver = Leaver(client, way)
        await eventually(lambda: leaver.num_tokens > 5, DEADLINE_S)
        await leaver.leave()
        await eventually(lambda: nothing_runs(stack), 10)
    assert 5 < generated(stack) < OUTPUT
