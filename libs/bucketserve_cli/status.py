"""`bucketserve status`: what the schedulers that lead see, as tables."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import grpc
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bucketserve.core.errors import UnavailableError
from bucketserve.rpc.channel import open_channel
from bucketserve.v1 import common_pb2, scheduler_pb2, scheduler_pb2_grpc
from bucketserve_cli.connection import Connection
from bucketserve_cli.terminal import as_json, plain_table, print_json

__all__ = ["show_status", "status_view"]

TIMEOUT_S = 5.0


async def show_status(
    addresses: Sequence[str], connection: Connection, watch_s: float, console: Console, *, is_json: bool = False
) -> None:
    """Prints what the leading schedulers see once, or again every watch_s seconds; as JSON one line each time.

    Raises:
        UnavailableError: no scheduler at these addresses answers, or one does and is a standby.
    """
    async with AsyncExitStack() as stack:
        stubs = {
            address: scheduler_pb2_grpc.SchedulerServiceStub(
                await stack.enter_async_context(open_channel(address, connection.tls))
            )
            for address in addresses
        }
        if is_json:
            print_json(as_json(await _ask_leaders(stubs)))
            while watch_s:
                await asyncio.sleep(watch_s)
                try:
                    print_json(as_json(await _ask_leaders(stubs)))
                except UnavailableError as error:
                    print_json({"error": str(error)})
            return
        view = status_view(await _ask_leaders(stubs))
        if not watch_s:
            console.print(view)
            return
        with Live(view, console=console) as live:
            while True:
                await asyncio.sleep(watch_s)
                try:
                    view = status_view(await _ask_leaders(stubs))
                    live.update(view)
                except UnavailableError as error:
                    # As while another scheduler takes over: the last that was seen stays beside it.
                    live.update(Group(view, Text(f"\n{error}", style="red")))


def status_view(status: scheduler_pb2.GetStatusResponse) -> RenderableType:
    """Returns the tables: of pools if there are several, of workers and of buckets, for each model."""
    parts: list[RenderableType] = []
    for model in status.models:
        leader = model.scheduler
        parts += [
            Text(f"model {model.model}: scheduler {leader.scheduler_id}, epoch {leader.epoch}", style="bold"),
            Text(
                f"{model.num_waiting} waiting, {model.num_running} running, {model.num_finished} finished in "
                f"{model.num_batches} batches, policy {model.policy}"
            ),
            *_pools(model),
            _workers(model),
            _buckets(model),
        ]
    return Group(*parts)


def _pools(model: scheduler_pb2.ModelStatus) -> list[Table]:
    """Returns a table with a row for each role and engine; none where that is one row."""
    pools: dict[tuple[str, str], list[scheduler_pb2.WorkerStatus]] = {}
    for worker in model.workers:
        pools.setdefault((_role(worker), worker.engine), []).append(worker)
    if len(pools) < 2:
        return []
    table = plain_table("pool", "engine", "workers", "KV free", "KV total", "running", "waiting")
    for (role, engine), workers in sorted(pools.items()):
        reports = [worker.report for worker in workers]
        table.add_row(
            role,
            Text(engine),
            str(len(workers)),
            f"{sum(report.kv_free_tokens for report in reports):,} tokens",
            f"{sum(report.kv_total_tokens for report in reports):,} tokens",
            str(sum(report.num_running for report in reports)),
            str(sum(report.num_waiting for report in reports)),
        )
    return [table]


def _role(worker: scheduler_pb2.WorkerStatus) -> str:
    return common_pb2.WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_").lower()


def _workers(model: scheduler_pb2.ModelStatus) -> Table:
    table = plain_table("worker", "role", "engine", "KV free", "KV total", "running", "waiting", "report age")
    for worker in model.workers:
        report = worker.report
        name = f"{worker.worker_id} (draining)" if worker.is_draining else worker.worker_id
        table.add_row(
            Text(name),
            _role(worker),
            Text(worker.engine),
            f"{report.kv_free_tokens:,} tokens",
            f"{report.kv_total_tokens:,} tokens",
            str(report.num_running),
            str(report.num_waiting),
            f"{worker.report_age_ms} ms",
        )
    if not model.workers:
        table.add_row("none")
    return table


def _buckets(model: scheduler_pb2.ModelStatus) -> Table:
    table = plain_table("bucket", "waiting", "prompt tokens")
    for bucket in model.buckets:
        edges = Text(f"[{bucket.low_tokens}, {bucket.high_tokens})")
        table.add_row(edges, str(bucket.num_waiting), f"{bucket.waiting_tokens:,}")
    return table


async def _ask_leaders(
    stubs: dict[str, scheduler_pb2_grpc.SchedulerServiceStub],
) -> scheduler_pb2.GetStatusResponse:
    """Returns what the schedulers that lead models say of these.

    Raises:
        UnavailableError: none leads any; says of each what it is.
    """
    answers = await asyncio.gather(*(_ask(address, stub) for address, stub in stubs.items()))
    models: dict[str, scheduler_pb2.ModelStatus] = {}
    for model in (model for answer in answers if not isinstance(answer, str) for model in answer.models):
        # Who does not know yet that it was replaced has an older epoch.
        if model.model not in models or model.scheduler.epoch > models[model.model].scheduler.epoch:
            models[model.model] = model
    if models:
        return scheduler_pb2.GetStatusResponse(models=[model for _, model in sorted(models.items())])
    told = [
        answer
        if isinstance(answer, str)
        else f"scheduler {answer.scheduler_id} at {address} leads no model: it is a standby, or nobody has joined yet"
        for address, answer in zip(stubs, answers, strict=True)
    ]
    raise UnavailableError("; ".join(told), reason="NO_LEADER")


async def _ask(address: str, stub: scheduler_pb2_grpc.SchedulerServiceStub) -> scheduler_pb2.GetStatusResponse | str:
    """Returns the answer, or why there is none."""
    try:
        answer: scheduler_pb2.GetStatusResponse = await stub.GetStatus(
            scheduler_pb2.GetStatusRequest(), timeout=TIMEOUT_S
        )
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"scheduler at {address} did not answer within {TIMEOUT_S:g} s"
        return f"scheduler at {address}: {error.code().name}: {error.details()}"
    return answer
