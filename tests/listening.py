"""Servers of asyncio's in tests, and their end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from bucketserve_gateway.openai.server import stop_listening

__all__ = ["num_connections", "until_closed"]

END_S = 30.0


def num_connections(server: asyncio.Server) -> int:
    """Returns how many connections that it accepted are not closed yet; from Python 3.13 on asyncio keeps a set."""
    clients = getattr(server, "_clients", None)
    return server._active_count if clients is None else len(clients)  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def until_closed(server: asyncio.Server) -> AsyncIterator[None]:
    """Then listens no more, and waits for the connections that were accepted, those of failed handshakes included.

    Their clients have to be gone by then. That is what wait_closed() does from Python 3.12 on: what would be left of
    the connections is found open by whichever test runs when it is collected.
    """
    try:
        yield
    finally:
        await stop_listening(server)
        async with asyncio.timeout(END_S):
            while num_connections(server):
                await asyncio.sleep(0.01)
