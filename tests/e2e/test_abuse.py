"""Clients that behave badly harm nobody else; what is nobody's business stays out of logs and spans.

ABUSE_SCALE sets how much of it there is (default 0.1; `make abuse` takes 1, and holds everybody else to one second more
than without it).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
import urllib.request
from collections.abc import AsyncIterator

import grpc
import pytest

from bucketserve.client import BucketServeClient, Started
from bucketserve.core.errors import OverloadedError
from bucketserve.rpc.probe import check_health
from bucketserve.rpc.status import error_from_call
from bucketserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import NewStack
from tests.e2e.hostile import GENERATE, HOSTILE, burst, idle_connections, invented_names, unread_calls
from tests.e2e.hostile_http import HOSTILE_HTTP
from tests.e2e.memory_limit import limited, peak_bytes
from tests.e2e.observe import eventually, metric
from tests.e2e.test_stack import run
from tests.otlp import OtlpReceiver

pytestmark = pytest.mark.e2e

# Channels of one process share a connection unless told otherwise.
ALONE = [("grpc.use_local_subchannel_pool", 1)]
SCALE = float(os.environ.get("ABUSE_SCALE", "0.1"))
# Machines of a CI are slow and shared: there it is only told whether anybody waits for what another has sent.
MORE_S = 1.0 if SCALE >= 1 else 15.0
GIB = 1 << 30
MAY_BE_BARE = {"many_ids", "long_texts", "long_chats", "long_tokenising", "large_jobs", "many_stops"}
"""Kinds with messages beyond what the gateway receives at all: gRPC itself says so."""


async def test_a_client_that_does_not_read_is_bounded_then_cut_and_harms_nobody(new_stack: NewStack) -> None:
    stack = new_stack(environ={"BUCKETSERVE_GATEWAY_OUTPUT_QUEUE_TOKENS": "200"})
    # Twenty alternatives for each token are more than the transport buffers.
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[5]),
        stopping=common_pb2.StoppingParams(max_tokens=2000, ignore_eos=True),
        response=inference_pb2.ResponseOptions(num_logprobs=20),
    )
    # A window that does not grow: what the client does not take stays at the server.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]
    async with (
        grpc.aio.insecure_channel(stack.gateway_address, options=options) as channel,
        BucketServeClient(stack.gateway_address) as client,
    ):
        wanted, _ = await run(client, 10, 50)
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
        await call.read()
        others = await asyncio.gather(*(run(client, 10, 50) for _ in range(8)))
        assert [tokens for tokens, _ in others] == [wanted] * 8
        # Its work has ended, though it has taken nothing.
        await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") == 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read():
                pass
        error = error_from_call(caught.value)
        assert isinstance(error, OverloadedError)
        assert error.reason == "SLOW_CLIENT"


async def test_streams_of_a_connection_and_metadata_of_a_call_are_limited(new_stack: NewStack) -> None:
    stack = new_stack(
        environ={
            "BUCKETSERVE_GATEWAY_MAX_STREAMS_PER_CONNECTION": "4",
            "BUCKETSERVE_GATEWAY_MAX_METADATA_BYTES": "4096",
            "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "20000",
        }
    )
    started: list[Started] = []
    may_leave = asyncio.Event()

    async def stay(client: BucketServeClient) -> None:
        """Keeps a stream open for up to 40 s, or until it may leave."""
        async with contextlib.aclosing(client.generate(token_ids=[5], max_tokens=2000, ignore_eos=True)) as events:
            async for event in events:
                if isinstance(event, Started):
                    started.append(event)
                if may_leave.is_set():
                    return

    async with (
        BucketServeClient(stack.gateway_address, options=ALONE) as greedy,
        BucketServeClient(stack.gateway_address, options=ALONE) as other,
    ):
        with pytest.raises((grpc.aio.AioRpcError, OverloadedError)) as caught:
            await run(other, 5, 5, metadata=[("x-large", "x" * 20_000)])
        assert "metadata" in str(caught.value).lower()
        calls = [asyncio.create_task(stay(greedy)) for _ in range(12)]
        await eventually(lambda: len(started) == 4 and sum(call.done() for call in calls) == 8)
        refused = [call.exception() for call in calls if call.done()]
        # Told why and when to come again, and counted; nobody else is concerned.
        assert {(type(error), error.reason, error.retry_delay_s) for error in refused} == {
            (OverloadedError, "MAX_CALLS_PER_CONNECTION", 1.0)
        }
        labels = {"reason": "max_calls_per_connection"}
        assert metric(stack, "gateway", "bucketserve_gateway_refused_total", **labels) == 8
        assert len((await run(other, 5, 5))[0]) == 5
        assert len(started) == 4
        await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_open_calls") == 4)
        may_leave.set()
        await asyncio.gather(*calls, return_exceptions=True)
        assert len((await run(greedy, 5, 5))[0]) == 5
    for name in ("open_calls", "held_bytes"):
        await eventually(lambda name=name: metric(stack, "gateway", f"bucketserve_gateway_{name}") == 0)


async def test_prompts_outputs_and_secrets_are_in_no_log_and_no_span(new_stack: NewStack) -> None:
    marker = "xylophone-4711"
    with OtlpReceiver() as receiver:
        stack = new_stack(
            environ={
                "BUCKETSERVE_TELEMETRY_OTLP_ENDPOINT": receiver.endpoint,
                "BUCKETSERVE_TELEMETRY_LOG_LEVEL": "debug",
            }
        )
        async with BucketServeClient(stack.gateway_address) as client:
            secret = [("authorization", f"Bearer {marker}"), ("x-api-key", marker)]
            text = await client.generate_text(f"Say {marker}", max_tokens=8, ignore_eos=True, metadata=secret)
            # Refused ones are logged as well.
            with contextlib.suppress(Exception):
                await client.generate_text(f"Say {marker}", max_tokens=10**6, stop_strings=[""], metadata=secret)
        await eventually(lambda: len(receiver.spans()) >= 4)
        spans = json.dumps([[span.name, {k: str(v) for k, v in span.attributes.items()}] for span in receiver.spans()])
        logs = "".join(service.log_path.read_text() for service in stack.services.values())
    assert marker not in spans
    assert marker not in logs
    assert len(text) > 3
    assert text not in logs


class Victims:
    """Clients that go on as ever, and what they see."""

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self.took_s: list[float] = []

    @contextlib.asynccontextmanager
    async def at(self, address: str, number: int = 4) -> AsyncIterator[None]:
        """Keeps so many requests of several kinds on their way."""
        tasks = [asyncio.create_task(self._go_on(address, i)) for i in range(number)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _go_on(self, address: str, index: int) -> None:
        async with BucketServeClient(address, options=ALONE) as client:
            while True:
                start_s = time.monotonic()
                try:
                    match index % 3:
                        case 0:
                            await run(client, 20, 10)
                        case 1:
                            await client.generate_text("And the king said " * 20, max_tokens=10)
                        case _:
                            await client.tokenize("And the king said")
                except Exception as error:
                    self.failures.append(error)
                    await asyncio.sleep(0.1)
                self.took_s.append(time.monotonic() - start_s)
                await asyncio.sleep(0.01)

    def longest_s(self) -> float:
        """Returns the longest wait since it was last asked."""
        longest_s = max(self.took_s, default=0.0)
        self.took_s.clear()
        return longest_s


async def in_a_process(address: str, kind: str) -> dict[str, int]:
    """Returns what a hostile client sees that has a process of its own, one that yields to everybody else's."""
    arguments = ["-m", "tests.e2e.hostile", address, kind, str(SCALE)]
    process = await asyncio.create_subprocess_exec(
        "nice", sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return json.loads(out)


def series(stack: LocalStack, service: str) -> set[str]:
    """The names and labels of all that a service exports."""
    with urllib.request.urlopen(f"http://{stack.metrics_addresses[service]}/metrics", timeout=5) as response:
        return {line.rpartition(b" ")[0].decode() for line in response.read().splitlines() if line[:1] != b"#"}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["grpc", "http"])
