"""The models that peers of this scheduler have named: of each its seat, its gateways and, while it leads, its loop.

Several schedulers share the models: each model is led by whichever of them holds its seat, and the others refuse
streams that are about it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from bucketserve.core.errors import UnavailableError
from bucketserve.telemetry.logs import EventLog
from bucketserve.v1 import scheduler_pb2
from bucketserve_scheduler.factories import Stores
from bucketserve_scheduler.loop import LoopDeps, SchedulingLoop
from bucketserve_scheduler.peers import GatewayPeers
from bucketserve_scheduler.seat import Seat, seat_of
from bucketserve_scheduler.shares import Shares

__all__ = ["ServedModel", "ServedModels"]

LEAVE_S = 1.0
"""For loops to finish their turn on SIGTERM, which takes longer only while the store is away."""
LOOK_S = 5.0
FORGOTTEN_S = 300.0
"""A model of which no peer has spoken for so long is closed: its name may have been mistyped, or its pool is gone."""
KEPT_S = 300.0
"""A model that was handed on and is back is not handed on again for so long: its peers may know no other scheduler."""


class ServedModel:
    """A model: it is led from here while its seat is held."""

    def __init__(
        self,
        name: str,
        tasks: asyncio.TaskGroup,
        deps: LoopDeps,
        stores: Stores,
        log: EventLog,
        has_rival: Callable[[], bool],
    ) -> None:
        """Begins to look for the seat; has_rival: see Seat."""
        self.name = name
        self.gateways = GatewayPeers()
        self.spoken_of_s = deps.clock()
        """When a peer was last here or asked for it, as far as that was noticed."""
        self.handed_on_s = -math.inf
        self.loop: SchedulingLoop | None = None
        """Started when the first peer says how long the model's context is."""
        self._tasks = tasks
        self._deps = deps
        self._store = stores.of_model(name)
        self._log = log
        self._running: asyncio.Task[None] | None = None
        self._is_leaving = False
        self.seat = Seat(
            stores.of_model(seat_of(name)),
            deps.scheduler_id,
            deps.settings.leader_lease_s,
            has_rival=has_rival,
            on_taken=lambda epoch: log.info("seat.taken", model=name, epoch=epoch),
            on_lost=self._lose,
            on_store=self._hear_of_store,
        )
        self._seating = tasks.create_task(self.seat.run(), name=f"seat-{name}")

    @property
    def is_led_here(self) -> bool:
        """Whether streams that are about it belong here."""
        return self.seat.is_held and not self._is_leaving

    @property
    def has_peers(self) -> bool:
        """Whether a gateway or a worker is connected."""
        return self.gateways.are_connected or (self.loop is not None and bool(self.loop.workers))

    @property
    def is_idle(self) -> bool:
        """Whether nobody is there and nothing is open. What is open ends with the leases of who has gone."""
        return not (self._is_leaving or self.has_peers or (self.loop is not None and self.loop.num_open))

    async def check_led_here(self) -> None:
        """Sends a peer on to the scheduler that leads the model; it tries the next address.

        Raises:
            UnavailableError: this one does not.
        """
        await self.seat.looked()
        if not self.is_led_here:
            problem = self.seat.problem
            detail = f"no scheduler leads: {problem}" if problem else "standby: another scheduler leads"
            raise UnavailableError(detail, reason="STANDBY")

    def loop_for(self, context_tokens: int) -> SchedulingLoop:
        """Returns the loop; starts it if there is none yet, for a context of that many tokens.

        Raises:
            UnavailableError: another scheduler leads. A loop of ours would stand in the way of its loop.
        """
        if not self.is_led_here:
            raise UnavailableError("standby: another scheduler leads", reason="STANDBY")
        if self.loop is None:
            self.loop = SchedulingLoop(self.name, context_tokens, self._store, self.gateways, self._deps)
            self._running = self._tasks.create_task(self.loop.run(), name=f"loop-{self.name}")
        return self.loop

    def hello(self) -> scheduler_pb2.SchedulerHello:
        """Returns who leads."""
        return scheduler_pb2.SchedulerHello(scheduler_id=self._deps.scheduler_id, epoch=self.seat.epoch)

    def tell_adapters(self) -> None:
        """Tells the gateways which adapters there are, if that has changed."""
        workers = self.loop.workers.values() if self.loop is not None else ()
        self.gateways.tell_adapters(
            adapter for peer in workers if not peer.is_draining for adapter in peer.hello.adapters.adapters
        )

    async def leave(self) -> None:
        """Lets the loop finish its turn and resign: what is claimed for a worker is also sent to it."""
        self._is_leaving = True
        if self.loop is not None and self._running is not None:
            self.loop.leave()
            await asyncio.wait([self._running], timeout=LEAVE_S)
            self.loop.part()
        self._stop_loop()
        self.gateways.part_with_all()

    async def hand_on(self) -> None:
        """Lets another scheduler lead it, and stands by."""
        self._log.info("seat.handed_on", model=self.name)
        self.handed_on_s = self._deps.clock()
        await self.leave()
        await self.seat.hand_on()
        self._is_leaving = False

    async def end(self) -> None:
        """Gives the seat up; nothing of it runs any more then. Whoever comes meanwhile is sent on."""
        tasks = [task for task in (self._running, self._seating) if task is not None]
        await self.leave()
        self._seating.cancel()
        await asyncio.wait(tasks)
        self.seat.dismiss()

    def close(self) -> None:
        """Gives the seat up and cuts every peer."""
        self._is_leaving = True
        self._seating.cancel()
        self._stop_loop()
        self.gateways.cut_all()

    def _lose(self, why: str) -> None:
        self._log.warning("seat.lost", model=self.name, detail=why)
        self._stop_loop()
        self.gateways.cut_all()

    def _stop_loop(self) -> None:
        """Ends the loop, which gives its leadership up; a later stream starts a new one."""
        if self.loop is not None and self._running is not None:
            self.loop.abandon()
            self._running.cancel()
        self.loop = self._running = None

    def _hear_of_store(self, problem: str) -> None:
        if problem:
            self._deps.telemetry.store_unavailable(self.name, problem)
        else:
            self._deps.telemetry.store_answers()


