"""Health probe for containers: `python -m bucketserve.rpc.probe HOST:PORT`, exit status 0 if SERVING."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2

from bucketserve.addresses import AddressError, channel_target

__all__ = ["check_health", "main"]


def check_health(address: str, timeout_s: float = 3.0, service: str = "") -> str:
    """Returns the health of the server at host:port, or of one of its services, such as SERVING.

    Raises:
        grpc.RpcError: nobody answers.
        AddressError: that is no address.
    """
    with grpc.insecure_channel(channel_target(address)) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def main(arguments: list[str]) -> int:
    """Asks the server at arguments[0] for its overall health; prints the answer."""
    if len(arguments) != 1:
        print("usage: python -m bucketserve.rpc.probe HOST:PORT", file=sys.stderr)
        return 2
    try:
        health = check_health(arguments[0])
    except grpc.RpcError as error:
        print(f"{arguments[0]}: {error.code().name}", file=sys.stderr)
        return 1
    except AddressError as error:
        print(error, file=sys.stderr)
        return 2
    print(health)
    return 0 if health == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
