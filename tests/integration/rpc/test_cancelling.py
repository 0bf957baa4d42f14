"""A search for a leader can be cancelled at any moment, also in those in which grpc.aio swallows that.

It does between the status of a call and the end of its preparation, as when a connection is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from bucketserve.rpc import leader
from bucketserve.rpc.leader import LeaderSearch
from bucketserve.rpc.listening import hang_up, messages_of, messages_while_alive
from bucketserve.store.embedded import ReservedPorts
from bucketserve.v1 import scheduler_pb2

TRIES = 400
"""One in 4 to one in 200 has the moment, by how busy the machine is."""


@pytest.fixture
def refusing() -> Iterator[str]:
    """An address of this machine at which nobody listens."""
    ports = ReservedPorts()
    yield f"127.0.0.1:{ports.take()}"
    ports.close()


@pytest.mark.parametrize("listen", [messages_of, messages_while_alive])
async def test_no_cancellation_is_lost_as_a_connection_is_refused(
    refusing: str, listen: Callable[[Any], AsyncIterator[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader, "RETRY_S", 0.0)
    monkeypatch.setattr(leader, "SLOW_RETRY_S", 0.0)
    calls: list[Any] = []

    async def hello() -> AsyncIterator[scheduler_pb2.SubmitRequest]:
        yield scheduler_pb2.SubmitRequest(hello=scheduler_pb2.GatewayHello(gateway_id="g"))
        await asyncio.sleep(60)

    async def talk(stub: Any, _: str) -> None:
        calls.append(stub.Submit(hello()))
        try:
            async for _message in listen(calls[-1]):
                pass
        finally:
            hang_up(calls[-1])

    for _ in range(TRIES):
        calls.clear()
        task = asyncio.create_task(LeaderSearch("m", [refusing], None, lambda *_: None).run(talk))
        while not (calls and calls[0].done()):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=2)
        assert task.cancelled()
