"""What the random worlds of tests/property/core have found, on literal events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bucketserve.core.messages import (
    BatchPrefilled,
    CancelAtWorker,
    Command,
    Decision,
    DispatchBatch,
    DispatchFailed,
    Drop,
    DropReason,
    Event,
    ForgetRequest,
    KvPulled,
    PlaceRequest,
    PullKv,
    RefuseReason,
    RefuseRequest,
    RequestCancelled,
    RequestFinished,
    RequestResumed,
    RequestSubmitted,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
)
from bucketserve.core.patience import PATIENCE_S, REJOIN_S
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, EdgeRule, QueueOrder
from bucketserve.core.types import FinishReason, RequestId, WorkerId, WorkerRole
from tests.builders import a_request, at, finished, joined, reported

pytestmark = pytest.mark.usefixtures("all_that_may_be_is_expected")

A = RequestId("a")
BOTH, PREFILL, DECODE = WorkerRole.BOTH, WorkerRole.PREFILL, WorkerRole.DECODE


def core(**settings) -> SchedulerCore:
    return SchedulerCore(CoreSettings(**{"edges": EdgeRule.NONE, **settings}), 4096)


def worker(name: str, fingerprint: str = "", role: WorkerRole = BOTH, **more) -> WorkerJoined:
    tokenizer, context_tokens = more.pop("tokenizer", ""), more.pop("context_tokens", 4096)
    return replace(
        joined(name, **more),
        fingerprint=fingerprint,
        role=role,
        tokenizer=tokenizer,
        context_tokens=context_tokens,
    )


def submitted(name: str = "a", **more) -> RequestSubmitted:
    return RequestSubmitted(a_request(name, **more))


def resumed(name: str, **more) -> RequestResumed:
    return RequestResumed(a_request(name, is_resumed=True, **more))


def of_type(decision: Decision, kind: type[Command]) -> list:
    return [command for command in decision.commands if isinstance(command, kind)]


def sent(decision: Decision) -> list[tuple[str, tuple[str, ...]]]:
    return [(c.batch.worker_id, c.batch.request_ids) for c in of_type(decision, DispatchBatch)]


def held_at(name: str) -> BatchPrefilled:
    return BatchPrefilled(worker_id=WorkerId(name), assignment=1, request_ids=(A,), held=(A,))


def ended_at(name: str, reason: FinishReason) -> RequestFinished:
    return finished("a", name, reason=reason)


# --- who may serve whom -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [submitted(tokenizer="T2"), resumed("a", tokenizer="T2")])
def test_a_prompt_whose_tokenizer_has_gone_ends(event: Event) -> None:
    under_test = core()
    # Admitted while nobody is here to say that there is no such tokenizer.
    under_test.step([event], 0.0)
    under_test.step([worker("w", tokenizer="T1")], 0.1)
    drops = [under_test.step([], 3.0 + i * (PATIENCE_S + 1)).drops for i in range(2)]
    assert drops == [(), (Drop(A, DropReason.NO_LIKE_WORKER),)]


def refusals(decision: Decision) -> list[RefuseReason]:
    return [command.reason for command in of_type(decision, RefuseRequest)]


@pytest.mark.parametrize("role", [None, DECODE])
def test_a_model_without_a_worker_waits_for_one_and_then_says_that_there_is_none(role: WorkerRole | None) -> None:
    under_test = core()
    others = [] if role is None else [worker("d", role=role)]
    assert under_test.step([*others, submitted("a"), resumed("b")], 1000.0).drops == ()
    assert under_test.step([submitted("c")], 1000.0 + PATIENCE_S - 0.1).drops == ()
    ended = under_test.step([submitted("d")], 1000.0 + PATIENCE_S).drops
    assert {drop.request_id for drop in ended} == {"a", "b", "c"}
    assert {drop.reason for drop in ended} == {DropReason.NO_WORKER}
    assert refusals(under_test.step([submitted("e")], 1001.0 + PATIENCE_S)) == [RefuseReason.NO_WORKER]
    assert under_test.status().num_waiting == 0
    # Once there is one it is as if nothing had been.
    found = under_test.step([worker("w"), submitted("f")], 2000.0)
    assert not refusals(found) and not found.drops
    assert sent(found) == [("w", ("f",))]


def test_a_worker_that_leaves_is_nobody_for_what_is_new_and_somebody_for_what_it_began() -> None:
    under_test = core()
    busy = worker("w", "A", free=0, total=1000)
    under_test.step([busy, resumed("a", fingerprint="A"), submitted("b")], 0.0)
    under_test.step([WorkerDraining(WorkerId("w"))], 100.0)
    ended = under_test.step([submitted("c")], 100.0 + PATIENCE_S)
    assert ended.drops == (Drop(RequestId("b"), DropReason.NO_WORKER),)
    assert refusals(ended) == [RefuseReason.NO_WORKER]
    found = under_test.step([reported("w", free=1000)], 200.0)
    assert sent(found) == [("w", ("a",))]
    assert not found.drops


def test_patience_with_a_model_begins_when_its_last_worker_leaves() -> None:
    under_test = core()
    under_test.step([worker("w"), worker("v")], 0.0)
    under_test.step([WorkerLost(WorkerId("w"))], 100.0)
    under_test.step([WorkerLost(WorkerId("v")), submitted("a")], 200.0)
    assert under_test.step([], 199.9 + PATIENCE_S).drops == ()
    # With whoever comes before that is over it begins anew.
    under_test.step([worker("u", free=0)], 199.95 + PATIENCE_S)
    gone_s = 300.0
    under_test.step([WorkerLost(WorkerId("u")), submitted("b")], gone_s)
    assert not refusals(under_test.step([submitted("c")], gone_s + PATIENCE_S - 0.1))
    assert under_test.status().num_waiting == 3
    assert len(under_test.step([], gone_s + PATIENCE_S).drops) == 3


def test_a_bound_request_ends_while_its_like_only_decode() -> None:
    under_test = core()
    under_test.step([worker("w", "B"), worker("d", "A", DECODE), resumed("a", fingerprint="A")], 0.0)
    assert under_test.step([], PATIENCE_S + 1).drops == (Drop(A, DropReason.NO_LIKE_WORKER),)


@pytest.mark.parametrize(("waited_s", "left_s"), [(0.0, PATIENCE_S), (5.0, PATIENCE_S - 5.0), (PATIENCE_S, REJOIN_S)])
def test_how_long_its_weights_are_waited_for_does_not_begin_anew_with_each_leader(
    waited_s: float, left_s: float
) -> None:
    under_test, now_s = core(), 1000.0
    again = resumed("a", fingerprint="A", attempt_s=now_s - waited_s)
    assert under_test.step([worker("w", "B"), again], now_s).drops == ()
    # One that waits for less time does not hold it up.
    under_test.step([resumed("b", fingerprint="A", attempt_s=now_s)], now_s)
    assert under_test.step([], now_s + left_s - 0.1).drops == ()
    assert Drop(A, DropReason.NO_LIKE_WORKER) in under_test.step([], now_s + left_s + 0.1).drops


@pytest.mark.parametrize(("waited_s", "left_s"), [(0.0, PATIENCE_S), (5.0, PATIENCE_S - 5.0), (PATIENCE_S, REJOIN_S)])
def test_how_long_a_decode_worker_is_waited_for_does_not_begin_anew_either(waited_s: float, left_s: float) -> None:
    under_test, now_s = core(), 1000.0
    under_test.restore(parked=[], running={a_request("a"): WorkerId("p")}, edges=(), outputs={})
    holder = worker("p", role=PREFILL, running=(at("a", is_held=True, held_s=waited_s),))
    assert under_test.step([holder], now_s).drops == ()
    assert under_test.step([], now_s + left_s - 0.1).drops == ()
    assert under_test.step([], now_s + left_s + 0.1).drops == (Drop(A, DropReason.NO_LIKE_WORKER),)


def test_what_waited_long_in_the_queue_has_all_patience_when_its_weights_go() -> None:
    under_test, now_s = core(), 1000.0
    again = resumed("a", fingerprint="A", attempt_s=now_s - 2 * PATIENCE_S)
    under_test.step([worker("w", "A", free=0, total=1000), again], now_s)
    under_test.step([WorkerLost(WorkerId("w")), worker("v", "B")], now_s + 1.0)
    assert under_test.step([], now_s + PATIENCE_S).drops == ()
    assert under_test.step([], now_s + PATIENCE_S + 2.0).drops == (Drop(A, DropReason.NO_LIKE_WORKER),)


def test_a_request_that_only_workers_of_another_kind_could_hold_ends() -> None:
    under_test = core()
    fleet = [worker("small", "A", free=100), worker("large", "B", free=4000)]
    assert under_test.step([*fleet, resumed("a", prompt_tokens=500, fingerprint="A")], 0.1).drops == ()
    assert under_test.step([], PATIENCE_S + 1).drops == (Drop(A, DropReason.TOO_LARGE),)
    fleet = [worker("small", tokenizer="T1", free=100), worker("large", tokenizer="T2", free=4000)]
    decision = core().step([*fleet, submitted(prompt_tokens=500, tokenizer="T1")], 0.0)
    assert of_type(decision, RefuseRequest) == [RefuseRequest(A, RefuseReason.TOO_LARGE, 0.0)]


def test_a_resumption_that_only_the_lost_worker_could_hold_waits_for_it() -> None:
    under_test = core()
    under_test.step([worker("small", free=500), resumed("a", prompt_tokens=2000)], 100.0)
    # A newcomer does not wait behind it.
    assert sent(under_test.step([submitted("b")], 100.1)) == [("small", ("b",))]
    assert sent(under_test.step([worker("large", free=4000)], 110.0)) == [("large", ("a",))]


def test_a_bound_request_finds_its_like_behind_many_idle_others() -> None:
    under_test = core()
    others = [worker(f"n{number:02}", "B", free=10_000) for number in range(20)]
    like = worker("old", "A", free=4000, total=10_000, num_running=5)
    assert sent(under_test.step([*others, like, resumed("a", fingerprint="A")], 0.0)) == [("old", ("a",))]


def test_what_is_held_after_a_takeover_waits_for_the_decode_side() -> None:
    under_test = core()
    under_test.restore(parked=[], running={a_request("a", 100, 300, 5000.0): WorkerId("p")}, edges=(), outputs={})
    held = worker("p", role=PREFILL, free=500, running=(at("a", is_held=True),))
    other = worker("small", role=DECODE, free=10)
    assert under_test.step([held, other], 5000.2).drops == ()
    pulls = of_type(under_test.step([worker("d", role=DECODE, free=500)], 5010.0), PullKv)
    assert [pull.target_id for pull in pulls] == ["d"]


def test_patience_with_what_is_held_begins_when_its_decoder_has_gone() -> None:
    under_test = core()
    fleet = [worker("p", role=PREFILL), worker("d", role=DECODE, free=100, total=500)]
    under_test.step([*fleet, submitted(prompt_tokens=200)], 0.0)
    under_test.step([held_at("p")], 0.2)
    # It waited for room in the only decoder for longer than anybody has patience.
    late_s = 2 * PATIENCE_S
    assert under_test.step([WorkerLost(WorkerId("d"))], late_s).drops == ()
    assert under_test.step([], late_s + PATIENCE_S - 1).drops == ()
    assert under_test.step([], late_s + PATIENCE_S + 1).drops == (Drop(A, DropReason.NO_LIKE_WORKER),)


def test_a_full_decode_side_of_some_weights_holds_no_others_back() -> None:
    under_test = core()
    requests = {name: a_request(name, 100, 300, arrival_s) for arrival_s, name in enumerate("abc")}
    sources = {"a": "p1", "b": "p1", "c": "p2"}
    running = {requests[name]: WorkerId(source) for name, source in sources.items()}
    under_test.restore(parked=[], running=running, edges=(), outputs={})
    fleet = [
        worker("p1", "A", PREFILL, running=(at("a", is_held=True), at("b", is_held=True))),
        worker("p2", "B", PREFILL, running=(at("c", is_held=True),)),
        worker("d1", "A", DECODE, free=450),
        worker("d2", "B", DECODE),
    ]
    pulls = of_type(under_test.step(fleet, 4.0), PullKv)
    assert [(pull.request_id, pull.target_id) for pull in pulls] == [("a", "d1"), ("c", "d2")]


@pytest.mark.parametrize("order", QueueOrder)
def test_a_worker_to_avoid_is_taken_where_the_others_could_never_serve(order: QueueOrder) -> None:
    avoid = frozenset({WorkerId("old")})
    for other in (
        worker("other", "B", free=1000),
        worker("other", "A", free=1000, tokenizer="T2"),
        worker("other", "A", free=15),
        worker("other", "A", free=1000, context_tokens=15),
    ):
        under_test = core(queue_order=order)
        bound = resumed("a", fingerprint="A", tokenizer="T1", avoid=avoid)
        assert sent(under_test.step([worker("old", "A", tokenizer="T1"), other, bound], 0.0)) == [("old", ("a",))]


def test_a_batch_has_nothing_beyond_its_worker_s_context() -> None:
    under_test = core()
    events = [worker("w", free=4000, context_tokens=512), worker("large", context_tokens=4096, free=600)]
    under_test.step([*events, WorkerDraining(WorkerId("large"))], 0.0)
    decision = under_test.step([submitted("a", prompt_tokens=500), submitted("b", prompt_tokens=510)], 0.1)
    assert sent(decision) == [("w", ("a",))]


def test_workers_that_do_both_take_over_what_is_held_whoever_else_decodes() -> None:
    under_test = core()
    under_test.step([worker("p", "A", PREFILL), worker("gone", "A", DECODE), submitted()], 0.0)
    under_test.step([WorkerLost(WorkerId("gone")), worker("b", "A"), worker("d", "B", DECODE)], 0.1)
    pulls = of_type(under_test.step([held_at("p")], 0.2), PullKv)
    assert [(pull.source_id, pull.target_id) for pull in pulls] == [("p", "b")]


# --- what waits for its like ------------------------------------------------------------------------------------


def test_what_its_worker_brings_back_is_not_queued_beside_that() -> None:
    under_test = core()
    under_test.step([worker("other", "B"), resumed("a", fingerprint="A")], 0.0)
    decision = under_test.step([worker("w", "A", running=(at("a"),))], 0.1)
    assert of_type(decision, PlaceRequest) == [PlaceRequest(A, WorkerId("w"))]
    assert sent(decision) == []
    assert (under_test.status().num_waiting, under_test.status().num_running) == (0, 1)


def test_what_waits_for_its_like_has_its_deadline_too() -> None:
    under_test = core()
    decision = under_test.step([worker("w", "B"), resumed("a", fingerprint="A", deadline_s=5.0)], 0.0)
    assert decision.wake_s == 5.0
    assert under_test.step([], 5.0).drops == (Drop(A, DropReason.DEADLINE),)


def test_what_is_said_again_counts_from_then_on_and_not_what_a_store_knew() -> None:
    under_test = core()
    under_test.restore(parked=[a_request("a", arrival_s=9.0, fingerprint="A")], running={}, edges=(), outputs={})
    under_test.step([worker("w", "B"), resumed("a", fingerprint="A", deadline_s=50.0)], 9.0)
    assert sent(under_test.step([worker("like", "A")], 10.0)) == [("like", ("a",))]
    assert Drop(A, DropReason.DEADLINE) in under_test.step([], 50.0).drops


# --- cancelled, and nobody heard it -----------------------------------------------------------------------------


def test_a_cancellation_is_said_again_to_a_worker_that_was_away() -> None:
    under_test = core()
    under_test.step([worker("w"), submitted()], 0.0)
    under_test.step([WorkerDraining(WorkerId("w")), RequestCancelled(A)], 0.1)
    decision = under_test.step([worker("w", running=(at("a"),))], 0.2)
    assert decision.commands == (CancelAtWorker(WorkerId("w"), A),)
    under_test = core()
    under_test.restore(parked=[], running={a_request("a"): WorkerId("w")}, edges=(), outputs={})
    under_test.step([RequestCancelled(A)], 0.1)
    decision = under_test.step([worker("w", running=(at("a"),))], 0.2)
    assert decision.commands == (CancelAtWorker(WorkerId("w"), A),)


def test_what_is_cancelled_before_it_was_known_not_to_be_sent_ends() -> None:
    under_test = core()
    under_test.step([worker("w"), submitted()], 0.0)
    under_test.step([RequestCancelled(A)], 0.1)
    decision = under_test.step([DispatchFailed(worker_id=WorkerId("w"), request_ids=(A,))], 0.2)
    assert (sent(decision), decision.drops) == ([], (Drop(A, DropReason.CANCELLED),))


@pytest.mark.parametrize("end", [WorkerLost(WorkerId("p")), ended_at("p", FinishReason.ERROR)])
def test_what_was_cancelled_is_not_said_to_be_lost(end: Event) -> None:
    under_test = core()
    under_test.step([worker("p"), submitted()], 0.0)
    assert under_test.step([RequestCancelled(A), end], 0.1).drops == (Drop(A, DropReason.CANCELLED),)


def test_what_is_cancelled_is_not_pulled() -> None:
    under_test = core()
    under_test.step([worker("p", role=PREFILL), submitted()], 0.0)
    under_test.step([held_at("p"), RequestCancelled(A)], 0.1)
    assert of_type(under_test.step([worker("d", role=DECODE)], 0.2), PullKv) == []


def test_what_its_source_ended_its_target_stops_to_pull() -> None:
    under_test = core()
    under_test.step([worker("p", role=PREFILL), worker("d", role=DECODE), submitted()], 0.0)
    assert of_type(under_test.step([held_at("p")], 0.1), PullKv)
    decision = under_test.step([ended_at("p", FinishReason.CANCELLED)], 0.2)
    assert CancelAtWorker(WorkerId("d"), A) in decision.commands


def test_a_worker_that_comes_back_with_what_it_was_to_pull_from_itself_is_told_again() -> None:
    under_test = core()
    under_test.step([worker("w", role=PREFILL), submitted()], 0.0)
    under_test.step([held_at("w")], 0.1)
    # It does both now, and so it is to take over what it holds; the order is lost with its stream.
    again = worker("w", running=(at("a", is_held=True),))
    for now_s in (0.2, 0.3):
        (pull,) = of_type(under_test.step([again], now_s), PullKv)
        assert (pull.source_id, pull.target_id) == ("w", "w")
    pulled = KvPulled(request_id=A, target_id=WorkerId("w"), assignment=pull.assignment, is_ok=True)
    assert under_test.step([pulled], 0.4).drops == ()
    assert under_test.status().num_running == 1


def test_a_batch_of_which_nothing_was_sent_leaves_no_trace() -> None:
    under_test = core()
    under_test.step([worker("w"), submitted()], 0.0)
    under_test.step([RequestCancelled(A), DispatchFailed(worker_id=WorkerId("w"), request_ids=(A,))], 0.1)
    (known,) = under_test._fleet
    assert not known.unaccounted


# --- two lives of one request -----------------------------------------------------------------------------------


def test_what_is_late_of_an_older_life_says_nothing_about_the_newer_one() -> None:
    under_test = core()
    # Nobody here knows of it: the store has lost its ticket. Then its gateway says it again.
    decision = under_test.step([worker("w", running=(at("a", assignment=4),))], 0.0)
    assert decision.commands == (CancelAtWorker(WorkerId("w"), A),)
    (batch,) = [c.batch for c in of_type(under_test.step([RequestResumed(a_request("a"))], 0.1), DispatchBatch)]
    # The worker's orders count on from the last one that it had.
    assert batch.assignment == 5
    late = [
        BatchPrefilled(worker_id=WorkerId("w"), assignment=4, request_ids=(A,), held=(A,)),
        finished("a", assignment=4, reason=FinishReason.CANCELLED),
        finished("a", assignment=4, reason=FinishReason.ERROR),
    ]
    assert under_test.step(late, 0.2) == Decision()
    assert of_type(under_test.step([finished("a", assignment=5)], 0.3), ForgetRequest) == [ForgetRequest(A)]


def test_a_worker_that_is_back_with_an_older_life_has_lost_the_newer_one() -> None:
    under_test = core()
    under_test.step([worker("w", running=(at("a", assignment=4),))], 0.0)
    assert sent(under_test.step([RequestResumed(a_request("a"))], 0.1)) == [("w", ("a",))]
    # The batch was lost with the stream, as was the order to stop the older life.
    decision = under_test.step([worker("w", running=(at("a", assignment=4),))], 0.2)
    assert decision.drops == (Drop(A, DropReason.WORKER_LOST),)
    assert decision.commands == (CancelAtWorker(WorkerId("w"), A),)
    assert under_test.status().num_running == 0


def test_a_decode_worker_that_is_back_with_an_older_life_has_not_pulled_the_newer_one() -> None:
    under_test = core()
    under_test.step([worker("p", role=PREFILL), worker("d", role=DECODE, last_assignment=6), submitted()], 0.0)
    (pull,) = of_type(under_test.step([held_at("p")], 0.1), PullKv)
    assert pull.assignment == 7
    back = worker("d", role=DECODE, running=(at("a", assignment=3),), last_assignment=6)
    decision = under_test.step([back], 0.2)
    assert decision.drops == (Drop(A, DropReason.WORKER_LOST),)
    assert set(decision.commands) == {CancelAtWorker(WorkerId("p"), A), CancelAtWorker(WorkerId("d"), A)}


def test_a_new_leader_believes_the_worker_that_its_store_names() -> None:
    under_test = core()
    under_test.restore(parked=[], running={a_request("a"): WorkerId("w")}, edges=(), outputs={})
    assert under_test.step([worker("w", running=(at("a", assignment=9),))], 0.0) == Decision()
    assert under_test.step([finished("a", assignment=8)], 0.1) == Decision()
    assert of_type(under_test.step([finished("a", assignment=9)], 0.2), ForgetRequest) == [ForgetRequest(A)]
