"""A scheduler that ends, and a worker that drains: nothing is claimed for a worker that does not get it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import pytest

from bucketserve.store.embedded import EmbeddedServer
from bucketserve.v1 import common_pb2, scheduler_pb2
from bucketserve_scheduler.factories import stores
from bucketserve_scheduler.loop import SchedulingLoop
from bucketserve_scheduler.peers import WorkerPeer
from tests.integration.scheduler.builders import CONTEXT, a_loop, a_run, report


@contextlib.asynccontextmanager
async def loop_over_valkey() -> AsyncIterator[SchedulingLoop]:
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(EmbeddedServer())
        store = (await stores(server.url, "default", stack)).of_model("m")
        yield stack.enter_context(a_loop(store))


async def submit_for_ever(loop: SchedulingLoop) -> None:
    for number in itertools.count():
        await loop.submit(a_run(number))
        await asyncio.sleep(0.001)


async def play_worker(
    loop: SchedulingLoop, peer: WorkerPeer, *, finishes: bool = False
) -> list[scheduler_pb2.WorkResponse]:
    """Takes batches and asks for more until the stream ends; returns what came."""
    messages = []
    async for message in peer.outbox.messages():
        messages.append(message)
        if message.WhichOneof("message") == "batch":
            done = scheduler_pb2.BatchPrefilled(
                assignment=message.batch.assignment,
                run_ids=[run.run_id for run in message.batch.runs],
            )
            await loop.hear(peer, scheduler_pb2.WorkRequest(prefilled=done))
            for run in message.batch.runs if finishes else ():
                end = scheduler_pb2.RunFinished(
                    run_id=run.run_id,
                    assignment=message.batch.assignment,
                    reason=common_pb2.FINISH_REASON_LENGTH,
                    output_tokens=1,
                )
                await loop.hear(peer, scheduler_pb2.WorkRequest(finished=end))
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
        await asyncio.wait_for(running, 30)
        loop.part()
        submitting.cancel()
        # It ends by itself: nobody closed the stream, its end is queued behind the batches.
        sent = await asyncio.wait_for(worker, 30)
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
        worker = asyncio.create_task(play_worker(loop, peer, finishes=True))
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
        await asyncio.wait_for(running, 30)
        loop.part()
        sent = await asyncio.wait_for(worker, 30)
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
        await asyncio.wait_for(running, 30)
        loop.part()
        sent = await asyncio.wait_for(play_worker(loop, peer), 30)
        assert [message.WhichOneof("message") for message in sent] == ["no_more_work"]


async def test_the_last_of_its_weights_gets_what_they_have_begun_and_then_hears_that_it_may_go() -> None:
    async with loop_over_valkey() as loop:
        running = asyncio.create_task(loop.run())
        mine = scheduler_pb2.WorkerHello(worker_id="w", context_tokens=CONTEXT, report=report(), fingerprint="old")
        peer = await loop.connect(mine)
        other = await loop.connect(
            scheduler_pb2.WorkerHello(worker_id="v", context_tokens=CONTEXT, report=report(), fingerprint="new")
        )
        begun = [a_run(number, is_admitted=True) for number in range(3)]
        for run in begun:
            run.ticket.fingerprint = "old"
        await loop.submit(begun[0])
        while not loop.num_batches:
            await asyncio.sleep(0.001)
        await loop.hear(peer, scheduler_pb2.WorkRequest(draining=scheduler_pb2.WorkerDraining()))
        for run in (*begun[1:], *(a_run(number) for number in range(3, 6))):
            await loop.submit(run)
        new = asyncio.create_task(play_worker(loop, other, finishes=True))
        old = asyncio.create_task(play_worker(loop, peer, finishes=True))
        while loop.num_finished < 6:
            await asyncio.sleep(0.001)
        loop.leave()
        await asyncio.wait_for(running, 30)
        loop.part()
        sent = await asyncio.wait_for(old, 30)
        assert ids(sent) == {run.ticket.run_id for run in begun}
        assert [m.WhichOneof("message") for m in sent].index("no_more_work") == len(sent) - 1
        assert ids(await asyncio.wait_for(new, 30)) == {f"r{number}.1" for number in range(3, 6)}
