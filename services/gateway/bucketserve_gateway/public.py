"""What clients can reach: the gRPC port with the native services and those of other protocols, and the HTTP port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping

from bucketserve.facades import kserve_pb2, kserve_pb2_grpc, vllm_pb2, vllm_pb2_grpc
from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.server import RpcServer
from bucketserve.v1 import inference_pb2, inference_pb2_grpc, job_pb2, job_pb2_grpc
from bucketserve_gateway.admission import AdmissionInterceptor
from bucketserve_gateway.auth import AuthInterceptor, Keys
from bucketserve_gateway.jobs import JobServicer
from bucketserve_gateway.kserve import KserveServicer
from bucketserve_gateway.openai import Batches, BatchLines, Files, HttpServer, OpenAIFacade, Shelves
from bucketserve_gateway.reads import Reads
from bucketserve_gateway.servicer import GatewayParts, Generate, InferenceServicer
from bucketserve_gateway.submissions import Submissions
from bucketserve_gateway.validation import largest_message
from bucketserve_gateway.vllm_engine import VllmEngineServicer

__all__ = ["grpc_server", "http_server"]


def grpc_server(
    parts: GatewayParts,
    ours: Deployment,
    inference: InferenceServicer,
    jobs: JobServicer,
    is_leaving: Callable[[], bool],
) -> RpcServer:
    """Returns the server of the native API and of the other protocols that speak gRPC."""
    settings, admission, keys = parts.settings, parts.admission, parts.keys
    max_message_bytes = largest_message(parts.catalog, settings.max_prompt_bytes)
    server = RpcServer(
        settings.listen,
        services=[
            inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
            job_pb2.DESCRIPTOR.services_by_name["JobService"].full_name,
            kserve_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
            vllm_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name,
            ours.health_service,
        ],
        on_unexpected=parts.telemetry.unexpected,
        tls=ours.tls,
        is_public=True,
        enable_reflection=keys.is_open if settings.enable_reflection is None else settings.enable_reflection,
        max_connections=settings.max_connections,
        interceptors=[
            AuthInterceptor(keys),
            AdmissionInterceptor(admission, Reads.of(max_message_bytes, admission.refusal)),
        ],
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_metadata_size", settings.max_metadata_bytes),
            # Beyond the soft limit calls would be refused at random.
            ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes + 1024),
        ],
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server.grpc_server)
    job_pb2_grpc.add_JobServiceServicer_to_server(jobs, server.grpc_server)
    generate, telemetry = _permitted(keys, inference.generate), parts.telemetry
    kserve = KserveServicer(
        generate,
        parts.catalog,
        admission,
        identify=keys.identify,
        max_prompt_bytes=settings.max_prompt_bytes,
        max_streams=settings.max_infer_streams,
        is_serving=lambda: server.is_serving,
        is_leaving=is_leaving,
        on_refused=lambda error: telemetry.refused("", "", error),
        on_unexpected=telemetry.unexpected,
    )
    kserve_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(kserve, server.grpc_server)
    engine = VllmEngineServicer(
        generate,
        parts.catalog,
        admission,
        parts.requests,
        identify=keys.identify,
        is_serving=lambda: server.is_serving,
        on_refused=lambda error: telemetry.refused("", "", error),
    )
    vllm_pb2_grpc.add_VllmEngineServicer_to_server(engine, server.grpc_server)
    return server


def http_server(
    parts: GatewayParts,
    ours: Deployment,
    inference: InferenceServicer,
    submissions: Submissions,
    shelves: Shelves | None,
) -> HttpServer:
    """Returns the server of OpenAI's API."""
    settings = parts.settings
    max_body_bytes = largest_message(parts.catalog, settings.max_prompt_bytes)
    files = Files(shelves, submissions, parts.admission, settings.max_job_bytes)
    batches = Batches(
        files,
        shelves.batch_list if shelves else None,
        submissions,
        BatchLines(inference.generate, parts.catalog),
        max_lines=settings.max_job_requests,
        max_line_bytes=max_body_bytes,
    )
    facade = OpenAIFacade(
        inference.generate,
        parts.catalog,
        parts.keys,
        parts.admission,
        parts.telemetry,
        files,
        batches,
        max_body_bytes,
    )
    return HttpServer(
        settings.http_listen,
        facade,
        tls=ours.tls,
        max_connections=settings.max_connections,
        max_head_bytes=settings.max_metadata_bytes,
    )


def _permitted(keys: Keys, generate: Generate) -> Generate:
    """Returns generation for other protocols: what they ask for is permitted here, the native API's as it is read."""

    def checked(
        request: inference_pb2.GenerateRequest, metadata: Mapping[str, str], remaining_s: float | None
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        keys.identify(metadata).permit(request)
        return generate(request, metadata, remaining_s)

    return checked
