"""WorkerService: what other workers may ask this one."""

from __future__ import annotations

import grpc

from bucketserve.core.types import WorkerRole
from bucketserve.ports import EngineInfo
from bucketserve.rpc.convert import role_to_pb
from bucketserve.v1 import worker_pb2, worker_pb2_grpc

__all__ = ["WorkerServicer"]

Context = grpc.aio.ServicerContext[worker_pb2.GetWorkerInfoRequest, worker_pb2.GetWorkerInfoResponse]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Describes the worker. FetchKv is inherited and answers UNIMPLEMENTED: this version runs role `both` only."""

    def __init__(self, *, worker_id: str, model: str, role: WorkerRole, info: EngineInfo) -> None:
        """All of it is fixed once the engine is loaded."""
        self._answer = worker_pb2.GetWorkerInfoResponse(
            worker_id=worker_id,
            model=model,
            role=role_to_pb(role),
            device=info.device,
            dtype=info.dtype,
            kv_bytes_per_token=info.kv_bytes_per_token,
        )

    async def GetWorkerInfo(
        self, request: worker_pb2.GetWorkerInfoRequest, context: Context
    ) -> worker_pb2.GetWorkerInfoResponse:
        """The worker."""
        return self._answer
