"""What a tenant has left of its quotas, for all gateways together.

| key                           | type   | content                                                                  |
|-------------------------------|--------|--------------------------------------------------------------------------|
| bs:{d/quota/tenant}:requests  | string | when all requests that were taken will have come back (s), at the latest |
| bs:{d/quota/tenant}:tokens    | string | the same of tokens                                                       |
| bs:{d/quota/tenant}:running   | zset   | request -> end of its gateway's lease (ms); "" -> less than zero by as   |
|                               |        | many tokens as they have together                                        |

What is taken comes back evenly over a minute; a tenant that has been idle for one has a minute's worth at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import cast
from urllib.parse import quote

import redis.asyncio as aioredis

from bucketserve.store.redis import guard

__all__ = ["QuotaStore", "Refusal"]

MINUTE_S = 60.0
SCRIPTS = ("quota_take", "quota_settle", "quota_renew")
MOST_AT_ONCE = 16
"""Commands at once, and so connections."""
LIMITS = ("requests a minute", "tokens a minute", "requests at once", "tokens at once")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A limit that is in the way, and in how many seconds it may not be any more."""

    limit: str
    retry_delay_s: float


class QuotaStore:
    """Every method is atomic.

    Raises, all of them:
        UnavailableError: the server can't be reached.
    """

    def __init__(self, client: aioredis.Redis, deployment: str = "default", *, lease_s: float = 30.0) -> None:
        """Does not own the client. What was taken at once is free again after lease_s if nobody renews it."""
        self._client = client
        self._deployment = deployment
        self._lease_ms = round(lease_s * 1e3)
        self._places = asyncio.Semaphore(MOST_AT_ONCE)
        folder = resources.files("bucketserve.store") / "lua"
        self._scripts = {name: client.register_script((folder / f"{name}.lua").read_text()) for name in SCRIPTS}

    async def take(
        self, tenant: str, name: str, num_tokens: int, *, requests: int, tokens: int, at_once: int, tokens_at_once: int
    ) -> Refusal | None:
        """Takes a request of that many tokens; returns what is in the way, and nothing is taken then.

        Args:
            tenant: whose it is.
            name: of the request, which nobody else uses: its number of tokens and a colon at the beginning.
            num_tokens: what it may need; more than a minute's worth counts as that.
            requests: limit a minute; 0: none.
            tokens: limit a minute; 0: none.
            at_once: limit of requests that wait or run; 0: none.
            tokens_at_once: limit of their tokens together; 0: none. One that needs more is let in alone.
        """
        keys = self._keys(tenant, "requests", "tokens", "running")
        args: list[str | int] = [name, num_tokens, requests, tokens, at_once, tokens_at_once, self._lease_ms]
        which, wait_ms = cast(tuple[int, int], await self._run("quota_take", keys, args))
        return Refusal(LIMITS[which - 1], wait_ms / 1e3) if which else None

    async def settle(self, tenant: str, name: str, *, unused: int, tokens: int) -> None:
        """Ends a request; `unused` of what it took comes back at once, by the limit under which it was taken."""
        sooner_s = unused * MINUTE_S / tokens if tokens else 0.0
        await self._run("quota_settle", self._keys(tenant, "tokens", "running"), [name, f"{sooner_s:.6f}"])

    async def renew(self, tenant: str, names: Iterable[str]) -> None:
        """Keeps the leases of requests that run."""
        await self._run("quota_renew", self._keys(tenant, "running"), [self._lease_ms, *names])

    async def _run(self, name: str, keys: list[str], args: list[str | int]) -> object:
        # Beyond the pool's size the library would not wait, but fail.
        async with self._places:
            return await guard(self._scripts[name](keys=keys, args=args))

    def _keys(self, tenant: str, *kinds: str) -> list[str]:
        return [f"bs:{{{self._deployment}/quota/{quote(tenant, safe='')}}}:{kind}" for kind in kinds]
