"""rediss:// to a real server behind TLS, which the embedded one does not speak by itself."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bucketserve.core.errors import UnavailableError
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.store.redis import RedisStore, connect
from tests.certificates import Authority, Papers

pytestmark = pytest.mark.redis


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Authority(tmp_path / "ours").issue("redis")


@pytest.fixture
async def url(valkey: EmbeddedServer, papers: Papers) -> AsyncIterator[str]:
    """Of a port that takes clients with a certificate of the CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(papers.cert, papers.key)
    context.load_verify_locations(papers.ca)
    context.verify_mode = ssl.CERT_REQUIRED

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while piece := await source.read(65_536):
                sink.write(piece)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", valkey.port)
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

    server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    yield f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    server.close()


async def test_the_store_is_reached_with_papers_and_by_nobody_else(url: str, papers: Papers, tmp_path: Path) -> None:
    theirs = Authority(tmp_path / "theirs").issue("rogue")
    ours = f"ssl_certfile={papers.cert}&ssl_keyfile={papers.key}"
    for query, is_welcome in {
        f"ssl_ca_certs={papers.ca}&{ours}": True,
        ours: False,
        f"ssl_ca_certs={theirs.ca}&{ours}": False,
        f"ssl_ca_certs={papers.ca}": False,
        f"ssl_ca_certs={papers.ca}&ssl_certfile={theirs.cert}&ssl_keyfile={theirs.key}": False,
    }.items():
        client = connect(f"{url}?{query}")
        store = RedisStore(client, "locked")
        try:
            if is_welcome:
                assert await store.lead("me", 1.0) is not None
            else:
                with pytest.raises(UnavailableError, match="store: "):
                    await store.lead("me", 1.0)
        finally:
            await client.aclose()
