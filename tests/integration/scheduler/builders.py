"""A scheduling loop and what gateways and workers say to it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from bucketserve.ports import QueueStore
from bucketserve.rpc.outbox import Outbox
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import scheduler_pb2
from bucketserve_scheduler.factories import new_core
from bucketserve_scheduler.loop import LoopDeps, SchedulingLoop
from bucketserve_scheduler.peers import GatewayPeer, GatewayPeers
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_scheduler.telemetry import LoopTelemetry

CONTEXT = 2048


@contextlib.contextmanager
def a_loop(store: QueueStore, gateways: GatewayPeers | None = None, **settings) -> Iterator[SchedulingLoop]:
    """Returns a loop over a store that does not run yet; gateway g is connected unless others are given."""
    if gateways is None:
        gateways = GatewayPeers()
        gateways.connect(a_gateway())
    with loop_deps(**settings) as deps:
        yield SchedulingLoop("m", CONTEXT, store, gateways, deps)


@contextlib.contextmanager
def loop_deps(scheduler_id: str = "s", **settings) -> Iterator[LoopDeps]:
    configured = SchedulerSettings(**settings)
    with open_telemetry(Service.SCHEDULER, "s", metrics_address=None) as outlets:
        yield LoopDeps(
            settings=configured,
            scheduler_id=scheduler_id,
            telemetry=LoopTelemetry(outlets.log, outlets.metrics, outlets.tracing),
            clock=time.monotonic,
            new_core=lambda context_tokens: new_core(configured, context_tokens),
        )


@contextlib.asynccontextmanager
async def running(loop: SchedulingLoop) -> AsyncIterator[None]:
    task = asyncio.create_task(loop.run())
    try:
        yield
    finally:
        loop.leave()
        await asyncio.wait_for(task, 5)


def a_gateway() -> GatewayPeer:
    return GatewayPeer("g", Outbox(10_000))


def a_run(number: int = 0, *, is_admitted: bool = False) -> scheduler_pb2.SubmitRun:
    ticket = scheduler_pb2.Ticket(
        run_id=f"r{number}.1",
        model="m",
        prompt_tokens=1 + number % 50,
        max_new_tokens=5,
        tenant="a",
        gateway_id="g",
        context_tokens=CONTEXT,
    )
    return scheduler_pb2.SubmitRun(ticket=ticket, spec=b"opaque", is_admitted=is_admitted)


def report(last_assignment: int = 0) -> scheduler_pb2.WorkerReport:
    return scheduler_pb2.WorkerReport(
        kv_total_tokens=100_000, kv_free_tokens=100_000, max_sequences=512, last_assignment=last_assignment
    )


def hello(last_assignment: int = 0, **more) -> scheduler_pb2.WorkerHello:
    return scheduler_pb2.WorkerHello(
        worker_id="w", context_tokens=CONTEXT, report=report(last_assignment), instance="one process", **more
    )
