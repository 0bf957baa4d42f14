from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bucketserve.rpc.channel import open_channel
from bucketserve.v1 import scheduler_pb2, scheduler_pb2_grpc
from bucketserve_cli.stack import LocalStack, StackSpec

DEMO_MODEL = str(Path(__file__).resolve().parents[2] / "models" / "demo" / "model")

NewStack = Callable[..., LocalStack]


@pytest.fixture
def new_stack(tmp_path: Path) -> Iterator[NewStack]:
    """Returns a function that starts a stack, by default with the fake engine; all stop at the end of the test."""
    stacks: list[LocalStack] = []

    def start(**options) -> LocalStack:
        environ = {"BUCKETSERVE_WORKER_CONTEXT_TOKENS": "2048", **options.pop("environ", {})}
        spec = StackSpec(
            model=DEMO_MODEL, log_dir=tmp_path / f"logs{len(stacks)}", environ=environ, **{"engine": "fake", **options}
        )
        stack = LocalStack(spec)
        stacks.append(stack)
        return stack.__enter__()

    yield start
    for stack in stacks:
        stack.__exit__(None, None, None)


async def status(stack: LocalStack) -> scheduler_pb2.ModelStatus:
    async with open_channel(stack.scheduler_address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        response = await stub.GetStatus(scheduler_pb2.GetStatusRequest(), timeout=5)
    return response.models[0]


async def eventually(check: Callable[[], object], timeout_s: float = 15.0) -> None:
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


def metric(stack: LocalStack, service: str, name: str) -> float:
    """Sum over labels of a sample on a service's /metrics."""
    with urllib.request.urlopen(f"http://{stack.metrics_addresses[service]}/metrics", timeout=5) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)
