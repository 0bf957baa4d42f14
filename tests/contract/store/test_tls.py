"""rediss:// to a real server behind TLS, which the embedded one does not speak by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bucketserve.core.errors import UnavailableError
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.store.redis import RedisStore, connect
from tests.certificates import Authority, Papers
from tests.tls_relay import behind_tls

pytestmark = pytest.mark.redis


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Authority(tmp_path / "ours").issue("redis")


@pytest.fixture
async def url(valkey: EmbeddedServer, papers: Papers) -> AsyncIterator[str]:
    """Of a port that takes clients with a certificate of the CA."""
    async with behind_tls(papers, valkey.port) as port:
        yield f"rediss://127.0.0.1:{port}/0"


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
