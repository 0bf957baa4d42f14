"""Composition root of the scheduler: settings -> adapters -> loops -> server."""

from __future__ import annotations

import asyncio
import time
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
from bucketserve_scheduler.loop import LoopDeps
from bucketserve_scheduler.models import ServedModels
from bucketserve_scheduler.servicer import SchedulerServicer
from bucketserve_scheduler.settings import SchedulerSettings
from bucketserve_scheduler.telemetry import LoopTelemetry

__all__ = ["serve"]


HEALTH_S = 0.1
STORE_CHECK_S = 5.0
STORE_RETRY_S = 0.5


async def serve(
    settings: SchedulerSettings, ours: Deployment, telemetry: TelemetrySettings, stop: asyncio.Event
) -> None:
    """Runs the scheduler until `stop` is set.

    Nothing is waited for but the turn in hand: what waits is in the store, what runs goes on without a scheduler.
    Leadership is given up, so that a standby or the next start leads at once.
    """
    scheduler_id = settings.scheduler_id or default_instance_id("scheduler")
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
            telemetry=LoopTelemetry(outlets.log, outlets.metrics, outlets.tracing),
            clock=time.monotonic,
            new_core=lambda context_tokens: new_core(settings, context_tokens),
        )
        kept = await stores(settings.redis_url, ours.name, stack)
        keep_loaded()
        async with asyncio.TaskGroup() as tasks:
            models = ServedModels(tasks, deps, kept, outlets.log)
            watch = _StoreWatch(kept.of_model(""), deps.telemetry)
            servicer = SchedulerServicer(
                settings=settings, deployment=ours, scheduler_id=scheduler_id, models=models, clock=time.monotonic
            )
            scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, server.grpc_server)
            try:
                await server.start()
                background = [
                    tasks.create_task(_show_health(server, watch, models), name="health"),
                    tasks.create_task(servicer.tell_adapters(), name="adapters"),
                    tasks.create_task(watch.run(), name="store-watch"),
                    tasks.create_task(models.share(), name="shares"),
                    tasks.create_task(models.tidy(), name="tidy"),
                ]
                outlets.log.info("scheduler.ready", listen=settings.listen, policy=settings.policy)
                await stop.wait()
                for task in background:
                    task.cancel()
                await server.set_serving(False)
                await models.leave()
            finally:
                models.close()
                await server.stop(grace_s=1.0)


async def _show_health(server: RpcServer, watch: _StoreWatch, models: ServedModels) -> None:
    """Keeps health true: SERVING if this scheduler leads what it is asked for, or another could."""
    while True:
        await server.set_serving(not (watch.problem or models.problem))
        await asyncio.sleep(HEALTH_S)


class _StoreWatch:
    """Whether the store answers while no model is known, and what its settings put at risk."""

    def __init__(self, store: QueueStore, telemetry: LoopTelemetry) -> None:
        """Looks at nothing yet."""
        self._store = store
        self._telemetry = telemetry
        self.problem = "the store was not reached yet"
        """Empty if it answers."""

    async def run(self) -> None:
        """Goes on until it is cancelled; says once what is at risk."""
        told = ""
        while True:
            try:
                risk = await self._store.risk()
                self.problem = ""
                self._telemetry.store_answers()
                if risk and risk != told:
                    self._telemetry.store_evicts(risk)
                told = risk
            except UnavailableError as error:
                self.problem = str(error)
                self._telemetry.store_unavailable("", self.problem)
            await asyncio.sleep(STORE_RETRY_S if self.problem else STORE_CHECK_S)
