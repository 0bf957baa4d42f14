"""What tenants may use: taken when a request begins, counted exactly when it ends.

Counts are in the store, so that gateways share them. A store that is away stops nobody here: what is let in then is not
counted, and new requests wait for their scheduler anyway, which needs the store too.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from bucketserve.core.errors import QuotaExceededError, UnavailableError
from bucketserve.store.quotas import QuotaStore, Refusal
from bucketserve_gateway.keys import Limits

__all__ = ["Charge", "Quotas"]

RENEW_S = 10.0
SETTLE_S = 1.0
"""Most that a gateway which ends waits for what has ended before."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What a request has taken."""

    tenant: str
    name: str
    num_tokens: int
    limits: Limits


class Quotas:
    """Takes and settles; renews what runs."""

    def __init__(
        self,
        store: QuotaStore | None,
        limits_of: Callable[[str], Limits | None],
        on_problem: Callable[[str], None],
    ) -> None:
        """limits_of(tenant) returns what a tenant may use, None for all; on_problem is told why use goes uncounted."""
        self._store = store
        self._limits_of = limits_of
        self._on_problem = on_problem
        self._open: dict[str, Charge] = {}
        self._settling: set[asyncio.Task[None]] = set()

    async def take(self, tenant: str, num_tokens: int) -> Charge | None:
        """Takes a request of at most that many tokens; None if nothing limits it.

        Raises:
            QuotaExceededError: the tenant has used what it may; says when to come back.
        """
        limits = self._limits_of(tenant)
        if limits is None:
            return None
        if self._store is None:
            self._on_problem("there is no redis_url")
            return None
        name = f"{num_tokens}:{uuid.uuid4().hex}"
        charge = Charge(tenant, name, min(num_tokens, limits.tokens_per_minute or num_tokens), limits)
        taking = asyncio.create_task(
            self._store.take(
                tenant,
                charge.name,
                num_tokens,
                requests=limits.requests_per_minute,
                tokens=limits.tokens_per_minute,
                at_once=limits.requests_at_once,
                tokens_at_once=limits.tokens_at_once,
            ),
            name="quota",
        )
        try:
            refusal = await asyncio.shield(taking)
        except asyncio.CancelledError:
            # Whoever leaves now does not wait for what the store has been asked to take.
            self._later(self._give_back(charge, taking))
            raise
        except UnavailableError as error:
            self._on_problem(str(error))
            return None
        if refusal is not None:
            raise QuotaExceededError(tenant, refusal.limit, retry_delay_s=refusal.retry_delay_s)
        self._open[charge.name] = charge
        return charge

    def settle(self, charge: Charge | None, num_used: int) -> None:
        """Ends a request that used so many tokens. Does not wait: whoever leaves may have been cancelled."""
        if charge is None:
            return
        del self._open[charge.name]
        self._later(self._settle(charge, num_used))

    async def run(self) -> None:
        """Keeps what runs counted, for ever; on cancellation lets what has ended be settled."""
        try:
            while True:
                await asyncio.sleep(RENEW_S)
                await self._renew()
        finally:
            if self._settling:
                await asyncio.wait(self._settling, timeout=SETTLE_S)

    async def _renew(self) -> None:
        by_tenant: dict[str, list[str]] = {}
        for charge in self._open.values():
            by_tenant.setdefault(charge.tenant, []).append(charge.name)
        try:
            for tenant, names in by_tenant.items():
                await self._taken_from().renew(tenant, names)
        except UnavailableError as error:
            self._on_problem(str(error))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="quota")
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _give_back(self, charge: Charge, taking: asyncio.Task[Refusal | None]) -> None:
        """Ends a request whose client left while it was being taken."""
        try:
            refusal = await taking
        except UnavailableError as error:
            self._on_problem(str(error))
            return
        if refusal is None:
            await self._settle(charge, 0)

    async def _settle(self, charge: Charge, num_used: int) -> None:
        unused = max(charge.num_tokens - num_used, 0)
        try:
            tokens = charge.limits.tokens_per_minute
            await self._taken_from().settle(charge.tenant, charge.name, unused=unused, tokens=tokens)
        except UnavailableError as error:
            self._on_problem(str(error))

    def _taken_from(self) -> QuotaStore:
        assert self._store is not None, "nothing is taken without a store"
        return self._store
