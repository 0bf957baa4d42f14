"""Prefill and decode on different workers, on literal events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from bucketserve.core.messages import (
    BatchPrefilled,
    CancelAtWorker,
    Command,
    DispatchBatch,
    Drop,
    DropReason,
    ForgetRequest,
    KvPulled,
    PlaceRequest,
    PreemptAtWorker,
    PullKv,
    RefuseReason,
    RefuseRequest,
    ReleaseKv,
    RequestCancelled,
    RequestResumed,
    RequestSubmitted,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
)
from bucketserve.core.patience import PULL_S
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, EdgeRule, QueueOrder
from bucketserve.core.types import Batch, FinishReason, RequestClass, RequestId, WorkerId, WorkerRole
from tests.builders import a_request, at, finished, joined, reported

pytestmark = pytest.mark.usefixtures("all_that_may_be_is_expected")

P, D = WorkerId("p"), WorkerId("d")
BATCH, INTERACTIVE = RequestClass.BATCH, RequestClass.INTERACTIVE


def world(decode_tokens: int = 1000) -> SchedulerCore:
    core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE), 4096)
    prefill = replace(joined("p", free=500), role=WorkerRole.PREFILL)
    decode = replace(joined("d", free=decode_tokens), role=WorkerRole.DECODE)
    core.step([prefill, decode], 0.0)
    return core


def start(
    core: SchedulerCore, *names: str, prompt: int = 100, output: int = 300, now_s: float = 0.1, **more
) -> list[Batch]:
    events = [RequestSubmitted(a_request(name, prompt, output, now_s, **more)) for name in names]
    return [c.batch for c in core.step(events, now_s).commands if isinstance(c, DispatchBatch)]


def prefilled(batch: Batch) -> BatchPrefilled:
    ids = batch.request_ids
    return BatchPrefilled(worker_id=P, assignment=batch.assignment, request_ids=ids, held=ids)


def moved(name: str, assignment: int = 1, *, is_ok: bool = True) -> KvPulled:
    return KvPulled(request_id=RequestId(name), target_id=D, assignment=assignment, is_ok=is_ok)


def test_prompts_are_computed_on_one_worker_and_go_on_at_the_other() -> None:
    core = world()
    (batch,) = start(core, "a", "b", "c", "d")
    # The prefill worker reserves prompts only: 400 of 450 safe tokens, though the outputs are three times as long.
    assert (batch.worker_id, len(batch.request_ids)) == (P, 4)
    moves = [c for c in core.step([prefilled(batch)], 0.2).commands if isinstance(c, PullKv)]
    # The decode worker has 900 safe tokens: two requests of 400. The rest stays where it is.
    assert [(m.request_id, m.source_id, m.target_id) for m in moves] == [("a", P, D), ("b", P, D)]
    assert not [c for c in core.step([reported("d", free=1000)], 0.3).commands if isinstance(c, PullKv)]
    core.step([moved("a"), moved("b", 2), reported("d", free=200, num_running=2)], 0.4)
    done = finished("a", "d", output_tokens=300)
    later = core.step([done, reported("d", free=600, num_running=1)], 0.5)
    assert ForgetRequest(RequestId("a")) in later.commands
    assert [c.request_id for c in later.commands if isinstance(c, PullKv)] == ["c"]


def test_a_transfer_that_nobody_says_the_end_of_ends_the_attempt() -> None:
    core = world()
    (batch,) = start(core, "a")
    decision = core.step([prefilled(batch)], 0.2)
    assert decision.wake_s == 0.2 + PULL_S
    # Its worker is here and reports, as if it had never been told.
    assert core.step([reported("d", free=1000)], 0.2 + PULL_S - 1).drops == ()
    late = core.step([], 0.2 + PULL_S)
    assert late.drops == (Drop(RequestId("a"), DropReason.WORKER_FAILED),)
    assert {c.worker_id for c in late.commands if isinstance(c, CancelAtWorker)} == {P, D}
    # An answer that comes after all is about nothing, and the next attempt finds all of the room.
    assert core.step([moved("a")], 0.3 + PULL_S).commands == ()
    assert len(start(core, "b", now_s=1.0 + PULL_S)) == 1


def test_only_the_last_order_to_pull_is_waited_for() -> None:
    core = world()
    (batch,) = start(core, "a")
    core.step([prefilled(batch)], 0.2)
    core.step([moved("a")], 0.4)
    assert core.step([], 0.3 + PULL_S).drops == ()
    assert core.step([finished("a", "d", output_tokens=300)], 0.4 + PULL_S).wake_s is None


def test_a_failed_transfer_ends_the_attempt_on_both_sides() -> None:
    core = world()
    (batch,) = start(core, "a")
    core.step([prefilled(batch)], 0.2)
    decision = core.step([moved("a", is_ok=False)], 0.3)
    assert decision.drops == (Drop(RequestId("a"), DropReason.WORKER_FAILED),)
    # Room is free again: the next attempt goes through.
    again = core.step([RequestResumed(a_request("a.2", 100, 800, 0.4, is_resumed=True))], 0.4)
    assert [c.batch.request_ids for c in again.commands if isinstance(c, DispatchBatch)] == [("a.2",)]


def test_losing_either_side_while_kv_moves_drops_the_request_and_stops_the_other() -> None:
    for lost, other in ((P, D), (D, P)):
        core = world()
        (batch,) = start(core, "a")
        core.step([prefilled(batch)], 0.2)
        decision = core.step([WorkerLost(lost)], 0.3)
        assert decision.drops == (Drop(RequestId("a"), DropReason.WORKER_LOST),)
        assert CancelAtWorker(other, RequestId("a")) in decision.commands
        assert CancelAtWorker(lost, RequestId("a")) not in decision.commands


def test_cancelling_while_kv_moves_reaches_both_sides() -> None:
    core = world()
    (batch,) = start(core, "a")
    core.step([prefilled(batch)], 0.2)
    decision = core.step([RequestCancelled(RequestId("a"))], 0.3)
    assert set(decision.commands) == {CancelAtWorker(P, RequestId("a")), CancelAtWorker(D, RequestId("a"))}


def test_a_request_too_large_for_any_decode_worker_is_refused() -> None:
    core = world(decode_tokens=200)
    decision = core.step([RequestSubmitted(a_request("a", 100, 300))], 0.1)
    assert [command.reason.value for command in decision.commands] == ["too_large"]


def test_the_store_hears_where_a_request_decodes_now() -> None:
    core = world()
    (batch,) = start(core, "a")
    core.step([prefilled(batch)], 0.2)
    # And its old worker that nobody needs the KV there any more.
    told = (PlaceRequest(RequestId("a"), D), ReleaseKv(P, RequestId("a")))
    assert core.step([moved("a")], 0.3).commands == told


def a_new_leader(worker_id: WorkerId) -> SchedulerCore:
    core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE), 4096)
    core.restore(parked=[], running={a_request("a", 100, 300, 0.0): worker_id}, edges=(), outputs={})
    return core


def test_a_new_leader_hands_over_what_a_worker_says_it_holds() -> None:
    core = a_new_leader(P)
    holder = replace(joined("p", running=(at("a", is_held=True),)), role=WorkerRole.PREFILL)
    decision = core.step([holder, replace(joined("d"), role=WorkerRole.DECODE)], 0.1)
    assert [c for c in decision.commands if isinstance(c, PullKv)] == [
        PullKv(request_id=RequestId("a"), source_id=P, target_id=D, assignment=1)
    ]
    assert not decision.drops


def test_a_request_that_moved_while_nobody_led_is_believed_to_be_where_it_says() -> None:
    core = a_new_leader(P)
    decode = replace(joined("d", running=(at("a"),)), role=WorkerRole.DECODE)
    assert core.step([decode], 0.1).commands == (PlaceRequest(RequestId("a"), D),)
    # The worker that held it comes later and knows nothing of it any more: that is as it should be.
    assert not core.step([replace(joined("p"), role=WorkerRole.PREFILL)], 0.2).drops
    done = finished("a", "d", output_tokens=300)
    assert ForgetRequest(RequestId("a")) in core.step([done], 0.3).commands


@pytest.mark.parametrize("is_at_once", [True, False])
def test_whoever_has_pulled_what_another_still_holds_goes_on(is_at_once: bool) -> None:
    core = a_new_leader(P)
    holder = replace(joined("p", running=(at("a", is_held=True),)), role=WorkerRole.PREFILL)
    taker = replace(joined("d", running=(at("a"),)), role=WorkerRole.DECODE)
    other = replace(joined("e"), role=WorkerRole.DECODE)
    steps = [[holder, taker, other]] if is_at_once else [[holder], [taker, other]]
    commands = [c for number, events in enumerate(steps) for c in core.step(events, 0.1 * number).commands]
    assert set(commands) == {PlaceRequest(RequestId("a"), D), ReleaseKv(P, RequestId("a"))}
    done = finished("a", "d", output_tokens=300)
    assert ForgetRequest(RequestId("a")) in core.step([done], 0.3).commands
    assert core.status().num_running == 0


def test_a_run_of_an_older_attempt_is_stopped_not_believed() -> None:
    core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE), 4096)
    core.restore(parked=[], running={a_request("a.2", 100, 300, 0.0): P}, edges=(), outputs={})
    decode = replace(joined("d", running=(at("a.1"),)), role=WorkerRole.DECODE)
    assert core.step([decode], 0.1).commands == (CancelAtWorker(D, RequestId("a.1")),)


def test_one_that_only_a_decoder_that_left_could_hold_does_not_stop_those_behind_it() -> None:
    core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE, fill_tokens=10_000), 4096)
    small, large = joined("small", free=500), joined("d", free=2000)
    core.step([replace(joined("p", free=3000), role=WorkerRole.PREFILL)], 0.0)
    core.step([replace(worker, role=WorkerRole.DECODE) for worker in (small, large)], 0.0)
    (batch,) = start(core, "large", prompt=200, output=1000)
    (others,) = start(core, "a", "b", now_s=0.2)
    core.step([WorkerLost(D)], 0.3)
    pulls = [c for c in core.step([prefilled(batch), prefilled(others)], 0.4).commands if isinstance(c, PullKv)]
    assert [(pull.request_id, pull.target_id) for pull in pulls] == [("a", "small")]
    # It goes on when there is one again, or ends after a while: its KV is not held for ever.
    again = core.step([replace(joined("d2", free=2000), role=WorkerRole.DECODE)], 10.0)
    assert {c.request_id for c in again.commands if isinstance(c, PullKv)} == {"large", "b"}
    core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE), 4096)
    core.step([replace(joined("p", free=3000), role=WorkerRole.PREFILL)], 0.0)
    core.step([replace(large, role=WorkerRole.DECODE)], 0.0)
    (batch,) = start(core, "large", prompt=200, output=1000)
    core.step([WorkerLost(D), replace(small, role=WorkerRole.DECODE), prefilled(batch)], 1.0)
    assert not core.step([], 30.0).drops
    assert core.step([], 32.0).drops == (Drop(RequestId("large"), DropReason.TOO_LARGE),)


def test_a_run_that_the_store_forgot_goes_on_where_it_is() -> None:
    core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE), 4096)
    core.step([RequestSubmitted(a_request("a", 100, 300, 0.0))], 0.0)
    decision = core.step([joined("w", running=(at("a"),))], 0.1)
    assert decision.commands == (PlaceRequest(RequestId("a"), WorkerId("w")),)
    assert core.status().num_waiting == 0


def test_a_request_waits_while_the_other_half_is_away_and_is_refused_only_if_no_half_can_hold_it() -> None:
    core = world()
    (batch,) = start(core, "a", now_s=0.1)
    core.step([WorkerLost(D)], 0.2)
    held = core.step([prefilled(batch)], 0.3)
    assert not held.drops
    # What is new stays in the queue: nobody could go on with it.
    assert start(core, "b", now_s=0.3) == []
    back = core.step([replace(joined("d"), role=WorkerRole.DECODE)], 0.4)
    assert [c.request_id for c in back.commands if isinstance(c, PullKv)] == ["a"]
    assert [c.batch.request_ids for c in back.commands if isinstance(c, DispatchBatch)] == [("b",)]
    too_large = core.step([RequestSubmitted(a_request("c", 600, 10, 0.5))], 0.5)
    assert [c.reason for c in too_large.commands if isinstance(c, RefuseRequest)] == [RefuseReason.TOO_LARGE]


def test_a_transfer_whose_end_was_lost_with_the_stream_has_ended_all_the_same() -> None:
    core = world()
    (batch,) = start(core, "a")
    core.step([prefilled(batch)], 0.2)
    back = core.step([replace(joined("d", running=(at("a"),)), role=WorkerRole.DECODE)], 0.3)
    assert PlaceRequest(RequestId("a"), D) in back.commands
    assert ReleaseKv(P, RequestId("a")) in back.commands
    done = finished("a", "d", output_tokens=300)
    assert ForgetRequest(RequestId("a")) in core.step([done], 0.4).commands
    assert core.status().num_running == 0


def rejoined_for_both(core: SchedulerCore, free: int = 500) -> list[object]:
    """The prefill worker is one for everything now, and still holds the KV of a request."""
    held = replace(at("a"), is_held=True)
    event = replace(joined("p", free=free, total=free + 100, running=(held,)), role=WorkerRole.BOTH)
    return list(core.step([WorkerLost(D), event], 0.3).commands)


def test_what_a_prefill_worker_holds_goes_on_there_when_it_is_to_do_both() -> None:
    core = world()
    core.step([reported("d", free=0)], 0.05)
    (batch,) = start(core, "a", prompt=100, output=300)
    assert not [c for c in core.step([prefilled(batch)], 0.2).commands if isinstance(c, PullKv)]
    # Its prompt is there already: 300 tokens more are enough.
    assert PullKv(request_id=RequestId("a"), source_id=P, target_id=P, assignment=2) in rejoined_for_both(
        core, free=350
    )
    core.step([replace(moved("a", 2), target_id=P)], 0.4)
    done = finished("a", "p", 2, output_tokens=300)
    assert ForgetRequest(RequestId("a")) in core.step([done], 0.5).commands
    assert core.status().num_running == 0


def test_a_decode_worker_comes_before_those_that_do_both() -> None:
    core = world()
    (batch,) = start(core, "a")
    both = replace(joined("b", free=9000), role=WorkerRole.BOTH)
    (move,) = [c for c in core.step([both, prefilled(batch)], 0.2).commands if isinstance(c, PullKv)]
    assert move.target_id == D


def of(name: str, role: WorkerRole, fingerprint: str, free: int = 1000) -> WorkerJoined:
    return replace(joined(name, free=free), role=role, fingerprint=fingerprint)


def rolling(*more: WorkerJoined) -> SchedulerCore:
    """Prefill and decode workers of the old weights, and a prefill worker of the new ones."""
    core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE, fill_tokens=10_000), 4096)
    old = [of("p", WorkerRole.PREFILL, "old"), of("d", WorkerRole.DECODE, "old")]
    core.step([*old, of("p2", WorkerRole.PREFILL, "new"), *more], 0.0)
    return core


def workers_of(batches: list[Batch]) -> set[str]:
    return {batch.worker_id for batch in batches}


def test_new_weights_get_requests_only_when_one_of_them_decodes() -> None:
    core = rolling()
    assert workers_of(start(core, "a")) == {"p"}
    core.step([of("d2", WorkerRole.DECODE, "new")], 0.2)
    assert workers_of(start(core, "b", now_s=0.3)) == {"p2"}
    # One that leaves takes nothing over any more.
    core.step([WorkerDraining(WorkerId("d2"))], 0.4)
    assert workers_of(start(core, "c", now_s=0.5)) == {"p"}


def test_new_weights_get_no_request_that_none_of_them_could_decode() -> None:
    core = rolling(of("d2", WorkerRole.DECODE, "new", free=350))
    assert workers_of(start(core, "large")) == {"p"}
    assert workers_of(start(core, "small", output=200, now_s=0.2)) == {"p2"}
    # However many of the new ones are idle.
    core = rolling(
        of("d2", WorkerRole.DECODE, "new", free=350),
        *(of(f"q{i}", WorkerRole.PREFILL, "new", free=5000) for i in range(12)),
    )
    core.step([reported("p", free=500, total=1000)], 0.1)
    assert workers_of(start(core, "large", now_s=0.2)) == {"p"}


def test_a_worker_that_does_both_decodes_for_its_weights() -> None:
    core = rolling(of("b2", WorkerRole.BOTH, "new"))
    core.step([reported("b2", free=0)], 0.1)
    assert workers_of(start(core, "a", now_s=0.2)) == {"p2"}


def test_without_like_decode_workers_requests_wait_in_the_queue() -> None:
    core = rolling()
    core.step([WorkerLost(P), WorkerLost(D), of("d", WorkerRole.DECODE, "old")], 0.1)
    assert start(core, "a", now_s=0.2) == []
    # With not a token sent.
    assert not core.step([], 30.0).drops
    commands = core.step([of("d2", WorkerRole.DECODE, "new")], 30.05).commands
    assert workers_of([c.batch for c in commands if isinstance(c, DispatchBatch)]) == {"p2"}


def test_constrained_output_is_prefilled_only_where_somebody_decodes_it() -> None:
    plain, able = of("d", WorkerRole.DECODE, "old"), replace(of("d2", WorkerRole.DECODE, "old"), has_grammars=True)
    core = SchedulerCore(CoreSettings(edges=EdgeRule.NONE, fill_tokens=10_000), 4096)
    core.step([replace(of("p", WorkerRole.PREFILL, "old"), has_grammars=True), plain], 0.0)
    refused = core.step([RequestSubmitted(a_request("early", 100, 300, needs_grammar=True))], 0.1).commands
    assert [c.reason for c in refused if isinstance(c, RefuseRequest)] == [RefuseReason.NO_GRAMMARS]
    core.step([able], 0.2)
    (batch,) = start(core, "a", now_s=0.3, needs_grammar=True)
    (pull,) = [c for c in core.step([prefilled(batch)], 0.4).commands if isinstance(c, PullKv)]
    assert pull.target_id == "d2"


def test_where_nobody_decodes_there_is_no_model() -> None:
    core = rolling()
    core.step([WorkerLost(P), WorkerLost(D)], 0.1)
    assert start(core, "a", now_s=0.2) == []
    assert core.step([], 31.0).drops == (Drop(RequestId("a"), DropReason.NO_WORKER),)
    refused = core.step([RequestSubmitted(a_request("b", 100, 300, 32.0))], 32.0).commands
    assert [(c.request_id, c.reason) for c in refused if isinstance(c, RefuseRequest)] == [
        ("b", RefuseReason.NO_WORKER)
    ]


def test_what_is_prefilled_waits_for_its_weights_and_ends_with_the_true_reason() -> None:
    for rejoins in (True, False):
        core = rolling()
        core.step([reported("d", free=0)], 0.05)
        (batch,) = start(core, "a")
        core.step([prefilled(batch)], 0.2)
        core.step([WorkerLost(D), of("d2", WorkerRole.DECODE, "new")], 1.0)
        assert not core.step([], 30.0).drops
        if rejoins:
            commands = core.step([of("d", WorkerRole.DECODE, "old")], 30.5).commands
            assert [c.request_id for c in commands if isinstance(c, PullKv)] == ["a"]
        else:
            assert core.step([], 32.0).drops == (Drop(RequestId("a"), DropReason.NO_LIKE_WORKER),)


def test_an_output_whose_weights_nobody_decodes_waits_for_them_and_ends() -> None:
    core = rolling()
    core.step([WorkerLost(D)], 0.1)
    resumed = replace(a_request("a.2", 100, 300, 0.2, is_resumed=True), fingerprint="old")
    assert not core.step([RequestResumed(resumed)], 0.2).drops
    assert not core.step([], 30.0).drops
    assert core.step([], 31.0).drops == (Drop(RequestId("a.2"), DropReason.NO_LIKE_WORKER),)


def test_what_only_weights_without_a_decode_side_could_hold_holds_nobody_up() -> None:
    for order in (QueueOrder.SLACK, QueueOrder.FCFS):
        settings = CoreSettings(batch_patience_s=1.0, queue_order=order)
        core = SchedulerCore(settings, 8192)
        core.step([of("p2", WorkerRole.PREFILL, "new", free=3000), of("b", WorkerRole.BOTH, "old", free=1000)], 0.0)
        large = a_request("large", 1500, 500, 0.1, request_class=RequestClass.BATCH)
        assert not core.step([RequestSubmitted(large)], 0.1).drops
        # Long overdue by now: those who could serve it may come at any time, and others go on meanwhile.
        for i in range(5):
            batch_class = a_request(f"small{i}", 100, 300, 100.0 + i, request_class=RequestClass.BATCH)
            commands = core.step([RequestSubmitted(batch_class)], 100.0 + i).commands
            [small] = [c.batch for c in commands if isinstance(c, DispatchBatch)]
            assert (small.worker_id, small.request_ids) == ("b", (f"small{i}",)), order
            core.step(
                [finished(f"small{i}", "b", small.assignment), reported("b", last_assignment=small.assignment)],
                100.5 + i,
            )
        commands = core.step([of("d2", WorkerRole.DECODE, "new", free=3000)], 110.0).commands
        assert [c.batch.worker_id for c in commands if isinstance(c, DispatchBatch)] == ["p2"], order


# --- batch class ----------------------------------------------------------------------------------------------------


def held(core: SchedulerCore, name: str, request_class: RequestClass, now_s: float) -> list[Command]:
    """Has a request of 100 and 300 tokens computed at the prefill worker; returns what follows from its end."""
    events = [RequestSubmitted(a_request(name, 100, 300, now_s, request_class=request_class))]
    (batch,) = [c.batch for c in core.step(events, now_s).commands if isinstance(c, DispatchBatch)]
    report = reported("p", free=500, total=500, last_assignment=batch.assignment)
    return [c for c in core.step([prefilled(batch), report], now_s).commands if not isinstance(c, ForgetRequest)]


def pulled(commands: Iterable[Command]) -> list[str]:
    return [command.request_id for command in commands if isinstance(command, PullKv)]


def test_batch_class_lets_interactive_ones_go_first() -> None:
    core = world(decode_tokens=500)
    assert pulled(held(core, "x", INTERACTIVE, 0.1)) == ["x"]
    core.step([moved("x"), reported("d", free=400, total=500, last_assignment=1, num_running=1)], 0.2)
    assert pulled(held(core, "b", BATCH, 0.3)) == []
    assert pulled(held(core, "i", INTERACTIVE, 0.4)) == []
    ends = [finished("x", "d", output_tokens=300), reported("d", free=500, total=500, last_assignment=1)]
    assert pulled(core.step(ends, 0.5).commands) == ["i"]


@pytest.mark.parametrize(("now_s", "names"), [(1.0, []), (700.0, ["b2"])])
def test_batch_class_leaves_half_of_a_decode_worker_until_it_has_waited_for_its_patience(
    now_s: float, names: list[str]
) -> None:
    core = world(decode_tokens=2000)
    assert pulled(held(core, "x", INTERACTIVE, 0.1)) == ["x"]
    core.step([moved("x"), reported("d", free=1900, total=2000, last_assignment=1, num_running=1)], 0.2)
    assert pulled(held(core, "b1", BATCH, 0.3)) == ["b1"]
    assert pulled(held(core, "b2", BATCH, 0.4)) == []
    assert pulled(held(core, "i", INTERACTIVE, 0.5)) == ["i"]
    assert pulled(core.step([reported("d", free=1900, total=2000, last_assignment=1)], now_s).commands) == names


def test_batch_class_that_decodes_gives_way_to_what_waits_for_room() -> None:
    core = world(decode_tokens=1000)
    assert pulled([*held(core, "b1", BATCH, 0.1), *held(core, "b2", BATCH, 0.2)]) == ["b1", "b2"]
    # What a decode worker has was never in a batch sent to it, and its reports name batches alone.
    events = [moved("b1"), moved("b2", 2), reported("d", free=800, total=1000, num_running=2)]
    core.step(events, 0.3)
    gone = [c for c in held(core, "i", INTERACTIVE, 0.4) if isinstance(c, PreemptAtWorker)]
    assert gone == [PreemptAtWorker(D, RequestId("b1"))]
    # It is on its way out: nobody else has to go.
    assert core.step([reported("d", free=800, total=1000, num_running=2)], 0.5).commands == ()
    ended = finished("b1", "d", reason=FinishReason.PREEMPTED)
    events = [ended, reported("d", free=900, total=1000, num_running=1)]
    assert pulled(core.step(events, 0.6).commands) == ["i"]


def test_batch_class_holds_half_of_a_prefill_worker_at_the_most() -> None:
    core = world(decode_tokens=600)
    sizes = [len(batch.request_ids) for batch in start(core, *"abcd", prompt=100, output=1, request_class=BATCH)]
    assert sizes == [2]
    # Alone, one may be as large as there is room.
    core = world(decode_tokens=600)
    assert [batch.request_ids for batch in start(core, "a", prompt=480, output=1, request_class=BATCH)] == [("a",)]
