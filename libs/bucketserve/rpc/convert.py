"""Protobuf messages <-> the core's values. The only place that knows both; loses nothing, decides nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TypeVar

from bucketserve.core.errors import FieldViolation, InvalidRequestError
from bucketserve.core.messages import DropReason, RefuseReason, WorkerJoined
from bucketserve.core.types import (
    Batch,
    BatchId,
    FinishReason,
    Headroom,
    Request,
    RequestClass,
    RequestId,
    RunningRequest,
    StepSample,
    WorkerId,
    WorkerRole,
)
from bucketserve.ports import Logprob, Sampling, SequenceSpec, StructuredOutput, StructureKind, TokenLogprobs
from bucketserve.v1 import common_pb2, scheduler_pb2

__all__ = [
    "adapters_from_pb",
    "batch_info",
    "drop_reason_to_pb",
    "finish_reason_from_pb",
    "finish_reason_to_pb",
    "headroom_from_pb",
    "headroom_to_pb",
    "joined_from_pb",
    "logprobs_to_pb",
    "refuse_reason_to_pb",
    "request_class_from_pb",
    "request_from_ticket",
    "role_from_pb",
    "role_to_pb",
    "sequence_from_spec",
    "steps_from_pb",
    "structured_from_pb",
]

K = TypeVar("K")
V = TypeVar("V")


def _inverse(table: dict[K, V]) -> dict[V, K]:
    return {value: key for key, value in table.items()}


_FINISH = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: common_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
    FinishReason.PREEMPTED: common_pb2.FINISH_REASON_PREEMPTED,
}
_FINISH_BACK = _inverse(_FINISH)
_ROLES = {
    WorkerRole.PREFILL: common_pb2.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: common_pb2.WORKER_ROLE_DECODE,
    WorkerRole.BOTH: common_pb2.WORKER_ROLE_BOTH,
}
_ROLES_BACK = {**_inverse(_ROLES), common_pb2.WORKER_ROLE_UNSPECIFIED: WorkerRole.BOTH}
_REFUSALS = {
    RefuseReason.QUEUE_REQUESTS: scheduler_pb2.REFUSE_REASON_QUEUE_REQUESTS,
    RefuseReason.QUEUE_TOKENS: scheduler_pb2.REFUSE_REASON_QUEUE_TOKENS,
    RefuseReason.TENANT_QUOTA: scheduler_pb2.REFUSE_REASON_TENANT_QUOTA,
    RefuseReason.SLO_UNATTAINABLE: scheduler_pb2.REFUSE_REASON_SLO_UNATTAINABLE,
    RefuseReason.TOO_LARGE: scheduler_pb2.REFUSE_REASON_TOO_LARGE,
    RefuseReason.OTHER_TOKENIZER: scheduler_pb2.REFUSE_REASON_OTHER_TOKENIZER,
    RefuseReason.NO_GRAMMARS: scheduler_pb2.REFUSE_REASON_NO_GRAMMARS,
    RefuseReason.NO_WORKER: scheduler_pb2.REFUSE_REASON_NO_WORKER,
    RefuseReason.NO_ADAPTER: scheduler_pb2.REFUSE_REASON_NO_ADAPTER,
    RefuseReason.STORE_FULL: scheduler_pb2.REFUSE_REASON_STORE_FULL,
}
_DROPS = {
    DropReason.DEADLINE: scheduler_pb2.DROP_REASON_DEADLINE,
    DropReason.CANCELLED: scheduler_pb2.DROP_REASON_CANCELLED,
    DropReason.WORKER_LOST: scheduler_pb2.DROP_REASON_WORKER_LOST,
    DropReason.WORKER_FAILED: scheduler_pb2.DROP_REASON_WORKER_FAILED,
    DropReason.TOO_LARGE: scheduler_pb2.DROP_REASON_TOO_LARGE,
    DropReason.NO_LIKE_WORKER: scheduler_pb2.DROP_REASON_NO_LIKE_WORKER,
    DropReason.NO_WORKER: scheduler_pb2.DROP_REASON_NO_WORKER,
    DropReason.INTERNAL: scheduler_pb2.DROP_REASON_INTERNAL,
}


def finish_reason_to_pb(reason: FinishReason) -> common_pb2.FinishReason:
    """Returns the wire value."""
    return _FINISH[reason]


def finish_reason_from_pb(reason: common_pb2.FinishReason) -> FinishReason:
    """Returns the core's value; an unknown one counts as an error."""
    return _FINISH_BACK.get(reason, FinishReason.ERROR)


