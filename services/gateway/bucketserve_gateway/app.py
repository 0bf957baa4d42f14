"""Composition root of the gateway: settings -> models -> parts -> servers for clients and for workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bucketserve.addresses import Address
from bucketserve.config import TelemetrySettings
from bucketserve.core.errors import SettingsError
from bucketserve.process import default_instance_id, keep_loaded, unless_stopped
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.server import RpcServer
from bucketserve.store.files import FileStore
from bucketserve.store.job_room import JobRoom
from bucketserve.store.jobs import JobStore
from bucketserve.store.listing import Listing
from bucketserve.store.quotas import QuotaStore
from bucketserve.store.redis import connect
from bucketserve.store.sealing import PLAIN, Sealer, read_sealing_keys
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import delivery_pb2, delivery_pb2_grpc
from bucketserve_gateway.admission import Admission
from bucketserve_gateway.auth import Keys
from bucketserve_gateway.delivery import DeliveryServicer
from bucketserve_gateway.job_runner import JobRunner
from bucketserve_gateway.jobs import JobServicer
from bucketserve_gateway.models import ModelCatalog, load_models
from bucketserve_gateway.names import ModelNames
from bucketserve_gateway.openai import BatchLines, HttpServer, Shelves
from bucketserve_gateway.public import grpc_server, http_server
from bucketserve_gateway.quotas import Quotas
from bucketserve_gateway.requests import OpenRequests
from bucketserve_gateway.scheduler_link import SchedulerLink, SchedulerLinks
from bucketserve_gateway.servicer import GatewayParts, InferenceServicer
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.submissions import Submissions
from bucketserve_gateway.telemetry import GatewayTelemetry
from bucketserve_gateway.tokenizer_pool import TokenizerPool

if TYPE_CHECKING:
    from bucketserve_gateway.tokens import Tokens

__all__ = ["serve"]

FLUSH_S = 2.0
HEALTH_S = 0.1


async def serve(settings: GatewaySettings, ours: Deployment, telemetry: TelemetrySettings, stop: asyncio.Event) -> None:
    """Runs the gateway until `stop` is set, and then for lame_duck_s and until its streams end, at most drain_s.

    Raises:
        ModelLoadError: a model's tokenizer can't be loaded.
        SettingsError: an address can't be bound, there is no model, or names of models clash.
    """
    names = _names(settings)
    gateway_id = settings.gateway_id or default_instance_id("gateway")
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
                certificate_ends_unix_s=ours.tls.ends_unix_s if ours.tls else None,
                metrics_context=ours.tls.metrics_context() if ours.tls else None,
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
                names=names,
            ),
        )
        keep_loaded()
        admission = Admission(
            max_calls=settings.max_open_calls,
            max_calls_per_connection=settings.max_streams_per_connection,
            max_bytes=settings.max_held_bytes,
            on_refused=observer.refused_at_the_door,
        )
        stores = await _stores(settings, ours.name)
        keys = _keys(settings, names, observer, stores)
        tokenizers = TokenizerPool(settings.tokenizer_threads, settings.max_prompt_bytes, admission.refusal)
        stack.callback(tokenizers.close)
        requests = OpenRequests()
        observer.watch(admission, requests)
        delivery = DeliveryServicer(requests, ours)
        schedulers = SchedulerLinks(
            settings.models,
            lambda model: SchedulerLink(
                model,
                settings.scheduler_address.split(","),
                ours,
                gateway_id,
                requests,
                on_state=observer.scheduler_state,
                on_adapters=catalog.adapters.announced,
            ),
        )
        quotas = Quotas(stores.quotas, keys.limits_of, observer.quota_uncounted)
        parts = GatewayParts(
            settings=settings,
            gateway_id=gateway_id,
            delivery_address=settings.delivery_address or settings.delivery_listen,
            catalog=catalog,
            keys=keys,
            admission=admission,
            quotas=quotas,
            tokenizers=tokenizers,
            requests=requests,
            schedulers=schedulers,
            delivery=delivery,
            telemetry=observer,
        )
        inference = InferenceServicer(parts)
        is_leaving = asyncio.Event()
        submissions = Submissions(stores.jobs, stores.room, settings, admission)
        jobs_api = JobServicer(submissions, catalog, settings, admission, is_leaving=is_leaving.is_set)
        public, http = (
            grpc_server(parts, ours, inference, jobs_api, is_leaving.is_set),
            http_server(parts, ours, inference, submissions, stores.shelves),
        )
        internal = _delivery_server(settings, ours, observer, delivery)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(schedulers.run(), name="scheduler-links"),
                tasks.create_task(quotas.run(), name="quotas"),
                tasks.create_task(keys.run(), name="keys"),
            ]
            health = tasks.create_task(
                _show_health([public, internal, http], schedulers, settings.scheduler_wait_s), name="health"
            )
            runner = _job_runner(stores, inference, gateway_id, settings, observer, catalog, admission)
            jobs = tasks.create_task(runner.run(), name="job-runner") if runner else None
            try:
                for server in (internal, public, http):
                    await server.start()
                observer.log.info(
                    "gateway.ready",
                    listen=settings.listen,
                    http_listen=settings.http_listen,
                    models=",".join(settings.models),
                )
                await stop.wait()
                health.cancel()
                await asyncio.gather(public.leave(settings.lame_duck_s), http.leave(settings.lame_duck_s))
                is_leaving.set()
                if jobs is not None:
                    # What jobs have running here is given back: another gateway, or this one later, takes it up.
                    jobs.cancel()
                    await asyncio.wait([jobs])
                is_drained = await requests.drained(settings.drain_s)
                observer.log.info("gateway.drained", is_complete=is_drained, num_left=len(requests))
            finally:
                # The last messages of the drained streams leave within the grace; what is left is cut.
                await asyncio.gather(public.stop(FLUSH_S), http.stop(FLUSH_S))
                if jobs is not None:
                    jobs.cancel()
                for task in (*background, health):
                    task.cancel()
                delivery.close()
                await internal.stop(FLUSH_S)


def _delivery_server(
    settings: GatewaySettings, ours: Deployment, observer: GatewayTelemetry, delivery: DeliveryServicer
) -> RpcServer:
    """Returns the server that workers deliver to."""
    server = RpcServer(
        settings.delivery_listen,
        services=[delivery_pb2.DESCRIPTOR.services_by_name["DeliveryService"].full_name, ours.health_service],
        on_unexpected=observer.unexpected,
        tls=ours.tls,
        reached_at=settings.delivery_address,
        enable_reflection=False,
    )
    delivery_pb2_grpc.add_DeliveryServiceServicer_to_server(delivery, server.grpc_server)
    return server


def _names(settings: GatewaySettings) -> ModelNames:
    """Returns the names of the served models.

    Raises:
        SettingsError: there is no model, or names clash.
    """
    if not settings.models:
        raise SettingsError(["[gateway] models: name at least one, BUCKETSERVE_GATEWAY_MODELS=name=directory"])
    return ModelNames(settings.models, settings.aliases)


async def _show_health(servers: Sequence[RpcServer | HttpServer], schedulers: SchedulerLinks, grace_s: float) -> None:
    """Keeps health true: SERVING if a request would be served, or would only wait for a scheduler that takes over."""
    while True:
        for server in servers:
            await server.set_serving(schedulers.is_present(grace_s))
        await asyncio.sleep(HEALTH_S)


class _Stores(NamedTuple):
    """What this gateway keeps in Redis, if it has one."""

    jobs: JobStore | None = None
    room: JobRoom | None = None
    quotas: QuotaStore | None = None
    shelves: Shelves | None = None


async def _stores(settings: GatewaySettings, deployment: str) -> _Stores:
    """Returns what is kept in Redis.

    Raises:
        SettingsError: the keys that jobs are sealed with can't be used, or are not these.
    """
    sealer = Sealer(read_sealing_keys(Path(settings.job_keys_file))) if settings.job_keys_file else PLAIN
    if not settings.redis_url:
        return _Stores()
    client = connect(settings.redis_url)
    await sealer.check(client, deployment)
    room = JobRoom(
        client, deployment, max_tenant_bytes=settings.max_tenant_job_bytes, max_bytes=settings.max_all_job_bytes
    )
    shelves = Shelves(
        FileStore(client, sealer), Listing(client, deployment, "files"), Listing(client, deployment, "batches")
    )
    return _Stores(JobStore(client, deployment, sealer), room, QuotaStore(client, deployment), shelves)


def _tokens(settings: GatewaySettings, observer: GatewayTelemetry) -> Tokens | None:
    """Returns the tokens of an identity provider; None without one."""
    if not settings.jwks:
        return None
    # Cryptography is 10 MiB that a gateway without tokens need not hold.
    from bucketserve_gateway.tokens import TokenRules, Tokens

    rules = TokenRules(settings.jwks, settings.jwt_issuer, settings.jwt_audience, settings.jwt_tenant_claim)
    return Tokens(rules, observer.keys_unusable)


def _keys(settings: GatewaySettings, names: ModelNames, observer: GatewayTelemetry, stores: _Stores) -> Keys:
    """Returns the keys of clients.

    Raises:
        SettingsError: their file can't be used.
    """
    keys = Keys(
        settings.keys_file,
        tokens=_tokens(settings, observer),
        names=names,
        on_refused=observer.refused_at_the_door,
        on_problem=observer.keys_unusable,
    )
    if keys.has_limits and stores.quotas is None:
        raise SettingsError(["[gateway] redis_url: needed for what the keys file limits in [[tenants]]"])
    return keys


def _job_runner(
    stores: _Stores,
    inference: InferenceServicer,
    gateway_id: str,
    settings: GatewaySettings,
    observer: GatewayTelemetry,
    catalog: ModelCatalog,
    admission: Admission,
) -> JobRunner | None:
    """Returns what runs jobs here; None without a store."""
    if stores.jobs is None:
        return None
    batches = BatchLines(inference.generate, catalog)
    return JobRunner(
        stores.jobs, inference.generate, gateway_id, settings, observer, admission, stores.room, batches=batches
    )
