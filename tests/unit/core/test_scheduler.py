"""SchedulerCore on literal events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bucketserve.core.messages import (
    AdmitFailed,
    AdmitRequest,
    BatchPrefilled,
    CancelAtWorker,
    Decision,
    DispatchFailed,
    Drop,
    DropReason,
    ForgetRequest,
    RefuseReason,
    RefuseRequest,
    RequestCancelled,
    WorkerDraining,
    WorkerLost,
)
from bucketserve.core.patience import PATIENCE_S
from bucketserve.core.settings import EdgeRule
from bucketserve.core.types import (
    FinishReason,
    LimitedBy,
    RequestClass,
    RequestId,
    WorkerId,
)
from tests.builders import a_request, at, finished, joined, reported
from tests.unit.core.cores import W, batches, core, of_kind, prefill_steps, prefilled, resumed, submitted

pytestmark = pytest.mark.usefixtures("all_that_may_be_is_expected")


def refusals(decision: Decision) -> list[RefuseReason]:
    return [command.reason for command in decision.commands if isinstance(command, RefuseRequest)]


def forgotten(decision: Decision) -> list[str]:
    return [command.request_id for command in decision.commands if isinstance(command, ForgetRequest)]


def prefilled_at(worker: str, *names: str) -> BatchPrefilled:
    ids = tuple(RequestId(name) for name in names)
    return BatchPrefilled(worker_id=WorkerId(worker), assignment=1, request_ids=ids)


def test_requests_wait_without_a_worker_and_go_when_one_joins() -> None:
    under_test = core()
    first = under_test.step(submitted("a", "b"), 1.0)
    assert [type(command) for command in first.commands] == [AdmitRequest, AdmitRequest]
    (batch,) = batches(under_test.step([joined()], 2.0))
    assert (batch.request_ids, batch.worker_id, batch.assignment) == (("a", "b"), W, 1)
    assert (batch.prefill_tokens, batch.padded_tokens, batch.reserved_kv_tokens) == (20, 20, 40)
    assert batch.limited_by is LimitedBy.SUPPLY
    view = under_test.status()
    assert (view.num_waiting, view.num_running) == (0, 2)


def test_least_slack_first_and_batch_class_last() -> None:
    under_test = core()
    under_test.step(submitted("relaxed", ttft_slo_s=5.0), 0.0)
    under_test.step(submitted("urgent", ttft_slo_s=0.5, arrival_s=1.0), 1.0)
    under_test.step(submitted("batch", request_class=RequestClass.BATCH), 1.0)
    (formed,) = batches(under_test.step([joined()], 1.0))
    assert formed.request_ids == ("urgent", "relaxed")
    assert [batch.request_ids for batch in batches(under_test.step([prefilled(formed)], 1.1))] == [("batch",)]


def test_cancelling_in_the_queue_and_at_a_worker() -> None:
    under_test = core()
    under_test.step(submitted("a"), 0.0)
    decision = under_test.step([RequestCancelled(RequestId("a")), RequestCancelled(RequestId("unknown"))], 0.1)
    assert decision.drops == (Drop(RequestId("a"), DropReason.CANCELLED),)
    under_test.step([joined(), *submitted("b")], 0.2)
    decision = under_test.step([RequestCancelled(RequestId("b"))], 0.3)
    assert decision.commands == (CancelAtWorker(W, RequestId("b")),)
    assert forgotten(under_test.step([finished("b")], 0.4)) == ["b"]
    assert under_test.step([finished("b")], 0.5).commands == ()


def test_a_lost_worker_s_requests_are_dropped_for_resubmission() -> None:
    under_test = core()
    under_test.step([joined(), *submitted("a", "b")], 0.0)
    decision = under_test.step([WorkerLost(W)], 1.0)
    assert {drop.request_id for drop in decision.drops} == {"a", "b"}
    assert {drop.reason for drop in decision.drops} == {DropReason.WORKER_LOST}
    again = under_test.step([*resumed("a.2"), joined("w2")], 1.1)
    assert batches(again)[0].request_ids == ("a.2",)
    # What the lost worker still says of the first attempt is ignored.
    assert under_test.step([finished("a")], 1.2).commands == ()


def test_a_worker_that_comes_back_keeps_what_it_still_has() -> None:
    under_test = core()
    under_test.step([joined(), *submitted("a", "b")], 0.0)
    decision = under_test.step([joined(running=(at("a"), at("ghost")))], 1.0)
    assert [drop.request_id for drop in decision.drops] == ["b"]
    assert CancelAtWorker(W, RequestId("ghost")) in decision.commands
    assert forgotten(under_test.step([finished("a")], 1.1)) == ["a"]


def test_a_request_said_again_changes_nothing() -> None:
    under_test = core()
    under_test.step(submitted("waits"), 0.0)
    assert under_test.step([*submitted("waits"), *resumed("waits")], 0.1).commands == ()
    under_test.step([joined()], 0.2)
    assert under_test.step([*submitted("waits"), *resumed("waits")], 0.3).commands == ()


def test_a_resumption_is_never_refused_and_goes_first() -> None:
    under_test = core(max_queued_requests=2, fill_tokens=1)
    under_test.step([joined(free=30, total=1000), *submitted("runs")], 0.0)
    under_test.step(submitted("a", "b", ttft_slo_s=0.5, arrival_s=1.0), 1.0)
    wanted = {"ttft_slo_s": 0.1, "reject_if_unattainable": True, "arrival_s": 0.5}
    decision = under_test.step([*submitted("c"), *resumed("lost.2", **wanted)], 40.0)
    assert refusals(decision) == [RefuseReason.QUEUE_REQUESTS]
    # Late as it is, and with others before it in the queue.
    assert batches(under_test.step([joined("w2", free=25, total=1000)], 41.0))[0].request_ids == ("lost.2",)


def test_a_resumed_request_avoids_the_worker_that_lost_it_while_there_is_another() -> None:
    under_test = core()
    avoid = frozenset({WorkerId("cut")})
    under_test.step([joined("cut", free=4000), joined("other", free=2000)], 0.0)
    (batch,) = batches(under_test.step(resumed("a.2", avoid=avoid), 0.1))
    assert batch.worker_id == "other"
    under_test.step([WorkerLost(WorkerId("other"))], 0.2)
    (batch,) = batches(under_test.step(resumed("a.3", avoid=avoid), 0.3))
    assert batch.worker_id == "cut"


def test_what_a_worker_failed_is_dropped_for_resumption() -> None:
    under_test = core()
    under_test.step([joined(), *submitted("a")], 0.0)
    decision = under_test.step([finished("a", reason=FinishReason.ERROR)], 0.1)
    assert decision.drops == (Drop(RequestId("a"), DropReason.WORKER_FAILED),)
    # The next attempt may come in the same turn as the end of the one before, in any order.
    events = [*resumed("a.2"), finished("a")]
    assert batches(under_test.step(events, 0.2))[0].request_ids == ("a.2",)


def test_what_every_worker_would_fail_is_not_dropped_for_resumption() -> None:
    """Its gateway hears of it from the worker; a drop that came first would make it try again."""
    under_test = core()
    under_test.step([joined(), *submitted("a")], 0.0)
    failed = replace(finished("a", reason=FinishReason.ERROR), is_retryable=False)
    decision = under_test.step([failed], 0.1)
    assert decision.drops == ()
    assert ForgetRequest(RequestId("a")) in decision.commands


def test_what_the_store_did_not_have_is_stored_and_sent_again() -> None:
    under_test = core()
    under_test.step([joined(free=100), *submitted("a", "b")], 0.0)
    failed = DispatchFailed(worker_id=W, request_ids=(RequestId("b"),))
    decision = under_test.step([failed], 0.1)
    assert [c.request.request_id for c in decision.commands if isinstance(c, AdmitRequest)] == ["b"]
    assert [again.request_ids for again in batches(decision)] == [("b",)]
    for name, assignment in (("a", 1), ("b", 2)):
        done = finished(name, assignment=assignment)
        assert forgotten(under_test.step([done], 0.2)) == [name]
    # All of the worker's memory is free again.
    under_test.step([reported(free=100, total=100, last_assignment=2)], 0.3)
    assert batches(under_test.step(submitted("c", max_new_tokens=90), 0.4))[0].reserved_kv_tokens == 100


def test_what_the_store_could_not_take_is_refused() -> None:
    under_test = core()
    under_test.step(submitted("a"), 0.0)
    decision = under_test.step([AdmitFailed((RequestId("a"),))], 0.1)
    assert refusals(decision) == [RefuseReason.STORE_FULL]
    assert under_test.status().num_waiting == 0


def test_a_parked_request_waits_for_its_gateway() -> None:
    under_test = core()
    under_test.restore(parked=[a_request("p"), a_request("q")], running={}, edges=(), outputs={})
    assert not batches(under_test.step([joined()], 0.0))
    assert batches(under_test.step(resumed("p"), 0.1))[0].request_ids == ("p",)
    assert under_test.step([RequestCancelled(RequestId("q"))], 0.2).drops == (
        Drop(RequestId("q"), DropReason.CANCELLED),
    )


def test_only_the_same_weights_go_on_with_an_output() -> None:
    under_test = core()
    under_test.step([of_kind("old", "A", free=4000), of_kind("new", "B", free=4000)], 0.0)
    assert batches(under_test.step(resumed("a.2", fingerprint="A"), 0.1))[0].worker_id == "old"
    # New requests prefer the newer weights while they have room.
    assert batches(under_test.step(submitted("b"), 0.2))[0].worker_id == "new"
    under_test.step([WorkerDraining(WorkerId("new"))], 0.3)
    assert batches(under_test.step(submitted("c"), 0.4))[0].worker_id == "old"


def test_a_request_bound_to_busy_weights_does_not_stop_those_behind_it() -> None:
    under_test = core(fill_tokens=1)
    under_test.step([of_kind("old", "A", free=4000), *submitted("runs")], 0.0)
    decision = under_test.step([of_kind("new", "B", free=4000), *resumed("a.2", fingerprint="A"), *submitted("b")], 0.1)
    assert [(batch.worker_id, batch.request_ids) for batch in batches(decision)] == [("new", ("b",))]
    assert batches(under_test.step([prefilled_at("old", "runs")], 0.2))[0].request_ids == ("a.2",)


def test_a_request_whose_weights_are_gone_waits_for_them_and_ends() -> None:
    under_test = core()
    under_test.step([of_kind("new", "B", free=4000), *resumed("a.2", "b.2", fingerprint="A"), *submitted("c")], 0.0)
    assert under_test.status().num_waiting == 0
    assert batches(under_test.step([of_kind("old", "A", free=15, total=4000)], 5.0)) == []
    # Its only worker leaves again before it had room; what waits goes back to waiting for its like.
    under_test.step([WorkerLost(WorkerId("old"))], 6.0)
    assert {drop.request_id for drop in under_test.step([], 37.0).drops} == {"a.2", "b.2"}


def test_constrained_output_goes_to_engines_that_can_do_it() -> None:
    under_test = core()
    assert not refusals(under_test.step(submitted("early", needs_grammar=True), 0.0))
    plain, able = of_kind("w", "A", free=4000), replace(of_kind("v", "B", free=4000), has_grammars=True)
    # It waits for whoever may come; once somebody is here who can't, it is known that nobody can.
    assert not batches(under_test.step([plain], 0.1))
    assert refusals(under_test.step(submitted("a", needs_grammar=True), 0.2)) == [RefuseReason.NO_GRAMMARS]
    assert refusals(under_test.step(submitted("b", needs_grammar=True, tokenizer="T"), 0.3)) == [
        RefuseReason.NO_GRAMMARS
    ]
    found = batches(under_test.step([able, *submitted("c", needs_grammar=True)], 0.4))
    assert {batch.worker_id for batch in found} == {"v"}
    assert "c" in {request_id for batch in found for request_id in batch.request_ids}


def test_a_prompt_of_another_tokenizer_is_not_served() -> None:
    under_test = core()
    under_test.step([of_kind("w", "A", tokenizer="T1", free=4000)], 0.0)
    assert refusals(under_test.step(submitted("a", tokenizer="T2"), 0.1)) == [RefuseReason.OTHER_TOKENIZER]
    # One that was admitted while its workers were here does not stop those behind it.
    assert not batches(under_test.step(resumed("c", tokenizer="T2"), 0.1))
    assert batches(under_test.step(submitted("b", tokenizer="T1"), 0.2))[0].request_ids == ("b",)


def test_the_context_grows_with_the_workers() -> None:
    under_test = core(edges=EdgeRule.ADAPTIVE)
    assert refusals(under_test.step(submitted("a", prompt_tokens=9000), 0.0)) == [RefuseReason.TOO_LARGE]
    large = replace(joined("large", free=100_000), context_tokens=32_768)
    (batch,) = batches(under_test.step([large, *submitted("b", prompt_tokens=30_000)], 0.1))
    assert batch.bucket.high == 32_769
    assert under_test.status().buckets[-1].bucket.high == 32_769


def test_an_event_that_cannot_be_taken_ends_its_own_request_alone(monkeypatch) -> None:
    under_test = core()
    under_test.step([joined(), *submitted("a")], 0.0)
    arrived = under_test._edges.arrived

    def fail(length: int, now_s: float) -> None:
        if length == 13:
            raise IndexError("no such cell")
        arrived(length, now_s)

    monkeypatch.setattr(under_test._edges, "arrived", fail)
    decision = under_test.step([*submitted("bad", prompt_tokens=13), *submitted("b")], 0.1)
    assert decision.drops == (Drop(RequestId("bad"), DropReason.INTERNAL),)
    assert [str(fault.error) for fault in decision.faults] == ["no such cell"]
    assert batches(decision)[0].request_ids == ("b",)


def test_deadlines_end_requests_wherever_they_are() -> None:
    under_test = core()
    decision = under_test.step(submitted("waits", deadline_s=5.0), 0.0)
    assert decision.wake_s == 5.0
    assert under_test.step([], 5.0).drops == (Drop(RequestId("waits"), DropReason.DEADLINE),)
    under_test.step([joined(), *submitted("runs", deadline_s=9.0)], 6.0)
    decision = under_test.step([], 9.5)
    assert decision.drops == (Drop(RequestId("runs"), DropReason.DEADLINE),)
    assert decision.commands == (CancelAtWorker(W, RequestId("runs")),)


def test_the_queue_is_bounded_and_refusals_say_when_to_come_back() -> None:
    under_test = core(max_queued_requests=2, max_queued_tokens=100)
    assert refusals(under_test.step(submitted("a", "b", "c"), 0.0)) == [RefuseReason.QUEUE_REQUESTS]
    under_test = core(max_queued_tokens=25)
    decision = under_test.step(submitted("a", "b", "c"), 0.0)
    assert refusals(decision) == [RefuseReason.QUEUE_TOKENS]
    assert next(c for c in decision.commands if isinstance(c, RefuseRequest)).retry_after_s > 0
    under_test = core(max_queued_tokens=100, max_tenant_share=0.3)
    events = [*submitted("a", "b", "c", "d", tenant="greedy"), *submitted("e", tenant="modest")]
    assert refusals(under_test.step(events, 0.0)) == [RefuseReason.TENANT_QUOTA]


def test_what_fits_nowhere_is_refused() -> None:
    under_test = core()
    assert refusals(under_test.step(submitted("a", prompt_tokens=4000, max_new_tokens=200), 0.0)) == [
        RefuseReason.TOO_LARGE
    ]
    under_test.step([joined(free=100)], 0.0)
    assert refusals(under_test.step(submitted("b", max_new_tokens=100), 0.0)) == [RefuseReason.TOO_LARGE]


def test_an_unattainable_slo_is_refused_at_once_if_asked_for() -> None:
    under_test = core()
    under_test.step([joined(), reported(steps=prefill_steps(0.1))], 0.0)
    decision = under_test.step(submitted("a", ttft_slo_s=0.5, reject_if_unattainable=True), 0.0)
    assert refusals(decision) == [RefuseReason.SLO_UNATTAINABLE]
    assert refusals(under_test.step(submitted("b", ttft_slo_s=0.5), 0.0)) == []


def test_a_draining_worker_gets_nothing_more() -> None:
    under_test = core()
    assert not batches(under_test.step([joined(), WorkerDraining(W), *submitted("a")], 0.0))


def test_what_no_worker_could_ever_hold_waits_for_one_and_ends() -> None:
    under_test = core()
    under_test.step(submitted("large", prompt_tokens=500), 0.0)
    assert under_test.step([joined(free=100)], 1.0).drops == ()
    # It is late from here on, and in nobody's way.
    assert batches(under_test.step(submitted("small"), 3.0))[0].request_ids == ("small",)
    assert under_test.step([], 3.0 + PATIENCE_S - 1).drops == ()
    assert under_test.step([], 3.0 + PATIENCE_S + 1).drops == (Drop(RequestId("large"), DropReason.TOO_LARGE),)


def test_what_a_worker_can_not_hold_any_more_waits_for_another_and_ends() -> None:
    for grows in (True, False):
        under_test = core(memory_reserve=0.0)
        under_test.step([joined(free=1000)], 0.0)
        # Out of memory: its budget is smaller from now on.
        under_test.step([reported(free=900, total=900)], 0.1)
        assert refusals(under_test.step(submitted("new", prompt_tokens=950), 0.2)) == [RefuseReason.TOO_LARGE]
        assert not batches(under_test.step(resumed("large.2", prompt_tokens=950), 0.3))
        under_test.step([], 20.0)
        if grows:
            assert batches(under_test.step([reported(free=1000, total=1000)], 21.0))[0].request_ids == ("large.2",)
        else:
            under_test.step([], 30.0)
            assert under_test.step([], 70.0).drops == (Drop(RequestId("large.2"), DropReason.TOO_LARGE),)


def test_what_is_said_again_of_a_parked_request_is_of_its_tenant_and_class() -> None:
    for other in ({"tenant": "other"}, {"request_class": RequestClass.BATCH}):
        under_test = core()
        under_test.restore(parked=[a_request("p", tenant="t")], running={}, edges=(), outputs={})
        decision = under_test.step([joined(), *resumed("p", **({"tenant": "t"} | other))], 0.1)
        assert decision.drops == (Drop(RequestId("p"), DropReason.INTERNAL),)
        assert len(decision.faults) == 1
        # Nothing of it is left to fall over later.
        assert under_test.step(submitted("q", tenant="t"), 100.0).faults == ()


def test_a_restored_core_goes_on() -> None:
    under_test = core()
    running = a_request("runs")
    under_test.restore(parked=[a_request("waits")], running={running: W}, edges=(), outputs={})
    decision = under_test.step([joined(running=(at("runs"),), free=980, total=1000), *resumed("waits")], 0.0)
    assert decision.drops == ()
    assert [batch.request_ids for batch in batches(decision)] == [("waits",)]
    assert forgotten(under_test.step([finished("runs")], 1.0)) == ["runs"]
