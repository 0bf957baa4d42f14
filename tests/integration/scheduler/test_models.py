"""The models of schedulers: which are handed on, which are closed, and who comes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator

import pytest

from bucketserve.core.errors import UnavailableError
from bucketserve.ports import Leadership, QueueStore
from bucketserve.rpc.outbox import Outbox
from bucketserve.store.memory import MemoryState, MemoryStore
from bucketserve_scheduler import models as models_module
from bucketserve_scheduler import shares
from bucketserve_scheduler.factories import Stores
from bucketserve_scheduler.models import ServedModel, ServedModels
from bucketserve_scheduler.peers import GatewayPeer
from bucketserve_scheduler.seat import seat_of
from tests.e2e.observe import eventually
from tests.integration.scheduler.builders import CONTEXT, a_run, hello, loop_deps
from tests.unit.scheduler.test_shares import Board

LEASE_S = 0.3


class Log:
    """What was logged."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def _say(self, event: str, *, model: str, **more: object) -> None:
        self.said.append((event, model))

    info = warning = _say

    def of(self, event: str) -> list[str]:
        """Returns the models that an event was about."""
        return [model for name, model in self.said if name == event]


class World:
    """Schedulers over one store, and peers that look for whoever leads their model."""

    def __init__(self) -> None:
        self.states: dict[str, MemoryState] = defaultdict(MemoryState)
        self.board, self.log = Board(), Log()
        self.schedulers: dict[str, ServedModels] = {}
        self._stack = contextlib.AsyncExitStack()
        self._peers: dict[str, asyncio.Task[None]] = {}

    async def add(self, name: str, **settings) -> ServedModels:
        deps = self._stack.enter_context(loop_deps(name, leader_lease_s=LEASE_S, **settings))
        tasks = asyncio.TaskGroup()
        await self._stack.enter_async_context(tasks)
        stores = Stores(self.store, self.board)  # type: ignore[arg-type]
        found = self.schedulers[name] = ServedModels(tasks, deps, stores, self.log)  # type: ignore[arg-type]
        self._stack.callback(found.close)
        sharing = tasks.create_task(found.share())
        self._stack.callback(sharing.cancel)
        return found

    def store(self, model: str) -> QueueStore:
        return MemoryStore(self.states[model])

    def come(self, model: str, *schedulers: str) -> None:
        """Begins a gateway that knows these schedulers only; all of them, if none is named."""
        self._peers[model] = asyncio.create_task(self._stay(model, schedulers or tuple(self.schedulers)))

    async def go(self, model: str) -> None:
        self._peers[model].cancel()
        await asyncio.wait([self._peers.pop(model)])

    async def _stay(self, name: str, schedulers: tuple[str, ...]) -> None:
        while True:
            for scheduler in schedulers:
                with contextlib.suppress(UnavailableError):
                    model = self.schedulers[scheduler].of(name)
                    await model.check_led_here()
                    peer = GatewayPeer("g", Outbox(10_000))
                    model.gateways.connect(peer)
                    try:
                        async for _ in peer.outbox.messages():
                            pass
                    finally:
                        model.gateways.disconnect(peer, time.monotonic())
            await asyncio.sleep(0.02)

    def used(self, scheduler: str) -> list[str]:
        """Returns the models that a scheduler leads for somebody."""
        return [each.name for each in self.schedulers[scheduler].all() if each.is_led_here and each.has_peers]

    async def end(self) -> None:
        for model in list(self._peers):
            await self.go(model)
        await self._stack.aclose()


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    # As it is to the lease in earnest.
    monkeypatch.setattr(shares, "SAY_S", LEASE_S / 2)
    found = World()
    yield found
    await found.end()


async def lead(models: ServedModels, name: str) -> ServedModel:
    model = models.of(name)
    await eventually(lambda: model.is_led_here)
    return model


async def test_a_model_that_nobody_has_come_for_is_neither_counted_nor_handed_on(world: World) -> None:
    first, second = await world.add("first"), await world.add("second")
    for name in ("a", "b", "c"):
        world.come(name, "first")
    world.come("d", "second")
    await lead(first, "zz-typo")
    await eventually(lambda: (world.used("first"), world.used("second")) == (["a", "b", "c"], ["d"]))
    # From now on they know both.
    for name in ("a", "b", "c", "d"):
        await world.go(name)
        world.come(name)
    await eventually(lambda: len(world.used("first")) == len(world.used("second")) == 2)
    await asyncio.sleep(4 * shares.LOOKS_BETWEEN * shares.SAY_S)
    assert len(world.log.of("seat.handed_on")) == 1
    assert "zz-typo" not in world.log.of("seat.handed_on")
    assert "zz-typo" not in {model.name for model in second.all()}


