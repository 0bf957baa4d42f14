"""What a test sees of a running stack."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from bucketserve.rpc.channel import open_channel
from bucketserve.v1 import scheduler_pb2, scheduler_pb2_grpc
from bucketserve_cli.stack import LocalStack

__all__ = ["eventually", "metric", "status"]


async def status(stack: LocalStack) -> scheduler_pb2.ModelStatus:
    """What the scheduler that leads sees."""
    for address in stack.scheduler_addresses:
        async with open_channel(address) as channel:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            response = await stub.GetStatus(scheduler_pb2.GetStatusRequest(), timeout=5)
        # There may be others: who may speak to schedulers may name any model.
        for model in response.models:
            if model.model == stack.spec.model_name:
                return model
    raise AssertionError("nobody leads")


async def eventually(check: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Waits until check(), which may be a coroutine function, returns something true."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        result = check()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return
        assert time.monotonic() < deadline_s, f"{check} did not come true in {timeout_s} s"
        await asyncio.sleep(0.05)


def metric(stack: LocalStack, service: str, name: str, **labels: str) -> float:
    """Sum, over the labels not given, of a sample on a service's /metrics."""
    with urllib.request.urlopen(f"http://{stack.metrics_addresses[service]}/metrics", timeout=5) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
