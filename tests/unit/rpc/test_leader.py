"""Which scheduler is listened to."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from bucketserve.core.errors import UnavailableError
from bucketserve.rpc import leader
from bucketserve.rpc.leader import LeaderSearch
from bucketserve.v1 import scheduler_pb2


def hello(epoch: int) -> scheduler_pb2.SchedulerHello:
    return scheduler_pb2.SchedulerHello(scheduler_id=f"s{epoch}", epoch=epoch)


def test_who_has_heard_a_newer_leader_does_not_listen_to_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(leader.time, "monotonic", lambda: now_s)
    search = LeaderSearch("m", ["a", "b"], None, lambda is_connected, detail: None)
    assert not search.is_present(1e9)
    search.welcomed(hello(5), "a")
    search.welcomed(hello(7), "b")
    search.welcomed(hello(7), "b")
    with pytest.raises(UnavailableError, match="leads no more"):
        search.welcomed(hello(5), "a")
    # A store that lost its data and its clock counts anew: after a while that is believed.
    now_s = 200.0
    search.welcomed(hello(1), "a")
    assert search.is_present(0)


async def test_a_scheduler_that_waits_for_its_store_may_lead_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # After one has led, others say that they don't, or nobody is there.
    now_s = 100.0
    monkeypatch.setattr(leader.time, "monotonic", lambda: now_s)
    turns: asyncio.Queue[Exception | None] = asyncio.Queue()
    states: asyncio.Queue[bool] = asyncio.Queue()
    search = LeaderSearch("m", ["127.0.0.1:1"], None, lambda is_connected, detail: states.put_nowait(is_connected))

    async def talk(stub: object, address: str) -> None:
        turn = await turns.get()
        if turn is None:
            search.welcomed(hello(1), address)
        else:
            raise turn

    nobody = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "nobody")
    details = grpc.aio.Metadata(("grpc-status-details-bin", b""))
    standby = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), details, "the store is away")
    running = asyncio.create_task(search.run(talk))
    found = []
    for turn in (standby, None, standby, nobody, nobody):
        now_s += 6.0
        turns.put_nowait(turn)
        # Whoever is connected loses the stream next.
        while await states.get():
            pass
        found.append((search.may_come(10.0), search.is_present(10.0)))
    running.cancel()
    assert found == [(False, False), (True, True), (True, True), (True, False), (False, False)]
