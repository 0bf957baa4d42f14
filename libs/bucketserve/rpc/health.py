"""grpc.health.v1.Health of one server, whose services share one status.

Our own since the library's keeps an entry for each name that anybody watches, and forgets all watchers of a service
when one of them leaves: the others would never hear that the server goes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from bucketserve.core.errors import NotFoundError, OverloadedError

__all__ = ["HealthServicer"]

MAX_WATCHES = 64
"""Of a connection at once."""
RETRY_S = 1.0


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers for the named services; starts NOT_SERVING."""

    def __init__(self, services: Iterable[str]) -> None:
        """Takes full names; the empty one stands for the whole server."""
        self._services = frozenset(services)
        self._is_serving = False
        self._is_leaving = False
        self._changed = asyncio.Event()
        self._watches: Counter[str] = Counter()

    @property
    def is_serving(self) -> bool:
        """What everybody is told."""
        return self._is_serving

    def set_serving(self, is_serving: bool) -> None:
        """Tells everybody who asks or watches; without effect after leave()."""
        if self._is_leaving or is_serving == self._is_serving:
            return
        self._is_serving = is_serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def leave(self) -> None:
        """NOT_SERVING for good."""
        self.set_serving(False)
        self._is_leaving = True

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """The status now."""
        if request.service not in self._services:
            raise NotFoundError("service", request.service)
        return health_pb2.HealthCheckResponse(status=self._status_of(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """The status now, and each further one; SERVICE_UNKNOWN, and nothing more, for a name that is not ours."""
        peer = context.peer()
        if self._watches[peer] >= MAX_WATCHES:
            message = f"{MAX_WATCHES} watches are open on this connection"
            raise OverloadedError(message, reason="MAX_WATCHES", retry_delay_s=RETRY_S)
        self._watches[peer] += 1
        told = None
        try:
            while True:
                changed, status = self._changed, self._status_of(request.service)
                if status != told:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                    told = status
                    continue
                await changed.wait()
        finally:
            self._watches[peer] -= 1
            if not self._watches[peer]:
                del self._watches[peer]

    def _status_of(self, service: str) -> int:
        if service not in self._services:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        return (
            health_pb2.HealthCheckResponse.SERVING if self._is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
