"""SchedulerCore on literal events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bucketserve.core.messages import (
    AdmitFailed,
    AdmitRequest,
    BatchPrefilled,
    CancelAtWorker,
    ChangeEdges,
    Decision,
    DispatchBatch,
    DispatchFailed,
    Drop,
    DropReason,
    ForgetRequest,
    RefuseReason,
    RefuseRequest,
    RequestCancelled,
    RequestResumed,
    RequestSubmitted,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
)
from bucketserve.core.patience import PATIENCE_S
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, EdgeRule, QueueOrder
from bucketserve.core.types import (
    Batch,
    FinishReason,
    LimitedBy,
    RequestClass,
    RequestId,
    StepSample,
    WorkerId,
)
from tests.builders import a_request, at, finished, joined, reported

pytestmark = pytest.mark.usefixtures("all_that_may_be_is_expected")

W = WorkerId("w")
FCFS = QueueOrder.FCFS


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


def refusals(decision: Decision) -> list[RefuseReason]:
    return [command.reason for command in decision.commands if isinstance(command, RefuseRequest)]


def forgotten(decision: Decision) -> list[str]:
    return [command.request_id for command in decision.commands if isinstance(command, ForgetRequest)]


def prefilled(batch: Batch) -> BatchPrefilled:
    return BatchPrefilled(worker_id=W, assignment=batch.assignment, request_ids=batch.request_ids)


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


def test_memory_limits_a_batch_to_nine_tenths_of_what_is_free() -> None:
    under_test = core()
    # 0.9 x 200 tokens hold 9 requests of 20.
    (batch,) = batches(under_test.step([joined(free=200), *submitted(*(f"r{i:02}" for i in range(20)))], 0.0))
    assert len(batch.request_ids) == 9
    assert batch.limited_by is LimitedBy.MEMORY


def test_less_reported_headroom_means_a_smaller_batch() -> None:
    sizes = []
    for free in (1000, 500, 100):
        under_test = core()
        events = [joined(free=free, total=1000), *submitted(*(f"r{i:03}" for i in range(100)))]
        sizes.append(len(batches(under_test.step(events, 0.0))[0].request_ids))
    assert sizes == [45, 22, 4]


def test_what_a_report_does_not_contain_yet_is_still_counted() -> None:
    under_test = core()
    first = batches(under_test.step([joined(free=200), *submitted("a", "b", max_new_tokens=50)], 0.0))
    assert [len(batch.request_ids) for batch in first] == [2]
    # The report was sent before the batch arrived (last_assignment 0): 80 of 200 tokens are left, 72 of them safe.
    late = batches(under_test.step([reported(free=200, total=200), *submitted("c", "d", max_new_tokens=50)], 0.1))
    assert [batch.request_ids for batch in late] == [("c",)]
    # This one contains both batches, of which the first has ended.
    ends = [prefilled(first[0]), finished("a"), finished("b")]
    after = under_test.step([reported(free=140, total=200, last_assignment=2), *ends], 0.2)
    assert [batch.request_ids for batch in batches(after)] == [("d",)]


def test_sequences_and_outstanding_batches_are_bounded() -> None:
    under_test = core(fill_tokens=1)
    names = [f"r{i}" for i in range(9)]
    decision = under_test.step([joined(free=4000, max_sequences=4), *submitted(*names)], 0.0)
    (batch,) = batches(decision)
    assert (len(batch.request_ids), batch.limited_by) == (4, LimitedBy.COUNT)
    # Another batch needs the first one's prompts to be computed, and a free sequence.
    left = reported(free=3900, total=4000, last_assignment=1, num_running=2, waiting_prefill_tokens=20)
    assert not batches(under_test.step([left], 0.1))
    events = [prefilled(batch), reported(free=3900, total=4000, last_assignment=1, num_running=2, max_sequences=4)]
    assert len(batches(under_test.step(events, 0.2))[0].request_ids) == 2


def test_a_short_prompt_goes_beside_a_long_one_only_when_it_would_be_late() -> None:
    under_test = core(fill_tokens=1, small_batch_tokens=100)
    (long,) = batches(under_test.step([joined(free=9000), *submitted("long", prompt_tokens=3000)], 0.0))
    names = ("a", "b", "c")
    events = [*submitted("other", prompt_tokens=1500), *submitted(*names, prompt_tokens=40, ttft_slo_s=1.0)]
    waits = under_test.step(events, 0.1)
    # Nothing is known of the worker's speed: they may start at the last moment.
    assert (batches(waits), waits.wake_s) == ([], 0.9)
    # Neither another long one, nor short ones beyond the limit of a small batch.
    (small,) = batches(under_test.step([], 0.9))
    assert small.request_ids == ("a", "b")
    assert small.limited_by is LimitedBy.TIME
    # Small ones have as many places as long ones, and don't take theirs.
    (after,) = batches(under_test.step([prefilled(small)], 0.95))
    assert after.request_ids == ("c",)
    computed = [prefilled(long), reported(free=5000, total=9000, last_assignment=3)]
    (after,) = batches(under_test.step(computed, 1.0))
    assert after.request_ids == ("other",)


def test_a_short_prompt_goes_beside_a_long_one_that_takes_too_long() -> None:
    under_test = core(fill_tokens=1, small_batch_tokens=100)
    speed = reported(free=9000, total=9000, steps=prefill_steps(0.001))
    under_test.step([joined(free=9000), speed, *submitted("long", prompt_tokens=3000)], 0.0)
    # 3 s for what is there: one with a target of 10 s waits till shortly before, one with 2 s goes at once.
    waits = under_test.step(submitted("patient", ttft_slo_s=10.0), 0.1)
    assert batches(waits) == []
    assert waits.wake_s is not None and 6.5 < waits.wake_s < 7.0
    # Never for batch class: it has no target.
    assert batches(under_test.step(submitted("batch", request_class=RequestClass.BATCH), 0.2)) == []
    hurried = submitted("hurried", ttft_slo_s=2.0, prompt_tokens=100)
    assert batches(under_test.step(hurried, 0.3))[0].request_ids == ("hurried",)


def test_a_short_prompt_goes_to_a_worker_with_a_place_for_any_before_one_that_computes_a_long_prompt() -> None:
    under_test = core(fill_tokens=1, small_batch_tokens=100)
    under_test.step([joined(free=9000), *submitted("long", prompt_tokens=3000)], 0.0)
    # It has hardly any memory left and many sequences, but nothing to compute.
    under_test.step([joined("full", free=100, total=9000, num_running=60)], 0.1)
    assert batches(under_test.step(submitted("a"), 0.2))[0].worker_id == "full"


def test_small_batches_are_for_long_prompts_only() -> None:
    under_test = core(fill_tokens=1, small_batch_tokens=100)
    under_test.step([joined(free=9000), *submitted("a", prompt_tokens=1500)], 0.0)
    waits = under_test.step(submitted("b", ttft_slo_s=0.01), 0.1)
    assert (batches(waits), waits.wake_s) == ([], None)


def test_first_come_first_served_holds_whatever_a_short_first_one_waits_for() -> None:
    under_test = core(fill_tokens=1, small_batch_tokens=100, edges=EdgeRule.ADAPTIVE, queue_order=FCFS)
    fleet = [of_kind("w", "A", free=9000), *submitted("long", prompt_tokens=3000)]
    under_test.step(fleet, 0.0)
    under_test.step([of_kind("other", "B", free=9000)], 0.1)
    # Bound to the busy worker's weights, it waits for its place; what comes later does not go before it.
    events = [*resumed("a.2", fingerprint="A", ttft_slo_s=9.0), *submitted("b", prompt_tokens=1500, arrival_s=0.2)]
    assert batches(under_test.step(events, 0.2)) == []


def test_without_small_batches_all_wait_for_the_long_ones() -> None:
    under_test = core(fill_tokens=1)
    under_test.step([joined(free=9000), *submitted("long", prompt_tokens=1500)], 0.0)
    assert not batches(under_test.step(submitted("a", prompt_tokens=1), 0.1))


def prefill_steps(seconds_per_token: float) -> tuple[StepSample, ...]:
    """Enough steps of different sizes to learn a speed from."""
    return tuple(StepSample(prefill_tokens=n, duration_s=n * seconds_per_token) for n in range(20, 400, 20))


def test_time_limits_a_batch_to_its_tightest_ttft() -> None:
    under_test = core()
    under_test.step([joined(free=100_000), reported(free=100_000, total=100_000, steps=prefill_steps(0.01))], 0.0)
    events = submitted(*(f"r{i}" for i in range(10)), prompt_tokens=50, ttft_slo_s=1.7)
    # 50 tokens take 0.5 s each: three meet 1.7 s, a fourth would not, and no other batch may join them.
    (batch,) = batches(under_test.step(events, 0.0))
    assert (len(batch.request_ids), batch.limited_by) == (3, LimitedBy.TIME)


@pytest.mark.parametrize(("ttft_slo_s", "joining"), [(6.0, ("a",)), (4.1, ()), (1.0, ("a",))])
def test_a_batch_joins_the_end_of_another_one_if_both_are_soon_done_and_in_time(
    ttft_slo_s: float, joining: tuple[str, ...]
) -> None:
    under_test = core(fill_tokens=100)
    steps = prefill_steps(0.001)
    under_test.step([joined(free=100_000), reported(free=100_000, total=100_000, steps=steps)], 0.0)
    under_test.step(submitted("long", prompt_tokens=400, ttft_slo_s=ttft_slo_s), 0.0)
    assert not batches(under_test.step(submitted("a", "b", prompt_tokens=80, ttft_slo_s=30.0), 0.1))
    # 60 tokens are left of it: with one of 80 the worker is done in 0.14 s, with two in 0.22 s. What is late, waits.
    left = reported(free=99_000, total=100_000, last_assignment=1, num_waiting=1, waiting_prefill_tokens=60)
    found = [batch.request_ids for batch in batches(under_test.step([left], 4.0))]
    assert found == ([joining] if joining else [])
    assert not batches(under_test.step([], 4.02))


def test_least_slack_first_and_batch_class_last() -> None:
    under_test = core()
    under_test.step(submitted("relaxed", ttft_slo_s=5.0), 0.0)
    under_test.step(submitted("urgent", ttft_slo_s=0.5, arrival_s=1.0), 1.0)
    under_test.step(submitted("batch", request_class=RequestClass.BATCH), 1.0)
    formed = batches(under_test.step([joined()], 1.0))
    assert [batch.request_ids for batch in formed] == [("urgent", "relaxed"), ("batch",)]


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


def of_kind(name: str, fingerprint: str, **more) -> WorkerJoined:
    tokenizer = more.pop("tokenizer", "")
    return replace(joined(name, **more), fingerprint=fingerprint, tokenizer=tokenizer)


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


def test_an_empty_worker_may_be_filled_by_one_request() -> None:
    under_test = core()
    (batch,) = batches(under_test.step([joined(free=100), *submitted("a", max_new_tokens=90)], 0.0))
    assert batch.reserved_kv_tokens == 100


def test_what_no_worker_could_ever_hold_waits_for_one_and_ends() -> None:
    under_test = core()
    under_test.step(submitted("large", prompt_tokens=500), 0.0)
    assert under_test.step([joined(free=100)], 1.0).drops == ()
    # It is late from here on, and in nobody's way.
    assert batches(under_test.step(submitted("small"), 3.0))[0].request_ids == ("small",)
    assert under_test.step([], 3.0 + PATIENCE_S - 1).drops == ()
    assert under_test.step([], 3.0 + PATIENCE_S + 1).drops == (Drop(RequestId("large"), DropReason.TOO_LARGE),)


def test_a_late_large_request_is_not_starved_by_small_ones() -> None:
    under_test = core(edges=EdgeRule.ADAPTIVE, fill_tokens=10_000)
    under_test.step([joined(free=1000), *submitted("holder", max_new_tokens=400)], 0.0)
    under_test.step(submitted("large", prompt_tokens=700, max_new_tokens=100), 0.0)
    early = under_test.step([reported(free=590, total=1000, last_assignment=1), *submitted("s1", arrival_s=0.1)], 0.1)
    assert [batch.request_ids for batch in batches(early)] == [("s1",)]
    # Past its TTFT the large one gives way to those in time, until its lane is owed its share ...
    late = under_test.step([reported(free=570, total=1000, last_assignment=2), *submitted("s2", arrival_s=5.0)], 5.0)
    assert [batch.request_ids for batch in batches(late)] == [("s2",)]
    # ... and the worker is saved for it.
    saved = under_test.step([reported(free=550, total=1000, last_assignment=3), *submitted("s3", arrival_s=5.1)], 5.1)
    assert batches(saved) == []
    ends = [finished(name) for name in ("holder", "s1", "s2")]
    done = under_test.step([*ends, reported(last_assignment=3)], 6.0)
    assert [batch.request_ids for batch in batches(done)] == [("large",), ("s3",)]


def test_batches_are_cut_from_one_bucket() -> None:
    under_test = core(edges=EdgeRule.ADAPTIVE)
    events = [*submitted("a", "b"), *submitted("long", prompt_tokens=700), joined(free=4000)]
    short, long = batches(under_test.step(events, 0.0))
    assert (short.request_ids, long.request_ids) == (("a", "b"), ("long",))
    assert short.bucket.high <= long.bucket.low <= 700 < long.bucket.high


def test_adaptive_edges_follow_the_arrivals() -> None:
    under_test = core(edges=EdgeRule.ADAPTIVE)
    under_test.step([joined(free=4000, max_sequences=1)], 0.0)
    edges = None
    for i in range(200):
        lengths = (20, 30, 2000, 2200)
        decision = under_test.step(submitted(f"r{i}", prompt_tokens=lengths[i % 4], arrival_s=i / 50), i / 50)
        for command in decision.commands:
            if isinstance(command, ChangeEdges):
                edges = command.edges
    assert edges is not None
    assert edges[-1] == 4097
    # Short and long ones are apart, and nothing splits the gap between them twice.
    assert any(30 < edge <= 2000 for edge in edges)
    assert sum(60 < edge <= 1900 for edge in edges) <= 1


def test_a_restored_core_goes_on() -> None:
    under_test = core()
    running = a_request("runs")
    under_test.restore(parked=[a_request("waits")], running={running: W}, edges=(), outputs={})
    decision = under_test.step([joined(running=(at("runs"),), free=980, total=1000), *resumed("waits")], 0.0)
    assert decision.drops == ()
    assert [batch.request_ids for batch in batches(decision)] == [("waits",)]
    assert forgotten(under_test.step([finished("runs")], 1.0)) == ["runs"]


def test_a_worker_whose_memory_has_shrunk_is_kept_for_nobody_who_needs_more() -> None:
    under_test = core(batch_patience_s=1.0, deferred_share=0.5)
    [busy] = batches(under_test.step([joined(free=1000), *submitted("busy", prompt_tokens=600)], 0.0))
    under_test.step(submitted("large", prompt_tokens=900, request_class=RequestClass.BATCH), 0.1)
    [first] = batches(under_test.step(submitted("first", arrival_s=10.0), 10.0))
    # From now on the worker is kept for the large one.
    assert batches(under_test.step(submitted("small", arrival_s=10.0), 10.0)) == []
    # Out of memory: its budget is a step smaller from now on, and it is empty.
    smaller = reported(free=800, total=800, last_assignment=first.assignment)
    ends = [finished("busy", assignment=busy.assignment), finished("first", assignment=first.assignment)]
    [small] = batches(under_test.step([*ends, smaller], 10.1))
    assert small.request_ids == ("small",)
    as_before = reported(last_assignment=small.assignment)
    [large] = batches(under_test.step([finished("small", assignment=small.assignment), as_before], 10.2))
    assert large.request_ids == ("large",)


def test_a_batch_heeds_the_tpot_of_what_decodes_and_no_target_that_nobody_could_keep() -> None:
    # A decode step takes a millisecond for each sequence.
    steps = [StepSample(decode_sequences=n, duration_s=0.001 * n) for n in range(1, 60)]
    for promised, most in ((0.0055, 4), (None, 40), (0.0005, 40)):
        under_test = core(is_time_aware=True)
        under_test.step([joined(free=100_000, total=100_000), reported(steps=tuple(steps * 5))], 0.0)
        [first] = batches(under_test.step(submitted("chat", prompt_tokens=10, tpot_slo_s=promised), 0.1))
        report = reported(free=99_000, total=100_000, num_running=1, last_assignment=first.assignment)
        under_test.step([prefilled(first), report], 0.2)
        decision = under_test.step(submitted(*(f"r{i}" for i in range(40)), prompt_tokens=10), 0.3)
        assert abs(len(batches(decision)[0].request_ids) - most) <= 1, promised
