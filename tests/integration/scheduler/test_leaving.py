"""A scheduler that ends, and a worker that drains: nothing is claimed for a worker that does not get it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator

import pytest

from bucketserve.rpc.outbox import Outbox
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import scheduler_pb2
from bucketserve_scheduler.adapters import new_core, stores
from bucketserve_scheduler.loop import LoopDeps, SchedulingLoop
from bucketserve_scheduler.peers import GatewayPeer, GatewayPeers, WorkerPeer
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_scheduler.telemetry import LoopTelemetry

CONTEXT = 2048


def report(last_assignment: int = 0) -> scheduler_pb2.WorkerReport:
    return scheduler_pb2.WorkerReport(
        kv_total_tokens=100_000, kv_free_tokens=100_000, max_sequences=512, last_assignment=last_assignment
    )


@contextlib.asynccontextmanager
async def loop_over_valkey() -> AsyncIterator[SchedulingLoop]:
    settings = SchedulerSettings()
    async with contextlib.AsyncExitStack() as stack:
        outlets = stack.enter_context(open_telemetry(Service.SCHEDULER, "s", metrics_address=None))
        server = stack.enter_context(EmbeddedServer())
        gateways = GatewayPeers()
        gateways.connect(GatewayPeer("g", Outbox(10_000)))
        deps = LoopDeps(
            settings=settings,
            scheduler_id="s",
            gateways=gateways,
            telemetry=LoopTelemetry(outlets.log, outlets.metrics, outlets.tracing),
            clock=time.monotonic,
            new_core=lambda context_tokens: new_core(settings, context_tokens),
        )
        yield SchedulingLoop("m", CONTEXT, (await stores(server.url, "default", stack))("m"), deps)


def a_run(number: int) -> scheduler_pb2.SubmitRun:
    ticket = scheduler_pb2.Ticket(
        run_id=f"r{number}.1",
        model="m",
        prompt_tokens=1 + number % 50,
        max_new_tokens=5,
        tenant="a",
        gateway_id="g",
        context_tokens=CONTEXT,
    )
    return scheduler_pb2.SubmitRun(ticket=ticket, spec=b"opaque")


async def submit_for_ever(loop: SchedulingLoop) -> None:
    for number in itertools.count():
        await loop.submit(a_run(number))
        await asyncio.sleep(0.001)


async def play_worker(loop: SchedulingLoop, peer: WorkerPeer) -> list[scheduler_pb2.WorkResponse]:
    """Takes batches and asks for more until the stream ends; returns what came."""
    messages = []
    async for message in peer.outbox.messages():
        messages.append(message)
        if message.WhichOneof("message") == "batch":
            done = scheduler_pb2.BatchPrefilled(
                batch_id=message.batch.batch.batch_id,
                run_ids=[run.run_id for run in message.batch.runs],
                duration_us=1000,
            )
            await loop.hear(peer, scheduler_pb2.WorkRequest(prefilled=done))
            await loop.hear(peer, scheduler_pb2.WorkRequest(report=report(message.batch.assignment)))
    return messages


def ids(messages: list[scheduler_pb2.WorkResponse]) -> set[str]:
    return {run.run_id for message in messages for run in message.batch.runs}


@pytest.mark.parametrize("delay_s", [0.02, 0.05, 0.0503, 0.0511, 0.0517, 0.1])
async def test_what_a_scheduler_claimed_is_sent_before_it_goes(delay_s: float) -> None:
    async with loop_over_valkey() as loop:
        running = asyncio.create_task(loop.run())
        peer = await loop.connect(scheduler_pb2.WorkerHello(worker_id="w", context_tokens=CONTEXT, report=report()))
        worker = asyncio.create_task(play_worker(loop, peer))
        submitting = asyncio.create_task(submit_for_ever(loop))
        while not loop.num_batches:
            await asyncio.sleep(0.001)
        await asyncio.sleep(delay_s)
        loop.leave()
        await asyncio.wait_for(running, 5)
        loop.part()
        submitting.cancel()
        # It ends by itself: nobody closed the stream, its end is queued behind the batches.
        sent = await asyncio.wait_for(worker, 5)
        store = loop._store
        next_one = await store.lead("other", 5.0)
        assert next_one is not None, "the loop has not resigned"
        snapshot = await store.load(next_one)
        claimed = {str(entry.request_id) for entry in snapshot.tickets if entry.worker_id is not None}
        assert claimed
        assert claimed == ids(sent)


async def test_a_draining_worker_hears_when_nothing_more_will_come() -> None:
    async with loop_over_valkey() as loop:
        running = asyncio.create_task(loop.run())
        peer = await loop.connect(scheduler_pb2.WorkerHello(worker_id="w", context_tokens=CONTEXT, report=report()))
        worker = asyncio.create_task(play_worker(loop, peer))
        submitting = asyncio.create_task(submit_for_ever(loop))
        while loop.num_batches < 2:
            await asyncio.sleep(0.001)
        await loop.hear(peer, scheduler_pb2.WorkRequest(draining=scheduler_pb2.WorkerDraining()))
        # Requests keep coming, and wait.
        while not loop.core.status().num_waiting:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        submitting.cancel()
        loop.leave()
        await asyncio.wait_for(running, 5)
        loop.part()
        sent = await asyncio.wait_for(worker, 5)
        kinds = [message.WhichOneof("message") for message in sent]
        assert kinds.count("batch") > 1
        assert kinds.count("no_more_work") == 1
        assert "batch" not in kinds[kinds.index("no_more_work") :]
        assert loop.core.status().num_waiting > 0


async def test_a_worker_that_comes_back_draining_gets_nothing() -> None:
    async with loop_over_valkey() as loop:
        running = asyncio.create_task(loop.run())
        submitting = asyncio.create_task(submit_for_ever(loop))
        await asyncio.sleep(0.05)
        hello = scheduler_pb2.WorkerHello(worker_id="w", context_tokens=CONTEXT, report=report(), is_draining=True)
        peer = await loop.connect(hello)
        await asyncio.sleep(0.1)
        submitting.cancel()
        loop.leave()
        await asyncio.wait_for(running, 5)
        loop.part()
        sent = await asyncio.wait_for(play_worker(loop, peer), 5)
        assert [message.WhichOneof("message") for message in sent] == ["no_more_work"]
