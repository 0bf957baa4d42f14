"""WorkerService: what other workers may ask this one."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import grpc

from bucketserve.core.errors import NotFoundError
from bucketserve.ports import EngineInfo
from bucketserve.rpc.convert import role_to_pb
from bucketserve.rpc.deployment import Deployment
from bucketserve.v1 import worker_pb2, worker_pb2_grpc
from bucketserve_worker.kv_source import PIECE_BYTES
from bucketserve_worker.worker import Worker

__all__ = ["WorkerServicer"]

InfoContext = grpc.aio.ServicerContext[worker_pb2.GetWorkerInfoRequest, worker_pb2.GetWorkerInfoResponse]
FetchContext = grpc.aio.ServicerContext[worker_pb2.FetchKvRequest, worker_pb2.FetchKvResponse]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Describes the worker and gives out the KV that it holds."""

    def __init__(self, worker: Worker, deployment: Deployment, *, model: str, info: EngineInfo) -> None:
        """Takes a worker whose engine is loaded."""
        self._worker = worker
        self._deployment = deployment
        self._model = model
        self._info = info

    async def GetWorkerInfo(
        self, request: worker_pb2.GetWorkerInfoRequest, context: InfoContext
    ) -> worker_pb2.GetWorkerInfoResponse:
        """The worker."""
        return worker_pb2.GetWorkerInfoResponse(
            worker_id=self._worker.worker_id,
            model=self._model,
            role=role_to_pb(self._worker.role),
            device=self._info.device,
            dtype=self._info.dtype,
            kv_bytes_per_token=self._info.kv_bytes_per_token,
        )

    async def FetchKv(
        self, request: worker_pb2.FetchKvRequest, context: FetchContext
    ) -> AsyncIterator[worker_pb2.FetchKvResponse]:
        """Held KV, as bytes."""
        self._deployment.check(context.invocation_metadata())
        held = self._worker.holder.find(request.run_id)
        if held is None or not secrets.compare_digest(held.secret, request.secret):
            # One answer for both: who only guesses learns nothing.
            raise NotFoundError("kv", request.run_id, "no KV is held for this run and secret")
        block = held.handed_over.block
        for begin in range(0, len(block.data), PIECE_BYTES):
            yield worker_pb2.FetchKvResponse(piece=bytes(block.data[begin : begin + PIECE_BYTES]))
            if held.key not in self._worker.holder:
                raise NotFoundError("kv", request.run_id, "the KV was let go while it was read")
