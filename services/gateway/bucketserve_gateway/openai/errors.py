"""Errors of the project as OpenAI's error bodies: {"error": {message, type, code, param}}.

| error                 | status | type                  | code                            |
|-----------------------|--------|-----------------------|---------------------------------|
| InvalidRequestError   | 400    | invalid_request_error | none, or what OpenAI calls it   |
| UnknownModelError     | 404    | invalid_request_error | model_not_found                 |
| HttpError             | its    | invalid_request_error | its                             |
| UnauthenticatedError  | 401    | invalid_request_error | invalid_api_key                 |
| ForbiddenError        | 403    | invalid_request_error | forbidden                       |
| OverloadedError       | 429    | rate_limit_error      | its reason                      |
| UnavailableError      | 503    | server_error          | its reason                      |
| DeadlineError         | 504    | timeout_error         | its reason                      |
| RequestCancelledError | 499    | server_error          | its reason                      |
| anything else         | 500    | server_error          | none: what failed is not told   |

429 and 503 come with Retry-After in whole seconds, and with retry-after-ms, which OpenAI's clients prefer. Where
waiting does not help, x-should-retry tells them not to: they would send a request that ends workers twice more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from bucketserve.core.errors import (
    BucketServeError,
    DeadlineError,
    FieldViolation,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestCancelledError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
)
from bucketserve_gateway.job_runner import FOREVER

__all__ = ["CLOSE", "ErrorBody", "Headers", "HttpError", "ParameterError", "body_of", "headers_of", "status_of"]

Headers = list[tuple[bytes, bytes]]
ErrorBody = dict[str, dict[str, str | None]]

CLOSE = (b"connection", b"close")
"""The header of a response after which the connection ends."""
MAX_CHARACTERS = 1024
"""Of a message, which may repeat what a client sent."""
INVALID = "invalid_request_error"
TOO_LONG = "context_length_exceeded"
"""By which, or by the words that the message begins with, clients know that they are to shorten the conversation."""
_KINDS: dict[type[BucketServeError], tuple[int, str]] = {
    InvalidRequestError: (400, INVALID),
    NotFoundError: (404, INVALID),
    UnauthenticatedError: (401, INVALID),
    ForbiddenError: (403, INVALID),
    OverloadedError: (429, "rate_limit_error"),
    UnavailableError: (503, "server_error"),
    DeadlineError: (504, "timeout_error"),
    RequestCancelledError: (499, "server_error"),
}
_FIELDS = [
    (re.compile(r"stopping\.stop_strings.*"), "stop"),
    (re.compile(r"token_ids\.ids.*"), "prompt"),
    (re.compile(r"chat"), "messages"),
    (re.compile(r"response\.num_logprobs"), "logprobs"),
    (re.compile(r"(?:sampling|stopping|chat)\.(.*)"), r"\1"),
    (re.compile(r"tenant"), "x-llm-d-inference-fairness-id"),
    (re.compile(r"request_id"), "x-request-id"),
]
"""Fields of the native API, and what they are called here; the first that fits counts."""


class ParameterError(InvalidRequestError):
    """A parameter is wrong, unknown, or asks for what is not served."""

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        """Takes the parameter's name, what is wrong with it, and OpenAI's name for that."""
        super().__init__([FieldViolation(param, message)])
        self.code = code


class HttpError(BucketServeError):
    """The exchange itself is wrong: its route, method, length, type or pace."""

    reason = "INVALID_REQUEST"

    def __init__(self, status: int, message: str, code: str | None = None, headers: Headers | None = None) -> None:
        """Takes the status to answer with, and further headers."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or []


def status_of(error: Exception) -> int:
    """Returns the HTTP status of an error."""
    return error.status if isinstance(error, HttpError) else _kind_of(error)[0]


def headers_of(error: Exception) -> Headers:
    """Returns the headers that belong to an error: whether to try again, and when."""
    if isinstance(error, HttpError):
        return error.headers
    if isinstance(error, OverloadedError | UnavailableError) and error.reason not in FOREVER:
        delay_s = max(error.retry_delay_s, 0.001)
        return [(b"retry-after", b"%d" % math.ceil(delay_s)), (b"retry-after-ms", b"%d" % math.ceil(delay_s * 1e3))]
    if isinstance(error, UnauthenticatedError):
        return [(b"www-authenticate", b"Bearer")]
    return [(b"x-should-retry", b"false")] if status_of(error) >= 500 else []


def body_of(error: Exception, names: Mapping[str, str]) -> ErrorBody:
    """Returns the body of an error.

    Args:
        error: what happened.
        names: fields of the native API -> parameters by which this request gave them.
    """
    kind = INVALID if isinstance(error, HttpError) else _kind_of(error)[1]
    param, code, message = None, None, "internal error"
    match error:
        case InvalidRequestError():
            violations = [(_parameter(v.field, names), v.description) for v in error.violations]
            message = "; ".join(f"{name}: {text}" if name else text for name, text in violations)
            param = violations[0][0] or None
            if isinstance(error, ParameterError):
                code = error.code
            elif all(violation.is_too_long for violation in error.violations):
                code, message = TOO_LONG, f"prompt is too long: {message}"
        case UnknownModelError():
            param, code, message = "model", "model_not_found", str(error)
        case UnauthenticatedError():
            code, message = "invalid_api_key", str(error)
        case HttpError():
            code, message = error.code, str(error)
        case BucketServeError() if kind != "server_error" or isinstance(error, UnavailableError):
            code, message = error.reason.lower(), str(error)
    return {"error": {"message": message[:MAX_CHARACTERS], "type": kind, "code": code, "param": param}}


def _kind_of(error: Exception) -> tuple[int, str]:
    return next((found for kind, found in _KINDS.items() if isinstance(error, kind)), (500, "server_error"))


def _parameter(field: str, names: Mapping[str, str]) -> str:
    """Returns what a field of the native API is called here."""
    if field in names:
        return names[field]
    found = ((pattern.fullmatch(field), name) for pattern, name in _FIELDS)
    return next((match.expand(name) for match, name in found if match), field)
