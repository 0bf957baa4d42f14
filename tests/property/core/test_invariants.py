"""What holds for every sequence of events: random worlds, driven by hypothesis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bucketserve.core.lanes import Lane, Lanes
from bucketserve.core.messages import ForgetRequest
from bucketserve.core.order import order_key
from bucketserve.core.settings import BatchOrder, CoreSettings, QueueOrder
from bucketserve.core.types import Request, RequestClass, WorkerId
from tests.builders import a_request
from tests.property.core.peers import Worker
from tests.property.core.scripts import BOTH, SHORT, actions, chain, crowded_actions, crowded_worlds, play, worlds
from tests.property.core.world import CONTEXT, World


@pytest.fixture(scope="module", autouse=True)
def much_changes_in_a_short_time() -> Iterator[None]:
    """Edges and roles change within the seconds that a world lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in (
            ("edges.COOLDOWN_S", 0.2),
            ("edges.LOOK_S", 0.1),
            ("roles.HOLD_S", 0.2),
            ("roles.COOLDOWN_S", 0.5),
        ):
            patch.setattr(f"bucketserve.core.{name}", seconds)
        yield


@given(worlds(), actions)
@settings(max_examples=500)
def test_every_request_ends_exactly_once_and_leaves_nothing_behind(world: World, script: list[tuple]) -> None:
    play(world, script)
    world.settle()
    world.check_end()


@given(crowded_worlds(), crowded_actions)
@settings(max_examples=200)
def test_runs_that_make_room_for_others_end_exactly_once_all_the_same(world: World, script: list[tuple]) -> None:
    play(world, script)
    world.settle()
    world.check_end()
    world.check_replay()


@given(worlds(), actions)
@settings(max_examples=80)
def test_a_recorded_log_replays_to_the_same_decisions(world: World, script: list[tuple]) -> None:
    play(world, script)
    world.check_replay()


def a_world(core_settings: CoreSettings, *capacities: int, outputs: dict[str, tuple[int, ...]] | None = None) -> World:
    workers = [Worker(WorkerId(f"w{i}"), capacity, BOTH, "A", "", CONTEXT, {}) for i, capacity in enumerate(capacities)]
    world = World(core_settings, workers, outputs)
    for worker in workers:
        world.connect(worker)
    return world


any_request = st.builds(
    a_request,
    name=st.sampled_from(["a", "b"]),
    prompt_tokens=st.integers(1, 100_000),
    arrival_s=st.floats(0, 1000),
    request_class=st.sampled_from(list(RequestClass)),
    ttft_slo_s=st.one_of(st.none(), st.floats(0.01, 100)),
)


@given(st.floats(0.01, 0.9), st.lists(st.integers(1, 5000), min_size=1, max_size=300))
@settings(max_examples=100)
def test_deferred_requests_get_their_share_while_both_lanes_wait(share: float, sizes: list[int]) -> None:
    lanes = Lanes(CONTEXT, share)
    lanes.add(a_request("urgent"), 1.0, late_s=1.0)
    lanes.add(a_request("patient"), 1.0, late_s=None)
    tokens = dict.fromkeys(Lane, 0)
    for size in sizes:
        [lane] = (lane for lane in lanes.in_turn()[0] if len(lanes.of(lane)))
        tokens[lane] += size
        lanes.dispatched(lane, size)
        # What is owed is never more than one dispatch's share, in either direction.
        assert -max(sizes) <= share * sum(tokens.values()) - tokens[Lane.BATCH] <= max(sizes)


def test_what_the_deferred_had_in_advance_is_forgotten_but_for_a_request() -> None:
    lanes = Lanes(1000, 0.02)
    lanes.add(a_request("urgent"), 1.0, late_s=1.0)
    lanes.add(a_request("patient"), 1.0, late_s=None)
    for _ in range(1000):
        lanes.dispatched(Lane.LATE, 1000)
    lanes.dispatched(Lane.IN_TIME, 49_000)
    assert lanes.in_turn()[0] == (Lane.IN_TIME,)
    lanes.dispatched(Lane.IN_TIME, 2_000)
    assert Lane.BATCH in lanes.in_turn()[0]


seconds = st.floats(0, 100)


@given(
    st.builds(
        CoreSettings, batch_order=st.sampled_from(list(BatchOrder)), queue_order=st.sampled_from(list(QueueOrder))
    ),
    any_request,
    any_request,
    st.tuples(seconds, seconds, seconds),
    st.tuples(seconds, seconds, seconds),
)
@settings(max_examples=300)
def test_in_a_lane_nothing_that_arrives_after_a_request_s_key_goes_before_it(
    config: CoreSettings, request: Request, other: Request, own: tuple, others: tuple
) -> None:
    names = ("prefill_s", "cost_s", "lead_s")
    key = order_key(request, config, **dict(zip(names, own, strict=True)))
    assert key >= request.arrival_s
    # However many wait, what it costs them puts it off by no more than a minute.
    dear = order_key(request, config, prefill_s=own[0], cost_s=1e9, lead_s=own[2])
    assert dear <= order_key(request, config, prefill_s=own[0], lead_s=own[2]) + 60.001
    if other.arrival_s > key:
        assert order_key(other, config, **dict(zip(names, others, strict=True))) > key