async def test_hostile_clients_harm_nobody_else(new_stack: NewStack, way: str) -> None:
    stack = new_stack()
    limits = {service.pid: GIB if name != "worker-0" else 2 * GIB for name, service in stack.services.items()}
    victims = Victims()
    async with victims.at(stack.gateway_address):
        with limited(limits) as by:
            await asyncio.sleep(3)
            before_s = victims.longest_s()
            seen: dict[str, tuple[dict[str, int], float, float]] = {}
            address = stack.gateway_address if way == "grpc" else stack.http_address
            for kind in HOSTILE if way == "grpc" else HOSTILE_HTTP:
                start_s = time.monotonic()
                outcomes = await in_a_process(address, kind)
                took_s = time.monotonic() - start_s
                # Whoever waits still waits for this kind, not for the next.
                await asyncio.sleep(1)
                seen[kind] = (outcomes, took_s, victims.longest_s())
                print(
                    f"{kind}: {outcomes} in {took_s:.1f} s, others waited {seen[kind][2]:.2f} s ({before_s:.2f} before)"
                )
            peaks = {name: peak_bytes(service.pid) for name, service in stack.services.items()}
            print(f"memory limited by {by}; peaks in MiB:", {name: peak >> 20 for name, peak in peaks.items()})
    assert victims.failures == []
    assert all(peak < limits[stack.services[name].pid] for name, peak in peaks.items()), peaks
    for kind, (outcomes, took_s, longest_s) in seen.items():
        # gRPC takes calls in as they come: what comes behind a burst waits until the burst is in, and no longer. So it
        # is with messages of millions of parts, each of which takes a quarter of a second to read.
        more_s = MORE_S + (took_s if kind in ("bursts", "many_messages", "large_tensors") else 0.0)
        assert longest_s <= before_s + more_s, (kind, longest_s, before_s)
        allowed = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
        # Over HTTP some that don't keep to its forms are cut.
        allowed |= {"200", "400", "408", "413", "429", "431", "cut"} if way == "http" else set()
        allowed |= {"RESOURCE_EXHAUSTED?"} if kind in MAY_BE_BARE else set()
        # What grpc.aio's client makes of a refusal that comes while it is still sending.
        allowed |= {"INTERNAL?"} if kind in ("large_jobs", "large_tensors") else set()
        assert outcomes.keys() <= allowed, (kind, outcomes)
    for name in ("open_calls", "held_bytes"):
        await eventually(lambda name=name: metric(stack, "gateway", f"bucketserve_gateway_{name}") == 0)


