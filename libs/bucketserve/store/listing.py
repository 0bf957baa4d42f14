"""What a tenant has, in the order in which it came: ids that begin with their time, and lists of them.

| key                           | type | content                         |
|-------------------------------|------|---------------------------------|
| bs:{d/jobs}:{kind}:{tenant}   | zset | ids, all of score 0             |

An id may outlive what it names: that expires by itself. Lists hold none that are older than anything is kept.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable
from typing import TypeVar, cast

import redis.asyncio as aioredis

from bucketserve.store.jobs import MOST_AT_ONCE
from bucketserve.store.redis import guard

__all__ = ["ID_CHARACTERS", "Listing", "new_id"]

T = TypeVar("T")

MOST_S = 32 * 86_400
"""Longer than anything that is listed is kept."""
TIME_CHARACTERS, RANDOM_BYTES = 14, 9
ID_CHARACTERS = TIME_CHARACTERS + 2 * RANDOM_BYTES


def new_id() -> str:
    """Returns an id that nobody can guess; later ones are greater."""
    return _beginning(0.0) + secrets.token_hex(RANDOM_BYTES)


def _beginning(ago_s: float) -> str:
    return f"{time.time_ns() // 1000 - round(ago_s * 1e6):0{TIME_CHARACTERS}x}"


class Listing:
    """The ids of one kind.

    Raises, all of them:
        UnavailableError: the server can't be reached.
    """

    def __init__(self, client: aioredis.Redis, deployment: str, kind: str) -> None:
        """Does not own the client."""
        self._client = client
        self._limit = asyncio.Semaphore(MOST_AT_ONCE)
        self._prefix = f"bs:{{{deployment}/jobs}}:{kind}:"

    async def add(self, tenant: str, an_id: str) -> None:
        """Lists an id; drops those that are too old to mean anything."""
        key = self._prefix + tenant
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.zadd(key, {an_id: 0})
            pipeline.zremrangebylex(key, "-", f"({_beginning(MOST_S)}")
            pipeline.expire(key, MOST_S)
            await self._ask(cast(Awaitable[object], pipeline.execute()))

    async def remove(self, tenant: str, *ids: str) -> None:
        """Takes ids off the list."""
        if ids:
            await self._ask(cast(Awaitable[object], self._client.zrem(self._prefix + tenant, *ids)))

    async def page(
        self, tenant: str, start: str, most: int, *, is_after: bool = True, is_newest_first: bool = True
    ) -> list[str]:
        """Returns at most so many ids, in order.

        Args:
            tenant: whose.
            start: an id, there or not, from which on; empty for all.
            most: how many.
            is_after: whether that id is left out.
            is_newest_first: whether the order is from the newest to the oldest.
        """
        key, start = self._prefix + tenant, f"{'(' if is_after else '['}{start}" if start else ""
        call = (
            self._client.zrevrangebylex(key, start or "+", "-", start=0, num=most)
            if is_newest_first
            else self._client.zrangebylex(key, start or "-", "+", start=0, num=most)
        )
        found = await self._ask(cast(Awaitable[list[bytes]], call))
        return [each.decode() for each in found]

    async def _ask(self, call: Awaitable[T]) -> T:
        async with self._limit:
            return await guard(call)
