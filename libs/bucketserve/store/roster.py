"""Which schedulers of a deployment there are, and how many models each leads.

| key               | type | content                                                                                  |
|-------------------|------|------------------------------------------------------------------------------------------|
| bs:{d}:schedulers | hash | scheduler id -> models that it leads, a space, and a number that grows with every word   |
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple
from urllib.parse import quote

import redis.asyncio as aioredis

from bucketserve.store.redis import guard

__all__ = ["Roster", "Word"]


class Word(NamedTuple):
    """What a scheduler said last. Without a time, since no clock is right for certain: who lives says another one."""

    num_led: int
    number: int


class Roster:
    """Every method is one round trip.

    Raises, all of them:
        UnavailableError: the server can't be reached.
    """

    def __init__(self, client: aioredis.Redis, deployment: str = "default") -> None:
        """Does not own the client."""
        self._client = client
        self._key = f"bs:{{{quote(deployment, safe='')}}}:schedulers"

    async def say(self, scheduler_id: str, word: Word) -> dict[str, Word]:
        """Says it for a scheduler; returns the last word of each of the others, of those that have ended as well."""
        return await guard(self._say(scheduler_id, word))

    async def forget(self, scheduler_ids: Collection[str]) -> None:
        """Forgets schedulers; one that lives is back with its next word."""
        if scheduler_ids:
            await guard(self._forget(scheduler_ids))

    async def _say(self, scheduler_id: str, word: Word) -> dict[str, Word]:
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.hset(self._key, scheduler_id, f"{word.num_led} {word.number}")
            pipe.hgetall(self._key)
            _, words = await pipe.execute()
        said = {name.decode(): Word(*map(int, text.split())) for name, text in words.items()}
        del said[scheduler_id]
        return said

    async def _forget(self, scheduler_ids: Collection[str]) -> None:
        await self._client.hdel(self._key, *scheduler_ids)
