"""Who schedules: one of several schedulers holds the seat, the others stand by and refuse streams.

The seat is a leadership in the store, like that of each model's loop, under a name that no model has. It decides where
gateways and workers are heard. A holder that could not renew it within its lease has to believe that another has it;
what it still writes is refused by the fencing epochs of its loops.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from bucketserve.core.errors import StaleEpochError, UnavailableError
from bucketserve.ports import Leadership, QueueStore

__all__ = ["SEAT", "Seat"]

SEAT = "*seat*"
"""In place of a model's name."""
MOST_PATIENCE = 2
"""In leases."""


class Seat:
    """Takes the seat whenever it is free and holds it as long as it can."""

    def __init__(
        self,
        store: QueueStore,
        scheduler_id: str,
        lease_s: float,
        *,
        on_taken: Callable[[int], None],
        on_lost: Callable[[str], None],
        on_store: Callable[[str], None],
    ) -> None:
        """on_taken(epoch) and on_lost(why) are called in turn, on_store(problem or nothing) with every look."""
        self._store = store
        self._scheduler_id = scheduler_id
        self._lease_s = lease_s
        self._on_taken = on_taken
        self._on_lost = on_lost
        self._on_store = on_store
        self.problem = "the store was not reached yet"
        """Why nobody can schedule; empty if the store answers."""
        self._held: Leadership | None = None
        self._renewed_s = 0.0
        """When the last successful renewal was asked for."""
        self._patience_s = lease_s / 2
        """How long an answer is waited for, by who has no seat to lose: longer each time, until there is one. Giving up
        closes the connection, and opening one to a store that is far away takes many round trips."""

    @property
    def is_held(self) -> bool:
        """Whether this process schedules."""
        return self._held is not None and not self._has_lapsed()

    @property
    def epoch(self) -> int:
        """Fencing epoch of the seat; 0 while it is not held."""
        return self._held.epoch if self._held is not None else 0

    def _has_lapsed(self) -> bool:
        return time.monotonic() - self._renewed_s > self._lease_s

    async def run(self) -> None:
        """Goes on until it is cancelled, and gives the seat up then."""
        try:
            while True:
                await self._look()
                await asyncio.sleep(self._lease_s / (3 if self._held else 6))
        finally:
            if self._held is not None:
                with contextlib.suppress(UnavailableError, StaleEpochError):
                    await self._store.resign(self._held)

    async def _look(self) -> None:
        asked_s = time.monotonic()
        patience_s = self._lease_s / 2 if self._held is not None else self._patience_s
        try:
            async with asyncio.timeout(patience_s):
                leadership = await self._store.lead(self._scheduler_id, self._lease_s, self.epoch)
        except (UnavailableError, TimeoutError) as error:
            self._patience_s = min(2 * patience_s, MOST_PATIENCE * self._lease_s)
            self.problem = str(error) or f"the store has not answered within {patience_s:g} s"
            self._on_store(self.problem)
            if self._held is not None and self._has_lapsed():
                # Whoever still reaches the store has taken it, or will.
                self._held = None
                self._on_lost("it could not be renewed within its lease")
            return
        self.problem, self._patience_s = "", self._lease_s / 2
        self._on_store("")
        if leadership is not None:
            self._renewed_s = asked_s
        if self._held is not None and (leadership is None or leadership.epoch != self._held.epoch):
            self._held = None
            self._on_lost("another scheduler took it" if leadership is None else "the store forgot it")
        if self._held is None and leadership is not None:
            self._held = leadership
            self._on_taken(leadership.epoch)
