"""Whether a server answers health checks with SERVING."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2

from bucketserve.addresses import channel_target
from bucketserve.rpc.tls import Tls

__all__ = ["check_health"]


def check_health(address: str, timeout_s: float = 3.0, service: str = "", tls: Tls | None = None) -> str:
    """Returns the health of the server at host:port, or of one of its services, such as SERVING.

    Raises:
        grpc.RpcError: nobody answers.
        AddressError: that is no address.
    """
    target = channel_target(address)
    with (
        grpc.insecure_channel(target)
        if tls is None
        else grpc.secure_channel(target, tls.channel_credentials(), tls.channel_options)
    ) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
