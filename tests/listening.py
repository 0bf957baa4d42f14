"""Servers of asyncio's in tests, and their end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

__all__ = ["until_closed"]

END_S = 30.0


@contextlib.asynccontextmanager
async def until_closed(server: asyncio.Server) -> AsyncIterator[None]:
    """Then listens no more, and waits for the connections that were accepted, those of failed handshakes included.

    Their clients have to be gone by then. That is what wait_closed() does from Python 3.12 on: what would be left of
    the connections is found open by whichever test runs when it is collected.
    """
    try:
        yield
    finally:
        server.close()
        async with asyncio.timeout(END_S):
            while server._active_count:  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
