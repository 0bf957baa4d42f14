"""Composition root of a worker: settings -> engine thread -> hub -> server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from bucketserve.config import TelemetrySettings, split_host_port
from bucketserve.core.errors import EngineError
from bucketserve.ports import Engine
from bucketserve.process import default_instance_id
from bucketserve.rpc.server import RpcServer
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


async def serve(settings: WorkerSettings, telemetry: TelemetrySettings, stop: asyncio.Event) -> None:
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
        metrics_address=split_host_port(settings.metrics_listen) if settings.metrics_listen else None,
        otlp_endpoint=telemetry.otlp_endpoint,
        sample_ratio=telemetry.sample_ratio,
        log_level=telemetry.log_level,
        log_format=telemetry.log_format,
    ) as outlets:
        log = outlets.log
        observer = WorkerTelemetry(log, outlets.metrics, outlets.tracing, worker_id, settings.model_name)
        worker = Worker(settings, worker_id, observer)
        server = RpcServer(
            settings.listen,
            services=[worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name],
            on_unexpected=lambda method, error: log.error("rpc.failed", error=error, method=method),
            enable_reflection=settings.enable_reflection,
        )
        load: Callable[[], Engine] = engine_loader(settings, lambda text: log.info("model.loading", progress=text))
        engine = EngineThread(load, worker.on_turn)
        engine.start()
        try:
            started = await engine.started
            worker.attach(engine, started)
            servicer = WorkerServicer(worker, model=settings.model_name, info=started.info)
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server.grpc_server)
            await server.start()
            link = asyncio.create_task(worker.link.run(), name="scheduler-link")
            sweeper = asyncio.create_task(worker.sweep(), name="kv-sweeper")
            await server.set_serving(True)
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
                await _until_stopped(stop, engine, link)
                await server.set_serving(False)
                worker.link.drain()
                is_drained = await worker.drained(settings.drain_s)
                log.info("worker.drained", is_complete=is_drained, num_left=len(worker.running))
            except BaseException as error:
                worker.engine_failed(error)
                await worker.drained(1.0)
                raise
            finally:
                link.cancel()
                sweeper.cancel()
                await asyncio.wait([link, sweeper])
                await worker.close()
        finally:
            await engine.stop()
            await server.stop(grace_s=1.0)


async def _until_stopped(stop: asyncio.Event, engine: EngineThread, link: asyncio.Task[None]) -> None:
    """Returns when stop is set.

    Raises:
        EngineError: the engine ended by itself.
    """
    stopped = asyncio.create_task(stop.wait())
    try:
        watched: set[asyncio.Future[object]] = {stopped, engine.ended, link}  # type: ignore[arg-type]
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if link.done():
            link.result()
        if engine.ended.done() and not stop.is_set():
            try:
                engine.ended.result()
            except Exception as error:
                raise EngineError(f"the engine ended: {error!r}") from error
            raise EngineError("the engine ended without being asked to")
    finally:
        stopped.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stopped
