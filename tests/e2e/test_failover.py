"""Two schedulers over one Valkey: one leads, the other stands by and takes over."""

from __future__ import annotations

import asyncio
import json
import signal
import time

import pytest

from bucketserve.client import BucketServeClient
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import NewStack, eventually, metric
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
