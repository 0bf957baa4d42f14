"""Batches: which requests, where, how many, and what ends them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bucketserve.core.messages import (
    ChangeEdges,
)
from bucketserve.core.settings import EdgeRule, QueueOrder
from bucketserve.core.types import (
    LimitedBy,
    RequestClass,
    StepSample,
)
from tests.builders import finished, joined, reported
from tests.unit.core.cores import batches, core, of_kind, prefill_steps, prefilled, resumed, submitted

pytestmark = pytest.mark.usefixtures("all_that_may_be_is_expected")


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


def test_where_a_step_holds_less_than_a_batch_it_is_the_measure_of_both() -> None:
    """On a CPU: a step of 256 tokens takes half a second."""
    under_test = core(fill_tokens=1, small_batch_tokens=1024)
    slow = replace(joined(free=9000), step_tokens=256)
    speed = reported(free=9000, total=9000, steps=prefill_steps(0.002))
    names = ("a", "b", "c")
    # Of three that fit a batch of 2,048 tokens two fit a step.
    (first,) = batches(under_test.step([slow, speed, *submitted(*names, prompt_tokens=120, ttft_slo_s=9.0)], 0.0))
    assert first.request_ids == ("a", "b")
    (third,) = batches(under_test.step([prefilled(first)], 0.5))
    assert third.request_ids == ("c",)
    # One of 600 tokens is more than a step: a short one goes beside it in time for that, itself and a step under way.
    under_test.step([prefilled(third), *submitted("long", prompt_tokens=600)], 1.0)
    waits = under_test.step(submitted("short", prompt_tokens=50, ttft_slo_s=4.0, arrival_s=1.0), 1.0)
    assert batches(waits) == []
    assert waits.wake_s is not None and 2.3 < waits.wake_s < 2.5
    # No batch beside it is longer than a step either.
    assert batches(under_test.step(submitted("other", prompt_tokens=300, ttft_slo_s=0.1, arrival_s=1.1), 1.1)) == []
    assert batches(under_test.step([], waits.wake_s))[0].request_ids == ("short",)


def test_first_come_first_served_holds_whatever_a_short_first_one_waits_for() -> None:
    under_test = core(fill_tokens=1, small_batch_tokens=100, edges=EdgeRule.ADAPTIVE, queue_order=QueueOrder.FCFS)
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


@pytest.mark.parametrize(
    ("waiting", "computing", "is_sent"),
    [
        (400, 0, False),
        (400, 100, False),
        # The step under way takes 0.4 s. Nothing that is sent now has a part in it.
        (400, 400, True),
        (60, 60, True),
        # Both together take too long for what is left after it.
        (400, 340, False),
    ],
)
def test_the_next_batch_is_sent_while_the_last_step_of_the_one_before_is_under_way(
    waiting: int, computing: int, is_sent: bool
) -> None:
    under_test = core(fill_tokens=100)
    steps = prefill_steps(0.001)
    under_test.step([joined(free=100_000), reported(free=100_000, total=100_000, steps=steps)], 0.0)
    under_test.step(submitted("long", prompt_tokens=800, ttft_slo_s=30.0), 0.0)
    assert not batches(under_test.step(submitted("a", "b", prompt_tokens=80, ttft_slo_s=30.0), 0.1))
    left = {"waiting_prefill_tokens": waiting, "computing_prefill_tokens": computing}
    step = reported(free=99_000, total=100_000, last_assignment=1, num_waiting=1, **left)
    found = [batch.request_ids for batch in batches(under_test.step([step], 0.4))]
    assert found == ([("a", "b")] if is_sent else [])
    # One batch waits behind it, not more.
    assert not batches(under_test.step(submitted("c", prompt_tokens=80, ttft_slo_s=30.0), 0.41))


def test_an_empty_worker_may_be_filled_by_one_request() -> None:
    under_test = core()
    (batch,) = batches(under_test.step([joined(free=100), *submitted("a", max_new_tokens=90)], 0.0))
    assert batch.reserved_kv_tokens == 100


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


def test_batch_class_that_is_due_goes_whatever_is_left_to_interactive_ones() -> None:
    under_test = core(batch_patience_s=10.0)
    under_test.step([joined(free=1000), *submitted("runs", prompt_tokens=500, max_new_tokens=100)], 0.0)
    busy = reported(free=500, total=1000, last_assignment=1, num_running=1, waiting_prefill_tokens=50)
    patient = submitted("patient", arrival_s=0.1, request_class=RequestClass.BATCH)
    # One in time waits for memory all the while: it is never the turn of those that are deferred.
    large = submitted("large", prompt_tokens=600, arrival_s=0.1, ttft_slo_s=1000.0)
    assert batches(under_test.step([busy, *patient, *large], 0.1)) == []
    assert batches(under_test.step([busy], 10.0)) == []
    (late,) = batches(under_test.step([busy], 10.2))
    assert late.request_ids == ("patient",)


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
