"""JobService: what is kept of the requests of a job."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from bucketserve.store.jobs import JobInfo
from bucketserve.v1 import inference_pb2, job_pb2
from bucketserve_gateway.jobs import JobServicer
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.names import ModelNames
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.submissions import Item
from tests.unit.gateway.builders import catalog


class Kept:
    """Stands for Submissions: keeps what would be stored."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.room = SimpleNamespace(job_id=self._job_id)

    async def _job_id(self, tenant: str, key: str) -> str:
        return "j"

    def place(self) -> Any:
        return contextlib.nullcontext()

    async def submit(self, job_id: str, tenant: str, ttl_s: int, items: AsyncIterator[Item]) -> JobInfo:
        self.items = [item async for item in items]
        return JobInfo(
            job_id=job_id,
            state="running",
            tenant=tenant,
            num_requests=len(self.items),
            num_done=0,
            num_failed=0,
            ttl_s=ttl_s,
            created_unix_us=1,
        )


async def test_a_request_is_kept_with_the_own_name_of_the_model_that_it_is_for() -> None:
    models = {"demo": catalog().get("demo"), "other": catalog("other").get("other")}
    kept, known = Kept(), ModelCatalog(models, ModelNames(models, {"latest": "demo"}))
    jobs: Any = JobServicer(kept, known, GatewaySettings(), is_leaving=lambda: False)  # type: ignore[arg-type]

    async def messages() -> AsyncIterator[job_pb2.SubmitJobRequest]:
        yield job_pb2.SubmitJobRequest(header=job_pb2.JobHeader())
        for name in ("latest", "demo", "other"):
            yield job_pb2.SubmitJobRequest(request=inference_pb2.GenerateRequest(model=name, prompt="a"))

    await jobs.SubmitJob(messages(), None)
    found = [inference_pb2.GenerateRequest.FromString(item.data).model for item in kept.items]
    assert found == ["demo", "demo", "other"]
