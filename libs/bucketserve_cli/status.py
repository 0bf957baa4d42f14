"""`bucketserve status`: what the scheduler sees, as tables."""

from __future__ import annotations

import asyncio

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bucketserve.rpc.channel import open_channel
from bucketserve.v1 import common_pb2, scheduler_pb2, scheduler_pb2_grpc

__all__ = ["show_status", "status_view"]

TIMEOUT_S = 5.0


async def show_status(address: str, watch_s: float, console: Console) -> None:
    """Prints the scheduler's state once, or again every watch_s seconds.

    Raises:
        grpc.aio.AioRpcError: the scheduler does not answer.
    """
    async with open_channel(address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        first = await _ask(stub)
        if not watch_s:
            console.print(status_view(first))
            return
        with Live(status_view(first), console=console) as live:
            while True:
                await asyncio.sleep(watch_s)
                live.update(status_view(await _ask(stub)))


def status_view(status: scheduler_pb2.GetStatusResponse) -> RenderableType:
    """Returns the tables: one of workers and one of buckets for each model."""
    parts: list[RenderableType] = [
        Text(f"scheduler {status.scheduler.scheduler_id}, epoch {status.scheduler.epoch}", style="bold")
    ]
    if not status.models:
        parts.append(Text("no worker has joined and no request has come yet"))
    for model in status.models:
        parts += [
            Text(
                f"\nmodel {model.model}: {model.num_waiting} waiting, {model.num_running} running, "
                f"{model.num_finished} finished in {model.num_batches} batches, policy {model.policy}"
            ),
            _workers(model),
            _buckets(model),
        ]
    return Group(*parts)


def _workers(model: scheduler_pb2.ModelStatus) -> Table:
    table = Table("worker", "role", "engine", "KV free", "KV total", "running", "waiting", "report age", box=None)
    for worker in model.workers:
        report = worker.report
        name = f"{worker.worker_id} (draining)" if worker.is_draining else worker.worker_id
        table.add_row(
            name,
            common_pb2.WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_").lower(),
            worker.engine,
            f"{report.kv_free_tokens:,} tokens",
            f"{report.kv_total_tokens:,} tokens",
            str(report.num_running),
            str(report.num_waiting),
            f"{worker.report_age_ms} ms",
        )
    return table


def _buckets(model: scheduler_pb2.ModelStatus) -> Table:
    table = Table("bucket", "waiting", "prompt tokens", box=None)
    for bucket in model.buckets:
        table.add_row(
            f"[{bucket.low_tokens}, {bucket.high_tokens})", str(bucket.num_waiting), f"{bucket.waiting_tokens:,}"
        )
    return table


async def _ask(stub: scheduler_pb2_grpc.SchedulerServiceStub) -> scheduler_pb2.GetStatusResponse:
    answer: scheduler_pb2.GetStatusResponse = await stub.GetStatus(scheduler_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
    return answer
