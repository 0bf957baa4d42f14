"""Whoever ends a task of his own can still be cancelled himself."""

from __future__ import annotations

import asyncio

import pytest

from bucketserve.rpc.tasks import end_task


async def _for_ever() -> None:
    await asyncio.sleep(60)


async def _slow_to_end(began: asyncio.Event) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        began.set()
        await asyncio.sleep(0.1)


async def test_a_cancellation_while_it_waits_is_not_taken_for_that_of_the_task() -> None:
    began = asyncio.Event()
    task = asyncio.create_task(_slow_to_end(began))
    await asyncio.sleep(0)
    caller = asyncio.create_task(end_task(task))
    await began.wait()
    caller.cancel()
    await asyncio.wait([caller, task])
    assert caller.cancelled()
    assert task.cancelled()


async def test_the_end_of_the_task_is_no_news_unless_it_is_an_error_that_nobody_expects() -> None:
    task = asyncio.create_task(_for_ever())
    await asyncio.sleep(0)
    await end_task(task)
    assert task.cancelled()

    async def fails() -> None:
        raise ValueError

    for expected in ((ValueError,), ()):
        task = asyncio.create_task(fails())
        await asyncio.sleep(0)
        if expected:
            await end_task(task, *expected)
        else:
            with pytest.raises(ValueError):
                await end_task(task)
