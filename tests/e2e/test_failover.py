"""What happens to streams and new requests when a scheduler or Redis dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time

import pytest

from bucketserve.client import BucketServeClient, Finished
from bucketserve.core.errors import UnavailableError
from bucketserve.store.embedded import EmbeddedServer
from bucketserve_cli.stack import LocalStack, free_port
from tests.e2e.conftest import NewStack, eventually, metric, status
from tests.e2e.test_stack import run

pytestmark = pytest.mark.e2e

SLOW = {"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "20000"}


def events(stack: LocalStack, service: str, event: str) -> list[dict]:
    lines = stack.services[service].log_path.read_text().splitlines()
    return [entry for line in lines if line.startswith("{") and (entry := json.loads(line)).get("event") == event]


def leader_of(stack: LocalStack) -> tuple[str, str]:
    """Names of the scheduler that took the seat last and of the other one."""
    taken = {name: events(stack, name, "seat.taken") for name in ("scheduler", "scheduler-1")}
    leader = max(taken, key=lambda name: max((entry["epoch"] for entry in taken[name]), default=0))
    return leader, "scheduler-1" if leader == "scheduler" else "scheduler"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_the_standby_takes_over_and_streams_never_notice(new_stack: NewStack, how: signal.Signals) -> None:
    stack = new_stack(num_schedulers=2, num_workers=2, environ=SLOW)
    leader, standby = leader_of(stack)
    assert not events(stack, standby, "seat.taken")
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, 30, 200)
        running = [asyncio.create_task(run(client, 30, 200)) for _ in range(6)]
        await eventually(lambda: sum(metric(stack, w, "vllm:num_requests_running") for w in stack.worker_names()) >= 6)
        stack.services[leader].signal(how)
        asked_s = time.monotonic()
        late, _ = await run(client, 30, 5)
        took_s = time.monotonic() - asked_s
        results = await asyncio.gather(*running)
    assert late == wanted[:5]
    assert [tokens for tokens, _ in results] == [wanted] * 6
    assert {finished.attempts for _, finished in results} == {1}
    assert len(events(stack, standby, "seat.taken")) == 1
    # Not a limit on speed: far beyond the lease it would mean that somebody waits for something else than the lease.
    assert took_s < 15


async def test_a_paused_leader_that_wakes_can_not_write(new_stack: NewStack) -> None:
    stack = new_stack(num_schedulers=2, environ=SLOW)
    leader, standby = leader_of(stack)
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, 20, 40)
        stack.services[leader].signal(signal.SIGSTOP)
        try:
            await eventually(lambda: events(stack, standby, "seat.taken"))
            # A paused process keeps its connections open: peers notice by keepalive that nobody answers.
            tokens, _ = await run(client, 20, 40)
            assert tokens == wanted
        finally:
            stack.services[leader].signal(signal.SIGCONT)
        await eventually(lambda: events(stack, leader, "seat.lost"))
        results = await asyncio.gather(*(run(client, 20, 40) for _ in range(4)))
    assert [tokens for tokens, _ in results] == [wanted] * 4
    # It never leads again while the other one lives.
    assert len(events(stack, leader, "seat.taken")) == 1
    epochs = [entry["epoch"] for name in (leader, standby) for entry in events(stack, name, "leader.elected")]
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize("outage_s", [0.5, 6.0])
async def test_redis_gone_and_back_without_its_data(new_stack: NewStack, outage_s: float) -> None:
    port = free_port()
    with contextlib.ExitStack() as servers:
        first = servers.enter_context(EmbeddedServer(port))
        stack = new_stack(num_workers=2, redis_url=first.url, environ=SLOW)
        async with BucketServeClient(stack.gateway_address) as client:
            wanted, _ = await run(client, 25, 250)
            running = [asyncio.create_task(run(client, 25, 250)) for _ in range(6)]
            await eventually(
                lambda: sum(metric(stack, w, "vllm:num_requests_running") for w in stack.worker_names()) >= 6
            )
            os.kill(first.pid, signal.SIGKILL)
            waiting = [asyncio.create_task(run(client, 25, 10)) for _ in range(3)]
            await asyncio.sleep(outage_s)
            servers.enter_context(EmbeddedServer(port))
            results = await asyncio.gather(*running)
            late = await asyncio.gather(*waiting)
            again, _ = await run(client, 25, 10)
    # Nothing was lost, nothing came twice, and what ran did not even start again.
    for tokens, finished in results:
        same = next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), len(tokens))
        assert tokens == wanted, f"{len(tokens)} tokens, the first {same} right; {finished}"
    assert {finished.attempts for _, finished in results} == {1}
    assert [tokens for tokens, _ in late] == [wanted[:10]] * 3
    assert again == wanted[:10]


async def test_a_paused_worker_counts_as_dead_and_is_ignored_when_it_wakes(new_stack: NewStack) -> None:
    stack = new_stack(num_workers=2, environ={**SLOW, "BUCKETSERVE_SCHEDULER_WORKER_LEASE_S": "2"})
    async with BucketServeClient(stack.gateway_address) as client:
        wanted = [(await run(client, 10 + i, 250))[0] for i in range(2)]
        running = [asyncio.create_task(run(client, 10 + i % 2, 250)) for i in range(6)]
        await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") >= 2)
        stack.services["worker-0"].signal(signal.SIGSTOP)
        await eventually(lambda: events(stack, "scheduler", "worker.lost"))
        await eventually(lambda: metric(stack, "worker-1", "vllm:num_requests_running") >= 5)
        # Awake again while the others still stream: what it sends belongs to attempts that nobody waits for.
        stack.services["worker-0"].signal(signal.SIGCONT)
        results = await asyncio.gather(*running)
        assert [tokens for tokens, _ in results] == [wanted[i % 2] for i in range(6)]
        assert max(finished.attempts for _, finished in results) == 2

        async def is_clean() -> bool:
            now = await status(stack)
            reports = [worker.report for worker in now.workers]
            return len(reports) == 2 and all(
                report.num_running == report.num_waiting == 0 and report.kv_free_tokens == report.kv_total_tokens
                for report in reports
            )

        await eventually(is_clean)


async def test_a_request_that_kills_workers_is_given_up_after_three(new_stack: NewStack) -> None:
    stack = new_stack(num_workers=3, environ=SLOW)
    async with BucketServeClient(stack.gateway_address) as client:
        poison = asyncio.create_task(run(client, 40, 1000))
        killed: set[str] = set()

        def holder() -> str | None:
            alive = [name for name in stack.worker_names() if name not in killed]
            return next((name for name in alive if metric(stack, name, "vllm:num_requests_running")), None)

        while len(killed) < 3:
            await eventually(holder)
            name = holder()
            assert name is not None
            killed.add(name)
            stack.services[name].signal(signal.SIGKILL)
            stack.services[name].wait(5)
        with pytest.raises(UnavailableError):
            await poison
        # Its workers are back; others are served as before.
        for name in sorted(killed):
            stack.restart(name)
        tokens, _ = await run(client, 10, 5)
        assert len(tokens) == 5


async def test_a_rolling_restart_of_workers_and_schedulers_fails_no_stream(new_stack: NewStack) -> None:
    stack = new_stack(num_schedulers=2, num_workers=2, environ=SLOW)
    over = asyncio.Event()
    done: list[Finished] = []

    async def client_loop(client: BucketServeClient, number: int) -> None:
        while not over.is_set():
            tokens, finished = await run(client, 10 + number, 60)
            assert tokens == wanted[number]
            done.append(finished)

    async with BucketServeClient(stack.gateway_address) as client:
        wanted = [(await run(client, 10 + i, 60))[0] for i in range(4)]
        load = [asyncio.create_task(client_loop(client, i)) for i in range(4)]
        for name in ("worker-0", "worker-1", "scheduler", "scheduler-1"):
            before = len(done)
            stack.services[name].signal(signal.SIGTERM)
            await asyncio.to_thread(stack.services[name].wait, 30)
            assert stack.services[name].exit_status == 0
            stack.restart(name)
            await asyncio.to_thread(stack.wait_until_serving, 30)
            # It goes on before the next one is restarted.
            await eventually(lambda before=before: len(done) >= before + 4, 30)
        over.set()
        await asyncio.gather(*load)
    # Drained, not killed: nothing had to start again.
    assert {finished.attempts for finished in done} == {1}