def role_to_pb(role: WorkerRole) -> common_pb2.WorkerRole:
    """Returns the wire value."""
    return _ROLES[role]


def role_from_pb(role: common_pb2.WorkerRole) -> WorkerRole:
    """Returns the core's value; unspecified is BOTH.

    Raises:
        InvalidRequestError: there is no such role.
    """
    if role not in _ROLES_BACK:
        raise InvalidRequestError([FieldViolation("role", f"unknown value {role}")])
    return _ROLES_BACK[role]


def joined_from_pb(hello: scheduler_pb2.WorkerHello) -> WorkerJoined:
    """Returns what a worker says of itself and of the requests that it has.

    Raises:
        InvalidRequestError: there is no such role.
    """
    return WorkerJoined(
        worker_id=WorkerId(hello.worker_id),
        role=role_from_pb(hello.role),
        headroom=headroom_from_pb(hello.report),
        context_tokens=hello.context_tokens,
        fingerprint=hello.fingerprint,
        tokenizer=hello.tokenizer,
        is_delivering=hello.report.is_delivering,
        step_tokens=hello.step_tokens,
        has_grammars=hello.has_grammars,
        adapters=adapters_from_pb(hello.adapters),
        running=tuple(
            RunningRequest(
                request_id=RequestId(at.run_id),
                assignment=at.assignment,
                is_held=at.HasField("held"),
                held_s=at.held_us / 1e6,
            )
            for at in hello.running
        ),
    )


def adapters_from_pb(adapters: scheduler_pb2.WorkerAdapters) -> frozenset[str]:
    """Returns the fingerprints of the adapters that a worker has."""
    return frozenset(adapter.fingerprint for adapter in adapters.adapters)


def refuse_reason_to_pb(reason: RefuseReason) -> scheduler_pb2.RefuseReason:
    """Returns the wire value."""
    return _REFUSALS[reason]


def drop_reason_to_pb(reason: DropReason) -> scheduler_pb2.DropReason:
    """Returns the wire value."""
    return _DROPS[reason]


def request_class_from_pb(request_class: common_pb2.RequestClass) -> RequestClass:
    """Returns the core's value; unspecified is INTERACTIVE."""
    return RequestClass.BATCH if request_class == common_pb2.REQUEST_CLASS_BATCH else RequestClass.INTERACTIVE


def request_from_ticket(
    ticket: scheduler_pb2.Ticket,
    *,
    arrival_s: float,
    attempt_s: float | None = None,
    deadline_s: float | None = None,
    block_hashes: Iterable[int] = (),
) -> Request:
    """Returns what the core needs to know of a ticket; times are seconds on the scheduler's clock."""
    slo = ticket.slo
    return Request(
        request_id=RequestId(ticket.run_id),
        prompt_tokens=ticket.prompt_tokens,
        max_new_tokens=ticket.max_new_tokens,
        arrival_s=arrival_s,
        attempt_s=attempt_s,
        block_hashes=tuple(block_hashes),
        request_class=request_class_from_pb(ticket.request_class),
        tenant=ticket.tenant,
        is_resumed=ticket.is_resumed,
        num_preemptions=ticket.num_preemptions,
        avoid=frozenset(WorkerId(worker_id) for worker_id in ticket.avoid_worker_ids),
        fingerprint=ticket.fingerprint,
        tokenizer=ticket.tokenizer,
        needs_grammar=ticket.needs_grammar,
        adapter=ticket.adapter,
        ttft_slo_s=slo.ttft_ms / 1e3 if slo.HasField("ttft_ms") else None,
        tpot_slo_s=slo.tpot_ms / 1e3 if slo.HasField("tpot_ms") else None,
        deadline_s=deadline_s,
        reject_if_unattainable=slo.reject_if_unattainable,
    )


def sequence_from_spec(
    spec: scheduler_pb2.RunSpec, key: RequestId, batch_id: str, *, hands_over: bool = False
) -> SequenceSpec:
    """Returns what the engine needs to run a spec; key is the engine's name for this run."""
    sampling = spec.sampling
    return SequenceSpec(
        request_id=key,
        token_ids=tuple(spec.token_ids),
        max_new_tokens=spec.max_new_tokens,
        num_resumed_tokens=spec.num_resumed_tokens,
        sampling=Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
            seed=sampling.seed,
        ),
        structured_output=structured_from_pb(spec.structured_output),
        stop_token_ids=frozenset(spec.stop_token_ids),
        num_logprobs=spec.num_logprobs if spec.HasField("num_logprobs") else None,
        batch_id=BatchId(batch_id),
        tpot_slo_s=spec.tpot_ms / 1e3 if spec.HasField("tpot_ms") else None,
        hands_over=hands_over,
        is_batch=request_class_from_pb(spec.request_class) is RequestClass.BATCH,
        num_preemptions=spec.num_preemptions,
        prefix_salt=spec.prefix_salt,
        adapter=spec.adapter,
    )


