"""A Python client for JobService, for asyncio.

async with JobClient("127.0.0.1:50051") as jobs:
    job = await jobs.submit(requests, idempotency_key="nightly-2026-11-23")
    async for result in jobs.results(job.job_id, follow=True):
        print(result.request_id, result.text)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable
from types import TracebackType
from typing import Any, TypeVar

import grpc

from bucketserve.rpc.channel import open_channel
from bucketserve.rpc.status import error_from_call
from bucketserve.v1 import common_pb2, inference_pb2, job_pb2, job_pb2_grpc

__all__ = ["JobClient", "Result", "request_from_json"]

Result = job_pb2.FetchJobResultsResponse
T = TypeVar("T")


class JobClient:
    """One channel to a gateway. Every method raises the BucketServeError that the server's status names."""

    def __init__(self, address: str) -> None:
        """Connects when first used."""
        self._channel = open_channel(address, watched_service="bucketserve.v1.JobService")
        self.stub = job_pb2_grpc.JobServiceStub(self._channel)

    async def __aenter__(self) -> JobClient:
        """Returns itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the channel."""
        await self._channel.close()

    async def submit(
        self,
        requests: Iterable[inference_pb2.GenerateRequest],
        *,
        idempotency_key: str = "",
        tenant: str = "",
        ttl_s: int = 0,
    ) -> job_pb2.Job:
        """Submits a job. With an idempotency key it may be called again until it succeeds: there is one job."""
        header = job_pb2.JobHeader(idempotency_key=idempotency_key, tenant=tenant, ttl_s=ttl_s)

        async def messages() -> AsyncIterator[job_pb2.SubmitJobRequest]:
            yield job_pb2.SubmitJobRequest(header=header)
            for request in requests:
                yield job_pb2.SubmitJobRequest(request=request)

        response: job_pb2.SubmitJobResponse = await _ours(self.stub.SubmitJob(messages()))
        return response.job

    async def get(self, job_id: str) -> job_pb2.Job:
        """Returns state and progress."""
        response: job_pb2.GetJobResponse = await _ours(self.stub.GetJob(job_pb2.GetJobRequest(job_id=job_id)))
        return response.job

    async def cancel(self, job_id: str) -> job_pb2.Job:
        """Ends a job."""
        response: job_pb2.CancelJobResponse = await _ours(self.stub.CancelJob(job_pb2.CancelJobRequest(job_id=job_id)))
        return response.job

    async def results(self, job_id: str, *, first_index: int = 0, follow: bool = False) -> AsyncIterator[Result]:
        """Yields results in order of the requests; with follow set, waits for those still to come."""
        call = self.stub.FetchJobResults(
            job_pb2.FetchJobResultsRequest(job_id=job_id, first_index=first_index, follow=follow)
        )
        try:
            async for result in call:
                yield result
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) or error from None
        finally:
            call.cancel()


def request_from_json(row: dict[str, Any]) -> inference_pb2.GenerateRequest:
    """Returns a request from a line of JSONL.

    Keys: one of prompt, messages ([{role, content}]) or token_ids; custom_id, model, max_tokens, stop (strings),
    ignore_eos, temperature, top_p, top_k, min_p, repetition_penalty, seed.

    Raises:
        ValueError: a key is unknown or a value has the wrong type.
    """
    row = dict(row)
    request = inference_pb2.GenerateRequest()
    try:
        request.request_id, request.model = row.pop("custom_id", ""), row.pop("model", "")
        if "prompt" in row:
            request.prompt = row.pop("prompt")
        if "token_ids" in row:
            request.token_ids.ids.extend(row.pop("token_ids"))
        for turn in row.pop("messages", ()):
            request.chat.messages.append(inference_pb2.ChatMessage(role=turn["role"], content=turn["content"]))
        if "max_tokens" in row:
            request.stopping.max_tokens = row.pop("max_tokens")
        request.stopping.stop_strings.extend(row.pop("stop", ()))
        request.stopping.ignore_eos = row.pop("ignore_eos", False)
        for name in common_pb2.SamplingParams.DESCRIPTOR.fields_by_name:
            if name in row:
                setattr(request.sampling, name, row.pop(name))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"wrong value: {error}") from error
    if row:
        raise ValueError(f"unknown keys: {', '.join(sorted(row))}")
    return request


async def _ours(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_from_call(error) or error from None
