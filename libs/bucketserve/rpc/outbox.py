"""Messages on their way out of one bidirectional stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

__all__ = ["Outbox"]

M = TypeVar("M")


class Outbox(Generic[M]):
    """A bounded queue that one stream handler empties.

    A peer that does not read is cut rather than waited for: the sender is the scheduling loop, which must not block.
    """

    def __init__(self, limit: int) -> None:
        """Holds at most `limit` messages."""
        self._queue: asyncio.Queue[M | None] = asyncio.Queue()
        self._limit = limit
        self._is_cut = False
        self.is_closed = False
        """Whether it takes nothing more."""

    def send(self, message: M) -> bool:
        """Queues a message; closes the box and returns False if it is full or closed."""
        if self.is_closed:
            return False
        if self._queue.qsize() >= self._limit:
            self.close()
            return False
        self._queue.put_nowait(message)
        return True

    def close(self) -> None:
        """Ends messages() at once; what is still queued is not sent."""
        self._is_cut = True
        self.finish()

    def finish(self) -> None:
        """Ends messages() after what is queued."""
        if not self.is_closed:
            self.is_closed = True
            self._queue.put_nowait(None)

    async def messages(self) -> AsyncIterator[M]:
        """Yields messages as they come, until close() or finish()."""
        while (message := await self._queue.get()) is not None and not self._is_cut:
            yield message
