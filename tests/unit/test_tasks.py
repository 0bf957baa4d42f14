"""Cancellations take effect: whoever ends a task of his own can be cancelled himself, whatever a library swallows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest

from bucketserve.core.errors import UnavailableError
from bucketserve.rpc.listening import messages_of, messages_while_alive
from bucketserve.rpc.status import errors_named
from bucketserve.store.redis import guard
from bucketserve.tasks import end_task, heeded


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


class _Deaf:
    """A stream call of a library that swallows its cancellation, and then comes to an end of its own."""

    def __init__(self, end: object) -> None:
        self.began = asyncio.Event()
        self._end = end

    async def read(self) -> object:
        if self.began.is_set():
            return grpc.aio.EOF
        try:
            self.began.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass
        if isinstance(self._end, BaseException):
            raise self._end
        return self._end


async def _read_on(deaf: _Deaf) -> None:
    async for _ in messages_of(deaf):
        pass


async def _read_while_alive(deaf: _Deaf) -> None:
    async for _ in messages_while_alive(deaf):
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda deaf: heeded(deaf.read()),
        lambda deaf: errors_named(deaf.read()),
        lambda deaf: guard(deaf.read()),
        _read_on,
        _read_while_alive,
    ],
)
@pytest.mark.parametrize("end", ["a message", grpc.aio.EOF, OSError("refused"), UnavailableError("away")])
async def test_what_a_library_swallows_is_heeded(call: Callable[[_Deaf], Awaitable[object]], end: object) -> None:
    deaf = _Deaf(end)
    task = asyncio.ensure_future(call(deaf))
    await deaf.began.wait()
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()


async def test_a_limit_of_time_that_a_library_swallows_is_heeded() -> None:
    with pytest.raises(UnavailableError, match="silent"):
        async for _ in messages_while_alive(_Deaf("a message"), silence_s=0.01):
            pass


async def test_a_cancellation_of_long_ago_is_no_reason_to_end() -> None:
    async def goes_on() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return await heeded(asyncio.sleep(0, "done"))
        return ""

    task = asyncio.create_task(goes_on())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "done"