async def test_one_that_comes_back_is_not_handed_on_again_and_again(world: World) -> None:
    await world.add("first")
    await world.add("second")
    for name in ("a", "b", "zz"):
        world.come(name, "first")
    await eventually(lambda: len(world.used("first")) == 3)
    for name in ("a", "b"):
        await world.go(name)
        world.come(name)
    # The peers of one of them can't follow it.
    await eventually(lambda: sorted(map(len, (world.used("first"), world.used("second")))) == [1, 2])
    await asyncio.sleep(4 * shares.LOOKS_BETWEEN * shares.SAY_S)
    assert world.log.of("seat.handed_on").count("zz") <= 1
    assert "zz" in world.used("first")


async def test_one_that_nobody_speaks_of_is_closed_and_begins_anew_when_somebody_comes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_module, "FORGOTTEN_S", 0.0)
    models = await world.add("first", gateway_lease_s=0.5)
    model = await lead(models, "m")
    world.come("m")
    loop = model.loop_for(CONTEXT)
    worker = await loop.connect(hello())
    await loop.submit(a_run(1))
    await eventually(lambda: world.states["m"].tickets)
    # Neither a peer that is there nor a request that is open is nobody.
    await world.go("m")
    await models.look()
    await loop.disconnect(worker)
    await models.look()
    assert (models.all(), loop.num_open) == ([model], 1)
    await eventually(lambda: not loop.num_open)
    assert not world.states["m"].tickets
    await models.look()
    assert (models.all(), world.log.of("model.forgotten")) == ([], ["m"])
    assert not [task for task in asyncio.all_tasks() if task.get_name() in ("seat-m", "loop-m")]
    for name in ("m", seat_of("m")):
        # At once: nobody's lease is waited for.
        assert await world.store(name).lead("another", 0.05) is not None
    world.come("m")
    await eventually(lambda: world.used("first") == ["m"])
    anew = models.of("m")
    assert anew is not model
    assert anew.loop_for(CONTEXT) is not loop
    await eventually(lambda: anew.loop is not None and anew.loop.leadership is not None)


async def test_what_is_open_in_the_store_is_there_when_it_begins_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = await world.add("first")
    model = await lead(models, "m")
    world.come("m")
    await eventually(lambda: model.has_peers)
    await model.loop_for(CONTEXT).submit(a_run(1))
    await eventually(lambda: world.states["m"].tickets)
    await world.go("m")
    # Not even idle: its loop would end what is open first.
    monkeypatch.setattr(ServedModel, "is_idle", True)
    monkeypatch.setattr(models_module, "FORGOTTEN_S", -1.0)
    await models.look()
    assert (models.all(), len(world.states["m"].tickets)) == ([], 1)
    loop = (await lead(models, "m")).loop_for(CONTEXT)
    await eventually(lambda: loop.num_open == 1)


class Slow(MemoryStore):
    """A store whose answer can be waited for."""

    async def lead(self, owner: str, ttl_s: float, epoch: int = 0) -> Leadership | None:
        await asyncio.sleep(0.01)
        return await super().lead(owner, ttl_s, epoch)


async def test_whoever_comes_while_it_is_closed_is_sent_on_and_never_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_module, "FORGOTTEN_S", -1.0)
    monkeypatch.setattr(World, "store", lambda self, model: Slow(self.states[model]))
    models = await world.add("first")
    waiting = asyncio.create_task(models.of("m").check_led_here())
    await asyncio.sleep(0.002)
    # The first answer of the store has not come yet.
    await models.look()
    with pytest.raises(UnavailableError, match="standby"):
        await asyncio.wait_for(waiting, 1.0)
    assert models.all() == []

    monkeypatch.setattr(models_module, "FORGOTTEN_S", 0.015)

    async def come(number: int) -> int:
        """Comes and goes; returns how often it was taken in."""
        taken = 0
        for turn in range(60):
            model = models.of("m")
            with contextlib.suppress(UnavailableError):
                await asyncio.wait_for(model.check_led_here(), 5.0)
                peer = GatewayPeer(f"g{number}", Outbox(10_000))
                model.gateways.connect(peer)
                taken += 1
                for _ in range(3):
                    assert models.of("m") is model
                    assert (model.is_led_here, peer.outbox.is_closed) == (True, False)
                    await asyncio.sleep(0.002 * (turn % 3))
                model.gateways.disconnect(peer, time.monotonic())
            await asyncio.sleep(0.01 * (number + turn % 5))
        return taken

    async def tidy() -> None:
        while True:
            await models.look()
            await asyncio.sleep(0.001)

    tidying = asyncio.create_task(tidy())
    taken = await asyncio.wait_for(asyncio.gather(*map(come, range(4))), 60)
    tidying.cancel()
    assert sum(taken) > 20
    assert len(world.log.of("model.forgotten")) > 5
