"""JobService: batch work that belongs to Redis. What runs it is job_runner.py."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable

import grpc

from bucketserve.core.errors import FieldViolation, InvalidRequestError, UnavailableError
from bucketserve.rpc.interceptors import first_message
from bucketserve.store.jobs import JobInfo, JobStore
from bucketserve.v1 import common_pb2, inference_pb2, job_pb2, job_pb2_grpc
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.validation import validate

__all__ = ["JobServicer"]

CHUNK = 256
"""Requests written, and results read, in one round trip at most."""
CHUNK_BYTES = 4 << 20
"""A chunk is written when it has this many, however few requests that are."""
FOLLOW_S = 0.5
DEFAULT_TTL_S = 86_400
MOST_TTL_S = 30 * 86_400
MOST_KEY_CHARACTERS = 128
MOST_TENANT_CHARACTERS = 64

STATES = {
    "loading": job_pb2.JOB_STATE_LOADING,
    "running": job_pb2.JOB_STATE_RUNNING,
    "completed": job_pb2.JOB_STATE_COMPLETED,
    "cancelled": job_pb2.JOB_STATE_CANCELLED,
}

SubmitRequests = AsyncIterator[job_pb2.SubmitJobRequest]
SubmitContext = grpc.aio.ServicerContext[job_pb2.SubmitJobRequest, job_pb2.SubmitJobResponse]
GetContext = grpc.aio.ServicerContext[job_pb2.GetJobRequest, job_pb2.GetJobResponse]
ResultsContext = grpc.aio.ServicerContext[job_pb2.FetchJobResultsRequest, job_pb2.FetchJobResultsResponse]
CancelContext = grpc.aio.ServicerContext[job_pb2.CancelJobRequest, job_pb2.CancelJobResponse]


class JobServicer(job_pb2_grpc.JobServiceServicer):
    """Writes jobs down and reads results; runs nothing."""

    def __init__(
        self,
        store: JobStore | None,
        catalog: ModelCatalog,
        settings: GatewaySettings,
        *,
        is_leaving: Callable[[], bool],
    ) -> None:
        """Without a store every call is answered UNAVAILABLE."""
        self._maybe_store = store
        self._catalog = catalog
        self._settings = settings
        self._is_leaving = is_leaving

    async def SubmitJob(self, request_iterator: SubmitRequests, context: SubmitContext) -> job_pb2.SubmitJobResponse:
        """Header, then requests. Each is checked before it is written; the job runs when all of them are."""
        store = self._store()
        first = await first_message(request_iterator)
        header = _checked_header(first)
        tenant = header.tenant or "default"
        job_id = _job_id(tenant, header.idempotency_key)
        await store.begin(job_id, tenant, header.ttl_s or DEFAULT_TTL_S)
        # Of its own: two submissions under one key may come at once, and only one of them is the job.
        upload = uuid.uuid4().hex
        digest, number, num_bytes = hashlib.sha256(), 0, 0
        chunk, chunk_bytes = list[bytes](), 0
        async for message in request_iterator:
            item = self._checked(message, number, tenant).SerializeToString(deterministic=True)
            digest.update(len(item).to_bytes(8, "big") + item)
            chunk.append(item)
            number, chunk_bytes, num_bytes = number + 1, chunk_bytes + len(item), num_bytes + len(item)
            self._check_size(number, num_bytes)
            if len(chunk) == CHUNK or chunk_bytes >= CHUNK_BYTES:
                await store.put(job_id, upload, number - len(chunk), chunk)
                chunk, chunk_bytes = [], 0
        if not number:
            raise InvalidRequestError([FieldViolation("items", "a job has at least one request")])
        if chunk:
            await store.put(job_id, upload, number - len(chunk), chunk)
        # A job that runs already was submitted before; start() tells whether with the same requests.
        return job_pb2.SubmitJobResponse(job=_to_pb(await store.start(job_id, upload, number, digest.hexdigest())))

    async def GetJob(self, request: job_pb2.GetJobRequest, context: GetContext) -> job_pb2.GetJobResponse:
        """State and progress."""
        return job_pb2.GetJobResponse(job=_to_pb(await self._store().get(_checked_id(request.job_id))))

    async def FetchJobResults(
        self, request: job_pb2.FetchJobResultsRequest, context: ResultsContext
    ) -> AsyncIterator[job_pb2.FetchJobResultsResponse]:
        """Results in order; with follow set, as they come."""
        store, job_id = self._store(), _checked_id(request.job_id)
        index = request.first_index
        while True:
            # The state first: what is there when the job has ended is all there will be.
            job = await store.get(job_id)
            end = min(index + CHUNK, job.num_requests)
            found = await store.results(job_id, range(index, end))
            for result in found:
                if result is None and request.follow and job.state == "running":
                    break
                if result is not None:
                    yield job_pb2.FetchJobResultsResponse.FromString(result)
                index += 1
            else:
                if index < job.num_requests:
                    continue
                if not request.follow or job.state in ("completed", "cancelled"):
                    return
            if self._is_leaving():
                raise UnavailableError("the gateway is shutting down", reason="DRAINING", retry_delay_s=1.0)
            await asyncio.sleep(FOLLOW_S)

    async def CancelJob(self, request: job_pb2.CancelJobRequest, context: CancelContext) -> job_pb2.CancelJobResponse:
        """Runners notice when they renew their leases."""
        return job_pb2.CancelJobResponse(job=_to_pb(await self._store().cancel(_checked_id(request.job_id))))

    def _store(self) -> JobStore:
        if self._maybe_store is None:
            raise UnavailableError("this gateway has no redis_url, which jobs need", reason="NO_JOB_STORE")
        return self._maybe_store

    def _check_size(self, number: int, num_bytes: int) -> None:
        settings = self._settings
        if number > settings.max_job_requests:
            raise InvalidRequestError([FieldViolation("items", f"at most {settings.max_job_requests:,} in a job")])
        if num_bytes > settings.max_job_bytes:
            raise InvalidRequestError([FieldViolation("items", f"at most {settings.max_job_bytes:,} bytes in a job")])

    def _checked(self, message: job_pb2.SubmitJobRequest, index: int, tenant: str) -> inference_pb2.GenerateRequest:
        """Returns a request as it will run.

        Raises:
            InvalidRequestError: with the violations of this request.
        """
        if message.WhichOneof("message") != "request":
            raise InvalidRequestError([FieldViolation(f"items[{index}]", "a request must follow the header")])
        request = message.request
        request.request_class = common_pb2.REQUEST_CLASS_BATCH
        request.tenant = tenant
        # It runs in what others leave: refused for a target of its own it would be tried again for ever.
        request.ClearField("slo")
        try:
            validate(request, self._catalog, max_prompt_bytes=self._settings.max_prompt_bytes)
        except InvalidRequestError as error:
            where = f"items[{index}]"
            raise InvalidRequestError(
                [FieldViolation(f"{where}.{v.field}", v.description) for v in error.violations]
            ) from None
        if not request.sampling.HasField("seed"):
            # Fixed here, so that a request that is started again elsewhere draws the same.
            request.sampling.seed = index + 1
        return request


def _checked_header(first: job_pb2.SubmitJobRequest) -> job_pb2.JobHeader:
    if first.WhichOneof("message") != "header":
        raise InvalidRequestError([FieldViolation("header", "must be the first message")])
    header, bad = first.header, []
    if len(header.idempotency_key) > MOST_KEY_CHARACTERS:
        bad.append(FieldViolation("header.idempotency_key", f"at most {MOST_KEY_CHARACTERS} characters"))
    if len(header.tenant) > MOST_TENANT_CHARACTERS:
        bad.append(FieldViolation("header.tenant", f"at most {MOST_TENANT_CHARACTERS} characters"))
    if header.ttl_s > MOST_TTL_S:
        bad.append(FieldViolation("header.ttl_s", f"at most {MOST_TTL_S:,} seconds"))
    if bad:
        raise InvalidRequestError(bad)
    return header


def _checked_id(job_id: str) -> str:
    if not job_id or len(job_id) > MOST_KEY_CHARACTERS or not job_id.isascii() or not job_id.isprintable():
        raise InvalidRequestError([FieldViolation("job_id", "name a job, as SubmitJob returned it")])
    return job_id


def _job_id(tenant: str, idempotency_key: str) -> str:
    if not idempotency_key:
        return f"job-{uuid.uuid4().hex[:24]}"
    return "job-" + hashlib.sha256("\0".join((tenant, idempotency_key)).encode()).hexdigest()[:24]


def _to_pb(job: JobInfo) -> job_pb2.Job:
    return job_pb2.Job(
        job_id=job.job_id,
        state=STATES[job.state],
        num_requests=job.num_requests,
        num_done=job.num_done,
        num_failed=job.num_failed,
        ttl_s=job.ttl_s,
        created_unix_us=job.created_unix_us,
    )
