"""A core for tests, what is said to it and what it says."""

from __future__ import annotations

from dataclasses import replace

from bucketserve.core.messages import (
    BatchPrefilled,
    Decision,
    DispatchBatch,
    RequestResumed,
    RequestSubmitted,
    WorkerJoined,
)
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, EdgeRule
from bucketserve.core.types import (
    Batch,
    StepSample,
    WorkerId,
)
from tests.builders import a_request, joined

W = WorkerId("w")


def core(**settings) -> SchedulerCore:
    """One bucket, a tenth of the memory in reserve, and two batches at a worker, no small ones beside them."""
    values = {"edges": EdgeRule.NONE, "small_batch_tokens": 0, "memory_reserve": 0.1, "fill_tokens": 10_000}
    return SchedulerCore(CoreSettings(**{**values, **settings}), 4096)


def submitted(*names: str, **more) -> list[RequestSubmitted]:
    return [RequestSubmitted(a_request(name, **more)) for name in names]


def resumed(*names: str, **more) -> list[RequestResumed]:
    return [RequestResumed(a_request(name, is_resumed="." in name, **more)) for name in names]


def batches(decision: Decision) -> list[Batch]:
    return [command.batch for command in decision.commands if isinstance(command, DispatchBatch)]


def prefilled(batch: Batch) -> BatchPrefilled:
    return BatchPrefilled(worker_id=W, assignment=batch.assignment, request_ids=batch.request_ids)


def prefill_steps(seconds_per_token: float) -> tuple[StepSample, ...]:
    """Enough steps of different sizes to learn a speed from."""
    return tuple(StepSample(prefill_tokens=n, duration_s=n * seconds_per_token) for n in range(20, 400, 20))


def of_kind(name: str, fingerprint: str, **more) -> WorkerJoined:
    tokenizer = more.pop("tokenizer", "")
    return replace(joined(name, **more), fingerprint=fingerprint, tokenizer=tokenizer)
