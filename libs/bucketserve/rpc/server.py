"""Lifecycle of a grpc.aio server: health, reflection, bound ports, drain."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Sequence

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bucketserve.core.errors import SettingsError
from bucketserve.rpc.channel import SERVER_OPTIONS
from bucketserve.rpc.health import HealthServicer
from bucketserve.rpc.interceptors import ErrorInterceptor
from bucketserve.rpc.tls import Tls

__all__ = ["RpcServer", "connections_by_descriptors"]

FOREVER_S = 86_400.0
"""A grace that stop() cuts short."""
MAX_CONNECTIONS = 4096
OTHER_DESCRIPTORS = 128
"""Kept for everything that is not a connection of a server: the process's own connections, files, its metrics."""


class RpcServer:
    """A server with standard health and reflection; starts NOT_SERVING.

    Servicers are added through `grpc_server` before start.
    """

    def __init__(
        self,
        listen: str,
        *,
        services: Sequence[str],
        on_unexpected: Callable[[str, BaseException], None],
        tls: Tls | None = None,
        is_public: bool = False,
        reached_at: str = "",
        enable_reflection: bool = True,
        max_connections: int = MAX_CONNECTIONS,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        options: Sequence[tuple[str, int | str]] = (),
    ) -> None:
        """Binds nothing yet.

        Args:
            listen: host:port.
            services: full names such as bucketserve.v1.InferenceService, for health and, of those that are described
                by a proto file, reflection.
            on_unexpected: called with method and error when a handler fails with an error that is not ours.
            tls: how connections are secured; None: they aren't.
            is_public: with TLS, who calls need not have a certificate of the deployment's CA.
            reached_at: host:port at which other services call this one; empty: listen.
            enable_reflection: answer reflection.
            max_connections: further ones are closed at once; less where the process may not open so many files.
            interceptors: see calls before the handlers; what they raise becomes a status.
            options: further channel arguments.

        Raises:
            SettingsError: the certificate is not for where it is reached.
        """
        self._listen = listen
        if tls is not None and not is_public:
            tls.check_address(reached_at or listen)
        self._credentials = None if tls is None else tls.server_credentials(is_public=is_public)
        self._health = HealthServicer([*services, ""])
        most = min(max_connections, connections_by_descriptors())
        self.grpc_server = grpc.aio.server(
            interceptors=[ErrorInterceptor(on_unexpected), *interceptors],
            # Of an option that is given twice the core takes the first.
            options=[*{**dict(SERVER_OPTIONS), "grpc.max_allowed_incoming_connections": most, **dict(options)}.items()],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        if enable_reflection:
            names = [*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
            # Tools ask for the description of whatever is listed, and end at the first that has none.
            reflection.enable_server_reflection(filter(_is_described, names), self.grpc_server)
        self.port = 0
        self._leaving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Binds and accepts connections, still NOT_SERVING; returns the port.

        Raises:
            SettingsError: the address can't be bound.
        """
        try:
            if self._credentials is None:
                self.port = self.grpc_server.add_insecure_port(self._listen)
            else:
                self.port = self.grpc_server.add_secure_port(self._listen, self._credentials)
        except RuntimeError as error:
            raise SettingsError([f"can't listen on {self._listen}: {error}; is the port in use?"]) from error
        await self.grpc_server.start()
        return self.port

    @property
    def is_serving(self) -> bool:
        """What health checks are answered."""
        return self._health.is_serving

    async def set_serving(self, is_serving: bool) -> None:
        """Answers health checks and watchers with SERVING or NOT_SERVING, for every service."""
        self._health.set_serving(is_serving)

    async def leave(self, lame_duck_s: float) -> None:
        """Parts with clients; returns when new calls are refused, while running ones go on until stop().

        For lame_duck_s seconds it says NOT_SERVING and still takes calls: who watches health goes elsewhere meanwhile.
        Then the port is closed and connections are told to go (GOAWAY). Without the first, calls that cross the GOAWAY
        would end with CANCELLED, which a client can't tell from a call that ran and was cut: that is how gRPC's core
        answers what arrives after its shutdown has begun.
        """
        self._health.leave()
        await asyncio.sleep(lame_duck_s)
        self._leaving = asyncio.create_task(self.grpc_server.stop(FOREVER_S), name="leaving")
        await asyncio.sleep(0)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets running ones finish for at most grace_s seconds, then cuts them."""
        self._health.leave()
        await self.grpc_server.stop(grace_s)
        if self._leaving is not None:
            await self._leaving


def _is_described(service: str) -> bool:
    try:
        descriptor_pool.Default().FindServiceByName(service)
    except KeyError:
        return False
    return True


def connections_by_descriptors() -> int:
    """Raises the limit of open files to what is allowed; returns how many connections a server may have by it.

    A third of it, a reserve aside, since a process has three servers at most, one of them for HTTP: none can take what
    the others, or the process itself, need.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else max((hard - OTHER_DESCRIPTORS) // 3, 16)
