"""JobService: what is kept of the requests of a job."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from bucketserve.core.errors import OverloadedError
from bucketserve.store.jobs import JobInfo
from bucketserve.v1 import inference_pb2, job_pb2
from bucketserve_gateway.jobs import JobServicer
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.names import ModelNames
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.submissions import Item
from tests.unit.gateway.builders import an_admission, catalog


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
    jobs: Any = JobServicer(kept, known, GatewaySettings(), an_admission(), is_leaving=lambda: False)  # type: ignore[arg-type]

    async def messages() -> AsyncIterator[job_pb2.SubmitJobRequest]:
        yield job_pb2.SubmitJobRequest(header=job_pb2.JobHeader())
        for name in ("latest", "demo", "other"):
            yield job_pb2.SubmitJobRequest(request=inference_pb2.GenerateRequest(model=name, prompt="a"))

    await jobs.SubmitJob(messages(), None)
    found = [inference_pb2.GenerateRequest.FromString(item.data).model for item in kept.items]
    assert found == ["demo", "demo", "other"]


async def test_results_that_were_read_count_until_their_reader_has_them() -> None:
    results = [job_pb2.FetchJobResultsResponse(index=i, text="a" * 1000).SerializeToString() for i in range(300)]
    job = JobInfo(
        job_id="j",
        state="completed",
        tenant="default",
        num_requests=len(results),
        num_done=len(results),
        num_failed=0,
        ttl_s=60,
        created_unix_us=1,
    )

    class Store:
        async def get(self, job_id: str) -> JobInfo:
            return job

        async def results(self, job_id: str, indices: range, max_bytes: int) -> list[bytes]:
            return results[indices.start : indices.start + max_bytes // 1000]

    kept: Any = SimpleNamespace(store=Store())
    admission = an_admission()
    jobs: Any = JobServicer(kept, catalog(), GatewaySettings(), admission, is_leaving=lambda: False)
    found, most = [], 0
    async for result in jobs.FetchJobResults(job_pb2.FetchJobResultsRequest(job_id="j"), None):
        found.append(result.index)
        most = max(most, admission.num_bytes)
    assert found == list(range(300))
    assert 100_000 < most < 200_000
    assert admission.num_bytes == 0
    with admission.room() as others:
        others.resize(1 << 20)
        with pytest.raises(OverloadedError):
            await anext(jobs.FetchJobResults(job_pb2.FetchJobResultsRequest(job_id="j"), None))
