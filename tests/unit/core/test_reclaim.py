"""Whom the scheduler tells to go for others, and how they come back, on literal events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bucketserve.core.messages import (
    BatchPrefilled,
    Decision,
    DispatchBatch,
    DispatchFailed,
    Drop,
    Event,
    ForgetRequest,
    PreemptAtWorker,
    RequestCancelled,
    RequestResumed,
    RequestSubmitted,
    SaveOutputs,
    WorkerDraining,
    WorkerJoined,
)
from bucketserve.core.outputs import FEW, SAVE_S
from bucketserve.core.preemption import loss
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings, EdgeRule, QueueOrder
from bucketserve.core.types import (
    MAX_PREEMPTIONS,
    FinishReason,
    RequestClass,
    RequestId,
    StepSample,
    WorkerId,
    WorkerRole,
)
from tests.builders import a_request, at, finished, joined, reported

pytestmark = pytest.mark.usefixtures("all_that_may_be_is_expected")

BATCH, INTERACTIVE = RequestClass.BATCH, RequestClass.INTERACTIVE


def core(**settings) -> SchedulerCore:
    return SchedulerCore(CoreSettings(**{"edges": EdgeRule.NONE, "memory_reserve": 0.0, **settings}), 4096)


def growing(name: str = "w", free: int = 1000, role: WorkerRole = WorkerRole.BOTH, **more) -> WorkerJoined:
    return replace(joined(name, free=free, **more), role=role)


def submitted(*names: str, **more) -> list[RequestSubmitted]:
    return [RequestSubmitted(a_request(name, **more)) for name in names]


def patient(*names: str, prompt_tokens: int = 100, output: int = 300, **more) -> list[RequestSubmitted]:
    return submitted(*names, prompt_tokens=prompt_tokens, max_new_tokens=output, request_class=BATCH, **more)


def sent(decision: Decision) -> list[tuple[str, tuple[str, ...]]]:
    return [(c.batch.worker_id, c.batch.request_ids) for c in decision.commands if isinstance(c, DispatchBatch)]


def let_go(decision: Decision) -> list[tuple[str, str]]:
    return [(c.worker_id, c.request_id) for c in decision.commands if isinstance(c, PreemptAtWorker)]


def running(under_test: SchedulerCore, worker: str = "w", **requests) -> None:
    """Sends batch-class requests to a worker, which has begun with all of them."""
    [command] = [c for c in under_test.step([*requests.values()], 0.0).commands if isinstance(c, DispatchBatch)]
    under_test.step(begun(worker, command.batch.request_ids, command.batch.assignment), 0.0)


def begun(worker: str, names: tuple[str, ...], assignment: int = 1, **more) -> list[Event]:
    ids = tuple(RequestId(name) for name in names)
    report = reported(worker, last_assignment=assignment, **{"num_running": len(names), **more})
    return [BatchPrefilled(worker_id=WorkerId(worker), assignment=assignment, request_ids=ids), report]


def busy(*prompts: tuple[str, int], max_sequences: int = 64, free: int = 1000) -> SchedulerCore:
    """A worker whose memory is full with batch-class requests, each of a prompt and 100 tokens of output."""
    under_test = core()
    events = [patient(name, prompt_tokens=tokens, output=100)[0] for name, tokens in prompts]
    worker = growing(free=free, max_sequences=max_sequences)
    assert sum(len(names) for _, names in sent(under_test.step([worker, *events], 0.0))) == len(prompts)
    held = sum(tokens for _, tokens in prompts)
    names = tuple(sorted(name for name, _ in prompts))
    under_test.step(begun("w", names, free=free - held, total=free, max_sequences=max_sequences), 0.1)
    return under_test


def urgent(name: str = "u", prompt_tokens: int = 100, output: int = 100, **more) -> list[RequestSubmitted]:
    more = {"ttft_slo_s": 0.15, "arrival_s": 0.2, **more}
    return submitted(name, prompt_tokens=prompt_tokens, max_new_tokens=output, **more)


# --- whom ---------------------------------------------------------------------------------------------------------


def test_batch_class_goes_first_then_who_never_went_then_who_has_least_to_compute_again() -> None:
    order = [(True, 0, 900), (True, 1, 10), (False, 0, 500), (False, 1, 5), (False, 1, 6)]
    losses = [loss(is_batch=batch, num_preemptions=number, num_tokens=tokens) for batch, number, tokens in order]
    assert losses == sorted(losses, key=lambda cost: cost or ())
    assert loss(is_batch=True, num_preemptions=MAX_PREEMPTIONS, num_tokens=1) is None


def test_the_cheapest_go_and_no_more_than_has_to() -> None:
    for output, gone in ((8, "d"), (100, "c"), (189, "dc"), (220, "cb"), (910, "dcba")):
        under_test = busy(("a", 300), ("b", 200), ("c", 100), ("d", 1), free=1010)
        # At the most nine tokens will be free, with each of them 100 more than its prompt.
        assert let_go(under_test.step(urgent(output=output), 0.2)) == [("w", name) for name in gone], output


def test_what_they_were_still_to_generate_becomes_free_as_well() -> None:
    under_test = busy(("a", 300), ("b", 200), ("c", 98), ("d", 1))
    # At the most they would need 999 tokens together; 101 of these are those of d.
    assert let_go(under_test.step(urgent(output=3), 0.2)) == [("w", "c")]
    under_test = busy(("a", 300), ("b", 200), ("c", 98), ("d", 1))
    assert let_go(under_test.step(urgent(output=2), 0.2)) == [("w", "d")]


def test_who_ends_before_the_peak_need_not_go() -> None:
    under_test = core()
    short = patient("short", prompt_tokens=10, output=10)[0]
    running(under_test, x=growing(), a=patient("a", prompt_tokens=300, output=600)[0], short=short)
    # It has fewest tokens, but memory is wanted for when the long one is about to end.
    assert let_go(under_test.step(urgent(), 0.2)) == [("w", "a")]


def test_who_went_before_goes_after_those_who_did_not() -> None:
    under_test = core()
    once = [RequestResumed(a_request("a.2", 10, 390, request_class=BATCH, is_resumed=True, num_preemptions=1))]
    running(under_test, x=growing(), a=once[0], b=patient("b", prompt_tokens=300, output=300)[0])
    assert let_go(under_test.step(urgent(), 0.2)) == [("w", "b")]


def test_who_went_twice_stays() -> None:
    under_test = core()
    twice = RequestResumed(a_request("a.3", 10, 950, request_class=BATCH, is_resumed=True, num_preemptions=2))
    running(under_test, x=growing(), a=twice)
    assert let_go(under_test.step(urgent(), 0.2)) == []


def test_nobody_goes_where_that_is_not_enough() -> None:
    under_test = core()
    running(under_test, x=growing(), a=patient("a", output=100)[0], b=submitted("b", prompt_tokens=700)[0])
    assert let_go(under_test.step(urgent(prompt_tokens=200, output=100), 0.2)) == []


def test_nobody_goes_for_batch_class_nor_where_there_is_room() -> None:
    under_test = busy(("a", 400), ("b", 400))
    assert let_go(under_test.step(patient("c", arrival_s=0.2), 0.2)) == []
    under_test.step([growing("w2")], 0.7)
    assert let_go(under_test.step(urgent("v"), 0.8)) == []


@pytest.mark.parametrize(("tokens", "others", "gone"), [(400, 300, ["a"]), (600, 0, ["a"]), (400, 0, [])])
def test_for_one_that_is_late_goes_only_what_batch_class_has_beyond_its_part(
    tokens: int, others: int, gone: list[str]
) -> None:
    under_test = core()
    events = [growing(), *patient("a", prompt_tokens=tokens - 100, output=100)]
    events += patient("b", prompt_tokens=others - 100, output=100) if others else []
    batches = [c.batch for c in under_test.step(events, 0.0).commands if isinstance(c, DispatchBatch)]
    under_test.step(begun("w", batches[0].request_ids, free=1000 - tokens, total=1000), 0.1)
    # What they were still to generate when they began they have by now.
    report = reported(free=1000 - tokens - others, last_assignment=1, num_decode_steps=99, num_running=2)
    under_test.step([report], 0.5)
    late = submitted("u", prompt_tokens=900 - tokens, max_new_tokens=101, ttft_slo_s=0.5)
    assert let_go(under_test.step(late, 0.6)) == [("w", name) for name in gone]


def test_for_a_stream_that_was_broken_off_batch_class_goes() -> None:
    under_test = busy(("a", 400), ("b", 400))
    back = a_request("u.2", 100, 100, 0.0, is_resumed=True, ttft_slo_s=0.5)
    assert let_go(under_test.step([RequestResumed(back)], 30.0)) == [("w", "a")]


def test_nobody_else_goes_while_enough_are_going() -> None:
    under_test = busy(("a", 400), ("b", 400))
    assert let_go(under_test.step(urgent("u"), 0.2)) == [("w", "a")]
    assert let_go(under_test.step(urgent("v"), 0.3)) == []
    # It has gone: its memory is for the first, the next one has its own turn.
    gone = finished("a", reason=FinishReason.PREEMPTED)
    report = reported(free=550, total=1000, last_assignment=1, num_running=1)
    decision = under_test.step([gone, report], 0.4)
    assert ForgetRequest(RequestId("a")) in decision.commands
    assert sent(decision) == [("w", ("u", "v"))]


def test_nobody_else_goes_before_it_is_reported_what_became_free() -> None:
    under_test = busy(("a", 400), ("b", 400))
    assert let_go(under_test.step(urgent(output=200), 0.2)) == [("w", "a")]
    decision = under_test.step([finished("a", reason=FinishReason.PREEMPTED)], 0.3)
    assert (let_go(decision), sent(decision)) == ([], [])
    decision = under_test.step([reported(free=600, total=1000, last_assignment=1, num_running=1)], 0.4)
    assert (let_go(decision), sent(decision)) == ([], [("w", ("u",))])


def test_the_worker_where_least_is_lost_is_chosen() -> None:
    under_test = core()
    running(under_test, x=growing("w1"), a=patient("a", prompt_tokens=600, output=400)[0])
    running(under_test, "w2", x=growing("w2"), b=patient("b", prompt_tokens=200, output=800)[0])
    assert let_go(under_test.step(urgent(), 0.2)) == [("w2", "b")]


def test_a_place_is_given_back_as_memory_is() -> None:
    under_test = busy(("a", 20), ("b", 10), max_sequences=2)
    assert let_go(under_test.step(urgent(), 0.2)) == [("w", "b")]


@pytest.mark.parametrize("role", [WorkerRole.PREFILL, WorkerRole.DECODE])
def test_workers_that_only_prefill_or_decode_let_nobody_go_for_others(role: WorkerRole) -> None:
    under_test = core()
    other = WorkerRole.DECODE if role is WorkerRole.PREFILL else WorkerRole.PREFILL
    runs = {a_request("a", 500, 500, request_class=BATCH): WorkerId("w")}
    under_test.restore(parked=[], running=runs, edges=(), outputs={})
    under_test.step([growing(role=role, free=1000, running=(at("a"),)), growing("w2", role=other)], 0.0)
    under_test.step([reported("w", free=0), reported("w2", free=0)], 0.1)
    decision = under_test.step(urgent(), 0.2)
    assert (let_go(decision), sent(decision)) == ([], [])


def test_where_kv_does_not_grow_batch_class_goes_all_the_same() -> None:
    under_test = core()
    running(under_test, x=joined(), a=patient("a", output=800)[0])
    under_test.step([reported(free=100, last_assignment=1, num_running=1)], 0.1)
    assert let_go(under_test.step(urgent(), 0.2)) == [("w", "a")]


# --- orders that miss ---------------------------------------------------------------------------------------------


def test_one_that_its_worker_may_not_have_yet_is_not_told_to_go() -> None:
    under_test = core(deferred_share=0.5)
    assert sent(under_test.step([growing(), *patient("a", output=900)], 0.0)) == [("w", ("a",))]
    assert let_go(under_test.step(urgent(), 0.2)) == []
    # All that it may use, though it has used a tenth of that: what is booked becomes free with it.
    assert let_go(under_test.step(begun("w", ("a",), free=900, total=1000), 0.3)) == [("w", "a")]


def test_an_order_that_was_lost_with_the_stream_is_given_again() -> None:
    under_test = busy(("a", 900))
    assert let_go(under_test.step(urgent(), 0.2)) == [("w", "a")]
    again = growing(free=100, total=1000, running=(at("a"),))
    assert let_go(under_test.step([again], 0.3)) == [("w", "a")]


def test_one_that_was_not_sent_is_not_on_its_way_out_when_it_comes_again() -> None:
    under_test = core()
    assert sent(under_test.step([growing(), *patient("a", prompt_tokens=850, output=100)], 0.0))
    under_test.step([reported(free=150, total=1000, last_assignment=1)], 0.1)
    assert let_go(under_test.step(urgent(), 0.2)) == [("w", "a")]
    under_test.step([RequestCancelled(RequestId("u"))], 0.25)
    again = under_test.step([DispatchFailed(worker_id=WorkerId("w"), request_ids=(RequestId("a"),))], 0.3)
    assert sent(again) == []
    again = under_test.step([reported(free=1000, last_assignment=1)], 0.4)
    assert sent(again) == [("w", ("a",))]
    under_test.step(begun("w", ("a",), 2, free=150, total=1000), 0.5)
    assert let_go(under_test.step(urgent("v", arrival_s=0.6), 0.6)) == [("w", "a")]


def test_one_that_has_ended_meanwhile_is_not_waited_for() -> None:
    under_test = busy(("a", 400), ("b", 400))
    assert let_go(under_test.step(urgent(), 0.2)) == [("w", "a")]
    decision = under_test.step([finished("a"), reported(free=600, total=1000, last_assignment=1)], 0.3)
    assert sent(decision) == [("w", ("u",))]
    # Nothing comes of the order; and of one that leaves nobody is told to go.
    assert under_test.step([finished("a", reason=FinishReason.PREEMPTED)], 0.4).commands == ()
    under_test.step([WorkerDraining(WorkerId("w"))], 0.5)
    assert let_go(under_test.step(urgent("v", prompt_tokens=300), 0.6)) == []


def test_one_whose_client_has_gone_is_on_its_way_out_already() -> None:
    under_test = busy(("a", 400), ("b", 400))
    under_test.step([RequestCancelled(RequestId("a"))], 0.15)
    assert let_go(under_test.step(urgent(), 0.2)) == [("w", "b")]


# --- what it leaves ------------------------------------------------------------------------------------------------

STEPS = tuple(
    StepSample(
        prefill_tokens=tokens,
        decode_sequences=sequences,
        decode_context_tokens=100 * sequences,
        duration_s=0.01 + 0.001 * sequences + 0.0001 * tokens,
    )
    for sequences in range(1, 40)
    for tokens in (0, 50, 100)
)
"""Of a worker that decodes n sequences in 10 + n ms."""


def beside(
    *, number: int = 1, tpot_slo_s: float | None = None, request_class: RequestClass = INTERACTIVE, **settings
) -> SchedulerCore:
    """A worker of 4,000 tokens that decodes that many requests of a hundred tokens."""
    under_test = core(**settings)
    names = tuple(f"i{i:02}" for i in range(number))
    more = {"request_class": request_class, "tpot_slo_s": tpot_slo_s}
    under_test.step([growing(free=4000), *submitted(*names, prompt_tokens=50, max_new_tokens=50, **more)], 0.0)
    free = 4000 - 100 * number
    under_test.step(begun("w", names, free=free, total=4000, steps=STEPS), 0.1)
    return under_test


@pytest.mark.parametrize(
    ("tokens", "others", "is_sent"),
    [
        (1900, {}, True),
        (2000, {}, False),
        # All that is idle is theirs while nobody interactive is there.
        (2000, {"request_class": BATCH}, True),
        (3800, {"request_class": BATCH}, True),
        (100, {"number": 21}, False),
        # 16 sequences decode in 26 ms, of which 10 are any step's.
        (100, {"number": 15}, True),
        (100, {"number": 15, "tpot_slo_s": 0.045}, True),
        (100, {"number": 15, "tpot_slo_s": 0.040}, False),
        (100, {"number": 15, "tpot_slo_s": 0.040, "request_class": BATCH}, True),
        # A target that is broken already is no leave to break it further; one that nobody could keep asks for nothing.
        (100, {"number": 15, "tpot_slo_s": 0.020}, False),
        (100, {"number": 15, "tpot_slo_s": 0.005}, True),
    ],
)
def test_half_of_memory_and_of_a_tpot_is_left_to_interactive_ones(tokens: int, others: dict, is_sent: bool) -> None:
    under_test = beside(**others)
    decision = under_test.step(patient("a", prompt_tokens=tokens - 50, output=50), 0.2)
    assert sent(decision) == ([("w", ("a",))] if is_sent else [])
    # Whoever is interactive may go in any case.
    assert ("w", ("u",)) in sent(under_test.step(urgent(), 0.2)) or is_sent


def test_what_goes_together_leaves_as_much() -> None:
    under_test = beside()
    names = [f"b{i}" for i in range(9)]
    decision = under_test.step(patient(*names, prompt_tokens=350, output=50), 0.2)
    assert [len(batch) for _, batch in sent(decision)] == [4]
    # The rest follows as soon as nobody interactive is there.
    events = [finished("i00"), reported(free=2400, total=4000, last_assignment=2)]
    assert [len(batch) for _, batch in sent(under_test.step(events, 0.3))] == [5]


def test_batch_class_joins_no_step_of_prompts() -> None:
    under_test = core()
    under_test.step([growing(free=4000), *submitted("i", prompt_tokens=50, max_new_tokens=50)], 0.0)
    assert sent(under_test.step(patient("a", prompt_tokens=50, output=50), 0.1)) == []
    assert sent(under_test.step(urgent(arrival_s=0.1, ttft_slo_s=9.0), 0.1)) == [("w", ("u",))]
    assert sent(under_test.step(begun("w", ("i",), free=3900, total=4000), 0.2)) == []
    assert sent(under_test.step(begun("w", ("u",), 2, free=3800, total=4000), 0.3)) == [("w", ("a",))]


def test_who_has_waited_for_its_patience_goes_in_its_turn_whatever_is_left() -> None:
    for now_s, is_sent in ((10.0, False), (700.0, True)):
        under_test = beside(number=15, tpot_slo_s=0.020)
        under_test.step(patient("a", prompt_tokens=50, output=50, arrival_s=0.2), 0.2)
        assert (sent(under_test.step([], now_s)) == [("w", ("a",))]) is is_sent


def test_behind_a_late_interactive_one_it_leaves_as_much() -> None:
    under_test = beside(number=15, tpot_slo_s=0.040)
    late = submitted("late", prompt_tokens=50, max_new_tokens=50, ttft_slo_s=0.001, arrival_s=0.0)
    decision = under_test.step([*patient("a", prompt_tokens=50, output=50), *late], 0.2)
    assert sent(decision) == [("w", ("late",))]


@pytest.mark.parametrize(
    ("tpot_slo_s", "gone"),
    [
        # 31 sequences decode in 41 ms, of which 10 are any step's.
        (0.080, 0),
        (0.060, 6),
        (0.040, 16),
        (0.012, 30),
        # Nobody could keep that, or asks for anything.
        (0.005, 0),
        (None, 0),
    ],
)
def test_what_decodes_beyond_its_part_goes_when_an_interactive_one_comes(tpot_slo_s: float | None, gone: int) -> None:
    under_test = beside(number=30, request_class=BATCH)
    decision = under_test.step(urgent("u", prompt_tokens=100, output=10, tpot_slo_s=tpot_slo_s), 0.2)
    assert sent(decision) == [("w", ("u",))]
    # By what is reported each holds more than by what is known of it.
    assert gone <= len(let_go(decision)) <= 1.2 * gone
    # Those are on their way: another one more goes for another one.
    more = let_go(under_test.step(urgent("v", prompt_tokens=10, output=10, tpot_slo_s=tpot_slo_s), 0.2))
    assert len(more) <= bool(0 < gone < 30)


def test_nobody_goes_where_only_arrival_counts() -> None:
    under_test = beside(number=30, request_class=BATCH, queue_order=QueueOrder.FCFS)
    decision = under_test.step(urgent("u", prompt_tokens=100, output=10, tpot_slo_s=0.012), 0.2)
    assert (sent(decision), let_go(decision)) == ([("w", ("u",))], [])


def test_what_decodes_stays_where_only_its_like_comes() -> None:
    under_test = beside(number=15, tpot_slo_s=0.040)
    assert sent(under_test.step(patient("a", prompt_tokens=50, output=50), 700.0)) == [("w", ("a",))]
    under_test.step(begun("w", ("a",), 2, num_running=16, free=2400, total=4000), 700.1)
    # It is one more than there should be.
    decision = under_test.step(patient("b", prompt_tokens=50, output=50, arrival_s=1.0), 1400.0)
    assert (sent(decision), let_go(decision)) == ([("w", ("b",))], [])


def test_batch_class_that_was_let_go_and_waits_holds_up_no_late_one() -> None:
    under_test = beside(number=15, tpot_slo_s=0.040)
    back = a_request("old.2", 50, 50, 0.0, request_class=BATCH, is_resumed=True, num_preemptions=1)
    assert sent(under_test.step([RequestResumed(back)], 0.2)) == []
    late = submitted("late", prompt_tokens=50, max_new_tokens=50, ttft_slo_s=0.001, arrival_s=0.2)
    assert sent(under_test.step(late, 0.3)) == [("w", ("late",))]


# --- the way back -------------------------------------------------------------------------------------------------


def test_what_was_let_go_goes_on_before_others_of_its_class() -> None:
    under_test = core(fill_tokens=1)
    under_test.step(patient("new", prompt_tokens=10, output=10), 1.0)
    back = a_request("old.2", 500, 100, 0.5, request_class=BATCH, is_resumed=True, num_preemptions=1)
    chat = a_request("chat.2", 500, 100, 0.5, is_resumed=True, num_preemptions=1)
    events: list[Event] = [RequestResumed(back), *urgent("u"), RequestResumed(chat)]
    under_test.step(events, 2.0)
    order = []
    for step in range(4):
        decision = under_test.step([growing(f"w{step}", free=600, max_sequences=1)], 2.1 + step / 10)
        order += [name for _, names in sent(decision) for name in names]
    # In either lane; each has its turn.
    assert order[0] == "chat.2"
    assert order.index("old.2") < order.index("new")
    assert len(order) == 4


def test_no_worker_is_kept_for_what_was_let_go_before_it_has_waited_as_others_have_to() -> None:
    for now_s, also_sent in ((1.0, [("w", ("v",))]), (2000.0, [])):
        under_test = core()
        under_test.step([growing(), *submitted("busy", prompt_tokens=500, max_new_tokens=100)], 0.0)
        under_test.step(begun("w", ("busy",), free=500, total=1000), 0.1)
        back = a_request("old.2", 500, 100, 0.5, request_class=BATCH, is_resumed=True, num_preemptions=1)
        under_test.step([RequestResumed(back)], now_s)
        new = submitted("u", prompt_tokens=10, max_new_tokens=10, arrival_s=now_s)
        assert sent(under_test.step(new, now_s)) == [("w", ("u",))]
        # From now on its lane is owed a share.
        more = submitted("v", prompt_tokens=10, max_new_tokens=10, arrival_s=now_s)
        assert sent(under_test.step(more, now_s)) == also_sent


def test_who_went_before_counts_in_full_from_then_on() -> None:
    short = {kind: (0, 0, 0, 0, 0, 100) for kind in ("interactive", "batch")}
    for number, others in ((0, 2), (1, 0), (2, 0)):
        under_test = core()
        under_test.restore(parked=[], running={}, edges=(), outputs=short)
        back = a_request("a", 100, 850, is_resumed=True, num_preemptions=number)
        under_test.step([growing(), RequestResumed(back)], 0.0)
        # Until it may not be let go any more its KV grows as others' does.
        under_test.step(begun("w", ("a",), free=50 if number == MAX_PREEMPTIONS else 900, total=1000), 0.1)
        decision = under_test.step(submitted("b", "c", prompt_tokens=60, max_new_tokens=300), 0.2)
        assert sum(len(names) for _, names in sent(decision)) == others


def test_requests_count_with_what_outputs_are_like_until_they_may_not_be_let_go() -> None:
    for num_preemptions, number in ((0, 9), (MAX_PREEMPTIONS, 2)):
        under_test = core()
        under_test.restore(parked=[], running={}, edges=(), outputs={"interactive": (0, 0, 0, 0, 0, FEW)})
        more = {"prompt_tokens": 100, "max_new_tokens": 300, "num_preemptions": num_preemptions}
        decision = under_test.step([growing(), *submitted(*(f"r{i:02}" for i in range(20)), **more)], 0.0)
        # A hundred and eight tokens each, or four hundred.
        assert [len(batch) for _, batch in sent(decision)] == [number]


def test_what_is_known_of_outputs_is_stored_now_and_then_and_not_lost_with_the_leader() -> None:
    under_test = core()
    under_test.step([growing(), *submitted("a", "b", "c")], 0.0)
    under_test.step(begun("w", ("a", "b", "c")), 0.1)

    def saved(decision: Decision) -> list[SaveOutputs]:
        return [command for command in decision.commands if isinstance(command, SaveOutputs)]

    [first] = saved(under_test.step([finished("a")], 1.0))
    assert {kind: sum(counts) for kind, counts in first.counts.items()} == {"i4": 1, "interactive": 1}
    assert saved(under_test.step([finished("b")], 1.0 + SAVE_S - 1)) == []
    # What ended by itself counts; what was stopped says nothing of how long it would have been.
    stopped = finished("c", reason=FinishReason.PREEMPTED)
    [second] = saved(under_test.step([stopped], 1.0 + SAVE_S))
    assert {kind: sum(counts) for kind, counts in second.counts.items()} == {"i4": 2, "interactive": 2}
    assert saved(under_test.step([], 100.0)) == []
    other = core()
    other.restore(parked=[], running={}, edges=(), outputs=second.counts)
    other.step([growing(), *submitted("d")], 0.0)
    [third] = saved(other.step([finished("d")], 1.0))
    assert sum(third.counts["interactive"]) == 3


def test_what_waits_for_a_worker_that_is_saved_for_another_lets_nobody_go_there() -> None:
    under_test = core(batch_patience_s=1.0, deferred_share=0.5)
    running(under_test, x=growing(), a=patient("a", prompt_tokens=300, output=300)[0])
    large = patient("large", prompt_tokens=900, output=50, arrival_s=0.1)
    under_test.step(large, 0.1)
    under_test.step([], 10.0)
    # What a gives back would be for the one that the worker is saved for.
    decision = under_test.step(submitted("u", prompt_tokens=600, max_new_tokens=300, arrival_s=10.0), 10.1)
    assert (let_go(decision), decision.drops) == ([], ())


def test_nobody_is_dropped_for_having_been_let_go() -> None:
    under_test = busy(("a", 900))
    under_test.step(urgent(), 0.2)
    decision = under_test.step([finished("a", reason=FinishReason.PREEMPTED)], 0.3)
    drops: tuple[Drop, ...] = decision.drops
    assert drops == ()
    back = a_request("a.2", 905, 95, request_class=BATCH, is_resumed=True, num_preemptions=1)
    under_test.step([RequestResumed(back), reported(last_assignment=1)], 0.4)
    assert under_test.status().num_running + under_test.status().num_waiting == 2
