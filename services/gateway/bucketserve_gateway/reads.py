"""Requests on their way in: how many at once, since each may grow to the largest message before we see any of it."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from bucketserve.core.errors import OverloadedError

__all__ = ["Reads"]

READ_S = 30.0
"""How long a request may take to arrive."""
HURRIED_READ_S = 0.5
"""The same while others wait."""
READ_BYTES = 64 << 20
"""For all requests that arrive; a place is as large as the largest message."""
MIN_PLACES, MAX_PLACES = 8, 256

M = TypeVar("M")


class Reads:
    """A bounded number of places.

    A free one goes to the connection that has fewest, so that one that sends slowly, or much, delays itself; while
    anybody waits nobody may take long.
    """

    def __init__(self, num_places: int, refusal: Callable[[str, str], OverloadedError]) -> None:
        """Takes what makes a refusal of (reason, message)."""
        self._free = num_places
        self._refusal = refusal
        self._by_connection: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._unhurried: dict[asyncio.Timeout, float] = {}
        """Since when those read that still have READ_S."""

    @classmethod
    def of(cls, max_message_bytes: int, refusal: Callable[[str, str], OverloadedError]) -> Reads:
        """Returns places for messages of that size."""
        return cls(min(max(READ_BYTES // max_message_bytes, MIN_PLACES), MAX_PLACES), refusal)

    async def read(self, peer: str, receive: Callable[[], Awaitable[M]]) -> M:
        """Returns what receive() returns, called when there is a place.

        Raises:
            OverloadedError: it took too long to arrive.
        """
        if self._free:
            self._free -= 1
            self._by_connection[peer] += 1
        else:
            await self._turn(peer)
        try:
            return await self._receive(receive)
        except TimeoutError:
            raise self._refusal("SLOW_REQUEST", "the request took too long to arrive") from None
        finally:
            self._leave(peer)

    async def _receive(self, receive: Callable[[], Awaitable[M]]) -> M:
        async with asyncio.timeout(HURRIED_READ_S if self._waiting else READ_S) as limit:
            if not self._waiting:
                self._unhurried[limit] = asyncio.get_running_loop().time()
            try:
                return await receive()
            finally:
                self._unhurried.pop(limit, None)

    async def _turn(self, peer: str) -> None:
        """Waits for a place, which is then taken."""
        now_s = asyncio.get_running_loop().time()
        for limit, start_s in self._unhurried.items():
            limit.reschedule(max(now_s, start_s + HURRIED_READ_S))
        self._unhurried.clear()
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(peer, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            # Cancelled while it waited, it is passed over; else it has a place.
            if not turn.cancelled():
                self._leave(peer)
            raise

    def _leave(self, peer: str) -> None:
        """Gives a place back, or rather to whoever is next."""
        self._by_connection[peer] -= 1
        if not self._by_connection[peer]:
            del self._by_connection[peer]
        while self._waiting:
            # Of connections that have equally many, the one that has waited for longest.
            following = min(self._waiting, key=lambda waiting: self._by_connection[waiting])
            turns = self._waiting.pop(following)
            turn = turns.popleft()
            if turns:
                self._waiting[following] = turns
            if not turn.cancelled():
                self._by_connection[following] += 1
                turn.set_result(None)
                return
        self._free += 1