async def test_a_burst_beyond_the_limits_is_told_so_and_counted(new_stack: NewStack) -> None:
    stack = new_stack(
        environ={
            "BUCKETSERVE_GATEWAY_MAX_OPEN_CALLS": "100",
            "BUCKETSERVE_GATEWAY_MAX_STREAMS_PER_CONNECTION": "40",
            "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "50000",
        }
    )
    for num_streams, num_connections in ((2000, 1), (2000, 50)):
        before = metric(stack, "gateway", "bucketserve_gateway_refused_total")
        found = await burst(stack.gateway_address, num_streams, num_connections)
        # Neither RST_STREAM nor a bare CANCELLED: who was not served is told why, and is in the metrics. (On a machine
        # that is busy enough the scheduler may seem to be away for a moment, of which it is told as well.)
        assert found.keys() <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}, found
        assert found["OK"] > 0
        refused = metric(stack, "gateway", "bucketserve_gateway_refused_total") - before
        assert refused == found["RESOURCE_EXHAUSTED"] > 0


async def test_idle_connections_and_unread_calls_block_nobody(new_stack: NewStack) -> None:
    stack = new_stack(environ={"BUCKETSERVE_GATEWAY_MAX_CONNECTIONS": "40"})
    async with idle_connections(stack.gateway_address, 60), BucketServeClient(stack.gateway_address) as client:
        # The port for workers, on which probes are answered as well, has connections of its own.
        assert check_health(stack.delivery_address, timeout_s=10) == "SERVING"
        await eventually(lambda: stack.is_serving("gateway"), 30)
        assert len((await run(client, 5, 5))[0]) == 5
    for method in (GENERATE, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
        before = metric(stack, "gateway", "bucketserve_gateway_refused_total", reason="slow_request")
        unread = asyncio.create_task(unread_calls(stack.gateway_address, 400, 20, method))
        await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_open_calls") >= 200)
        async with BucketServeClient(stack.gateway_address, options=ALONE) as other:
            for _ in range(5):
                assert len((await asyncio.wait_for(run(other, 5, 5), 10))[0]) == 5
        assert metric(stack, "gateway", "bucketserve_gateway_refused_total", reason="slow_request") > before
        unread.cancel()
        await asyncio.gather(unread, return_exceptions=True)
        await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_open_calls") == 0)


async def test_what_clients_invent_makes_no_series(new_stack: NewStack) -> None:
    stack = new_stack()
    await invented_names(stack.gateway_address, 5, seed=1)
    before = {name: series(stack, name) for name in stack.services}
    found = await invented_names(stack.gateway_address, 200, seed=2)
    assert found.keys() == {"OK", "NOT_FOUND"}
    assert found["OK"] == 200
    for name in stack.services:
        new = series(stack, name) - before[name]
        # Elsewhere a batch may have been limited by something that limited none before.
        assert not any("invented" in line for line in new) and len(new) <= (0 if name == "gateway" else 10), new
