from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import redis.asyncio as aioredis

from bucketserve.ports import QueueStore
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.store.memory import MemoryState, MemoryStore
from bucketserve.store.redis import RedisStore, connect

_names = itertools.count()


@pytest.fixture(scope="session")
def valkey() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
async def client(valkey: EmbeddedServer) -> AsyncIterator[aioredis.Redis]:
    """Returns a client of an empty server."""
    client = connect(valkey.url)
    await client.flushdb()
    yield client
    await client.aclose()


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
async def new_store(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[], QueueStore]]:
    """Returns a function that gives one more client of the same, initially empty, model."""
    if request.param == "memory":
        state = MemoryState()
        yield lambda: MemoryStore(state)
        return
    server: EmbeddedServer = request.getfixturevalue("valkey")
    client = connect(server.url)
    model = f"model {next(_names)} {{odd}}"
    yield lambda: RedisStore(client, model)
    await client.aclose()
