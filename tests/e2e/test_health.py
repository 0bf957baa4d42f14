"""Health says whether a request would be served, and an error says why it is not."""

from __future__ import annotations

import asyncio
import os
import signal

import grpc
import pytest

from bucketserve.client import BucketServeClient
from bucketserve.core.errors import UnavailableError
from bucketserve.v1 import inference_pb2, inference_pb2_grpc
from bucketserve_cli.stack import LocalStack
from tests.e2e.observe import events, eventually
from tests.e2e.test_stack import run

pytestmark = pytest.mark.e2e

SOON = {"BUCKETSERVE_GATEWAY_SCHEDULER_WAIT_S": "1"}


@pytest.mark.stack(environ=SOON)
async def test_a_gateway_without_a_scheduler_is_not_ready_and_is_again(stack: LocalStack) -> None:
    scheduler = stack.services["scheduler"]
    scheduler.signal(signal.SIGKILL)
    scheduler.wait(5)
    async with BucketServeClient(stack.gateway_address) as client:
        with pytest.raises(UnavailableError, match="no scheduler answers"):
            await run(client, 5, 2)
        await eventually(lambda: not stack.is_serving("gateway"), 20)
        stack.restart("scheduler")
        stack.wait_until_serving(60)
        tokens, _ = await run(client, 5, 2)
    assert len(tokens) == 2


@pytest.mark.stack(environ=SOON)
async def test_a_store_that_hangs_is_named_and_nobody_pretends_to_serve(stack: LocalStack) -> None:
    assert stack.store is not None
    os.kill(stack.store.pid, signal.SIGSTOP)
    try:
        await eventually(lambda: not stack.is_serving("scheduler"), 30)
        await eventually(lambda: not stack.is_serving("gateway"), 30)
        # As by a client that does not watch health. The last try may have met the end of a stream, not its reason.
        async with grpc.aio.insecure_channel(stack.gateway_address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            for _ in range(5):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in stub.Generate(inference_pb2.GenerateRequest(prompt="a"), timeout=20):
                        pass
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                if "the store" in (caught.value.details() or ""):
                    break
                await asyncio.sleep(1)
        assert "the store" in (caught.value.details() or "")
        # Said when it changes and then ever more rarely, not with every try.
        assert len(events(stack, "scheduler", "store.unavailable")) <= 6
    finally:
        os.kill(stack.store.pid, signal.SIGCONT)
    stack.wait_until_serving(60)
    async with BucketServeClient(stack.gateway_address) as client:
        tokens, _ = await run(client, 5, 2)
    assert len(tokens) == 2
