"""Placement of requests whose beginning some worker has computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from bucketserve.core.affinity import WAITS
from bucketserve.core.messages import (
    AdmitRequest,
    BatchPrefilled,
    Decision,
    DispatchBatch,
    RefuseRequest,
    RequestCancelled,
    RequestSubmitted,
    WorkerDraining,
    WorkerLost,
)
from bucketserve.core.prefixes import BLOCK_TOKENS
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, EdgeRule, QueueOrder
from bucketserve.core.types import Batch, Request, RequestId, StepSample, WorkerId
from tests.builders import a_request, finished, joined, reported

CONTEXT = 8192
LONG = 64 * BLOCK_TOKENS
"""Tokens of a beginning that is worth to be found."""
STEPS = tuple(StepSample(prefill_tokens=n, prefill_attention=n * n, duration_s=0.001 * n) for n in (100, 1000, 4000))
"""A millisecond per prompt token."""


def core(**more) -> SchedulerCore:
    return SchedulerCore(CoreSettings(edges=EdgeRule.NONE, **more), CONTEXT)


def fleet(number: int) -> list:
    return [replace(joined(f"w{i:02}", free=400_000), context_tokens=CONTEXT) for i in range(number)]


def chain(root: int = 1, tokens: int = LONG) -> tuple[int, ...]:
    return tuple(1000 * root + i for i in range(tokens // BLOCK_TOKENS))


def known(name: str, root: int = 1, tail: int = 50, **more) -> Request:
    """A request that begins as all of its root do."""
    return a_request(name, LONG + tail, block_hashes=chain(root), **more)


def batches(decision: Decision) -> list[Batch]:
    return [command.batch for command in decision.commands if isinstance(command, DispatchBatch)]


def places(decision: Decision) -> dict[str, str]:
    return {name: batch.worker_id for batch in batches(decision) for name in batch.request_ids}


def submit(under_test: SchedulerCore, *requests: Request, now_s: float = 0.0) -> Decision:
    return under_test.step([RequestSubmitted(request) for request in requests], now_s)


def end(under_test: SchedulerCore, batch: Batch, now_s: float = 0.0, cached: tuple[int, ...] = ()) -> Decision:
    """Its worker has done all of a batch, and says so."""
    worker = batch.worker_id
    ends = [finished(name, worker, batch.assignment) for name in batch.request_ids]
    report = reported(worker, free=400_000, total=400_000, last_assignment=batch.assignment, steps=STEPS)
    done = BatchPrefilled(
        worker_id=worker, assignment=batch.assignment, request_ids=batch.request_ids, cached_tokens=cached
    )
    return under_test.step([done, *ends, report], now_s)


def warm(under_test: SchedulerCore, *roots: int) -> dict[int, WorkerId]:
    """Lets a worker for each root compute its beginning; returns which one did."""
    firsts = [batches(submit(under_test, known(f"first{root}", root)))[0] for root in roots]
    for batch in firsts:
        end(under_test, batch)
    homes = {root: batch.worker_id for root, batch in zip(roots, firsts, strict=True)}
    assert len(set(homes.values())) == len(roots)
    return homes


def busy(under_test: SchedulerCore, worker_id: WorkerId, **more) -> None:
    under_test.step([reported(worker_id, free=390_000, total=400_000, last_assignment=9, **more)], 0.0)


def test_the_second_prompt_goes_where_the_first_one_was_though_it_is_not_among_the_least_loaded() -> None:
    under_test = core()
    under_test.step(fleet(20), 0.0)
    homes = warm(under_test, 1)
    busy(under_test, homes[1], num_running=3)
    assert homes[1] not in {worker.worker_id for worker in under_test._fleet.candidates()}
    (batch,) = batches(submit(under_test, known("second")))
    assert batch.worker_id == homes[1]
    assert batch.prefill_tokens == 50
    # One that begins otherwise goes to somebody who is idle.
    assert places(submit(under_test, known("other", 2)))["other"] != homes[1]


def test_it_counts_in_the_queue_with_what_is_still_to_compute() -> None:
    under_test = core()
    under_test.step(fleet(1), 0.0)
    warm(under_test, 1)
    decision = submit(under_test, known("a"), a_request("b", LONG + 50))
    admitted = {c.request.request_id: c.request for c in decision.commands if isinstance(c, AdmitRequest)}
    assert admitted["a"].prefill_tokens == 50
    assert admitted["b"].prefill_tokens == LONG + 50
    # Its KV is reserved in full all the same, since it is copied.
    assert sum(batch.reserved_kv_tokens for batch in batches(decision)) == 2 * (LONG + 60)


def test_a_prompt_known_to_its_last_token_has_one_to_compute() -> None:
    under_test = core()
    under_test.step(fleet(1), 0.0)
    warm(under_test, 1)
    (batch,) = batches(submit(under_test, a_request("a", LONG, block_hashes=chain())))
    assert batch.prefill_tokens == 1


def test_who_would_be_late_without_what_is_known_is_let_in() -> None:
    asks = {"ttft_slo_s": 2.0, "reject_if_unattainable": True}
    refused = {}
    for root in (1, 2):
        under_test = core()
        under_test.step(fleet(1), 0.0)
        warm(under_test, 1)
        decision = submit(under_test, known("a", root, **asks))
        refused[root] = any(isinstance(command, RefuseRequest) for command in decision.commands)
    assert refused == {1: False, 2: True}


def test_a_hot_beginning_spreads_before_its_holder_is_overloaded() -> None:
    under_test = core()
    under_test.step(fleet(4), 0.0)
    home = warm(under_test, 1)[1]
    counts = Counter()
    for i in range(120):
        placed = places(submit(under_test, known(f"r{i:03}", tail=200), now_s=0.001 * i))
        counts.update(placed.values())
        for name, worker_id in placed.items():
            batch_id = under_test._lives.get(RequestId(name)).assignment
            under_test.step(
                [
                    BatchPrefilled(worker_id=worker_id, assignment=batch_id, request_ids=(RequestId(name),)),
                    reported(
                        worker_id, free=200_000, total=400_000, last_assignment=batch_id, num_running=counts[worker_id]
                    ),
                ],
                0.001 * i,
            )
    assert sum(counts.values()) == 120
    # Alone it would have had to decode all; the others computed the beginning once, and share since.
    assert set(counts) == {f"w{i:02}" for i in range(4)}
    assert counts[home] < 80
    assert min(counts.values()) > 10


def test_it_waits_for_its_holder_no_longer_than_a_multiple_of_what_that_spares() -> None:
    under_test = core(fill_tokens=1)
    under_test.step(fleet(2), 0.0)
    homes = warm(under_test, 1, 2)
    assert places(submit(under_test, known("a", tail=300))) == {"a": homes[1]}
    decision = submit(under_test, known("b", tail=300))
    assert places(decision) == {}
    wait_s = WAITS * 0.001 * LONG
    assert decision.wake_s is not None and 0.9 * wait_s < decision.wake_s < 1.1 * wait_s
    assert places(under_test.step([], 0.8 * wait_s)) == {}
    late = under_test.step([], decision.wake_s)
    assert places(late) == {"b": homes[2]}
    end(under_test, batches(late)[0], decision.wake_s)
    # From now on both have it.
    index = under_test._affinity.index
    assert index.tokens_at(homes[1], chain()) == index.tokens_at(homes[2], chain()) == LONG


def test_it_goes_to_its_holder_as_soon_as_that_has_room_and_others_go_meanwhile() -> None:
    under_test = core(fill_tokens=1)
    under_test.step(fleet(2), 0.0)
    homes = warm(under_test, 1, 2)
    (first,) = batches(submit(under_test, known("a", tail=300)))
    assert places(submit(under_test, known("b", tail=300), known("c", 2, tail=300))) == {"c": homes[2]}
    assert places(end(under_test, first, 0.1)) == {"b": homes[1]}


def test_in_a_batch_for_one_worker_is_nobody_who_belongs_to_another() -> None:
    under_test = core()
    under_test.step(fleet(2), 0.0)
    homes = warm(under_test, 1, 2)
    names = [f"r{i}" for i in range(6)]
    decision = submit(under_test, *(known(name, 1 + i % 2, tail=60) for i, name in enumerate(names)))
    assert places(decision) == {name: homes[1 + i % 2] for i, name in enumerate(names)}


def test_nobody_is_overtaken_for_longer_than_that() -> None:
    """The holder never has room again, and others fit the worker that has, all the time."""
    under_test = core(fill_tokens=1, max_batch_tokens=400, deferred_share=0.01, small_batch_tokens=0)
    under_test.step(fleet(2), 0.0)
    homes = warm(under_test, 1, 2)
    assert places(submit(under_test, known("a", tail=300))) == {"a": homes[1]}
    waiting = known("patient", tail=300, arrival_s=0.0)
    submit(under_test, waiting)
    now_s, open_batch = 0.0, None
    for i in range(400):
        now_s += 0.05
        decision = submit(under_test, known(f"r{i:03}", 2, tail=300, arrival_s=now_s), now_s=now_s)
        for batch in batches(decision):
            open_batch = batch
        if "patient" in places(decision):
            break
        if open_batch is not None and open_batch.worker_id == homes[2]:
            after = end(under_test, open_batch, now_s)
            open_batch = next(iter(batches(after)), None)
            if "patient" in places(after):
                break
    else:
        raise AssertionError("starved")
    # What it may be overtaken by arrived within that time, and had a key as much later than its arrival.
    assert now_s < (WAITS + 2) * 0.001 * LONG


def test_first_come_first_served_stays_so() -> None:
    under_test = core(queue_order=QueueOrder.FCFS, max_batch_tokens=8192, small_batch_tokens=0)
    under_test.step(fleet(2), 0.0)
    homes = warm(under_test, 1, 2)
    assert places(submit(under_test, known("a", tail=300))) == {"a": homes[1]}
    # It does not wait for a worker whose step it may not join, and nothing behind it goes first.
    (batch,) = batches(submit(under_test, known("b", tail=300), known("c", 2, tail=300)))
    assert (batch.worker_id, batch.request_ids) == (homes[2], ("b", "c"))


def test_what_a_worker_had_is_forgotten_when_it_goes_or_begins_anew() -> None:
    for gone in ([WorkerLost], [WorkerDraining], []):
        under_test = core()
        under_test.step(fleet(2), 0.0)
        home = warm(under_test, 1)[1]
        under_test.step([kind(home) for kind in gone], 0.0)
        if not gone:
            under_test.step([replace(joined(home, free=400_000), context_tokens=CONTEXT)], 0.0)
        (batch,) = batches(submit(under_test, known("second")))
        assert batch.prefill_tokens == LONG + 50
        assert not gone or batch.worker_id != home


def test_those_whose_holder_has_gone_are_as_long_as_they_are() -> None:
    under_test = core(fill_tokens=1)
    under_test.step(fleet(2), 0.0)
    homes = warm(under_test, 1, 2)
    submit(under_test, known("a", tail=300))
    # Short enough at their holder to be small batches.
    waiting = [known(f"r{i}", tail=200 + i) for i in range(12)]
    placed = places(submit(under_test, *waiting))
    assert set(placed.values()) <= {homes[1]} and len(placed) < len(waiting)
    after = under_test.step([WorkerLost(homes[1])], 0.1)
    assert [batch.worker_id for batch in batches(after)] == [homes[2]]
    assert len(under_test._fleet.get(homes[2]).outstanding) == 1


def test_reports_correct_what_is_believed() -> None:
    under_test = core()
    under_test.step(fleet(1), 0.0)
    warm(under_test, 1)
    believed = []
    for i in range(100):
        (batch,) = batches(submit(under_test, known(f"r{i}")))
        believed.append(LONG + 50 - batch.prefill_tokens)
        # Its engine keeps nothing.
        end(under_test, batch, cached=(0,))
    assert believed[0] == LONG
    assert believed[-1] == 0


def test_a_request_leaves_the_queue_whatever_has_become_known_meanwhile() -> None:
    under_test = core(fill_tokens=1, small_batch_tokens=0)
    under_test.step(fleet(1), 0.0)
    (first,) = batches(submit(under_test, known("a")))
    submit(under_test, known("b"), known("c"))
    under_test._affinity.index.leave(WorkerId("w00"))
    under_test.step([RequestCancelled(RequestId("b"))], 0.1)
    assert places(end(under_test, first, 0.2)) == {"c": "w00"}
    view = under_test.status()
    assert (view.num_waiting, view.num_running, under_test._lanes.num_tokens) == (0, 1, 0)