def structured_from_pb(wanted: common_pb2.StructuredOutput) -> StructuredOutput | None:
    """Returns what an output must be; None if it may be anything."""
    kind = wanted.WhichOneof("constraint")
    if kind is None:
        return None
    text = json.dumps(list(wanted.choices.texts)) if kind == "choices" else getattr(wanted, kind)
    return StructuredOutput(StructureKind(kind), text)


def headroom_to_pb(
    headroom: Headroom, steps: Iterable[StepSample], *, last_assignment: int
) -> scheduler_pb2.WorkerReport:
    """Returns a worker's report."""
    return scheduler_pb2.WorkerReport(
        kv_total_tokens=headroom.kv_total_tokens,
        kv_free_tokens=max(headroom.kv_free_tokens, 0),
        kv_bytes_per_token=headroom.kv_bytes_per_token,
        device_total_bytes=headroom.device_total_bytes,
        device_reserved_bytes=headroom.device_reserved_bytes,
        device_free_bytes=headroom.device_free_bytes,
        weights_bytes=headroom.weights_bytes,
        activation_bytes_per_token=headroom.activation_bytes_per_token,
        max_sequences=headroom.max_sequences,
        num_running=headroom.num_running,
        num_waiting=headroom.num_waiting,
        waiting_prefill_tokens=headroom.waiting_prefill_tokens,
        computing_prefill_tokens=headroom.computing_prefill_tokens,
        last_assignment=last_assignment,
        steps=[
            scheduler_pb2.StepSample(
                prefill_tokens=step.prefill_tokens,
                prefill_attention=step.prefill_attention,
                decode_sequences=step.decode_sequences,
                decode_context_tokens=step.decode_context_tokens,
                duration_us=round(step.duration_s * 1e6),
            )
            for step in steps
        ],
        num_out_of_memory=headroom.num_out_of_memory,
        num_decode_steps=headroom.num_decode_steps,
    )


def headroom_from_pb(report: scheduler_pb2.WorkerReport) -> Headroom:
    """Returns the memory part of a worker's report."""
    return Headroom(
        kv_total_tokens=report.kv_total_tokens,
        kv_free_tokens=report.kv_free_tokens,
        max_sequences=report.max_sequences,
        num_running=report.num_running,
        num_waiting=report.num_waiting,
        waiting_prefill_tokens=report.waiting_prefill_tokens,
        computing_prefill_tokens=report.computing_prefill_tokens,
        last_assignment=report.last_assignment,
        kv_bytes_per_token=report.kv_bytes_per_token,
        device_total_bytes=report.device_total_bytes,
        device_reserved_bytes=report.device_reserved_bytes,
        device_free_bytes=report.device_free_bytes,
        weights_bytes=report.weights_bytes,
        activation_bytes_per_token=report.activation_bytes_per_token,
        num_out_of_memory=report.num_out_of_memory,
        num_decode_steps=report.num_decode_steps,
    )


def steps_from_pb(report: scheduler_pb2.WorkerReport) -> tuple[StepSample, ...]:
    """Returns the measured steps of a worker's report."""
    return tuple(
        StepSample(
            prefill_tokens=step.prefill_tokens,
            prefill_attention=step.prefill_attention,
            decode_sequences=step.decode_sequences,
            decode_context_tokens=step.decode_context_tokens,
            duration_s=step.duration_us / 1e6,
        )
        for step in report.steps
    )


def batch_info(batch: Batch) -> common_pb2.BatchInfo:
    """Returns the batch as clients and workers see it."""
    return common_pb2.BatchInfo(
        batch_id=batch.batch_id,
        bucket_low_tokens=batch.bucket.low,
        bucket_high_tokens=batch.bucket.high,
        num_requests=len(batch.request_ids),
        prompt_tokens=batch.prefill_tokens,
        padded_tokens=batch.padded_tokens,
        limited_by=batch.limited_by.value,
    )


def logprobs_to_pb(logprobs: TokenLogprobs) -> common_pb2.PositionLogprobs:
    """Returns the log-probabilities of one position."""

    def one(entry: Logprob) -> common_pb2.TokenLogprob:
        return common_pb2.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob)

    return common_pb2.PositionLogprobs(chosen=one(logprobs.chosen), top=[one(entry) for entry in logprobs.top])
