"""Composition root of a worker: settings -> engine thread -> hub -> server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

from bucketserve.addresses import Address
from bucketserve.config import TelemetrySettings
from bucketserve.core.errors import EngineError
from bucketserve.ports import Engine
from bucketserve.process import default_instance_id, keep_loaded, unless_stopped
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.server import RpcServer
from bucketserve.tasks import end_task
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import worker_pb2, worker_pb2_grpc
from bucketserve_worker.engine_thread import EngineThread
from bucketserve_worker.engines import engine_loader
from bucketserve_worker.servicer import WorkerServicer
from bucketserve_worker.settings import WorkerSettings
from bucketserve_worker.telemetry import WorkerTelemetry
from bucketserve_worker.worker import Worker

__all__ = ["serve"]

T = TypeVar("T")

ABSENCE_S = 10.0
"""A worker without a scheduler for longer is not ready."""
HEALTH_S = 0.1
HANG_CHECK_S = 0.5


async def serve(settings: WorkerSettings, ours: Deployment, telemetry: TelemetrySettings, stop: asyncio.Event) -> None:
    """Runs the worker until `stop` is set and its requests are finished, or drain_s have passed.

    Raises:
        ModelLoadError: the model can't be served.
        EngineError: the engine failed; its requests were handed back.
        SettingsError: an address can't be bound.
    """
    worker_id = settings.worker_id or default_instance_id("worker")
    with open_telemetry(
        Service.WORKER,
        worker_id,
        metrics_address=Address.parse(settings.metrics_listen) if settings.metrics_listen else None,
        otlp_endpoint=telemetry.otlp_endpoint,
        sample_ratio=telemetry.sample_ratio,
        log_level=telemetry.log_level,
        log_format=telemetry.log_format,
        certificate_ends_unix_s=ours.tls.ends_unix_s if ours.tls else None,
        metrics_context=ours.tls.metrics_context() if ours.tls else None,
    ) as outlets:
        log = outlets.log
        observer = WorkerTelemetry(log, outlets.metrics, outlets.tracing, worker_id, settings.model_name)
        worker = Worker(settings, ours, worker_id, observer)
        server = RpcServer(
            settings.listen,
            services=[worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name, ours.health_service],
            on_unexpected=lambda method, error: log.error("rpc.failed", error=error, method=method),
            tls=ours.tls,
            reached_at=settings.address,
            enable_reflection=settings.enable_reflection,
        )
        load: Callable[[], Engine] = engine_loader(settings, lambda text: log.info("model.loading", progress=text))
        engine = EngineThread(load, worker.on_turn)
        engine.start()
        try:
            started = await unless_stopped(stop, engine.started)
            worker.attach(engine, started)
            keep_loaded()
            await unless_stopped(stop, asyncio.ensure_future(worker.adapters.look()))
            servicer = WorkerServicer(worker.holder, ours)
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server.grpc_server)
            await server.start()
            link = asyncio.create_task(worker.link.run(), name="scheduler-link")
            sweeper = asyncio.create_task(worker.sweep(), name="kv-sweeper")
            watcher = asyncio.create_task(worker.adapters.run(), name="adapters")
            health = asyncio.create_task(_show_health(server, worker), name="health")
            log.info(
                "worker.ready",
                listen=settings.listen,
                engine=started.info.name,
                device=started.info.device,
                dtype=started.info.dtype,
                role=settings.role,
                kv_total_tokens=started.headroom.kv_total_tokens,
            )
            try:
                await _while_healthy(stop.wait(), engine, (link, watcher), settings.hang_s)
                health.cancel()
                await server.set_serving(False)
                worker.link.drain()
                is_drained = await _while_healthy(
                    worker.drained(settings.drain_s), engine, (link, watcher), settings.hang_s
                )
                log.info("worker.drained", is_complete=is_drained, num_left=len(worker.running))
            except BaseException as error:
                worker.engine_failed(error)
                await worker.drained(1.0)
                raise
            finally:
                tasks = (link, sweeper, watcher, health)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                await worker.close()
        finally:
            await engine.stop()
            await server.stop(grace_s=1.0)


async def _show_health(server: RpcServer, worker: Worker) -> None:
    """Keeps health true: SERVING if work may come, or would with a scheduler that takes over."""
    while True:
        await server.set_serving(worker.link.is_present(ABSENCE_S))
        await asyncio.sleep(HEALTH_S)


async def _while_healthy(
    work: Coroutine[object, object, T], engine: EngineThread, beside: Sequence[asyncio.Task[None]], hang_s: float
) -> T:
    """Returns what `work` returns, unless a task beside it, which is to run for ever, fails before.

    Raises:
        EngineError: the engine ended before, or hangs.
    """
    task = asyncio.ensure_future(work)
    try:
        watched: set[asyncio.Future[object]] = {task, engine.ended, *beside}  # type: ignore[arg-type]
        while not (await asyncio.wait(watched, timeout=HANG_CHECK_S, return_when=asyncio.FIRST_COMPLETED))[0]:
            if took_s := engine.hangs_for_s(hang_s):
                raise EngineError(f"the engine has not completed a step for {took_s:.0f} s")
        if task.done():
            return task.result()
        for other in beside:
            if other.done():
                other.result()
        try:
            engine.ended.result()
        except Exception as error:
            raise EngineError(f"the engine ended: {error!r}") from error
        raise EngineError("the engine ended without being asked to")
    finally:
        await end_task(task)
