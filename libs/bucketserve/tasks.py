"""Cancelling, so that it takes effect: once a task has missed its cancellation nobody repeats it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

__all__ = ["end_task", "heeded"]

T = TypeVar("T")


async def end_task(task: asyncio.Task[Any], *expected: type[BaseException]) -> None:
    """Cancels a task and waits until it has ended; how it ended is no news if it was cancelled or by an expected error.

    A cancellation of the caller meanwhile is the caller's: to await the task itself, and to suppress CancelledError,
    would take the one for the other.

    Raises:
        BaseException: any other error of the task.
    """
    task.cancel()
    await asyncio.wait([task])
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, expected):
        raise error


async def heeded(call: Awaitable[T]) -> T:
    """Returns what a library's call returns, unless the running task was cancelled meanwhile.

    Libraries swallow that: redis-py sends by asyncio.wait_for, which on Python 3.11 does as the sending is done;
    grpc.aio does while it prepares a call, and then tells of the connection that has failed. A task that goes on for
    ever would miss its only cancellation, and its process could not end.

    Raises:
        asyncio.CancelledError: it was, whatever the call has come to.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        return await call
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