class ServedModels:
    """Those of which somebody has spoken."""

    def __init__(self, tasks: asyncio.TaskGroup, deps: LoopDeps, stores: Stores, log: EventLog) -> None:
        """Knows of none."""
        self._shares = (
            Shares(stores.roster, deps.scheduler_id, num_led=lambda: len(self._shared()), hand_on=self._hand_one_on)
            if stores.roster is not None
            else None
        )
        self._tasks, self._deps, self._stores, self._log = tasks, deps, stores, log
        self._models: dict[str, ServedModel] = {}
        self._is_leaving = False

    def of(self, name: str) -> ServedModel:
        """Returns a model.

        Raises:
            UnavailableError: this scheduler leaves.
        """
        if self._is_leaving:
            raise UnavailableError("standby: this scheduler leaves", reason="STANDBY")
        if name not in self._models:
            has_rival = self._shares.has_rival if self._shares is not None else lambda: False
            self._models[name] = ServedModel(name, self._tasks, self._deps, self._stores, self._log, has_rival)
        model = self._models[name]
        model.spoken_of_s = self._deps.clock()
        return model

    def all(self) -> list[ServedModel]:
        """Returns them by name."""
        return [model for _, model in sorted(self._models.items())]

    async def share(self) -> None:
        """Evens out who leads how many; ends only by cancellation."""
        if self._shares is not None:
            await self._shares.run()

    async def tidy(self) -> None:
        """Closes models of which nobody speaks any more; ends only by cancellation."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Closes those of which nobody has spoken for FORGOTTEN_S; one that comes later begins anew."""
        for model in self.all():
            now_s = self._deps.clock()
            if not model.is_idle:
                model.spoken_of_s = now_s
            elif now_s - model.spoken_of_s > FORGOTTEN_S:
                self._log.info("model.forgotten", model=model.name)
                await model.end()
                # Not before: two of one name would be one owner of the seat, and each would give up the other's.
                del self._models[model.name]

    def _shared(self) -> list[ServedModel]:
        """Those that are led here for somebody. One without peers is no work, and nobody could take it over."""
        return [model for model in self.all() if model.is_led_here and model.has_peers]

    async def _hand_one_on(self) -> None:
        before_s = self._deps.clock() - KEPT_S
        if may_go := [model for model in self._shared() if model.handed_on_s < before_s]:
            await may_go[-1].hand_on()

    @property
    def problem(self) -> str:
        """Why one of them can be led by nobody; empty if the store answers."""
        return next((model.seat.problem for model in self._models.values() if model.seat.problem), "")

    async def leave(self) -> None:
        """Lets every loop finish its turn, and ends every stream once it has been told everything."""
        self._is_leaving = True
        await asyncio.gather(*(model.leave() for model in self._models.values()))

    def close(self) -> None:
        """Ends all that is left."""
        self._is_leaving = True
        for model in self._models.values():
            model.close()
