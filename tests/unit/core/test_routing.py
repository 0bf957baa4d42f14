"""Placement on arrival: a request goes to a worker at once, in turn or where the fewest are, and waits there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bucketserve.core.messages import BatchPrefilled, RequestResumed, WorkerDraining, WorkerLost
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, Placement
from bucketserve.core.types import FinishReason, RequestId, WorkerId
from tests.builders import a_request, finished, joined
from tests.unit.core.cores import batches, of_kind, submitted

BY_TURN, BY_LOAD, BY_PREFILL = Placement.ROUND_ROBIN, Placement.LEAST_LOADED, Placement.LEAST_PREFILL
EVERY = [BY_TURN, BY_LOAD, BY_PREFILL]


def core(placement: Placement) -> SchedulerCore:
    return SchedulerCore(CoreSettings().as_a_load_balancer(placement), 4096)


def where(decision) -> list[tuple[str, str]]:
    return [(batch.request_ids[0], batch.worker_id) for batch in batches(decision)]


@pytest.mark.parametrize("placement", EVERY)
def test_a_request_goes_at_once_whatever_its_worker_has_to_do(placement: Placement) -> None:
    one = core(placement)
    # Each is a tenth of the memory, and nothing ends: all go, each by itself, in order of arrival.
    one.step([joined("a", free=1000)], 0.0)
    sent = []
    for i in range(40):
        decision = one.step([*submitted(f"r{i}", prompt_tokens=90, arrival_s=float(i))], float(i))
        sent += where(decision)
        assert decision.wake_s is None
    assert sent == [(f"r{i}", "a") for i in range(40)]
    assert one.status().num_waiting == 0


def test_those_that_come_together_go_in_order_of_arrival() -> None:
    one = core(BY_TURN)
    later, sooner = submitted("later", arrival_s=2.0), submitted("sooner", arrival_s=1.0, prompt_tokens=500)
    decision = one.step([joined("a"), joined("b"), *later, *sooner], 2.0)
    assert where(decision) == [("sooner", "a"), ("later", "b")]


def test_round_robin_gives_to_each_in_turn_those_that_come_and_go_included() -> None:
    one = core(BY_TURN)
    one.step([joined("a"), joined("b"), joined("c")], 0.0)
    assert where(one.step(submitted("r0", "r1", "r2", "r3"), 1.0)) == [
        ("r0", "a"), ("r1", "b"), ("r2", "c"), ("r3", "a"),
    ]  # fmt: skip
    one.step([WorkerDraining(WorkerId("b")), joined("d")], 2.0)
    assert where(one.step(submitted("r4", "r5", "r6"), 3.0)) == [("r4", "c"), ("r5", "d"), ("r6", "a")]


def test_least_loaded_counts_open_requests() -> None:
    one = core(BY_LOAD)
    one.step([joined("a"), joined("b")], 0.0)
    # A long one counts as much as a short one.
    assert where(one.step(submitted("long", prompt_tokens=800), 1.0)) == [("long", "a")]
    assert where(one.step(submitted("r0"), 2.0)) == [("r0", "b")]
    # As many at both: the one with more memory.
    assert where(one.step(submitted("r1"), 3.0)) == [("r1", "b")]
    assert where(one.step([finished("r0", "b", 1), finished("r1", "b", 2), *submitted("r2", "r3")], 4.0)) == [
        ("r2", "b"), ("r3", "b"),
    ]  # fmt: skip


def test_least_prefill_counts_prompt_tokens_until_they_are_computed() -> None:
    one = core(BY_PREFILL)
    one.step([joined("a"), joined("b")], 0.0)
    decision = one.step(submitted("long", prompt_tokens=500), 1.0)
    assert where(decision) == [("long", "a")]
    assert where(one.step(submitted("r0", "r1", prompt_tokens=100), 2.0)) == [("r0", "b"), ("r1", "b")]
    batch = batches(decision)[0]
    computed = BatchPrefilled(worker_id=WorkerId("a"), assignment=batch.assignment, request_ids=batch.request_ids)
    # Nothing is left to compute there, and its request decodes.
    assert where(one.step([computed, *submitted("r2")], 3.0)) == [("r2", "a")]


@pytest.mark.parametrize("placement", EVERY)
def test_what_was_let_go_arrives_once_more_and_what_was_lost_goes_elsewhere(placement: Placement) -> None:
    one = core(placement)
    one.step([joined("a"), joined("b")], 0.0)
    assert where(one.step(submitted("r.1"), 1.0)) == [("r.1", "a")]
    again = a_request("r.2", is_resumed=True, num_preemptions=1)
    decision = one.step([finished("r.1", "a", reason=FinishReason.PREEMPTED), RequestResumed(again)], 2.0)
    assert [name for name, _ in where(decision)] == ["r.2"]
    worker_id = where(decision)[0][1]
    lost = one.step([WorkerLost(WorkerId(worker_id))], 3.0)
    assert [drop.request_id for drop in lost.drops] == ["r.2"]
    elsewhere = replace(again, request_id=RequestId("r.3"), avoid=frozenset({WorkerId(worker_id)}))
    one.step([joined(worker_id)], 4.0)
    assert where(one.step([RequestResumed(elsewhere)], 5.0)) == [("r.3", "b" if worker_id == "a" else "a")]


@pytest.mark.parametrize("placement", EVERY)
def test_only_those_that_may_serve_a_request_get_it_and_it_waits_for_them(placement: Placement) -> None:
    one = core(placement)
    one.step([of_kind("a", "A"), of_kind("b", "B")], 0.0)
    bound = [RequestResumed(a_request(f"r{i}.2", is_resumed=True, fingerprint="A")) for i in range(3)]
    assert where(one.step(bound, 1.0)) == [(f"r{i}.2", "a") for i in range(3)]
    # New ones prefer the newest weights.
    assert where(one.step(submitted("new0", "new1"), 2.0)) == [("new0", "b"), ("new1", "b")]
    gone = RequestResumed(a_request("x.2", is_resumed=True, fingerprint="C"))
    assert where(one.step([gone, *submitted("new2")], 3.0)) == [("new2", "b")]
    assert where(one.step([of_kind("c", "C")], 3.5)) == [("x.2", "c")]
