"""Clients that behave badly harm nobody else; what is nobody's business stays out of logs and spans."""

from __future__ import annotations

import asyncio
import contextlib
import json

import grpc
import pytest

from bucketserve.client import BucketServeClient, Started
from bucketserve.core.errors import OverloadedError
from bucketserve.rpc.status import error_from_call
from bucketserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric
from tests.e2e.test_stack import run
from tests.otlp import OtlpReceiver

pytestmark = pytest.mark.e2e

# Channels of one process share a connection unless told otherwise.
ALONE = [("grpc.use_local_subchannel_pool", 1)]


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
        assert metric(stack, "gateway", "bucketserve_gateway_open_calls") == len(started) == 4
        may_leave.set()
        await asyncio.gather(*calls, return_exceptions=True)
        assert len((await run(greedy, 5, 5))[0]) == 5
    await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_open_calls") == 0)
    assert metric(stack, "gateway", "bucketserve_gateway_held_bytes") == 0


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
