"""The Python clients against a real server: what is repeated, what is not, and that errors say what the server said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

import grpc
import pytest

from bucketserve.client import BucketServeClient, Chunk
from bucketserve.core.errors import (
    BucketServeError,
    DeadlineError,
    DuplicateRequestError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
    UnknownModelError,
)
from bucketserve.rpc.server import RpcServer
from bucketserve.store.embedded import free_port
from bucketserve.sync_client import SyncClient
from bucketserve.v1 import inference_pb2, inference_pb2_grpc
from bucketserve_cli.terminal import describe
from tests.chaos.proxy import Relay
from tests.e2e.observe import eventually

SERVICE = "bucketserve.v1.InferenceService"


class Gateway(inference_pb2_grpc.InferenceServiceServicer):
    """Keeps the requests that arrive; sends num_chunks and then waits, fails, or ends."""

    def __init__(self, num_chunks: int = 1, error: BucketServeError | None = None, *, waits: bool = False) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.num_chunks, self.error, self.waits = num_chunks, error, waits
        self.num_left = 0

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        try:
            for _ in range(self.num_chunks):
                # A client can leave before this write is known to be done.
                yield inference_pb2.GenerateResponse(chunk=inference_pb2.GenerateChunk(text="a"))
            if self.waits:
                await asyncio.Event().wait()
        finally:
            self.num_left += 1
        if self.error is not None:
            raise self.error

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        if self.error is not None:
            raise self.error
        return inference_pb2.ListModelsResponse()


async def started(gateway: Gateway, port: int = 0) -> RpcServer:
    server = RpcServer(
        f"127.0.0.1:{port}", services=[SERVICE], on_unexpected=lambda method, error: None, enable_reflection=False
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(gateway, server.grpc_server)
    await server.start()
    await server.set_serving(True)
    return server


@asynccontextmanager
async def serving(gateway: Gateway, port: int = 0) -> AsyncIterator[str]:
    server = await started(gateway, port)
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def with_asyncio(address: str) -> AsyncIterator[BucketServeClient]:
    async with BucketServeClient(address) as client:
        yield client


@asynccontextmanager
async def without_asyncio(address: str) -> AsyncIterator[SyncClient]:
    with SyncClient(address) as client:
        yield client


Open = Callable[[str], AbstractAsyncContextManager[BucketServeClient | SyncClient]]
both = pytest.mark.parametrize("open_client", [with_asyncio, without_asyncio], ids=["aio", "sync"])


async def text(client: BucketServeClient | SyncClient, **more: object) -> str:
    if isinstance(client, SyncClient):
        return await asyncio.to_thread(client.generate_text, "x", **more)
    return "".join([event.text async for event in client.generate(prompt="x", **more) if isinstance(event, Chunk)])


async def models(client: BucketServeClient | SyncClient) -> object:
    if isinstance(client, SyncClient):
        return await asyncio.to_thread(client.list_models)
    return await client.list_models()


ERRORS: list[tuple[BucketServeError, str]] = [
    (
        UnavailableError("no scheduler answers", reason="NO_SCHEDULER", retry_delay_s=1.5),
        "NO_SCHEDULER: no scheduler answers (try again in 1.5 s)",
    ),
    (
        OverloadedError("the queue is full", reason="QUEUE_TOKENS", retry_delay_s=0.25),
        "QUEUE_TOKENS: the queue is full (try again in 0.25 s)",
    ),
    (UnknownModelError("big", ["base", "chat"]), "UNKNOWN_MODEL: unknown model 'big'; served: base, chat"),
    (NotFoundError("job", "j"), "NOT_FOUND: no job 'j'"),
    (DuplicateRequestError("request id 'r' is in use"), "DUPLICATE_REQUEST: request id 'r' is in use"),
    (DeadlineError("too late"), "DEADLINE: too late"),
    (
        InvalidRequestError([FieldViolation("tenant", "too long"), FieldViolation("prompt", "empty")]),
        "INVALID_REQUEST: tenant: too long; prompt: empty",
    ),
]


@both
@pytest.mark.parametrize(("error", "said"), ERRORS, ids=[error.reason for error, _ in ERRORS])
async def test_what_a_server_answers_is_told_as_it_is_and_not_repeated(
    error: BucketServeError, said: str, open_client: Open
) -> None:
    gateway = Gateway(num_chunks=0, error=error)
    async with serving(gateway) as address, open_client(address) as client:
        for call in (text(client), models(client)):
            with pytest.raises(type(error)) as caught:
                await call
            assert describe(caught.value) == said
            assert (str(caught.value), caught.value.reason) == (str(error), error.reason)
    assert len(gateway.requests) == 1


@both
async def test_a_request_waits_for_a_gateway_that_is_just_coming_up(open_client: Open) -> None:
    gateway, port = Gateway(), free_port()
    async with open_client(f"127.0.0.1:{port}") as client:
        answer = asyncio.create_task(text(client))
        await asyncio.sleep(0.3)
        async with serving(gateway, port):
            assert await answer == "a"
    assert len(gateway.requests) == 1


@both
@pytest.mark.parametrize(("num_chunks", "num_sent"), [(0, 2), (1, 1)])
async def test_a_request_is_sent_again_only_if_nothing_was_heard_of_it(
    num_chunks: int, num_sent: int, open_client: Open
) -> None:
    gateway = Gateway(num_chunks, waits=True)
    async with serving(gateway) as address:
        relay = Relay(address)
        await relay.start()
        async with open_client(relay.address) as client:
            answer = asyncio.create_task(text(client))
            await eventually(lambda: gateway.requests)
            # The chunk, if there is one, is on its way.
            await asyncio.sleep(0.2)
            gateway.waits, gateway.num_chunks = False, 1
            relay.cut()
            if num_chunks:
                with pytest.raises(UnavailableError):
                    await answer
            else:
                assert await answer == "a"
        await relay.close()
    assert len(gateway.requests) == num_sent


@both
async def test_a_request_that_crosses_the_closing_of_its_gateway_is_sent_again(open_client: Open) -> None:
    gateway = Gateway(waits=True)
    server = await started(gateway)
    relay = Relay(f"127.0.0.1:{server.port}")
    await relay.start()
    async with open_client(relay.address) as client, serving(Gateway()) as other:
        running = asyncio.create_task(text(client))
        await eventually(lambda: gateway.requests)
        # What the server says of its leaving does not arrive before the request has gone.
        relay.back.clear()
        await server.leave(0)
        crossing = asyncio.create_task(text(client))
        await asyncio.sleep(0.5)
        relay.target = other
        relay.resume()
        assert await crossing == "a"
        assert len(gateway.requests) == 1
        await server.stop(0)
        with pytest.raises(BucketServeError):
            await running
    await relay.close()


async def test_closing_the_client_cancels_what_waits_and_sends_nothing_again() -> None:
    gateway = Gateway(num_chunks=0, waits=True)
    async with serving(gateway) as address:
        client = SyncClient(address)
        waiting = asyncio.create_task(text(client))
        await eventually(lambda: gateway.requests)
        await asyncio.to_thread(client.close)
        with pytest.raises(RequestCancelledError):
            await waiting
    assert len(gateway.requests) == 1


@both
async def test_a_string_of_stop_strings_is_one_and_two_prompts_are_refused(open_client: Open) -> None:
    gateway = Gateway()
    async with serving(gateway) as address, open_client(address) as client:
        await text(client, stop_strings="thee")
        await text(client, stop_strings=["thee", "thou"])
        for more in ({"token_ids": [1]}, {"chat": [("user", "x")]}):
            with pytest.raises(ValueError, match="give one of"):
                await text(client, **more)
    assert [list(request.stopping.stop_strings) for request in gateway.requests] == [["thee"], ["thee", "thou"]]


@both
async def test_a_deadline_holds_for_all_attempts_together(open_client: Open) -> None:
    async with open_client(f"127.0.0.1:{free_port()}") as client:
        with pytest.raises(UnavailableError) as caught:
            await text(client, timeout_s=0.3)
        assert "refused" in str(caught.value)


@pytest.mark.parametrize("num_chunks", [1, 1_000_000], ids=["while it waits", "while it writes"])
async def test_leaving_the_iteration_cancels_the_request(num_chunks: int) -> None:
    gateway = Gateway(num_chunks, waits=True)
    async with serving(gateway) as address:
        async with BucketServeClient(address) as client, aclosing(client.generate(prompt="x")) as events:
            assert (await anext(events)).text == "a"
        await eventually(lambda: gateway.num_left == 1)

        def leave(client: SyncClient) -> None:
            events = client.generate(prompt="x")
            assert next(events).text == "a"
            events.close()

        with SyncClient(address) as sync_client:
            await asyncio.to_thread(leave, sync_client)
            await eventually(lambda: gateway.num_left == 2)
            # From several threads at once.
            gateway.num_chunks, gateway.waits = 1, False
            assert await asyncio.gather(*(text(sync_client) for _ in range(20))) == ["a"] * 20
