"""The models that peers of this scheduler have named: of each its seat, its gateways and, while it leads, its loop.

Several schedulers share the models: each model is led by whichever of them holds its seat, and the others refuse
streams that are about it.
"""

from __future__ import annotations

import asyncio
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
        await self.leave()
        await self.seat.hand_on()
        self._is_leaving = False

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
            Shares(stores.roster, deps.scheduler_id, num_led=lambda: len(self._led()), hand_on=self._hand_one_on)
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
        return self._models[name]

    def all(self) -> list[ServedModel]:
        """Returns them by name."""
        return [model for _, model in sorted(self._models.items())]

    async def share(self) -> None:
        """Evens out who leads how many; ends only by cancellation."""
        if self._shares is not None:
            await self._shares.run()

    def _led(self) -> list[ServedModel]:
        return [model for model in self.all() if model.is_led_here]

    async def _hand_one_on(self) -> None:
        await self._led()[-1].hand_on()

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
