"""JobService: batch work that belongs to Redis. What runs it is job_runner.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc

from bucketserve.core.errors import (
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from bucketserve.rpc.interceptors import first_message
from bucketserve.store.jobs import JobInfo
from bucketserve.v1 import common_pb2, inference_pb2, job_pb2, job_pb2_grpc
from bucketserve_gateway.admission import Admission
from bucketserve_gateway.keys import MAX_TENANT_CHARACTERS
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.submissions import (
    DEFAULT_TTL_S,
    MOST_TTL_S,
    OUTPUT_TOKEN_BYTES,
    Item,
    Submissions,
    most_tokens,
)
from bucketserve_gateway.validation import validate

__all__ = ["JobServicer"]

CHUNK, CHUNK_BYTES = 256, 64 << 10
"""Results read in one round trip at most, and their bytes; one may be larger."""
RESULT_COPIES = 2
"""Of a result on its way: as it was read, and as a message."""
SILENCE_S = 30.0
"""A submission that sends nothing for so long is ended: others want its place."""
FOLLOW_S = 0.5
MOST_KEY_CHARACTERS = 128

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
        submissions: Submissions,
        catalog: ModelCatalog,
        settings: GatewaySettings,
        admission: Admission,
        *,
        is_leaving: Callable[[], bool],
    ) -> None:
        """Without a store every call is answered UNAVAILABLE."""
        self._submissions = submissions
        self._catalog = catalog
        self._settings = settings
        self._admission = admission
        self._is_leaving = is_leaving

    async def SubmitJob(self, request_iterator: SubmitRequests, context: SubmitContext) -> job_pb2.SubmitJobResponse:
        """Header, then requests. Each is checked before it is written; the job runs when all of them are."""
        with self._submissions.place():
            header = _checked_header(await first_message(_unless_silent(request_iterator)))
            tenant = header.tenant or "default"
            job_id = await self._submissions.room.job_id(tenant, header.idempotency_key)
            items = self._items(request_iterator, tenant)
            job = await self._submissions.submit(job_id, tenant, header.ttl_s or DEFAULT_TTL_S, items)
            return job_pb2.SubmitJobResponse(job=_to_pb(job))

    async def _items(self, requests: SubmitRequests, tenant: str) -> AsyncIterator[Item]:
        """Yields requests as they are stored.

        Raises:
            InvalidRequestError: one of them is wrong.
        """
        number = 0
        async for message in _unless_silent(requests):
            request = self._checked(message, number, tenant)
            number += 1
            most_output_bytes = most_tokens(request, self._catalog) * OUTPUT_TOKEN_BYTES
            yield Item(request.SerializeToString(deterministic=True), most_output_bytes)

    async def GetJob(self, request: job_pb2.GetJobRequest, context: GetContext) -> job_pb2.GetJobResponse:
        """State and progress."""
        return job_pb2.GetJobResponse(job=_to_pb(await self._job(request.job_id, request.tenant)))

    async def FetchJobResults(
        self, request: job_pb2.FetchJobResultsRequest, context: ResultsContext
    ) -> AsyncIterator[job_pb2.FetchJobResultsResponse]:
        """Results in order; with follow set, as they come."""
        store, job_id = self._submissions.store, request.job_id
        index = request.first_index
        with self._admission.room() as room:
            while True:
                # The state first: what is there when the job has ended is all there will be.
                job = await self._job(job_id, request.tenant)
                end = min(index + CHUNK, job.num_requests)
                found = await store.results(job_id, range(index, end), CHUNK_BYTES)
                room.resize(sum(len(result or b"") for result in found) * RESULT_COPIES)
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
        job = await self._job(request.job_id, request.tenant)
        return job_pb2.CancelJobResponse(job=_to_pb(await self._submissions.store.cancel(job.job_id)))

    async def _job(self, job_id: str, tenant: str) -> JobInfo:
        """Returns a job of a tenant.

        Raises:
            NotFoundError: there is none, or it is another's: nobody learns which.
        """
        if not job_id or len(job_id) > MOST_KEY_CHARACTERS or not job_id.isascii() or not job_id.isprintable():
            raise InvalidRequestError([FieldViolation("job_id", "name a job, as SubmitJob returned it")])
        job = await self._submissions.store.get(job_id)
        # Batches are OpenAI's API's.
        if job.tenant != (tenant or "default") or job.note:
            raise NotFoundError("job", job_id)
        return job

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
            valid = validate(request, self._catalog, max_prompt_bytes=self._settings.max_prompt_bytes)
        except InvalidRequestError as error:
            where = f"items[{index}]"
            raise InvalidRequestError(
                [FieldViolation(f"{where}.{v.field}", v.description) for v in error.violations]
            ) from None
        # The model that its sender's key is for: by the time it runs an alias may mean another one.
        request.model = valid.model.card.name
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
    if len(header.tenant) > MAX_TENANT_CHARACTERS:
        bad.append(FieldViolation("header.tenant", f"at most {MAX_TENANT_CHARACTERS} characters"))
    if header.ttl_s > MOST_TTL_S:
        bad.append(FieldViolation("header.ttl_s", f"at most {MOST_TTL_S:,} seconds"))
    if bad:
        raise InvalidRequestError(bad)
    return header


async def _unless_silent(messages: SubmitRequests) -> SubmitRequests:
    """Yields messages as they come.

    Raises:
        OverloadedError: none came for SILENCE_S seconds.
    """
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                message = await anext(messages, None)
        except TimeoutError:
            silence = f"nothing came for {SILENCE_S:g} s"
            raise OverloadedError(silence, reason="SLOW_REQUEST", retry_delay_s=1.0) from None
        if message is None:
            return
        yield message


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
