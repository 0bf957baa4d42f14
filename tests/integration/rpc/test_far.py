"""A scheduler that is far away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from bucketserve.rpc.channel import SERVER_OPTIONS
from bucketserve.rpc.leader import LeaderSearch
from bucketserve.rpc.outbox import Outbox
from bucketserve.v1 import scheduler_pb2, scheduler_pb2_grpc
from tests.chaos.proxy import Relay
from tests.e2e.observe import eventually

ONE_WAY_S = 0.3
"""Until the server's first bytes are here after a round trip of 200 ms: the relay can't delay the handshake of TCP."""


class Welcoming(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Says hello on every stream and leaves it open."""

    async def Submit(self, requests: object, context: object) -> AsyncIterator[scheduler_pb2.SubmitResponse]:
        yield scheduler_pb2.SubmitResponse(hello=scheduler_pb2.SchedulerHello(scheduler_id="s", epoch=1))
        await asyncio.Event().wait()


async def test_a_scheduler_behind_a_slow_way_is_found_again_each_time_the_way_breaks() -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(Welcoming(), server)
    relay = Relay(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    relay.delay_s = ONE_WAY_S
    await server.start()
    await relay.start()
    states: list[bool] = []
    search = LeaderSearch("m", [relay.address], None, lambda is_connected, detail: states.append(is_connected))

    async def talk(stub: scheduler_pb2_grpc.SchedulerServiceStub, address: str) -> None:
        outbox: Outbox[scheduler_pb2.SubmitRequest] = Outbox(10)
        async for response in stub.Submit(outbox.messages()):
            search.welcomed(response.hello, address)

    task = asyncio.create_task(search.run(talk))
    try:
        await eventually(lambda: states[-1:] == [True], 10)
        for _ in range(3):
            relay.cut()
            await eventually(lambda: False in states[-1:], 10)
            await eventually(lambda: states[-1:] == [True], 10)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await relay.close()
        await server.stop(0)
    # Each time by the first try: none was given up because it took longer than one to somebody near.
    assert states == [True, False] * 3 + [True]
