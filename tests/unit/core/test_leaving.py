"""Workers that want to leave: the last of a fingerprint go when nothing is open that only they could finish."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bucketserve.core import batching
from bucketserve.core.leaving import RETURN_S
from bucketserve.core.messages import (
    AdmitFailed,
    BatchPrefilled,
    Decision,
    DispatchBatch,
    Drop,
    DropReason,
    KvPulled,
    PullKv,
    RefuseRequest,
    ReleaseWorker,
    RequestCancelled,
    RequestResumed,
    RequestSubmitted,
    WorkerAway,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerReported,
)
from bucketserve.core.placement import place
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, EdgeRule
from bucketserve.core.types import FinishReason, Request, RequestId, WorkerId, WorkerRole
from bucketserve.core.workers import WorkerState
from tests.builders import a_request, at, finished, joined, reported

PREFILL, DECODE, BOTH = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH
A1, A2 = RequestId("a.1"), RequestId("a.2")


def of(name: str, role: WorkerRole, fingerprint: str = "old", **more) -> WorkerJoined:
    return replace(joined(name, **more), role=role, fingerprint=fingerprint)


def core(*workers: WorkerJoined) -> SchedulerCore:
    under_test = SchedulerCore(CoreSettings(edges=EdgeRule.NONE), 4096)
    under_test.step(workers, 0.0)
    return under_test


def draining(*names: str) -> list[WorkerDraining]:
    return [WorkerDraining(WorkerId(name)) for name in names]


def resumed(name: str = "a.2", fingerprint: str = "old", **more) -> RequestResumed:
    return RequestResumed(a_request(name, 12, 8, is_resumed=True, fingerprint=fingerprint, **more))


def released(decision: Decision) -> list[str]:
    return [command.worker_id for command in decision.commands if isinstance(command, ReleaseWorker)]


def sent(decision: Decision) -> list[tuple[str, tuple[str, ...]]]:
    batches = [command.batch for command in decision.commands if isinstance(command, DispatchBatch)]
    return [(batch.worker_id, batch.request_ids) for batch in batches]


def pulled(decision: Decision) -> list[tuple[str, str]]:
    return [(c.request_id, c.target_id) for c in decision.commands if isinstance(c, PullKv)]


def held(name: str = "a.1", worker: str = "p", assignment: int = 1) -> BatchPrefilled:
    ids = (RequestId(name),)
    return BatchPrefilled(worker_id=WorkerId(worker), assignment=assignment, request_ids=ids, held=ids)


def moved(name: str = "a.1", to: str = "d") -> KvPulled:
    return KvPulled(request_id=RequestId(name), target_id=WorkerId(to), assignment=1, is_ok=True)


def decoding() -> SchedulerCore:
    """One request decodes at the old weights."""
    under_test = core(of("p", PREFILL), of("d", DECODE))
    under_test.step([RequestSubmitted(a_request("a.1"))], 0.1)
    under_test.step([held()], 0.2)
    under_test.step([moved()], 0.3)
    under_test.step([of("p2", PREFILL, "new"), of("d2", DECODE, "new")], 0.4)
    return under_test


def test_who_has_others_of_its_kind_beside_it_goes_at_once() -> None:
    under_test = core(
        *(of(name, role) for role in (PREFILL, DECODE, BOTH) for name in (f"{role.value}-{i}" for i in "ab"))
    )
    assert released(under_test.step(draining("prefill-a", "decode-a", "both-a"), 0.1)) == [
        "prefill-a",
        "decode-a",
        "both-a",
    ]


@pytest.mark.parametrize("role", WorkerRole)
def test_the_last_goes_at_once_if_nothing_is_open(role: WorkerRole) -> None:
    under_test = core(of("w", role), of("new", BOTH, "new"))
    under_test.step([RequestSubmitted(a_request("a.1"))], 0.1)
    assert released(under_test.step(draining("w"), 0.2)) == ["w"]
    assert released(under_test.step([*draining("w"), reported("w")], 0.3)) == []


def test_the_last_prefill_worker_stays_for_what_decodes_and_computes_what_is_lost_there() -> None:
    under_test = decoding()
    assert released(under_test.step(draining("p"), 1.0)) == []
    lost = under_test.step([WorkerLost(WorkerId("d"))], 2.0)
    assert (lost.drops, released(lost)) == ((Drop(A1, DropReason.WORKER_LOST),), [])
    # Decoding has begun anew by the time that it is said again, or later.
    assert sent(under_test.step([resumed()], 2.1)) == []
    assert sent(under_test.step([of("d", DECODE)], 4.0)) == [("p", ("a.2",))]
    assert released(under_test.step([held("a.2", assignment=2)], 4.1)) == []
    under_test.step([KvPulled(request_id=A2, target_id=WorkerId("d"), assignment=1, is_ok=True)], 4.2)
    assert released(under_test.step([finished("a.2", "d"), reported("d")], 4.3)) == ["p"]


def test_the_last_decode_worker_takes_over_what_is_prefilled_and_nothing_new_is_begun_for_it() -> None:
    under_test = core(of("p", PREFILL), of("d", DECODE, free=0, total=1000))
    under_test.step([RequestSubmitted(a_request("a.1"))], 0.1)
    assert pulled(under_test.step([held()], 0.2)) == []
    leaves = under_test.step([*draining("d"), RequestSubmitted(a_request("b.1"))], 0.3)
    assert (released(leaves), sent(leaves)) == ([], [])
    assert pulled(under_test.step([reported("d", free=1000)], 0.4)) == [("a.1", "d")]
    under_test.step([moved()], 0.5)
    assert released(under_test.step([finished("a.1", "d"), reported("d")], 0.6)) == ["d"]
    # The new one waits for whoever comes.
    assert sent(under_test.step([of("d2", DECODE)], 0.7)) == [("p", ("b.1",))]


def test_both_halves_may_leave_at_once() -> None:
    under_test = decoding()
    assert released(under_test.step(draining("p", "d"), 1.0)) == []
    assert released(under_test.step([finished("a.1", "d"), reported("d")], 2.0)) == ["p", "d"]


def test_what_is_new_is_not_given_to_those_that_stay_for_the_old() -> None:
    under_test = decoding()
    under_test.step([*draining("p"), WorkerLost(WorkerId("p2"))], 1.0)
    assert sent(under_test.step([RequestSubmitted(a_request("b.1"))], 1.1)) == []
    assert sent(under_test.step([resumed("c.2"), RequestSubmitted(a_request("d.1"))], 1.2)) == [("p", ("c.2",))]


def test_what_the_last_lets_go_to_make_room_comes_back_to_it() -> None:
    under_test = core(of("w", BOTH))
    under_test.step([RequestSubmitted(a_request("a.1"))], 0.1)
    under_test.step([BatchPrefilled(worker_id=WorkerId("w"), assignment=1, request_ids=(A1,))], 0.2)
    assert released(under_test.step(draining("w"), 0.3)) == []
    let_go = finished("a.1", reason=FinishReason.PREEMPTED)
    assert released(under_test.step([let_go, reported("w")], 0.4)) == []
    assert sent(under_test.step([RequestCancelled(A1), resumed()], 0.5)) == [("w", ("a.2",))]
    assert released(under_test.step([finished("a.2", assignment=2), reported("w")], 0.6)) == ["w"]


def test_an_attempt_that_is_to_come_is_waited_for_and_not_for_ever() -> None:
    for comes in (True, False):
        under_test = decoding()
        under_test.step([WorkerLost(WorkerId("d"))], 1.0)
        decision = under_test.step(draining("p"), 1.1)
        assert (released(decision), decision.wake_s) == ([], 1.0 + RETURN_S)
        if comes:
            # And with it what becomes of it: nobody decodes it.
            assert released(under_test.step([resumed()], 2.0)) == []
            assert released(under_test.step([], 1.0 + RETURN_S)) == []
            assert released(under_test.step([RequestCancelled(A2)], 20.0)) == ["p"]
        else:
            assert released(under_test.step([], 0.9 + RETURN_S)) == []
            assert released(under_test.step([], 1.0 + RETURN_S)) == ["p"]


def test_what_a_full_store_did_not_take_is_to_come_again() -> None:
    under_test = decoding()
    under_test.step([WorkerLost(WorkerId("d")), of("d", DECODE)], 1.0)
    under_test.step([resumed(), *draining("p")], 1.1)
    refused = under_test.step([AdmitFailed((A2,))], 1.2)
    assert [type(command) for command in refused.commands] == [RefuseRequest]
    assert released(refused) == []
    assert sent(under_test.step([resumed()], 2.3)) == [("p", ("a.2",))]
    # What had not begun may run anywhere.
    under_test = core(of("p", PREFILL), of("d", DECODE))
    under_test.step([RequestSubmitted(a_request("b.1"))], 0.1)
    assert released(under_test.step([AdmitFailed((RequestId("b.1"),)), *draining("p")], 0.2)) == ["p"]


def test_a_new_leader_keeps_those_that_leave_until_it_knows_what_runs_where() -> None:
    for fingerprint, frees in (("old", False), ("new", True)):
        under_test = SchedulerCore(CoreSettings(edges=EdgeRule.NONE), 4096)
        under_test.restore(parked=[], running={a_request("a.1"): WorkerId("d")}, edges=(), outputs={})
        assert released(under_test.step([of("p", PREFILL), *draining("p")], 0.1)) == []
        decode = of("d", DECODE, fingerprint, running=(at("a.1"),))
        assert bool(released(under_test.step([decode], 1.0))) is frees
    # Parked requests say themselves whose they are.
    for fingerprint, frees in (("old", False), ("new", True), ("", True)):
        under_test = SchedulerCore(CoreSettings(edges=EdgeRule.NONE), 4096)
        under_test.restore(parked=[a_request("a.2", fingerprint=fingerprint)], running={}, edges=(), outputs={})
        assert bool(released(under_test.step([of("p", PREFILL), *draining("p")], 0.1))) is frees


def delivering(name: str) -> WorkerReported:
    return replace(reported(name), is_delivering=True)


def test_whose_output_has_not_arrived_stays_until_it_has() -> None:
    for is_said in (True, False):
        under_test = core(of("w", BOTH))
        under_test.step([RequestSubmitted(a_request("a.1"))], 0.1)
        # Its report comes behind the end; until then nobody knows.
        assert released(under_test.step([*draining("w"), finished("a.1", "w")], 0.2)) == []
        if is_said:
            assert released(under_test.step([delivering("w")], 0.3)) == []
        assert released(under_test.step([reported("w")], 0.4)) == ["w"]


def test_output_that_did_not_arrive_is_computed_by_the_last_that_can() -> None:
    lost = finished("a.1", "d", assignment=0, reason=FinishReason.ERROR, is_retryable=True)
    for comes in (True, False):
        under_test = core(of("p", PREFILL), of("d", DECODE))
        under_test.step([RequestSubmitted(a_request("a.1"))], 0.1)
        under_test.step([held()], 0.2)
        under_test.step([moved(), finished("a.1", "d"), *draining("p", "d")], 0.3)
        assert released(under_test.step([delivering("d")], 0.4)) == []
        assert released(under_test.step([lost, reported("d")], 5.0)) == []
        if comes:
            assert sent(under_test.step([resumed()], 6.0)) == [("p", ("a.2",))]
        else:
            assert released(under_test.step([], 4.9 + RETURN_S)) == []
            assert sorted(released(under_test.step([], 5.0 + RETURN_S))) == ["d", "p"]


def test_a_worker_that_dies_with_output_may_have_lost_it() -> None:
    under_test = core(of("w", BOTH), of("x", BOTH))
    assert released(under_test.step([delivering("x"), *draining("w", "x")], 0.1)) == []
    assert released(under_test.step([WorkerLost(WorkerId("x"))], 0.2)) == []
    assert released(under_test.step([], 0.2 + RETURN_S)) == ["w"]


def test_a_worker_that_left_in_peace_holds_nobody() -> None:
    under_test = core(of("w", BOTH), of("x", BOTH))
    assert released(under_test.step([delivering("x"), *draining("x")], 0.1)) == ["x"]
    under_test.step([WorkerLost(WorkerId("x"))], 0.2)
    assert released(under_test.step(draining("w"), 0.3)) == ["w"]


def test_a_worker_that_comes_back_with_output_is_not_released_for_that() -> None:
    under_test = core(replace(of("w", BOTH), is_delivering=True))
    assert released(under_test.step(draining("w"), 0.1)) == []
    assert released(under_test.step([reported("w")], 0.2)) == ["w"]


def test_a_new_leader_gives_gateways_time_to_say_what_the_one_before_lost_last() -> None:
    for led, others in ((True, False), (False, False), (True, True)):
        under_test = SchedulerCore(CoreSettings(edges=EdgeRule.NONE), 4096)
        under_test.restore(parked=[], running={}, edges=(4097,) if led else (), outputs={})
        fleet = [of("p", PREFILL), of("d", DECODE), *([of("p2", PREFILL)] if others else [])]
        decision = under_test.step([*fleet, *draining("p")], 5.0)
        assert bool(released(decision)) is (others or not led)
        if led and not others:
            assert sent(under_test.step([resumed()], 6.0)) == [("p", ("a.2",))]
            assert released(under_test.step([RequestCancelled(A2), finished("a.2", "p"), reported("p")], 7.0)) == []
            assert released(under_test.step([], 5.0 + RETURN_S)) == ["p"]


def test_who_is_away_is_given_nothing_and_comes_back_as_it_was() -> None:
    under_test = decoding()
    under_test.step([*draining("p"), WorkerAway(WorkerId("p"))], 1.0)
    assert sent(under_test.step([resumed("b.2")], 1.1)) == []
    back = under_test.step([of("p", PREFILL), *draining("p")], 1.5)
    assert (sent(back), released(back)) == ([("p", ("b.2",))], [])


def test_who_was_released_gets_nothing_more_whatever_comes() -> None:
    under_test = core(of("p", PREFILL), of("d", DECODE), of("p2", PREFILL))
    assert released(under_test.step(draining("p"), 0.1)) == ["p"]
    under_test.step([WorkerLost(WorkerId("p2"))], 0.2)
    assert sent(under_test.step([resumed()], 0.3)) == []
    assert not under_test.step([], 10.0).drops
    assert sent(under_test.step([of("p2", PREFILL)], 11.0)) == [("p2", ("a.2",))]


def test_those_that_leave_do_not_look_at_all_that_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    for workers in ([of("w", BOTH)], [of("p", PREFILL), of("w", DECODE)]):
        looked_at: list[str] = []

        def looks(request: Request, *others: object, looked_at: list[str] = looked_at) -> WorkerState | None:
            looked_at.append(request.request_id)
            return place(request, *others)

        monkeypatch.setattr(batching, "place", looks)
        under_test = core(*workers)
        # Something is open that keeps them.
        under_test.step([RequestSubmitted(a_request("a.1"))], 0.05)
        under_test.step([replace(held(worker=workers[0].worker_id), held=()), *draining("w")], 0.1)
        waiting = [RequestSubmitted(a_request(f"n{i}.1")) for i in range(500)]
        assert sent(under_test.step(waiting, 0.2)) == []
        looked_at.clear()
        decision = under_test.step([resumed("b.2"), resumed("c.2", fingerprint="new")], 0.3)
        assert sent(decision) == [(workers[0].worker_id, ("b.2",))]
        assert len(looked_at) < 20
