"""Composition root of the gateway: settings -> models -> parts -> two servers."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from bucketserve.addresses import Address
from bucketserve.config import DeploymentSettings, TelemetrySettings
from bucketserve.core.errors import SettingsError
from bucketserve.facades import kserve_pb2, kserve_pb2_grpc, vllm_pb2, vllm_pb2_grpc
from bucketserve.process import default_instance_id, unless_stopped
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.server import RpcServer
from bucketserve.store.job_room import JobRoom
from bucketserve.store.jobs import JobStore
from bucketserve.store.redis import connect
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import delivery_pb2, delivery_pb2_grpc, inference_pb2, inference_pb2_grpc, job_pb2, job_pb2_grpc
from bucketserve_gateway.admission import Admission, AdmissionInterceptor
from bucketserve_gateway.delivery import DeliveryServicer
from bucketserve_gateway.job_runner import JobRunner
from bucketserve_gateway.jobs import JobServicer
from bucketserve_gateway.kserve import KserveServicer
from bucketserve_gateway.models import load_models
from bucketserve_gateway.reads import Reads
from bucketserve_gateway.requests import OpenRequests
from bucketserve_gateway.scheduler_link import SchedulerLink
from bucketserve_gateway.servicer import GatewayParts, InferenceServicer
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.telemetry import GatewayTelemetry
from bucketserve_gateway.tokenizer_pool import TokenizerPool
from bucketserve_gateway.validation import largest_message
from bucketserve_gateway.vllm_engine import VllmEngineServicer

__all__ = ["serve"]

FLUSH_S = 2.0
HEALTH_S = 0.1


async def serve(
    settings: GatewaySettings, deployment: DeploymentSettings, telemetry: TelemetrySettings, stop: asyncio.Event
) -> None:
    """Runs the gateway until `stop` is set, and then for lame_duck_s and until its streams end, at most drain_s.

    Raises:
        ModelLoadError: a model's tokenizer can't be loaded.
        SettingsError: an address can't be bound, or there is no model.
    """
    if not settings.models:
        raise SettingsError(["[gateway] models: name at least one, BUCKETSERVE_GATEWAY_MODELS=name=directory"])
    gateway_id = settings.gateway_id or default_instance_id("gateway")
    ours = Deployment(deployment.name, deployment.token)
    with ExitStack() as stack:
        outlets = stack.enter_context(
            open_telemetry(
                Service.GATEWAY,
                gateway_id,
                metrics_address=Address.parse(settings.metrics_listen) if settings.metrics_listen else None,
                otlp_endpoint=telemetry.otlp_endpoint,
                sample_ratio=telemetry.sample_ratio,
                log_level=telemetry.log_level,
                log_format=telemetry.log_format,
            )
        )
        observer = GatewayTelemetry(outlets.log, outlets.metrics, outlets.tracing)
        catalog = await unless_stopped(
            stop,
            asyncio.to_thread(
                load_models,
                settings.models,
                settings.default_max_tokens,
                lambda text: outlets.log.info("model.loading", progress=text),
            ),
        )
        admission = Admission(
            max_calls=settings.max_open_calls,
            max_calls_per_connection=settings.max_streams_per_connection,
            max_bytes=settings.max_held_bytes,
            on_change=observer.admitted,
            on_refused=observer.refused_at_the_door,
        )
        tokenizers = TokenizerPool(settings.tokenizer_threads, settings.max_prompt_bytes, admission.refusal)
        stack.callback(tokenizers.close)
        requests = OpenRequests()
        delivery = DeliveryServicer(requests, ours)
        scheduler = SchedulerLink(
            settings.scheduler_address.split(","), ours, gateway_id, requests, observer.scheduler_state
        )
        parts = GatewayParts(
            settings=settings,
            gateway_id=gateway_id,
            delivery_address=settings.delivery_address or settings.delivery_listen,
            catalog=catalog,
            admission=admission,
            tokenizers=tokenizers,
            requests=requests,
            scheduler=scheduler,
            delivery=delivery,
            telemetry=observer,
        )
        inference = InferenceServicer(parts)
        public = _public_server(
            settings, ours, observer, admission, largest_message(catalog, settings.max_prompt_bytes)
        )
        internal = RpcServer(
            settings.delivery_listen,
            services=[delivery_pb2.DESCRIPTOR.services_by_name["DeliveryService"].full_name, ours.health_service],
            on_unexpected=observer.unexpected,
            enable_reflection=False,
        )
        is_leaving = asyncio.Event()
        store, room = _job_store(settings, deployment.name)
        _add_services(
            public,
            parts,
            inference,
            JobServicer(store, room, catalog, settings, admission=admission, is_leaving=is_leaving.is_set),
            is_leaving,
        )
        delivery_pb2_grpc.add_DeliveryServiceServicer_to_server(delivery, internal.grpc_server)
        async with asyncio.TaskGroup() as tasks:
            link = tasks.create_task(scheduler.run(), name="scheduler-link")
            watch = tasks.create_task(scheduler.watch(), name="silent-requests")
            health = tasks.create_task(
                _show_health([public, internal], scheduler, settings.scheduler_wait_s), name="health"
            )
            runner = JobRunner(store, inference.generate, gateway_id, settings, observer, room) if store else None
            jobs = tasks.create_task(runner.run(), name="job-runner") if runner else None
            try:
                await internal.start()
                await public.start()
                observer.log.info("gateway.ready", listen=settings.listen, models=",".join(settings.models))
                await stop.wait()
                health.cancel()
                await public.leave(settings.lame_duck_s)
                is_leaving.set()
                if jobs is not None:
                    # What jobs have running here is given back: another gateway, or this one later, takes it up.
                    jobs.cancel()
                    await asyncio.wait([jobs])
                is_drained = await requests.drained(settings.drain_s)
                observer.log.info("gateway.drained", is_complete=is_drained, num_left=len(requests))
            finally:
                # The last messages of the drained streams leave within the grace; what is left is cut.
                await public.stop(FLUSH_S)
                if jobs is not None:
                    jobs.cancel()
                for task in (link, watch, health):
                    task.cancel()
                delivery.close()
                await internal.stop(FLUSH_S)


def _add_services(
    public: RpcServer, parts: GatewayParts, inference: InferenceServicer, jobs: JobServicer, is_leaving: asyncio.Event
) -> None:
    """Adds our services to the clients' server, and those of others' protocols."""
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, public.grpc_server)
    job_pb2_grpc.add_JobServiceServicer_to_server(jobs, public.grpc_server)
    generate, settings, telemetry = inference.generate, parts.settings, parts.telemetry
    kserve = KserveServicer(
        generate,
        parts.catalog,
        parts.admission,
        max_prompt_bytes=settings.max_prompt_bytes,
        max_streams=settings.max_infer_streams,
        is_serving=lambda: public.is_serving,
        is_leaving=is_leaving.is_set,
        on_refused=lambda error: telemetry.refused("", "", error),
        on_unexpected=telemetry.unexpected,
    )
    kserve_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(kserve, public.grpc_server)
    engine = VllmEngineServicer(
        generate,
        parts.catalog,
        parts.admission,
        parts.requests,
        is_serving=lambda: public.is_serving,
        on_refused=lambda error: telemetry.refused("", "", error),
    )
    vllm_pb2_grpc.add_VllmEngineServicer_to_server(engine, public.grpc_server)


async def _show_health(servers: list[RpcServer], scheduler: SchedulerLink, grace_s: float) -> None:
    """Keeps health true: SERVING if a request would be served, or would only wait for a scheduler that takes over."""
    while True:
        for server in servers:
            await server.set_serving(scheduler.is_present(grace_s))
        await asyncio.sleep(HEALTH_S)


def _job_store(settings: GatewaySettings, deployment: str) -> tuple[JobStore, JobRoom] | tuple[None, None]:
    """Returns where jobs are kept, and the count of what they take there, if this gateway has a store."""
    if not settings.redis_url:
        return None, None
    client = connect(settings.redis_url)
    room = JobRoom(
        client, deployment, max_tenant_bytes=settings.max_tenant_job_bytes, max_bytes=settings.max_all_job_bytes
    )
    return JobStore(client, deployment), room


def _public_server(
    settings: GatewaySettings,
    ours: Deployment,
    observer: GatewayTelemetry,
    admission: Admission,
    max_message_bytes: int,
) -> RpcServer:
    """Returns the clients' server, without its services' handlers."""
    return RpcServer(
        settings.listen,
        services=[
            inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
            job_pb2.DESCRIPTOR.services_by_name["JobService"].full_name,
            kserve_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
            vllm_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name,
            ours.health_service,
        ],
        on_unexpected=observer.unexpected,
        enable_reflection=settings.enable_reflection,
        max_connections=settings.max_connections,
        interceptors=[AdmissionInterceptor(admission, Reads.of(max_message_bytes, admission.refusal))],
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_metadata_size", settings.max_metadata_bytes),
            # Beyond the soft limit calls would be refused at random.
            ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes + 1024),
        ],
    )
