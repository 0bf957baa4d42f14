"""The worker's stream to the scheduler, over a real connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest

from bucketserve.rpc.deployment import Deployment
from bucketserve.v1 import scheduler_pb2, scheduler_pb2_grpc
from bucketserve_worker import scheduler_link
from bucketserve_worker.scheduler_link import SchedulerLink


class SlowToWelcome(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Keeps what it hears, and welcomes when told to."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.said_hello = asyncio.Event()
        self.may_welcome = asyncio.Event()

    async def Work(self, request_iterator, context) -> AsyncIterator[scheduler_pb2.WorkResponse]:
        reading = asyncio.create_task(self._read(request_iterator))
        while not self.may_welcome.is_set():
            yield scheduler_pb2.WorkResponse(heartbeat=scheduler_pb2.Heartbeat())
            await asyncio.sleep(0.05)
        yield scheduler_pb2.WorkResponse(welcome=scheduler_pb2.WorkerWelcome(report_interval_ms=60_000))
        yield scheduler_pb2.WorkResponse(preempt=scheduler_pb2.PreemptRuns(run_ids=["r.1", "s.1"]))
        yield scheduler_pb2.WorkResponse(cancel=scheduler_pb2.CancelRuns(run_ids=["s.1"]))
        await reading

    async def _read(self, requests) -> None:
        async for message in requests:
            self.heard.append(message.WhichOneof("message"))
            self.said_hello.set()


@contextlib.asynccontextmanager
async def listening(
    scheduler: scheduler_pb2_grpc.SchedulerServiceServicer,
) -> AsyncIterator[tuple[str, grpc.aio.Server]]:
    server = grpc.aio.server()
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(scheduler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", server
    finally:
        await server.stop(0)


def a_link(address: str, ordered: list[tuple[str, list[str]]], states: asyncio.Queue[bool]) -> SchedulerLink:
    return SchedulerLink(
        "m",
        [address],
        Deployment(),
        hello=scheduler_pb2.WorkerHello,
        report=scheduler_pb2.WorkerReport,
        on_batch=lambda batch: None,
        on_cancel=lambda ids: ordered.append(("cancel", ids)),
        on_preempt=lambda ids: ordered.append(("preempt", ids)),
        on_pull=lambda pull: None,
        on_role=lambda role: None,
        on_heard=lambda: None,
        on_state=lambda is_connected, detail: states.put_nowait(is_connected),
    )


async def test_what_ends_between_hello_and_welcome_is_told_and_orders_come() -> None:
    # The hello names it as running: its end must follow, or it runs for ever in the scheduler's books.
    scheduler = SlowToWelcome()
    ordered: list[tuple[str, list[str]]] = []
    states: asyncio.Queue[bool] = asyncio.Queue()
    async with listening(scheduler) as (address, _):
        link = a_link(address, ordered, states)
        running = asyncio.create_task(link.run())
        await asyncio.wait_for(scheduler.said_hello.wait(), 10)
        link.finished(scheduler_pb2.RunFinished(run_id="r.1"))
        link.drain()
        scheduler.may_welcome.set()
        assert await asyncio.wait_for(states.get(), 10)
        link.pulled(scheduler_pb2.KvPulled(run_id="s.1"))
        while len(scheduler.heard) < 4:
            await asyncio.sleep(0.01)
        assert scheduler.heard == ["hello", "finished", "draining", "kv_pulled"]
        while len(ordered) < 2:
            await asyncio.sleep(0.01)
        assert ordered == [("preempt", ["r.1", "s.1"]), ("cancel", ["s.1"])]
        running.cancel()


async def test_who_leaves_waits_a_while_for_a_scheduler_that_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_link, "TAKEOVER_S", 600.0)
    scheduler = SlowToWelcome()
    scheduler.may_welcome.set()
    states: asyncio.Queue[bool] = asyncio.Queue()
    async with listening(scheduler) as (address, server):
        link = a_link(address, [], states)
        assert not link.can_bring_work
        running = asyncio.create_task(link.run())
        assert await asyncio.wait_for(states.get(), 10)
        link.drain()
        await server.stop(0)
        assert not await asyncio.wait_for(states.get(), 10)
        assert link.can_bring_work
        monkeypatch.setattr(scheduler_link, "TAKEOVER_S", 0.0)
        assert not link.can_bring_work
        running.cancel()
