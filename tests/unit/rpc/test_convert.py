"""What goes over the wire comes back as it was."""

from __future__ import annotations

import pytest

from bucketserve.core.types import FinishReason, Headroom, RequestId
from bucketserve.ports import Sampling, StructuredOutput, StructureKind
from bucketserve.rpc.convert import (
    finish_reason_from_pb,
    finish_reason_to_pb,
    headroom_from_pb,
    headroom_to_pb,
    joined_from_pb,
    request_from_ticket,
    sequence_from_spec,
)
from bucketserve.v1 import common_pb2, scheduler_pb2


@pytest.mark.parametrize("reason", list(FinishReason))
def test_every_reason_to_end(reason: FinishReason) -> None:
    assert finish_reason_from_pb(finish_reason_to_pb(reason)) is reason


def test_a_reason_of_a_later_release_is_an_error() -> None:
    assert finish_reason_from_pb(common_pb2.FinishReason.ValueType(99)) is FinishReason.ERROR


def test_how_often_a_run_was_preempted_and_whom_to_let_go_first() -> None:
    ticket = scheduler_pb2.Ticket(run_id="a.3", prompt_tokens=5, max_new_tokens=2, is_resumed=True, num_preemptions=2)
    assert request_from_ticket(ticket, arrival_s=0.0).num_preemptions == 2
    for request_class, is_batch in (
        (common_pb2.REQUEST_CLASS_BATCH, True),
        (common_pb2.REQUEST_CLASS_INTERACTIVE, False),
        (common_pb2.REQUEST_CLASS_UNSPECIFIED, False),
    ):
        spec = scheduler_pb2.RunSpec(token_ids=[7], max_new_tokens=2, request_class=request_class, num_preemptions=1)
        sequence = sequence_from_spec(spec, RequestId("a.3#1"), "b")
        assert (sequence.is_batch, sequence.num_preemptions) == (is_batch, 1)


def test_whose_kv_a_run_may_use() -> None:
    for salt in (b"", b"a tenant", "Zoë".encode(), bytes(range(256))):
        spec = scheduler_pb2.RunSpec(token_ids=[7], max_new_tokens=2, prefix_salt=salt)
        read = scheduler_pb2.RunSpec.FromString(spec.SerializeToString())
        assert sequence_from_spec(read, RequestId("a.1"), "b").prefix_salt == salt


def test_how_tokens_are_chosen() -> None:
    spec = scheduler_pb2.RunSpec(
        token_ids=[7],
        max_new_tokens=2,
        sampling=common_pb2.SamplingParams(
            temperature=0.5,
            top_p=0.25,
            top_k=3,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-2.0,
            frequency_penalty=0.75,
            logit_bias={9: -100.0, 2: 0.5},
            seed=2**64 - 1,
        ),
    )
    assert sequence_from_spec(spec, RequestId("a.1"), "b").sampling == Sampling(
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=0.75,
        logit_bias=((2, 0.5), (9, -100.0)),
        seed=2**64 - 1,
    )


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, None),
        (common_pb2.StructuredOutput(), None),
        (common_pb2.StructuredOutput(json_schema="{}"), StructuredOutput(StructureKind.JSON_SCHEMA, "{}")),
        (common_pb2.StructuredOutput(regex=""), StructuredOutput(StructureKind.REGEX, "")),
        (common_pb2.StructuredOutput(grammar="x"), StructuredOutput(StructureKind.GRAMMAR, "x")),
        (
            common_pb2.StructuredOutput(choices=common_pb2.Choices(texts=['a"', ""])),
            StructuredOutput(StructureKind.CHOICES, '["a\\"", ""]'),
        ),
    ],
    ids=str,
)
def test_what_an_output_must_be(wanted: common_pb2.StructuredOutput | None, found: StructuredOutput | None) -> None:
    spec = scheduler_pb2.RunSpec(token_ids=[7], max_new_tokens=2, structured_output=wanted)
    read = scheduler_pb2.RunSpec.FromString(spec.SerializeToString())
    assert sequence_from_spec(read, RequestId("a.1"), "b").structured_output == found


def test_who_can_constrain_output() -> None:
    ticket = scheduler_pb2.Ticket(run_id="a.1", prompt_tokens=5, max_new_tokens=2, needs_grammar=True)
    assert request_from_ticket(ticket, arrival_s=0.0).needs_grammar
    assert joined_from_pb(scheduler_pb2.WorkerHello(worker_id="w", has_grammars=True)).has_grammars


def test_how_a_worker_s_kv_is_used_and_how_far_it_has_got() -> None:
    headroom = Headroom(kv_total_tokens=9, kv_free_tokens=4, max_sequences=3, num_decode_steps=12)
    report = headroom_to_pb(headroom, [], last_assignment=0)
    assert headroom_from_pb(report) == headroom
    assert joined_from_pb(scheduler_pb2.WorkerHello(worker_id="w", report=report)).headroom == headroom
