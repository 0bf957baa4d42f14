"""A Python client for JobService, for asyncio.

async with JobClient("127.0.0.1:50051") as jobs:
    job = await jobs.submit(requests, idempotency_key="nightly-2026-11-23")
    async for result in jobs.results(job.job_id, follow=True):
        print(result.request_id, result.text)
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import grpc

from bucketserve.rpc.channel import UNARY_TIMEOUT_S, key_metadata, open_channel
from bucketserve.rpc.listening import messages_of
from bucketserve.rpc.status import error_from_call, errors_named
from bucketserve.rpc.tls import Tls
from bucketserve.v1 import common_pb2, inference_pb2, job_pb2, job_pb2_grpc

__all__ = ["JobClient", "Result", "request_from_json", "request_from_line"]

Result = job_pb2.FetchJobResultsResponse
V = TypeVar("V")
MAX_SHOWN = 60


class JobClient:
    """One channel to a gateway. Every method raises the BucketServeError that the server's status names."""

    def __init__(self, address: str, *, tls: Tls | None = None, api_key: str = "") -> None:
        """Connects when first used; arguments as BucketServeClient takes them."""
        self._metadata = key_metadata(api_key)
        self._channel = open_channel(address, tls, watched_service="bucketserve.v1.JobService")
        self.stub = job_pb2_grpc.JobServiceStub(self._channel)
        self._tenants: dict[str, str] = {}
        """Whose the jobs are that were submitted here."""

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

        response: job_pb2.SubmitJobResponse = await errors_named(
            self.stub.SubmitJob(messages(), metadata=self._metadata)
        )
        self._tenants[response.job.job_id] = tenant
        return response.job

    async def get(self, job_id: str, *, tenant: str = "") -> job_pb2.Job:
        """Returns state and progress. The tenant, here and below, is that of a job that was submitted elsewhere."""
        request = job_pb2.GetJobRequest(job_id=job_id, tenant=self._tenant_of(job_id, tenant))
        response: job_pb2.GetJobResponse = await errors_named(
            self.stub.GetJob(request, timeout=UNARY_TIMEOUT_S, metadata=self._metadata)
        )
        return response.job

    async def cancel(self, job_id: str, *, tenant: str = "") -> job_pb2.Job:
        """Ends a job."""
        request = job_pb2.CancelJobRequest(job_id=job_id, tenant=self._tenant_of(job_id, tenant))
        response: job_pb2.CancelJobResponse = await errors_named(
            self.stub.CancelJob(request, timeout=UNARY_TIMEOUT_S, metadata=self._metadata)
        )
        return response.job

    async def results(
        self, job_id: str, *, first_index: int = 0, follow: bool = False, tenant: str = ""
    ) -> AsyncIterator[Result]:
        """Yields results in order of the requests; with follow set, waits for those still to come."""
        call = self.stub.FetchJobResults(
            job_pb2.FetchJobResultsRequest(
                job_id=job_id, first_index=first_index, follow=follow, tenant=self._tenant_of(job_id, tenant)
            ),
            metadata=self._metadata,
        )
        try:
            async for result in messages_of(call):
                yield result
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) or error from None
        finally:
            call.cancel()

    def _tenant_of(self, job_id: str, tenant: str) -> str:
        return tenant or self._tenants.get(job_id, "")


def request_from_line(line: bytes | str) -> inference_pb2.GenerateRequest:
    """Returns a request from a line of JSONL, as request_from_json does.

    Raises:
        ValueError: it is not UTF-8, not JSON, not an object, or names a key twice; or as request_from_json says.
    """
    try:
        text = line.decode() if isinstance(line, bytes) else line
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    try:
        row = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"{_shown(row)} is not an object")
    return request_from_json(row)


