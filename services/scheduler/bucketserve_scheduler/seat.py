"""Who schedules a model: one of several schedulers holds its seat, the others stand by and refuse its streams.

The seat is a leadership in the store, like that of the model's loop, under a name that no model has. It decides where
gateways and workers are heard. A holder that could not renew it within its lease has to believe that another has it;
what it still writes is refused by the fencing epoch of its loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from bucketserve.core.errors import StaleEpochError, UnavailableError
from bucketserve.ports import Leadership, QueueStore

__all__ = ["Seat", "seat_of"]

MOST_PATIENCE = 2
"""In leases."""
LOOKS_LEFT_OUT = 4
"""While another scheduler should rather take it: of so many and one."""
LOOKS_AFTER = 12
"""Left out after it was handed on: two leases."""


def seat_of(model: str) -> str:
    """Returns the name of a model's seat in the store."""
    return f"*seat*{model}"


class Seat:
    """Takes the seat whenever it is free and holds it as long as it can."""

    def __init__(
        self,
        store: QueueStore,
        scheduler_id: str,
        lease_s: float,
        *,
        has_rival: Callable[[], bool],
        on_taken: Callable[[int], None],
        on_lost: Callable[[str], None],
        on_store: Callable[[str], None],
    ) -> None:
        """Looks at nothing yet.

        Args:
            store: whose leadership is the seat.
            scheduler_id: whoever takes it.
            lease_s: how long it is held without being renewed.
            has_rival: whether another scheduler should rather take it, if there is one that wants to.
            on_taken: called with its epoch when it was taken, in turn with on_lost.
            on_lost: called with the reason when it was lost.
            on_store: called with every look, with the store's problem or nothing.
        """
        self._store = store
        self._scheduler_id = scheduler_id
        self._lease_s = lease_s
        self._has_rival = has_rival
        self._on_taken = on_taken
        self._on_lost = on_lost
        self._on_store = on_store
        self.problem = ""
        """Why nobody can schedule; empty if the store answers, or was not asked yet."""
        self._has_looked = asyncio.Event()
        self._num_left_out = 0
        """Looks since the last one, while it is not held."""
        self._asking = asyncio.Lock()
        """Around what is asked of the store: a renewal that comes after the resignation would take the seat again."""
        self._is_handed_on = False
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

    async def looked(self) -> None:
        """Waits for the first answer, or the first that does not come, or for dismiss()."""
        await self._has_looked.wait()

    def dismiss(self) -> None:
        """Lets nobody wait any longer: nobody looks any more."""
        self._has_looked.set()

    async def run(self) -> None:
        """Goes on until it is cancelled, and gives the seat up then."""
        try:
            while True:
                async with self._asking:
                    if self._held is None and self._num_left_out < self._num_to_leave_out():
                        self._num_left_out += 1
                    else:
                        self._num_left_out, self._is_handed_on = 0, False
                        await self._look()
                self._has_looked.set()
                await asyncio.sleep(self._lease_s / (3 if self._held else 6))
        finally:
            await self._resign()

    async def hand_on(self) -> None:
        """Gives the seat up, and leaves it to others for a while."""
        async with self._asking:
            self._is_handed_on, self._num_left_out = True, 0
            await self._resign()

    async def _resign(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            with contextlib.suppress(UnavailableError, StaleEpochError):
                await self._store.resign(held)

    def _num_to_leave_out(self) -> int:
        if self._is_handed_on:
            return LOOKS_AFTER
        return LOOKS_LEFT_OUT if self._has_rival() else 0

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
