"""How much of the store jobs may take: of a tenant, and all together.

| key              | type | content                                                       |
|------------------|------|---------------------------------------------------------------|
| bs:{d/jobs}:room   | hash | submission -> bytes, a space, tenant                          |
| bs:{d/jobs}:until  | zset | submission -> when its room is free again at the latest (ms)  |
| bs:{d/jobs}:held   | hash | tenant -> bytes; empty: of all                                |
| bs:{d/jobs}:secret | string | what makes job ids that nobody can guess                    |

A submission takes room before it stores anything, for its requests and for the results that they may have. It keeps it
for as long as its job is kept, and somewhat longer.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Awaitable
from importlib import resources
from typing import cast

import redis.asyncio as aioredis

from bucketserve.core.errors import OverloadedError
from bucketserve.store.redis import guard

__all__ = ["LATER_S", "JobRoom"]

LATER_S = 3600
"""The room outlives its job, whose last requests may run for long after it was last looked at."""
RETRY_S = 60.0


class JobRoom:
    """Every method is atomic.

    Raises, all of them:
        UnavailableError: the server can't be reached.
    """

    def __init__(
        self, client: aioredis.Redis, deployment: str = "default", *, max_tenant_bytes: int, max_bytes: int
    ) -> None:
        """Does not own the client."""
        self._client = client
        prefix = f"bs:{{{deployment}/jobs}}:"
        self._keys = [prefix + name for name in ("room", "until", "held")]
        self._secret = f"{prefix}secret"
        self._limits = (max_tenant_bytes, max_bytes)
        folder = resources.files("bucketserve.store") / "lua"
        self._reserve = client.register_script((folder / "job_reserve.lua").read_text())
        self._keep = client.register_script((folder / "job_keep.lua").read_text())

    async def job_id(self, tenant: str, idempotency_key: str) -> str:
        """Returns the id of a tenant's job of that key, the same at every gateway; a new one without a key."""
        if not idempotency_key:
            return f"job-{secrets.token_hex(12)}"
        await guard(cast(Awaitable[object], self._client.set(self._secret, secrets.token_bytes(32), nx=True)))
        secret = cast(bytes, await guard(cast(Awaitable[object], self._client.get(self._secret))))
        name = "\0".join((tenant, idempotency_key)).encode()
        return "job-" + hmac.new(secret, name, hashlib.sha256).hexdigest()[:24]

    async def reserve(self, submission: str, tenant: str, num_bytes: int, keep_s: int) -> None:
        """Takes room for that many bytes more.

        Raises:
            OverloadedError: the tenant has, or all have, too much.
        """
        args: list[str | int] = [submission, tenant, num_bytes, keep_s, *self._limits]
        found: int = await guard(self._reserve(keys=self._keys, args=args))
        if found < 1:
            of, reason = ("tenant", "JOBS_OF_TENANT") if found == 0 else ("store", "JOBS_OF_STORE")
            most = self._limits[found]
            message = f"jobs of this {of} may take {most:,} bytes with their results; wait for some to expire"
            raise OverloadedError(message, reason=reason, retry_delay_s=RETRY_S)

    async def keep(self, submission: str, ttl_s: int) -> None:
        """Keeps the room of a job that is kept for so long from now."""
        await guard(self._keep(keys=self._keys, args=[submission, ttl_s + LATER_S]))

    async def give_up(self, submission: str) -> None:
        """Frees the room."""
        await guard(self._keep(keys=self._keys, args=[submission, 0]))