def request_from_json(row: Mapping[str, Any]) -> inference_pb2.GenerateRequest:
    """Returns a request from the object of a line of JSONL.

    Keys: one of prompt, messages ([{role, content}]) or token_ids; custom_id, model, max_tokens, stop (one string or
    several), ignore_eos, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
    logit_bias ({token id: number}), seed; one of json_schema (an object), regex, choices and grammar.

    Raises:
        ValueError: a key is unknown, a value has the wrong type or range, or there is not exactly one prompt.
    """
    if unknown := row.keys() - _KEYS:
        raise ValueError(f"unknown keys: {', '.join(sorted(map(str, unknown)))}")
    prompts = [key for key in _PROMPTS if key in row]
    if len(prompts) != 1:
        raise ValueError(f"give one of {', '.join(_PROMPTS)}, not {' and '.join(prompts) or 'none'}")
    if len(structures := [key for key in _STRUCTURES if key in row]) > 1:
        raise ValueError(f"give one of {', '.join(_STRUCTURES)}, not {' and '.join(structures)}")
    request = inference_pb2.GenerateRequest()
    for key, value in row.items():
        try:
            _set(request, key, value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}: {error}") from error
    return request


_PROMPTS = ("prompt", "messages", "token_ids")
_SAMPLING = {field.name: field for field in common_pb2.SamplingParams.DESCRIPTOR.fields}
_STRUCTURES = ("json_schema", "regex", "choices", "grammar")
_KEYS = {*_PROMPTS, *_STRUCTURES, "custom_id", "model", "max_tokens", "stop", "ignore_eos", *_SAMPLING}


def _set(request: inference_pb2.GenerateRequest, key: str, value: Any) -> None:
    match key:
        case "prompt" | "model":
            setattr(request, key, _typed(value, str))
        case "custom_id":
            request.request_id = _typed(value, str)
        case "token_ids":
            request.token_ids.ids.extend(_typed(item, int) for item in _typed(value, list))
        case "messages":
            for turn in _typed(value, list):
                if _typed(turn, dict).keys() != {"role", "content"}:
                    raise ValueError(f"{_shown(turn)} is not {{role, content}}")
                request.chat.messages.add(role=_typed(turn["role"], str), content=_typed(turn["content"], str))
            # Without a message the kind of prompt would be lost.
            request.chat.SetInParent()
        case "stop":
            stops = [value] if isinstance(value, str) else _typed(value, list)
            request.stopping.stop_strings.extend(_typed(stop, str) for stop in stops)
        case "max_tokens":
            request.stopping.max_tokens = _typed(value, int)
        case "ignore_eos":
            request.stopping.ignore_eos = _typed(value, bool)
        case "json_schema" | "regex" | "choices" | "grammar":
            _set_structure(request.structured_output, key, value)
        case "logit_bias":
            biases = _typed(value, dict).items()
            request.sampling.logit_bias.update({_token_id(name): _number(bias) for name, bias in biases})
        case _:
            is_float = _SAMPLING[key].cpp_type == _SAMPLING[key].CPPTYPE_FLOAT
            setattr(request.sampling, key, _number(value) if is_float else _typed(value, int))


def _set_structure(wanted: common_pb2.StructuredOutput, key: str, value: Any) -> None:
    match key:
        case "json_schema":
            wanted.json_schema = json.dumps(_typed(value, dict))
        case "choices":
            wanted.choices.texts.extend(_typed(text, str) for text in _typed(value, list))
            # Without a text the kind would be lost.
            wanted.choices.SetInParent()
        case _:
            setattr(wanted, key, _typed(value, str))


_TYPES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _token_id(name: str) -> int:
    # Names in JSON are strings.
    if not name.isdecimal():
        raise ValueError(f"{_shown(name)} is not a token id")
    return int(name)


def _number(value: Any) -> float:
    return value if type(value) is int else _typed(value, float)


def _typed(value: Any, kind: type[V]) -> V:
    # Exactly: in Python true is an integer.
    if type(value) is not kind:
        raise TypeError(f"{_shown(value)} is not {_TYPES[kind]}")
    return value


def _shown(value: object) -> str:
    """Returns the beginning of a value as JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return row


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:MAX_SHOWN]} is too large")
    return value
