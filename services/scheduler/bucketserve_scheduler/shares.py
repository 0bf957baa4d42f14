"""Sharing the models with the other schedulers: who leads more of them hands one on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from bucketserve.core.errors import UnavailableError
from bucketserve.store.roster import Roster, Word

__all__ = ["Shares"]

SAY_S = 1.0
LOOKS_ALIVE = 3
"""A scheduler whose word was the same at so many looks has ended, or can't lead anything either."""
LOOKS_KEPT = 600
"""After so many it is forgotten."""
LOOKS_BETWEEN = 5
"""Models are handed on one by one: the next one after so many looks, when the last one has found its place."""


@dataclass(slots=True)
class _Other:
    word: Word
    num_same: int = 0
    """At how many looks since it was said."""


class Shares:
    """Says how many models this scheduler leads, hears the same of the others, and evens out what differs by two."""

    def __init__(
        self,
        roster: Roster,
        scheduler_id: str,
        *,
        num_led: Callable[[], int],
        hand_on: Callable[[], Awaitable[None]],
    ) -> None:
        """num_led() is how many are led here; hand_on() gives one of them up."""
        self._roster = roster
        self._scheduler_id = scheduler_id
        self._num_led = num_led
        self._hand_on = hand_on
        self._others: dict[str, _Other] = {}
        self._num_looks = 0
        self._hand_on_again = 0
        """At which look the next one may go."""

    @property
    def fewest(self) -> int | None:
        """Models of the other scheduler that leads the fewest; None: there is no other."""
        return min((at.word.num_led for at in self._others.values() if at.num_same < LOOKS_ALIVE), default=None)

    def has_rival(self) -> bool:
        """Whether another scheduler would be a better place for one more model."""
        return self.fewest is not None and self.fewest < self._num_led()

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(SAY_S)

    async def look(self) -> None:
        """Says its word, hears the others', and hands a model on if that evens things out."""
        self._num_looks += 1
        try:
            self._hear(await self._roster.say(self._scheduler_id, Word(self._num_led(), self._num_looks)))
            await self._roster.forget([name for name, at in self._others.items() if at.num_same >= LOOKS_KEPT])
        except UnavailableError:
            # Others say so; nobody can lead anything meanwhile.
            self._others.clear()
        fewest = self.fewest
        if fewest is not None and self._num_led() - fewest >= 2 and self._num_looks >= self._hand_on_again:
            self._hand_on_again = self._num_looks + LOOKS_BETWEEN
            await self._hand_on()

    def _hear(self, words: Mapping[str, Word]) -> None:
        """Takes the last words. Of whom nothing was known before, nothing is known until it says another one."""
        known = self._others
        self._others = {}
        for name, word in words.items():
            at = known.get(name) or _Other(word, LOOKS_ALIVE)
            is_same = at.word == word
            self._others[name] = _Other(word, at.num_same + 1 if is_same else 0)
