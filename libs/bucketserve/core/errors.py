"""Errors of the project, each with what a caller can do about it.

BucketServeError
├── InvalidRequestError      the request can never succeed as it is      INVALID_ARGUMENT
├── NotFoundError            there is no such thing                      NOT_FOUND
│   └── UnknownModelError    nobody serves that model
├── DuplicateRequestError    the job's key is taken by another job       ALREADY_EXISTS
├── PeerRefusedError         a service of another deployment called      PERMISSION_DENIED
├── UnauthenticatedError     no key, or one that nobody knows            UNAUTHENTICATED
├── ForbiddenError           the caller's key is not for that            PERMISSION_DENIED
├── OverloadedError          full; try again after retry_delay_s         RESOURCE_EXHAUSTED
│   └── QuotaExceededError   the tenant has used what it may
├── UnavailableError         a part is down; try again                   UNAVAILABLE
├── DeadlineError            the deadline passed or can't be met         DEADLINE_EXCEEDED
├── RequestCancelledError    the client cancelled                        CANCELLED
├── IllegalStepError         a request can't go from the one state to the other; a fault of ours
├── StaleEpochError          another scheduler leads; discard and re-read
├── EngineError              the model failed
│   ├── NoAdapterError       the adapter is not loaded here
│   └── OutOfMemoryError     the device ran out of memory
├── ModelLoadError           a model directory or id can't be served; says what to do
└── SettingsError            settings are wrong; lists every problem
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "BucketServeError",
    "DeadlineError",
    "DuplicateRequestError",
    "EngineError",
    "FieldViolation",
    "ForbiddenError",
    "IllegalStepError",
    "InvalidRequestError",
    "ModelLoadError",
    "NoAdapterError",
    "NotFoundError",
    "OutOfMemoryError",
    "OverloadedError",
    "PeerRefusedError",
    "QuotaExceededError",
    "RequestCancelledError",
    "SettingsError",
    "StaleEpochError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnknownModelError",
]


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One thing wrong with one field of a request."""

    field: str
    """Path of the field, as in the proto: sampling.temperature."""
    description: str
    """What is wrong and what would be right."""
    is_too_long: bool = False
    """Whether the context does not hold the prompt, or not beside the output: a shorter prompt may be served."""


class BucketServeError(Exception):
    """Root of all errors raised on purpose."""

    reason: str = "INTERNAL"
    """Stable machine-readable reason (ErrorInfo.reason, metric label)."""


class InvalidRequestError(BucketServeError):
    """The request can never succeed as it is."""

    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        """Keeps the violations; at least one."""
        super().__init__("; ".join(f"{v.field}: {v.description}" if v.field else v.description for v in violations))
        self.violations = tuple(violations)


class NotFoundError(BucketServeError):
    """There is no such thing."""

    reason = "NOT_FOUND"

    def __init__(self, resource_type: str, resource_name: str, message: str = "") -> None:
        """Names what was asked for."""
        super().__init__(message or f"no {resource_type} {resource_name!r}")
        self.resource_type = resource_type
        self.resource_name = resource_name


class UnknownModelError(NotFoundError):
    """Nobody serves that model."""

    reason = "UNKNOWN_MODEL"

    def __init__(self, model: str, served: Sequence[str], message: str = "") -> None:
        """Names the model asked for and those that could have been, unless the message does."""
        super().__init__("model", model, message or f"unknown model {model!r}; served: {', '.join(served) or 'none'}")
        self.model = model


class DuplicateRequestError(BucketServeError):
    """The job's key is taken by another job."""

    reason = "DUPLICATE_REQUEST"


class PeerRefusedError(BucketServeError):
    """A service that is not one of this deployment called."""

    reason = "PEER_REFUSED"


class UnauthenticatedError(BucketServeError):
    """The caller showed no key, or one that nobody knows."""

    reason = "UNAUTHENTICATED"


class ForbiddenError(BucketServeError):
    """The caller's key is not for that."""

    reason = "FORBIDDEN"


class OverloadedError(BucketServeError):
    """The system is full."""

    reason = "OVERLOADED"

    def __init__(self, message: str, *, reason: str, retry_delay_s: float) -> None:
        """Names the limit that was hit and when to try again, in seconds."""
        super().__init__(message)
        self.reason = reason
        self.retry_delay_s = retry_delay_s


class QuotaExceededError(OverloadedError):
    """A tenant has used what it may."""

    def __init__(self, tenant: str, limit: str, *, retry_delay_s: float) -> None:
        """Names the limit, such as "requests a minute", and when to try again, in seconds."""
        message = f"tenant {tenant!r} has used its {limit}"
        super().__init__(message, reason="QUOTA_EXCEEDED", retry_delay_s=retry_delay_s)
        self.tenant = tenant


class UnavailableError(BucketServeError):
    """A part of the system is down or going down; trying again helps."""

    reason = "UNAVAILABLE"

    def __init__(self, message: str, *, reason: str = "UNAVAILABLE", retry_delay_s: float = 1.0) -> None:
        """Names what is down and when to try again, in seconds."""
        super().__init__(message)
        self.reason = reason
        self.retry_delay_s = retry_delay_s


class DeadlineError(BucketServeError):
    """The request's deadline passed or can't be met any more."""

    reason = "DEADLINE"


class RequestCancelledError(BucketServeError):
    """The request was cancelled."""

    reason = "CANCELLED"


class IllegalStepError(BucketServeError):
    """A request can't go from the one state to the other (core/lifecycle.py)."""


class StaleEpochError(BucketServeError):
    """Another scheduler leads: the write was refused."""

    reason = "STALE_EPOCH"


class EngineError(BucketServeError):
    """The model failed."""

    reason = "ENGINE_FAILED"


class KvGoneError(EngineError):
    """KV that was here when the rest of its sequence's was sent for has been given up since: all of it has to come."""


class NoAdapterError(EngineError):
    """The adapter is not loaded here: another worker may have it."""

    reason = "NO_ADAPTER"


class OutOfMemoryError(EngineError):
    """The device ran out of memory."""

    reason = "OUT_OF_MEMORY"


class ModelLoadError(BucketServeError):
    """A model can't be served; the message says what to do."""

    reason = "MODEL_LOAD"


class SettingsError(BucketServeError):
    """Settings are wrong."""

    reason = "SETTINGS"

    def __init__(self, problems: Sequence[str]) -> None:
        """Keeps every problem found."""
        super().__init__("settings are wrong:\n  " + "\n  ".join(problems))
        self.problems = tuple(problems)
