"""What a test sees of a running stack."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import grpc
from prometheus_client.parser import text_string_to_metric_families

from bucketserve.rpc.channel import open_channel
from bucketserve.v1 import scheduler_pb2, scheduler_pb2_grpc
from bucketserve_cli.stack import LocalStack

__all__ = ["answer", "begin", "events", "eventually", "leader", "metric", "models", "status"]

START = ("process_start_time_seconds", ())
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass
class _Before:
    """What a stack that is shared had counted and logged when a test was given it."""

    samples: dict[str, Samples] = field(default_factory=dict)
    log_bytes: dict[str, int] = field(default_factory=dict)


_before: WeakKeyDictionary[LocalStack, _Before] = WeakKeyDictionary()


def begin(stack: LocalStack) -> None:
    """From now on metric() counts from zero and events() returns what comes, as if the stack had just started."""
    _before[stack] = _Before(
        {name: _samples(stack, name) for name in stack.services},
        {name: service.log_path.stat().st_size for name, service in stack.services.items()},
    )


async def answer(stack: LocalStack, address: str) -> scheduler_pb2.GetStatusResponse:
    """What the scheduler at an address says."""
    async with open_channel(address, stack.deployment.tls) as channel:
        return await scheduler_pb2_grpc.SchedulerServiceStub(channel).GetStatus(
            scheduler_pb2.GetStatusRequest(), timeout=5
        )


async def status(stack: LocalStack) -> scheduler_pb2.ModelStatus:
    """What the scheduler that leads sees of the model that is served."""
    return next(model for model in await models(stack) if model.model == stack.spec.model_name)


async def models(stack: LocalStack) -> list[scheduler_pb2.ModelStatus]:
    """What the scheduler that leads sees. There may be models beside the served one: whoever may speak may name any."""
    for address in stack.scheduler_addresses:
        found = list((await answer(stack, address)).models)
        if any(model.model == stack.spec.model_name for model in found):
            return found
    raise AssertionError("nobody leads")


async def leader(stack: LocalStack) -> str:
    """Name of the scheduler that leads."""
    for name, service in stack.services.items():
        if name.startswith("scheduler") and service.exit_status is None:
            try:
                told = await answer(stack, service.health_address)
                if any(model.model == stack.spec.model_name for model in told.models):
                    return name
            except grpc.aio.AioRpcError:
                continue
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
    """Sum, over the labels not given, of a sample on a service's /metrics; of a counter, what this test added."""
    now = _samples(stack, service)
    if name.endswith(("_total", "_count", "_sum", "_bucket")):
        before = _before[stack].samples.get(service, {}) if stack in _before else {}
        if before.get(START) != now.get(START):
            # Another process: it began at zero.
            before = {}
        now = {key: value - before.get(key, 0.0) for key, value in now.items()}
    return sum(value for (of, has), value in now.items() if of == name and labels.items() <= dict(has).items())


def _samples(stack: LocalStack, service: str) -> Samples:
    scheme, context = "http", None
    if stack.spec.environ.get("BUCKETSERVE_TLS_METRICS"):
        ca, *ours = (str(stack.spec.environ[f"BUCKETSERVE_TLS_{name}_FILE"]) for name in ("CA", "CERT", "KEY"))
        scheme, context = "https", ssl.create_default_context(cafile=ca)
        context.load_cert_chain(*ours)
    url = f"{scheme}://{stack.metrics_addresses[service]}/metrics"
    with urllib.request.urlopen(url, timeout=5, context=context) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def events(stack: LocalStack, service: str, event: str) -> list[dict]:
    """The log entries of that kind that a service has written during this test."""
    first = _before[stack].log_bytes.get(service, 0) if stack in _before else 0
    lines = stack.services[service].log_path.read_bytes()[first:].decode(errors="replace").splitlines()
    return [entry for line in lines if line.startswith("{") and (entry := json.loads(line)).get("event") == event]
