"""Errors of the project <-> gRPC status with details (google.rpc.Status in grpc-status-details-bin).

| error                | code                | details besides ErrorInfo                                     |
|----------------------|---------------------|---------------------------------------------------------------|
| InvalidRequestError  | INVALID_ARGUMENT    | BadRequest with a violation for every field that is wrong     |
| UnknownModelError    | NOT_FOUND           | ResourceInfo                                                  |
| DuplicateRequestError| ALREADY_EXISTS      |                                                               |
| PeerRefusedError     | PERMISSION_DENIED   |                                                               |
| UnauthenticatedError | UNAUTHENTICATED     |                                                               |
| ForbiddenError       | PERMISSION_DENIED   |                                                               |
| OverloadedError      | RESOURCE_EXHAUSTED  | RetryInfo; QuotaFailure if it is a QuotaExceededError         |
| UnavailableError     | UNAVAILABLE         | RetryInfo                                                     |
| DeadlineError        | DEADLINE_EXCEEDED   |                                                               |
| RequestCancelledError| CANCELLED           |                                                               |
| anything else        | INTERNAL            | none: what failed inside is logged, not told                  |
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from bucketserve.core.errors import (
    BucketServeError,
    DeadlineError,
    DuplicateRequestError,
    FieldViolation,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PeerRefusedError,
    QuotaExceededError,
    RequestCancelledError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
)
from bucketserve.tasks import heeded

__all__ = ["DOMAIN", "FailedCall", "error_from_call", "errors_named", "is_answered", "status_of"]

DOMAIN = "bucketserve"
MAX_CHARACTERS = 256
"""Of a text in a status, which may repeat what a client sent."""
MAX_DETAIL_BYTES = 4096
"""Violations beyond this are left out: peers refuse trailers of more than 8 KiB or so."""

T = TypeVar("T")
FailedCall: TypeAlias = "grpc.aio.AioRpcError | grpc.Call"
"""With asyncio or without."""

_CODES: dict[type[BucketServeError], int] = {
    InvalidRequestError: code_pb2.INVALID_ARGUMENT,
    NotFoundError: code_pb2.NOT_FOUND,
    DuplicateRequestError: code_pb2.ALREADY_EXISTS,
    PeerRefusedError: code_pb2.PERMISSION_DENIED,
    UnauthenticatedError: code_pb2.UNAUTHENTICATED,
    ForbiddenError: code_pb2.PERMISSION_DENIED,
    OverloadedError: code_pb2.RESOURCE_EXHAUSTED,
    UnavailableError: code_pb2.UNAVAILABLE,
    DeadlineError: code_pb2.DEADLINE_EXCEEDED,
    RequestCancelledError: code_pb2.CANCELLED,
}


def status_of(error: BucketServeError) -> grpc.Status:
    """Returns the status to abort a call with."""
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), code_pb2.INTERNAL)
    message = _short(str(error)) if code != code_pb2.INTERNAL else "internal error"
    status = status_pb2.Status(code=code, message=message)
    status.details.append(_packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)))
    if isinstance(error, InvalidRequestError):
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=_short(violation.field), description=_short(violation.description))
            if bad.ByteSize() > MAX_DETAIL_BYTES:
                break
        status.details.append(_packed(bad))
    if isinstance(error, NotFoundError):
        resource = error_details_pb2.ResourceInfo(
            resource_type=error.resource_type, resource_name=_short(error.resource_name)
        )
        status.details.append(_packed(resource))
    if isinstance(error, QuotaExceededError):
        failure = error_details_pb2.QuotaFailure()
        failure.violations.add(subject=f"tenant:{_short(error.tenant)}", description=_short(str(error)))
        status.details.append(_packed(failure))
    if isinstance(error, OverloadedError | UnavailableError):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_delay_s * 1e9))
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return rpc_status.to_status(status)


def error_from_call(error: FailedCall) -> BucketServeError | None:
    """Returns our error for a failed call, if its status says which; None for any other failure."""
    status = _read_status(error)
    message = error.details() or error.code().name
    reason, retry_delay_s, violations, missing = "", 1.0, [], ("model", "")
    for detail in status.details if status else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry, resource = error_details_pb2.RetryInfo(), error_details_pb2.ResourceInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            retry_delay_s = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Unpack(bad):
            violations = [FieldViolation(item.field, item.description) for item in bad.field_violations]
        elif detail.Unpack(resource):
            missing = (resource.resource_type, resource.resource_name)
    build: dict[grpc.StatusCode, Callable[[], BucketServeError]] = {
        grpc.StatusCode.INVALID_ARGUMENT: lambda: InvalidRequestError(violations or [FieldViolation("", message)]),
        grpc.StatusCode.NOT_FOUND: lambda: (
            UnknownModelError(missing[1], (), message) if missing[0] == "model" else NotFoundError(*missing, message)
        ),
        grpc.StatusCode.ALREADY_EXISTS: lambda: DuplicateRequestError(message),
        grpc.StatusCode.UNAUTHENTICATED: lambda: UnauthenticatedError(message),
        grpc.StatusCode.PERMISSION_DENIED: lambda: (
            PeerRefusedError(message) if reason == PeerRefusedError.reason else ForbiddenError(message)
        ),
        grpc.StatusCode.RESOURCE_EXHAUSTED: lambda: OverloadedError(
            message, reason=reason or "OVERLOADED", retry_delay_s=retry_delay_s
        ),
        grpc.StatusCode.UNAVAILABLE: lambda: UnavailableError(
            message, reason=reason or "UNAVAILABLE", retry_delay_s=retry_delay_s
        ),
        grpc.StatusCode.DEADLINE_EXCEEDED: lambda: DeadlineError(message),
        grpc.StatusCode.CANCELLED: lambda: RequestCancelledError(message),
    }
    return build[error.code()]() if error.code() in build else None


async def errors_named(call: Awaitable[T]) -> T:
    """Returns what a call returns.

    Raises:
        BucketServeError: the one that the server's status names.
        grpc.aio.AioRpcError: any other failure.
    """
    try:
        return await heeded(call)
    except grpc.aio.AioRpcError as error:
        raise error_from_call(error) or error from None


def is_answered(error: FailedCall) -> bool:
    """Returns whether a server of the project gave this status; otherwise gRPC did, for want of a connection."""
    return _read_status(error) is not None


def _read_status(error: FailedCall) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return None


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 3] + "..."


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
