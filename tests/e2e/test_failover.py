"""What happens when something dies: the rows of the table in docs/architecture.md, one by one.

Here: worker (paused, poisoned), scheduler, Redis, gateway, SIGTERM. In test_stack.py: worker killed, client goes away,
SIGTERM under load. In test_overload.py: overload. In test_disaggregation.py: all of it where KV is on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import redis.asyncio as aioredis
from redis.exceptions import RedisError

from bucketserve.client import BucketServeClient, Finished
from bucketserve.core.errors import UnavailableError
from bucketserve.store.embedded import EmbeddedServer, find_server, free_port
from bucketserve.store.redis import connect
from bucketserve_cli.stack import LocalStack
from tests.chaos.checks import usage
from tests.e2e.conftest import NewStack
from tests.e2e.observe import events, eventually, leader, metric, status
from tests.e2e.test_stack import SLOW, run

pytestmark = pytest.mark.e2e


async def leader_and_standby(stack: LocalStack) -> tuple[str, str]:
    """Names of the scheduler that leads and of the other one."""
    leads = await leader(stack)
    return leads, "scheduler-1" if leads == "scheduler" else "scheduler"


@pytest.mark.stack(num_schedulers=2, num_workers=2, environ=SLOW)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_scheduler_dies_the_standby_takes_over_and_streams_never_notice(
    stack: LocalStack, how: signal.Signals
) -> None:
    first, standby = await leader_and_standby(stack)
    assert not events(stack, standby, "seat.taken")
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, 30, 200)
        running = [asyncio.create_task(run(client, 30, 200)) for _ in range(6)]
        await eventually(lambda: sum(metric(stack, w, "vllm:num_requests_running") for w in stack.worker_names()) >= 6)
        stack.services[first].signal(how)
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


@pytest.mark.stack(num_schedulers=2, num_workers=2, environ=SLOW)
async def test_a_paused_leader_that_wakes_can_not_write(stack: LocalStack) -> None:
    first, standby = await leader_and_standby(stack)
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, 20, 40)
        stack.services[first].signal(signal.SIGSTOP)
        try:
            await eventually(lambda: events(stack, standby, "seat.taken"))
            # A paused process keeps its connections open: peers notice by keepalive that nobody answers.
            tokens, _ = await run(client, 20, 40)
            assert tokens == wanted
        finally:
            stack.services[first].signal(signal.SIGCONT)
        await eventually(lambda: events(stack, first, "seat.lost"))
        results = await asyncio.gather(*(run(client, 20, 40) for _ in range(4)))
    assert [tokens for tokens, _ in results] == [wanted] * 4
    # It never leads again while the other one lives.
    assert not events(stack, first, "seat.taken")
    epochs = [entry["epoch"] for name in (first, standby) for entry in events(stack, name, "leader.elected")]
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize("outage_s", [0.5, 6.0])
async def test_redis_data_lost_and_nothing_else(
    new_stack: NewStack, stores: contextlib.ExitStack, outage_s: float
) -> None:
    port = free_port()
    first = stores.enter_context(EmbeddedServer(port))
    stack = new_stack(num_workers=2, redis_url=first.url, environ=SLOW)
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, 25, 250)
        running = [asyncio.create_task(run(client, 25, 250)) for _ in range(6)]
        await eventually(lambda: sum(metric(stack, w, "vllm:num_requests_running") for w in stack.worker_names()) >= 6)
        os.kill(first.pid, signal.SIGKILL)
        waiting = [asyncio.create_task(run(client, 25, 10)) for _ in range(3)]
        await asyncio.sleep(outage_s)
        stores.enter_context(EmbeddedServer(port))
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


async def test_worker_paused_counts_as_dead_and_is_ignored_when_it_wakes(new_stack: NewStack) -> None:
    stack = new_stack(num_workers=2, environ={**SLOW, "BUCKETSERVE_SCHEDULER_WORKER_LEASE_S": "2"})
    async with BucketServeClient(stack.gateway_address) as client:
        wanted = [(await run(client, 10 + i, 250))[0] for i in range(2)]
        running = [asyncio.create_task(run(client, 10 + i % 2, 250)) for i in range(6)]

        def busy() -> list[str]:
            # All six may be one batch: whoever has some will do.
            return [name for name in stack.worker_names() if metric(stack, name, "vllm:num_requests_running") >= 2]

        await eventually(busy)
        victim = busy()[0]
        stack.services[victim].signal(signal.SIGSTOP)
        await eventually(lambda: events(stack, "scheduler", "worker.lost"))
        await eventually(lambda: metric(stack, "scheduler", "bucketserve_scheduler_dropped_total") >= 1)
        # Awake again while the others still stream: what it sends belongs to attempts that nobody waits for.
        stack.services[victim].signal(signal.SIGCONT)
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
    stack = new_stack(num_workers=3, environ={**SLOW, "BUCKETSERVE_TELEMETRY_LOG_LEVEL": "debug"})
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
        # The second attempt came at once, the third after a while.
        began = [entry for name in killed for entry in events(stack, name, "run.began") if ".3#" in entry["run"]]
        resumed = [e for e in events(stack, "gateway", "request.resumed") if e["run_id"].endswith(".3")]
        times = [datetime.fromisoformat(entry["time"]) for entry in (*resumed, *began)]
        assert len(times) == 2
        assert (times[1] - times[0]).total_seconds() >= 0.19
        # Its workers are back; others are served as before.
        for name in sorted(killed):
            stack.restart(name)
        tokens, _ = await run(client, 10, 5)
        assert len(tokens) == 5


async def test_redis_short_outage_of_thirty_seconds(new_stack: NewStack, stores: contextlib.ExitStack) -> None:
    store = stores.enter_context(EmbeddedServer(is_durable=True))
    stack = new_stack(num_workers=2, redis_url=store.url, environ=SLOW)
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, 25, 400)
        running = [asyncio.create_task(run(client, 25, 400)) for _ in range(4)]
        await eventually(lambda: sum(metric(stack, w, "vllm:num_requests_running") for w in stack.worker_names()) >= 4)
        store.kill()
        refused: list[float] = []

        async def persistent() -> list[int]:
            """A client that comes back when it is told to."""
            while True:
                try:
                    return (await run(client, 25, 10))[0]
                except UnavailableError as error:
                    refused.append(error.retry_delay_s)
                    await asyncio.sleep(error.retry_delay_s)

        waiting = [asyncio.create_task(persistent()) for _ in range(3)]
        await asyncio.sleep(30)
        # What ran has long ended by now, without the store.
        assert all(task.done() for task in running)
        await asyncio.to_thread(store.start)
        late = await asyncio.gather(*waiting)
        results = await asyncio.gather(*running)
    assert [tokens for tokens, _ in results] == [wanted] * 4
    assert {finished.attempts for _, finished in results} == {1}
    assert late == [wanted[:10]] * 3
    # New requests waited, or were told when to come back.
    assert all(delay_s > 0 for delay_s in refused)


async def test_gateway_dies_its_requests_are_cancelled_and_nobody_else_notices(new_stack: NewStack) -> None:
    stack = new_stack(num_gateways=2, num_workers=2, environ={**SLOW, "BUCKETSERVE_SCHEDULER_GATEWAY_LEASE_S": "2"})
    here, there = stack.gateway_addresses
    async with BucketServeClient(here) as victim, BucketServeClient(there) as other:
        wanted, _ = await run(other, 20, 200)
        lost = [asyncio.create_task(run(victim, 20, 1000)) for _ in range(4)]
        kept = [asyncio.create_task(run(other, 20, 200)) for _ in range(4)]
        await eventually(lambda: sum(metric(stack, w, "vllm:num_requests_running") for w in stack.worker_names()) >= 8)
        stack.services["gateway"].signal(signal.SIGKILL)
        stack.services["gateway"].wait(5)
        ends = await asyncio.gather(*lost, return_exceptions=True)
        assert all(isinstance(end, UnavailableError) for end in ends)
        results = await asyncio.gather(*kept)
        assert [tokens for tokens, _ in results] == [wanted] * 4
        assert {finished.attempts for _, finished in results} == {1}

        async def is_free() -> bool:
            now = await status(stack)
            return now.num_running == 0 and all(
                worker.report.kv_free_tokens == worker.report.kv_total_tokens for worker in now.workers
            )

        # 1,000 tokens at 20 ms each would take 20 s.
        await eventually(is_free, 15)
        stack.restart("gateway")
        await asyncio.to_thread(stack.wait_until_serving, 120)


async def test_workers_wait_for_a_gateway_that_is_back_at_once_and_hold_no_more_than_before(
    new_stack: NewStack,
) -> None:
    # Their streams are open again though there is nothing to deliver; what they hold is looked at after the test.
    stack = new_stack(num_workers=2)
    stack.services["gateway"].signal(signal.SIGKILL)
    stack.services["gateway"].wait(5)
    stack.restart("gateway")
    await asyncio.to_thread(stack.wait_until_serving, 120)
    for name in stack.worker_names():
        await eventually(lambda name=name: usage(stack)[name].files["connection to gateway"] == 1)


@pytest.mark.timeout(400)
async def test_sigterm_anywhere_a_rolling_restart_of_the_whole_stack_fails_no_stream(new_stack: NewStack) -> None:
    stack = new_stack(num_schedulers=2, num_workers=2, num_gateways=2, environ=SLOW)
    over = asyncio.Event()
    done: list[Finished] = []

    async def client_loop(client: BucketServeClient, number: int) -> None:
        while not over.is_set():
            tokens, finished = await run(client, 10 + number, 60)
            assert tokens == wanted[number]
            done.append(finished)

    async def short_requests(client: BucketServeClient) -> None:
        # Many of them: one or the other is on its way just when a gateway closes.
        while not over.is_set():
            tokens, finished = await run(client, 5, 1)
            assert len(tokens) == 1
            done.append(finished)
            # Without a pause they would take all of the machine, also from the services that start.
            await asyncio.sleep(0.02)

    # A client that knows both gateways, as behind one DNS name.
    async with BucketServeClient("ipv4:" + ",".join(stack.gateway_addresses)) as client:
        wanted = [(await run(client, 10 + i, 60))[0] for i in range(4)]
        load = [asyncio.create_task(client_loop(client, i)) for i in range(4)]
        load += [asyncio.create_task(short_requests(client)) for _ in range(8)]
        for name in ("worker-0", "worker-1", "scheduler", "scheduler-1", "gateway", "gateway-1"):
            before = len(done)
            stack.services[name].signal(signal.SIGTERM)
            await asyncio.to_thread(stack.services[name].wait, 30)
            assert stack.services[name].exit_status == 0
            stack.restart(name)
            await asyncio.to_thread(stack.wait_until_serving, 120)
            # It goes on before the next one is restarted.
            await eventually(lambda before=before: len(done) >= before + 50, 60)
        over.set()
        await asyncio.gather(*load)
    # Drained, not killed: nothing had to start again.
    assert {finished.attempts for finished in done} == {1}


@contextlib.contextmanager
def sentinel(master_port: int, folder: Path) -> Iterator[int]:
    """A Sentinel that watches a master; yields its port."""
    port = free_port()
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor main 127.0.0.1 {master_port} 1\n"
        "sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 5000\n"
    )
    process = subprocess.Popen(
        [find_server(), str(config), "--sentinel"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield port
    finally:
        process.terminate()
        process.wait(5)


async def test_redis_fails_over_to_a_replica_by_sentinel(
    new_stack: NewStack, stores: contextlib.ExitStack, tmp_path: Path
) -> None:
    master = stores.enter_context(EmbeddedServer(is_durable=True))
    replica = stores.enter_context(EmbeddedServer(replica_of=master.port))
    watcher = stores.enter_context(sentinel(master.port, tmp_path))
    client = connect(f"sentinel://127.0.0.1:{watcher}/main")

    async def sees_the_replica() -> bool:
        try:
            return (await client.info("replication"))["connected_slaves"] == 1
        except (RedisError, OSError):
            return False

    await eventually(sees_the_replica)
    stack = new_stack(num_workers=2, redis_url=f"sentinel://127.0.0.1:{watcher}/main", environ=SLOW)
    async with BucketServeClient(stack.gateway_address) as gateway:
        wanted, _ = await run(gateway, 25, 300)
        running = [asyncio.create_task(run(gateway, 25, 300)) for _ in range(4)]
        await eventually(lambda: sum(metric(stack, w, "vllm:num_requests_running") for w in stack.worker_names()) >= 4)
        # The Sentinel must know the replica before there is need of it; it asks the master every ten seconds.
        sentinels = aioredis.from_url(f"redis://127.0.0.1:{watcher}")
        await eventually(lambda: _knows_a_replica(sentinels))
        master.kill()
        results = await asyncio.gather(*running)

        async def serves() -> bool:
            try:
                return (await run(gateway, 25, 10))[0] == wanted[:10]
            except UnavailableError:
                return False

        await eventually(serves)
    assert [tokens for tokens, _ in results] == [wanted] * 4
    assert {finished.attempts for _, finished in results} == {1}
    direct = connect(replica.url)
    assert (await direct.info("replication"))["role"] == "master"
    for open_client in (client, sentinels, direct):
        await open_client.aclose()


async def _knows_a_replica(sentinels: aioredis.Redis) -> bool:
    (main,) = (await sentinels.sentinel_masters()).values()
    return main["num-slaves"] == 1
