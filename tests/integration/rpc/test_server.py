"""A server's lifecycle and its doors, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bucketserve.rpc import server as module
from bucketserve.rpc.health import MAX_WATCHES
from bucketserve.rpc.server import RpcServer
from tests.e2e.observe import eventually

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
SERVICE = "bucketserve.v1.InferenceService"
ALONE = [("grpc.use_local_subchannel_pool", 1)]


@contextlib.asynccontextmanager
async def serving(**options: object) -> AsyncIterator[RpcServer]:
    def unexpected(method: str, error: BaseException) -> None:
        raise AssertionError(f"{method}: {error!r}")

    server = RpcServer("127.0.0.1:0", services=[SERVICE], on_unexpected=unexpected, **options)  # type: ignore[arg-type]
    await server.start()
    await server.set_serving(True)
    try:
        yield server
    finally:
        await server.stop(1.0)


@contextlib.asynccontextmanager
async def health_of(server: RpcServer) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=ALONE) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def asked(service: str = SERVICE) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def test_a_watcher_that_leaves_takes_nothing_from_the_others() -> None:
    async with serving() as server, health_of(server) as one, health_of(server) as other:
        stays, leaves = one.Watch(asked()), other.Watch(asked())
        assert (await stays.read()).status == (await leaves.read()).status == SERVING
        leaves.cancel()
        await asyncio.sleep(0.1)
        await server.set_serving(False)
        assert (await asyncio.wait_for(stays.read(), 5)).status == NOT_SERVING
        assert (await one.Check(asked())).status == NOT_SERVING
        await server.set_serving(True)
        assert (await asyncio.wait_for(stays.read(), 5)).status == SERVING


async def test_names_that_nobody_serves_are_kept_nowhere() -> None:
    async with serving() as server, health_of(server) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(asked("invented"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        calls = [stub.Watch(asked(f"invented-{i}")) for i in range(MAX_WATCHES)]
        assert {(await call.read()).status for call in calls} == {UNKNOWN}
        # Of a connection there are so many; others are not concerned.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Watch(asked()).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with health_of(server) as other:
            assert (await other.Watch(asked()).read()).status == SERVING
        for call in calls:
            call.cancel()
        await eventually(lambda: not server._health._watches)


async def test_connections_are_limited_and_those_that_say_nothing_are_closed() -> None:
    silent = [socket.socket() for _ in range(20)]
    options = [("grpc.server_handshake_timeout_ms", 1000)]
    try:
        async with serving(max_connections=10, options=options) as server:
            for each in silent:
                each.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    each.connect(("127.0.0.1", server.port))
            await asyncio.sleep(0.2)
            # They are closed after the time that they have to say something, and others get in.
            async with health_of(server) as stub:
                assert (await stub.Check(asked(), wait_for_ready=True, timeout=20)).status == SERVING
    finally:
        for each in silent:
            each.close()


async def test_idle_connections_are_closed_and_come_back_when_they_are_needed() -> None:
    options = [("grpc.max_connection_idle_ms", 500)]
    async with serving(max_connections=4, options=options) as server, contextlib.AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(health_of(server)) for _ in range(4)]
        for stub in idle:
            assert (await stub.Check(asked(), wait_for_ready=True, timeout=20)).status == SERVING
        async with health_of(server) as newcomer:
            assert (await newcomer.Check(asked(), wait_for_ready=True, timeout=20)).status == SERVING
        for stub in idle:
            assert (await stub.Check(asked(), wait_for_ready=True, timeout=20)).status == SERVING


@pytest.mark.parametrize(("limit", "connections"), [(1024, 298), (20_000, 6624), (100, 16)])
def test_three_servers_leave_descriptors_for_everything_else(
    monkeypatch: pytest.MonkeyPatch, limit: int, connections: int
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(module.resource, "getrlimit", lambda which: (limit // 2, limit))
    monkeypatch.setattr(module.resource, "setrlimit", lambda which, limits: raised.append(limits))
    assert module.connections_by_descriptors() == connections
    assert raised == [(limit, limit)]
