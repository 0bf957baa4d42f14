"""Ending a task of one's own."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["end_task"]


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
