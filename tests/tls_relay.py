"""TLS in front of a server that speaks none, such as the embedded store."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

from tests.certificates import Papers
from tests.listening import until_closed

__all__ = ["behind_tls"]


@contextlib.asynccontextmanager
async def behind_tls(papers: Papers, target: int, *, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[int]:
    """Takes clients with a certificate of the CA to port `target`; yields its port.

    Its clients have to be gone when it ends: it waits for their connections.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(papers.cert, papers.key)
    context.load_verify_locations(papers.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    relays: set[asyncio.Task[None]] = set()

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(65_536):
                sink.write(piece)
                await sink.drain()
        sink.close()
        with contextlib.suppress(OSError):
            await sink.wait_closed()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        relays.add(task)
        try:
            there = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            # The target is not up yet: its client tries again.
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

    server = await asyncio.start_server(relay, host, port, ssl=context)
    async with until_closed(server):
        yield server.sockets[0].getsockname()[1]
    await asyncio.gather(*relays)
