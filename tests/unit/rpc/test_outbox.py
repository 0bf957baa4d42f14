"""Outbox: what is sent, what is not."""

from __future__ import annotations

from bucketserve.rpc.outbox import Outbox


async def test_finish_sends_what_is_queued_and_takes_nothing_more() -> None:
    outbox: Outbox[int] = Outbox(10)
    assert outbox.send(1)
    assert outbox.send(2)
    outbox.finish()
    assert not outbox.send(3)
    assert [message async for message in outbox.messages()] == [1, 2]


async def test_close_sends_nothing_more_also_after_finish() -> None:
    outbox: Outbox[int] = Outbox(10)
    outbox.send(1)
    outbox.finish()
    outbox.close()
    assert [message async for message in outbox.messages()] == []


async def test_a_box_that_is_full_is_closed() -> None:
    outbox: Outbox[int] = Outbox(2)
    assert [outbox.send(number) for number in range(4)] == [True, True, False, False]
    assert outbox.is_closed
    assert [message async for message in outbox.messages()] == []
