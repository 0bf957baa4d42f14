"""Who schedules: one of several schedulers holds the seat, the others stand by and refuse streams.

The seat is a leadership in the store, like that of each model's loop, under a name that no model has. It decides where
gateways and workers are heard; what a former holder still writes is refused by the fencing epochs of its loops.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from bucketserve.core.errors import StaleEpochError, UnavailableError
from bucketserve.ports import Leadership, QueueStore

__all__ = ["SEAT", "Seat"]

SEAT = "*seat*"
"""In place of a model's name."""


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
        on_store_away: Callable[[str], None],
    ) -> None:
        """on_taken(epoch) and on_lost(why) are called from the event loop, in turn."""
        self._store = store
        self._scheduler_id = scheduler_id
        self._lease_s = lease_s
        self._on_taken = on_taken
        self._on_lost = on_lost
        self._on_store_away = on_store_away
        self._held: Leadership | None = None

    @property
    def is_held(self) -> bool:
        """Whether this process schedules."""
        return self._held is not None

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
        try:
            leadership = await self._store.lead(self._scheduler_id, self._lease_s)
        except UnavailableError as error:
            # Without the store nobody else can take it either; what runs goes on, and the epochs fence what is written.
            self._on_store_away(str(error))
            return
        if self._held is not None and (leadership is None or leadership.epoch != self._held.epoch):
            self._held = None
            self._on_lost("another scheduler took it" if leadership is None else "the store forgot it")
        if self._held is None and leadership is not None:
            self._held = leadership
            self._on_taken(leadership.epoch)
