"""Schedulers even out how many models each leads, and hand nothing on to who has ended."""

from __future__ import annotations

import pytest

from bucketserve.core.errors import UnavailableError
from bucketserve.store.roster import Word
from bucketserve_scheduler.shares import LOOKS_ALIVE, LOOKS_BETWEEN, LOOKS_KEPT, Shares


class Board:
    """A roster in memory."""

    def __init__(self) -> None:
        self.words: dict[str, Word] = {}
        self.is_away = False

    async def say(self, scheduler_id: str, word: Word) -> dict[str, Word]:
        if self.is_away:
            raise UnavailableError("store: connection refused")
        self.words[scheduler_id] = word
        return {name: word for name, word in self.words.items() if name != scheduler_id}

    async def forget(self, scheduler_ids: list[str]) -> None:
        for name in scheduler_ids:
            del self.words[name]


class World:
    """Schedulers that look in turn, and how many models each leads."""

    def __init__(self, **led: int) -> None:
        self.board, self.led, self.handed_on = Board(), dict(led), 0
        self.shares = {name: self._of(name) for name in led}

    def _of(self, name: str) -> Shares:
        async def hand_on() -> None:
            self.handed_on += 1
            self.led[name] -= 1
            # Whoever has less to do takes it: the others leave most looks out.
            taker = min((other for other in self.led if other != name), key=self.led.__getitem__)
            self.led[taker] += 1

        return Shares(self.board, name, num_led=lambda: self.led[name], hand_on=hand_on)  # type: ignore[arg-type]

    async def look(self, number: int) -> None:
        """Lets each look so often."""
        for _ in range(number):
            for each in self.shares.values():
                await each.look()

    def end(self, name: str) -> None:
        """Ends one without a word."""
        del self.shares[name], self.led[name]


@pytest.mark.parametrize(
    ("led", "evened"),
    [((4, 0), [2, 2]), ((3, 0), [2, 1]), ((1, 0), [1, 0]), ((7, 1, 0), [3, 3, 2]), ((2, 2, 2), [2, 2, 2])],
)
async def test_what_differs_by_two_is_evened_out_and_then_stays(led: tuple[int, ...], evened: list[int]) -> None:
    world = World(**{f"s{index}": number for index, number in enumerate(led)})
    await world.look(2 + 8 * LOOKS_BETWEEN)
    assert sorted(world.led.values(), reverse=True) == evened
    handed_on = world.handed_on
    assert handed_on <= sum(led)
    await world.look(50)
    assert world.handed_on == handed_on


async def test_nothing_is_handed_on_to_one_that_has_ended_and_it_is_forgotten() -> None:
    world = World(a=1, b=0, c=1)
    await world.look(3)
    world.end("b")
    assert "b" in world.board.words
    await world.look(LOOKS_ALIVE + 1)
    assert {name: world.shares[name].fewest for name in "ac"} == {"a": 1, "c": 1}
    # It took over what b had led: more than a, but less than what b had would make it less.
    world.led["a"] = 2
    assert not world.shares["c"].has_rival()
    await world.look(LOOKS_KEPT)
    assert world.handed_on == 0
    assert "b" not in world.board.words


async def test_words_of_before_this_one_was_started_are_nobodys() -> None:
    world = World(a=3)
    world.board.words["gone"] = Word(0, 7)
    await world.look(2 * LOOKS_BETWEEN)
    assert (world.shares["a"].fewest, world.handed_on) == (None, 0)


async def test_while_the_store_is_away_nobody_is_known() -> None:
    world = World(a=1, b=0)
    await world.look(3)
    assert world.shares["a"].has_rival()
    world.board.is_away = True
    await world.look(1)
    assert not world.shares["a"].has_rival()
    world.board.is_away = False
    await world.look(2)
    assert world.shares["a"].has_rival()
