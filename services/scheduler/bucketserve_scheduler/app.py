"""Composition root of the scheduler: settings -> adapters -> loops -> server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from bucketserve.addresses import Address
from bucketserve.config import TelemetrySettings
from bucketserve.core.errors import UnavailableError
from bucketserve.ports import QueueStore
from bucketserve.process import default_instance_id, keep_loaded
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.server import RpcServer
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import scheduler_pb2, scheduler_pb2_grpc
from bucketserve_scheduler.factories import new_core, stores
from bucketserve_scheduler.loop import LoopDeps, SchedulingLoop
from bucketserve_scheduler.peers import GatewayPeers
from bucketserve_scheduler.seat import SEAT, Seat
from bucketserve_scheduler.servicer import SchedulerServicer
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_scheduler.telemetry import LoopTelemetry

__all__ = ["serve"]


HEALTH_S = 0.1
STORE_CHECK_S = 5.0
LEAVE_S = 1.0
"""For loops to finish their turn on SIGTERM, which takes longer only while the store is away."""


class _Loops:
    """The loops by model; each is started when its model is first named."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        deps: LoopDeps,
        new_store: Callable[[str], QueueStore],
        is_leading: Callable[[], bool],
    ) -> None:
        self._tasks = tasks
        self._deps = deps
        self._new_store = new_store
        self._is_leading = is_leading
        self._loops: dict[str, SchedulingLoop] = {}
        self._running: list[asyncio.Task[None]] = []

    def of(self, model: str, context_tokens: int) -> SchedulingLoop:
        """Returns a model's loop.

        Raises:
            UnavailableError: another scheduler leads. A loop of ours would stand in the way of its loop.
        """
        loop = self._loops.get(model)
        if loop is None:
            if not self._is_leading():
                raise UnavailableError("standby: another scheduler leads", reason="STANDBY")
            loop = SchedulingLoop(model, context_tokens, self._new_store(model), self._deps)
            self._loops[model] = loop
            self._running.append(self._tasks.create_task(loop.run(), name=f"loop-{model}"))
        return loop

    def all(self) -> list[SchedulingLoop]:
        return [loop for _, loop in sorted(self._loops.items())]

    def stop(self) -> None:
        """Ends every loop, which gives its leadership up; later streams start new ones."""
        for loop in self._loops.values():
            loop.abandon()
        for task in self._running:
            task.cancel()
        self._loops.clear()
        self._running.clear()

    async def leave(self) -> None:
        """Lets every loop finish its turn and resign: what is claimed for a worker is also sent to it."""
        for loop in self._loops.values():
            loop.leave()
        if self._running:
            await asyncio.wait(self._running, timeout=LEAVE_S)
        for loop in self._loops.values():
            loop.part()
        self.stop()


async def serve(
    settings: SchedulerSettings, ours: Deployment, telemetry: TelemetrySettings, stop: asyncio.Event
) -> None:
    """Runs the scheduler until `stop` is set.

    Nothing is waited for but the turn in hand: what waits is in the store, what runs goes on without a scheduler.
    Leadership is given up, so that a standby or the next start leads at once.
    """
    scheduler_id = settings.scheduler_id or default_instance_id("scheduler")
    gateways = GatewayPeers()
    async with AsyncExitStack() as stack:
        outlets = stack.enter_context(
            open_telemetry(
                Service.SCHEDULER,
                scheduler_id,
                metrics_address=Address.parse(settings.metrics_listen) if settings.metrics_listen else None,
                otlp_endpoint=telemetry.otlp_endpoint,
                sample_ratio=telemetry.sample_ratio,
                log_level=telemetry.log_level,
                log_format=telemetry.log_format,
                certificate_ends_unix_s=ours.tls.ends_unix_s if ours.tls else None,
                metrics_context=ours.tls.metrics_context() if ours.tls else None,
            )
        )
        server = RpcServer(
            settings.listen,
            services=[scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name, ours.health_service],
            on_unexpected=lambda method, error: outlets.log.error("rpc.failed", error=error, method=method),
            tls=ours.tls,
            enable_reflection=settings.enable_reflection,
        )
        deps = LoopDeps(
            settings=settings,
            scheduler_id=scheduler_id,
            gateways=gateways,
            telemetry=LoopTelemetry(outlets.log, outlets.metrics, outlets.tracing),
            clock=time.monotonic,
            new_core=lambda context_tokens: new_core(settings, context_tokens),
        )
        new_store = await stores(settings.redis_url, ours.name, stack)
        keep_loaded()
        async with asyncio.TaskGroup() as tasks:
            loops = _Loops(tasks, deps, new_store, lambda: seat.is_held and not stop.is_set())

            def hear_of_store(problem: str) -> None:
                if problem:
                    deps.telemetry.store_unavailable(SEAT, problem)
                else:
                    deps.telemetry.store_answers()

            def lose(why: str) -> None:
                outlets.log.warning("seat.lost", detail=why)
                loops.stop()
                gateways.cut_all()

            store = new_store(SEAT)
            seat = Seat(
                store,
                scheduler_id,
                settings.leader_lease_s,
                on_taken=lambda epoch: outlets.log.info("seat.taken", epoch=epoch),
                on_lost=lose,
                on_store=hear_of_store,
            )
            seat_task = tasks.create_task(seat.run(), name="seat")
            servicer = SchedulerServicer(
                settings=settings,
                deployment=ours,
                scheduler_id=scheduler_id,
                gateways=gateways,
                loop_of=loops.of,
                loops=loops.all,
                is_leading=lambda: seat.is_held and not stop.is_set(),
                problem=lambda: seat.problem,
                epoch=lambda: seat.epoch,
                clock=time.monotonic,
            )
            scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, server.grpc_server)
            try:
                await server.start()
                health = tasks.create_task(_show_health(server, seat), name="health")
                adapters = tasks.create_task(servicer.tell_adapters(), name="adapters")
                checks = tasks.create_task(_check_store(store, deps.telemetry), name="store-check")
                outlets.log.info("scheduler.ready", listen=settings.listen, policy=settings.policy)
                await stop.wait()
                for task in (health, adapters, checks):
                    task.cancel()
                await server.set_serving(False)
                await loops.leave()
                gateways.part_with_all()
            finally:
                seat_task.cancel()
                loops.stop()
                gateways.cut_all()
                await server.stop(grace_s=1.0)


async def _show_health(server: RpcServer, seat: Seat) -> None:
    """Keeps health true: SERVING if this scheduler leads, or another could."""
    while True:
        await server.set_serving(not seat.problem)
        await asyncio.sleep(HEALTH_S)


async def _check_store(store: QueueStore, telemetry: LoopTelemetry) -> None:
    """Says once what the store's settings put at risk."""
    while True:
        try:
            if risk := await store.risk():
                telemetry.store_evicts(risk)
            return
        except UnavailableError:
            await asyncio.sleep(STORE_CHECK_S)
