"""What schedulers say of themselves in Redis."""

from __future__ import annotations

import pytest

from bucketserve.core.errors import UnavailableError
from bucketserve.store.embedded import EmbeddedServer, free_port
from bucketserve.store.redis import connect
from bucketserve.store.roster import Roster, Word


async def test_each_hears_the_last_word_of_the_others_of_its_deployment() -> None:
    with EmbeddedServer() as server:
        client = connect(server.url)
        here, there = Roster(client, "here"), Roster(client, "the{re}")
        assert await here.say("a", Word(2, 1)) == {}
        assert await here.say("b", Word(0, 7)) == {"a": Word(2, 1)}
        assert await here.say("a", Word(1, 2)) == {"b": Word(0, 7)}
        assert await there.say("c", Word(0, 1)) == {}
        await here.forget([])
        await here.forget(["a", "nobody"])
        assert await here.say("b", Word(1, 8)) == {}
        await client.aclose()


async def test_a_server_that_is_away_is_unavailable() -> None:
    client = connect(f"redis://127.0.0.1:{free_port()}")
    with pytest.raises(UnavailableError):
        await Roster(client).say("a", Word(0, 1))
    with pytest.raises(UnavailableError):
        await Roster(client).forget(["a"])
    await client.aclose()
