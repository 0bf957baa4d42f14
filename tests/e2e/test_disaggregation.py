"""Prefill and decode in different processes: KV moves, tokens stay the same, nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import pytest

from bucketserve.client import BucketServeClient
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import NewStack
from tests.e2e.observe import events, eventually, metric, status
from tests.e2e.test_stack import SLOW, run

pytestmark = pytest.mark.e2e

PREFILL, DECODE = "worker-0", "worker-1"
SMALL_DECODE = ({}, {"BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": "600"})


def transfers(stack: LocalStack, worker: str = DECODE, **labels: str) -> float:
    return metric(stack, worker, "bucketserve_worker_kv_transfers_total", **labels)


async def is_clean(stack: LocalStack) -> bool:
    """Whether every worker that is connected holds nothing."""
    now = await status(stack)
    return now.num_running == now.num_waiting == 0 and all(
        worker.report.kv_free_tokens == worker.report.kv_total_tokens for worker in now.workers
    )


@pytest.mark.parametrize("engine", ["fake", "transformers"])
async def test_tokens_are_those_of_one_worker_that_does_both(new_stack: NewStack, engine: str) -> None:
    lengths = [(1, 5), (7, 1), (33, 20), (150, 12), (300, 30), (64, 2)]
    both = new_stack(engine=engine)
    async with BucketServeClient(both.gateway_address) as client:
        wanted = [(await run(client, *length))[0] for length in lengths]
    split = new_stack(engine=engine, roles=("prefill", "decode"))
    async with BucketServeClient(split.gateway_address) as client:
        results = await asyncio.gather(*(run(client, *length) for length in lengths * 3))
    assert [tokens for tokens, _ in results] == wanted * 3
    assert {finished.attempts for _, finished in results} == {1}
    # All but those that ended with their first token went over, and through shared memory: both are on this host.
    # Twice, if pages of another request of that prompt were there when it was asked, and gone when they were needed.
    await eventually(lambda: transfers(split) >= 15)
    assert transfers(split, transport="shared_memory") == transfers(split)
    assert metric(split, DECODE, "bucketserve_worker_prefill_tokens_total") == 0
    await eventually(lambda: is_clean(split))


async def test_what_the_decode_side_has_of_a_tenant_s_prompt_does_not_move(new_stack: NewStack) -> None:
    environ = {"BUCKETSERVE_WORKER_NUM_THREADS": "1"}
    stack = new_stack(engine="transformers", roles=("prefill", "decode"), environ=environ)
    async with BucketServeClient(stack.gateway_address) as client:
        # Five pages and a bit.
        first, _ = await run(client, 167, 9, tenant="alice")
        whole = metric(stack, DECODE, "bucketserve_worker_kv_transfer_bytes_total")
        more = await asyncio.gather(*(run(client, 167, 9, tenant="alice") for _ in range(6)))
        await eventually(lambda: transfers(stack) == 7)
        assert metric(stack, DECODE, "bucketserve_worker_kv_transfer_known_pages_total") == 6 * 5
        assert metric(stack, DECODE, "bucketserve_worker_kv_transfer_bytes_total") == whole + 6 * whole * 7 / 167
        other = await run(client, 167, 9, tenant="bob")
        await eventually(lambda: transfers(stack) == 8)
        assert metric(stack, DECODE, "bucketserve_worker_kv_transfer_known_pages_total") == 6 * 5
    assert [tokens for tokens, _ in (*more, other)] == [first] * 7
    assert {finished.attempts for _, finished in (*more, other)} == {1}
    await eventually(lambda: is_clean(stack))


@pytest.mark.stack(roles=("prefill", "decode"), environ=SLOW, worker_environ=SMALL_DECODE)
async def test_a_full_decode_side_holds_the_prefill_side_back(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, 100, 100)
        running = [asyncio.create_task(run(client, 100, 100)) for _ in range(8)]
        # Two fit on the decode side; the others' KV waits where it was computed, and counts as used there.
        await eventually(lambda: metric(stack, PREFILL, "bucketserve_worker_kv_held_tokens") >= 400)
        results = await asyncio.gather(*running)
    assert [tokens for tokens, _ in results] == [wanted] * 8
    await eventually(lambda: is_clean(stack))


@pytest.mark.stack(roles=("prefill", "decode"), environ=SLOW)
@pytest.mark.parametrize("victim", [PREFILL, DECODE])
async def test_either_side_may_die_under_load(stack: LocalStack, victim: str) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, 60, 150)
        running = [asyncio.create_task(run(client, 60, 150)) for _ in range(8)]
        await eventually(lambda: metric(stack, DECODE, "vllm:num_requests_running") >= 4)
        stack.services[victim].signal(signal.SIGKILL)
        stack.services[victim].wait(5)
        stack.restart(victim)
        results = await asyncio.gather(*running)
    assert [tokens for tokens, _ in results] == [wanted] * 8
    await eventually(lambda: is_clean(stack))


async def test_a_new_leader_finds_everything_where_it_is(new_stack: NewStack) -> None:
    # Four of them fit the decode side with all their output, and five do not with any: nobody is let go there.
    prompt_tokens, max_tokens = 240, 50
    small = ({}, {"BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": str(4 * (prompt_tokens + max_tokens))})
    stack = new_stack(roles=("prefill", "decode"), environ=SLOW, worker_environ=small)
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, prompt_tokens, max_tokens)
        running = [asyncio.create_task(run(client, prompt_tokens, max_tokens)) for _ in range(8)]
        await eventually(lambda: metric(stack, PREFILL, "bucketserve_worker_kv_held_tokens") >= 2 * prompt_tokens)
        stack.services["scheduler"].signal(signal.SIGKILL)
        stack.services["scheduler"].wait(5)
        stack.restart("scheduler")
        results = await asyncio.gather(*running)
    assert [tokens for tokens, _ in results] == [wanted] * 8
    # Decodes went on and held KV was handed over: nothing was computed twice. What was just being sent to a worker has
    # a second attempt, and may have.
    computed = metric(stack, PREFILL, "bucketserve_worker_prefill_tokens_total")
    assert computed == (1 + len(running)) * prompt_tokens
    await eventually(lambda: is_clean(stack))


@pytest.mark.stack(roles=("prefill", "decode"), environ=SLOW, worker_environ=SMALL_DECODE)
async def test_cancelled_requests_free_both_sides(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        running = [asyncio.create_task(run(client, 100, 150)) for _ in range(12)]
        await eventually(lambda: metric(stack, PREFILL, "bucketserve_worker_kv_held_tokens") >= 300)
        for task in running:
            task.cancel()
        for task in running:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await eventually(lambda: is_clean(stack))
        assert (await run(client, 10, 5))[1].attempts == 1


async def test_a_worker_changes_sides_under_load_and_nothing_is_lost(new_stack: NewStack) -> None:
    stack = new_stack(
        roles=("prefill", "decode", "decode"),
        environ={
            **SLOW,
            "BUCKETSERVE_WORKER_FAKE_PREFILL_US_PER_TOKEN": "2000",
            "BUCKETSERVE_SCHEDULER_SWITCH_ROLES": "true",
        },
    )
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, 200, 60)
        # 60 prompts of 0.4 s and more: prefill is short for long enough. No two begin alike, or it would seem less.
        early = [asyncio.create_task(run(client, 200 + i, 60)) for i in range(60)]
        await eventually(lambda: events(stack, "scheduler", "worker.role_switched"))
        (switch,) = events(stack, "scheduler", "worker.role_switched")
        assert switch["role"] == "prefill"
        roles = {worker.worker_id: worker.role for worker in (await status(stack)).workers}
        assert roles[switch["worker_id"]] == common_pb2.WORKER_ROLE_PREFILL
        results = await asyncio.gather(*early, *(run(client, 200 + i, 60) for i in range(20)))
        assert metric(stack, switch["worker_id"], "bucketserve_worker_prefill_tokens_total") > 0
    outputs = [tokens for tokens, _ in results]
    assert (outputs[0], outputs[60:]) == (wanted, outputs[:20])
    assert {finished.attempts for _, finished in results} == {1}
    await eventually(lambda: is_clean(stack))


async def test_held_kv_is_freed_when_no_scheduler_comes_back(new_stack: NewStack) -> None:
    small = ({"BUCKETSERVE_WORKER_KV_LEASE_S": "2"}, {"BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": "600"})
    stack = new_stack(roles=("prefill", "decode"), environ=SLOW, worker_environ=small)
    async with BucketServeClient(stack.gateway_address) as client:
        running = [asyncio.create_task(run(client, 100, 150)) for _ in range(8)]
        await eventually(lambda: metric(stack, PREFILL, "bucketserve_worker_kv_held_tokens") >= 300)
        stack.services["scheduler"].signal(signal.SIGKILL)
        stack.services["scheduler"].wait(5)
        await eventually(lambda: events(stack, PREFILL, "kv.leases_expired"))
        stack.restart("scheduler")
        results = await asyncio.gather(*running)
    assert len({tuple(tokens) for tokens, _ in results}) == 1
    await eventually(lambda: is_clean(stack))
