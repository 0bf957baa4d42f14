"""WorkerService: what other workers may ask this one."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import grpc

from bucketserve.core.errors import NotFoundError
from bucketserve.rpc.deployment import Deployment
from bucketserve.v1 import worker_pb2, worker_pb2_grpc
from bucketserve_worker.kv_holder import KvHolder
from bucketserve_worker.kv_source import PIECE_BYTES

__all__ = ["WorkerServicer"]

FetchContext = grpc.aio.ServicerContext[worker_pb2.FetchKvRequest, worker_pb2.FetchKvResponse]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Gives out the KV that is held."""

    def __init__(self, holder: KvHolder, deployment: Deployment) -> None:
        """Owns nothing of it."""
        self._holder = holder
        self._deployment = deployment

    async def FetchKv(
        self, request: worker_pb2.FetchKvRequest, context: FetchContext
    ) -> AsyncIterator[worker_pb2.FetchKvResponse]:
        """Held KV and its trailer, or the part that was asked for, as bytes."""
        self._deployment.check(context.invocation_metadata())
        held = self._holder.find(request.run_id)
        if held is None or not secrets.compare_digest(held.secret, request.secret):
            # One answer for both: who only guesses learns nothing.
            raise NotFoundError("kv", request.run_id, "no KV is held for this run and secret")
        data = held.handed_over.block.data
        end = min(request.end or len(data), len(data))
        for begin in range(request.begin, end, PIECE_BYTES):
            yield worker_pb2.FetchKvResponse(piece=bytes(data[begin : min(begin + PIECE_BYTES, end)]))
            if held.key not in self._holder:
                raise NotFoundError("kv", request.run_id, "the KV was let go while it was read")
