"""Hashes of a prompt's blocks, on their way through the service to the core, and not into the store."""

from __future__ import annotations

import asyncio
import contextlib

from bucketserve.core.prefixes import BLOCK_TOKENS
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.v1 import common_pb2, scheduler_pb2
from bucketserve_scheduler.factories import stores
from bucketserve_scheduler.loop import SchedulingLoop
from bucketserve_scheduler.peers import WorkerPeer
from tests.integration.scheduler.builders import CONTEXT, a_loop, report, running

LONG = 16 * BLOCK_TOKENS
HASHES = [2**64 - 1 - i for i in range(16)]


def a_prompt(number: int) -> scheduler_pb2.SubmitRun:
    ticket = scheduler_pb2.Ticket(
        run_id=f"r{number}.1",
        model="m",
        prompt_tokens=LONG + 9,
        max_new_tokens=5,
        tenant="a",
        gateway_id="g",
        context_tokens=CONTEXT,
    )
    return scheduler_pb2.SubmitRun(ticket=ticket, spec=b"opaque", block_hashes=HASHES)


async def take(loop: SchedulingLoop, peer: WorkerPeer, taken: asyncio.Queue, cached: int) -> None:
    """A worker that says it had so many tokens of every prompt."""
    async for message in peer.outbox.messages():
        if message.WhichOneof("message") != "batch":
            continue
        for run in message.batch.runs:
            await taken.put((peer.worker_id, message.batch.batch.prompt_tokens))
            done = scheduler_pb2.BatchPrefilled(
                assignment=message.batch.assignment, run_ids=[run.run_id], cached_prompt_tokens=[cached]
            )
            await loop.hear(peer, scheduler_pb2.WorkRequest(prefilled=done))
            end = scheduler_pb2.RunFinished(
                run_id=run.run_id,
                assignment=message.batch.assignment,
                output_tokens=5,
                reason=common_pb2.FINISH_REASON_LENGTH,
            )
            await loop.hear(peer, scheduler_pb2.WorkRequest(finished=end))
            await loop.hear(peer, scheduler_pb2.WorkRequest(report=report(message.batch.assignment)))


async def play(number: int, cached: int) -> list[tuple[str, int]]:
    """Returns where each of so many like prompts went, one after the other, and what was to be computed of it."""
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(EmbeddedServer())
        loop = stack.enter_context(a_loop((await stores(server.url, "default", stack)).of_model("m")))
        await stack.enter_async_context(running(loop))
        taken: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        tasks = []
        for name in ("w0", "w1", "w2"):
            peer = await loop.connect(
                scheduler_pb2.WorkerHello(worker_id=name, context_tokens=CONTEXT, report=report(), instance=name)
            )
            tasks.append(asyncio.create_task(take(loop, peer, taken, cached)))
        found = []
        for i in range(number):
            await loop.submit(a_prompt(i))
            found.append(await asyncio.wait_for(taken.get(), 10))
            while loop.num_finished <= i:
                await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        return found


async def test_like_prompts_go_to_one_worker_for_what_it_has_not_computed() -> None:
    found = await play(5, LONG)
    assert {worker for worker, _ in found} == {"w0"}
    assert [tokens for _, tokens in found] == [LONG + 9, *[9] * 4]


async def test_a_worker_that_says_it_had_nothing_is_not_believed_to_have_much_for_long() -> None:
    found = await play(80, 0)
    assert [tokens for _, tokens in found[-5:]] == [LONG + 9] * 5


async def test_what_waits_is_stored_without_hashes() -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(EmbeddedServer())
        store = (await stores(server.url, "default", stack)).of_model("m")
        loop = stack.enter_context(a_loop(store))
        async with running(loop):
            run = a_prompt(1)
            await loop.submit(run)
            while not loop.core.status().num_waiting:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.1)
        leadership = await store.lead("other", 5.0)
        assert leadership is not None
        (ticket,) = (await store.load(leadership)).tickets
        assert ticket.ticket == run.ticket.SerializeToString()
        assert len(ticket.ticket) < 100 < 8 * len(run.block_hashes)
