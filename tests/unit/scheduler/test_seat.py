"""Who holds the seat knows when it may not believe so any more."""

from __future__ import annotations

import asyncio

from bucketserve.core.errors import UnavailableError
from bucketserve.ports import Leadership
from bucketserve.store.memory import MemoryState, MemoryStore
from bucketserve_scheduler.seat import Seat

LEASE_S = 0.3


class Cuttable(MemoryStore):
    """A store whose server can't be reached, or does not answer, while `how` says so."""

    how = ""

    async def lead(self, owner: str, ttl_s: float, epoch: int = 0) -> Leadership | None:
        if self.how == "refuses":
            raise UnavailableError("store: connection refused")
        if self.how == "hangs":
            await asyncio.sleep(60)
        return await super().lead(owner, ttl_s, epoch)


class Far(MemoryStore):
    """A store to which it takes long to open a connection; who does not wait for it begins anew."""

    is_open = False

    async def lead(self, owner: str, ttl_s: float, epoch: int = 0) -> Leadership | None:
        if not self.is_open:
            await asyncio.sleep(0.8 * LEASE_S)
            self.is_open = True
        return await super().lead(owner, ttl_s, epoch)


def seat(store: MemoryStore, name: str, said: list[str], *, has_rival: bool = False) -> Seat:
    return Seat(
        store,
        name,
        LEASE_S,
        has_rival=lambda: has_rival,
        on_taken=lambda epoch: said.append(f"{name} taken"),
        on_lost=lambda why: said.append(f"{name} lost: {why}"),
        on_store=lambda problem: None,
    )


async def until(condition, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_holder_that_is_cut_from_the_store_alone_gives_way() -> None:
    for how in ("refuses", "hangs"):
        state, said = MemoryState(), list[str]()
        cut, other = Cuttable(state), MemoryStore(state)
        first = seat(cut, "first", said)
        tasks = [asyncio.create_task(first.run())]
        await until(lambda: said == ["first taken"])  # noqa: B023
        second = seat(other, "second", said)
        tasks.append(asyncio.create_task(second.run()))
        cut.how = how
        await until(lambda: "second taken" in said)  # noqa: B023
        assert not (first.is_held and second.is_held)
        await until(lambda: any(line.startswith("first lost: it could not be renewed") for line in said))  # noqa: B023
        assert first.problem
        # It comes back as the one that stands by.
        cut.how = ""
        await until(lambda: not first.problem)  # noqa: B023
        assert (first.is_held, second.is_held) == (False, True)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_a_store_that_is_far_away_is_waited_for_each_time_the_connection_breaks() -> None:
    store, said = Far(), list[str]()
    only = seat(store, "only", said)
    task = asyncio.create_task(only.run())
    for _ in range(2):
        await until(lambda: only.is_held)
        store.is_open = False
        await until(lambda: store.is_open)
    await until(lambda: only.is_held and not only.problem)
    task.cancel()
    await asyncio.wait([task])


async def test_what_is_handed_on_is_left_to_others_and_taken_back_if_there_is_none() -> None:
    state, said = MemoryState(), list[str]()
    first = seat(MemoryStore(state), "first", said)
    tasks = [asyncio.create_task(first.run())]
    await until(lambda: first.is_held)
    # With a renewal under way as well, which would take it again.
    for _ in range(6):
        await asyncio.sleep(LEASE_S / 20)
        await first.hand_on()
        assert not first.is_held
        handed_on_s = asyncio.get_running_loop().time()
        await until(lambda: first.is_held)
        assert asyncio.get_running_loop().time() - handed_on_s > 1.5 * LEASE_S
    second = seat(MemoryStore(state), "second", said)
    tasks.append(asyncio.create_task(second.run()))
    await asyncio.sleep(LEASE_S / 3)
    await first.hand_on()
    await until(lambda: second.is_held)
    await asyncio.sleep(4 * LEASE_S)
    assert (first.is_held, second.is_held) == (False, True)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_whoever_has_more_to_do_leaves_a_free_seat_to_another_and_else_takes_it() -> None:
    state, said = MemoryState(), list[str]()
    busy = seat(MemoryStore(state), "busy", said, has_rival=True)
    tasks = [asyncio.create_task(busy.run())]
    # It answers a peer that asks, and the peer goes on to the next one.
    await asyncio.wait_for(busy.looked(), 5)
    # Nobody has asked the store: nothing is known to be wrong with it.
    assert (busy.is_held, busy.problem) == (False, "")
    await until(lambda: busy.is_held)
    idle = seat(MemoryStore(state), "idle", said)
    tasks.append(asyncio.create_task(idle.run()))
    await idle.looked()
    await busy.hand_on()
    await until(lambda: idle.is_held)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