@given(
    st.integers(1, 3),
    st.integers(100, 1900),
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 200)), min_size=1, max_size=8),
    st.integers(1, 6),
    st.booleans(),
)
# Small batches beside the long ones took what the large one needed, each time that something became free.
@example(1, 1603, [(38, 78)], 6, False)
@example(1, 1552, [(69, 117), (256, 131), (387, 55), (143, 66), (316, 40), (146, 31), (163, 58), (175, 81)], 2, False)
# A worker stayed saved for one behind it, which was not to go before it: nothing went at all.
@example(1, 1516, [(300, 1), (87, 89), (299, 1)], 1, False)
@example(1, 1450, [(300, 1), (87, 88), (292, 8)], 1, False)
# Small ones joined each step that was too short for the large one.
@example(1, 838, [(31, 80)], 1, False)
@example(2, 838, [(31, 80)], 2, False)
@example(1, 1522, [(116, 101), (307, 117), (262, 6), (285, 124), (359, 196), (282, 38)], 5, False)
@settings(max_examples=60)
def test_a_deferred_request_gets_its_turn_in_a_flood_of_urgent_ones(
    num_workers: int, size: int, flood: list, per_turn: int, is_alike: bool
) -> None:
    world = a_world(
        CoreSettings(max_queued_requests=10_000, batch_patience_s=1.0, deferred_share=0.5, fill_tokens=64),
        *[2000] * num_workers,
    )

    def urgent(prompt_tokens: int, max_new_tokens: int) -> Request:
        hashes = chain(1, prompt_tokens) if is_alike else ()
        return world.request(prompt_tokens, max_new_tokens, ttft_slo_s=0.5, tenant="urgent", block_hashes=hashes)

    world.submit([urgent(*shape) for shape in flood * 4])
    hashes = chain(1, size) if is_alike else ()
    patient = world.request(size, 50, request_class=RequestClass.BATCH, tenant="patient", block_hashes=hashes)
    world.submit([patient])
    # Until those before it in its lane have gone, then until a worker saved for it has room.
    for turn in range(400):
        if world.dispatched[patient.request_id]:
            return
        world.submit([urgent(*flood[turn % len(flood)]) for _ in range(per_turn)])
        for worker in world.workers.values():
            worker.obey()
            worker.prefill_one()
            worker.finish_one(ends_alone=True)
            worker.report()
            world.deliver(worker, elapsed_s=0.05)
    raise AssertionError("starved")


@given(
    st.integers(1, 2),
    st.lists(st.tuples(st.integers(1, 120), st.integers(1, 120)), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 250)), min_size=1, max_size=8),
    st.integers(1, 4),
)
# What has run is bound to its weights, and those behind it went before it for ever.
@example(1, [(56, 1), (110, 1)], [(1, 1), (110, 225)], 4)
@settings(max_examples=60)
def test_whatever_is_let_go_for_a_flood_of_urgent_ones_comes_to_its_end(
    num_workers: int, flood: list, patient: list, per_turn: int
) -> None:
    """Batch class goes when memory runs out and when others want it, twice at most, and then stays."""
    world = a_world(
        CoreSettings(max_queued_requests=10_000, batch_patience_s=1.0, deferred_share=0.5),
        *[500] * num_workers,
        outputs=SHORT,
    )
    batch_class = [world.request(*shape, request_class=RequestClass.BATCH, tenant="patient") for shape in patient]
    world.submit(batch_class)
    clients = [world.client_of[request.request_id] for request in batch_class]
    for turn in range(600):
        if all(client.outcomes for client in clients):
            break
        shapes = [flood[(turn + i) % len(flood)] for i in range(per_turn)]
        world.submit([world.request(*shape, ttft_slo_s=0.5, tenant="urgent") for shape in shapes])
        for worker in world.workers.values():
            worker.obey()
            worker.prefill_one()
            worker.prefill_one()
            worker.decode(30)
            worker.report()
            world.deliver(worker, elapsed_s=0.05)
        world.resume()
    assert [client.outcomes for client in clients] == [["finished"]] * len(clients)
    assert all(client.request.num_preemptions <= 2 for client in world.clients.values())
    world.check_replay()


@given(st.lists(st.integers(1, 1400), min_size=2, max_size=12))
@settings(max_examples=60)
def test_dropped_only_for_a_reason(lengths: list[int]) -> None:
    world = a_world(CoreSettings(), 2000)
    world.submit([world.request(n, 50) for n in lengths])
    world.settle()
    world.check_end()
    decisions = [decision for _, _, decision in world.logs[0][1]]
    assert not any(decision.drops for decision in decisions)
    finished = [c for decision in decisions for c in decision.commands if isinstance(c, ForgetRequest)]
    assert len(finished) == len(lengths)
