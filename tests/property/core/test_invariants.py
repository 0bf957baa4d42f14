"""What holds for every sequence of events: random worlds, driven by hypothesis."""

from __future__ import annotations

from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st

from bucketserve.core.lanes import Lane, Lanes
from bucketserve.core.messages import (
    AdmitRequest,
    BatchPrefilled,
    CancelAtWorker,
    ChangeEdges,
    Decision,
    DispatchBatch,
    DropReason,
    Event,
    ForgetRequest,
    RefuseRequest,
    RequestCancelled,
    RequestFinished,
    RequestSubmitted,
    WorkerLost,
)
from bucketserve.core.order import order_key
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import BatchOrder, CoreSettings, EdgeRule, QueueOrder
from bucketserve.core.types import Batch, BatchId, Request, RequestClass, RequestId, WorkerId
from tests.builders import a_request, joined, reported

CONTEXT = 4096


class World:
    """Workers that behave, and a check of every decision. Time passes by one tenth of a second a turn."""

    def __init__(self, core_settings: CoreSettings, capacities: list[int]) -> None:
        self.core = SchedulerCore(core_settings, CONTEXT)
        self.capacities = {WorkerId(f"w{i}"): capacity for i, capacity in enumerate(capacities)}
        self.held: dict[WorkerId, dict[RequestId, Request]] = {}
        self.seen: dict[WorkerId, int] = {}
        self.requests: dict[RequestId, Request] = {}
        self.state: dict[RequestId, str] = {}
        self.ends: Counter[RequestId] = Counter()
        self.log: list[tuple[float, list[Event], Decision]] = []
        self.batch_of: dict[RequestId, BatchId] = {}
        self.now_s = 0.0

    def turn(self, events: list[Event], elapsed_s: float = 0.1) -> None:
        self.now_s += elapsed_s
        decision = self.core.step(events, self.now_s)
        self.log.append((self.now_s, events, decision))
        for command in decision.commands:
            match command:
                case AdmitRequest(request=request):
                    assert self.state[request.request_id] == "new"
                    self.state[request.request_id] = "waiting"
                case RefuseRequest(request_id=request_id):
                    assert self.state[request_id] == "new"
                    self.end(request_id)
                case DispatchBatch(batch=batch):
                    self.dispatch(batch)
                case CancelAtWorker():
                    pass
                case ForgetRequest(request_id=request_id):
                    assert self.state[request_id] == "running"
                    self.end(request_id)
                case ChangeEdges(edges=edges):
                    assert list(edges) == sorted(set(edges))
                    assert edges[-1] == CONTEXT + 1
        for drop in decision.drops:
            assert self.state[drop.request_id] in ("waiting", "running")
            self.end(drop.request_id)

    def end(self, request_id: RequestId) -> None:
        self.state[request_id] = "ended"
        self.ends[request_id] += 1

    def dispatch(self, batch: Batch) -> None:
        held = self.held[batch.worker_id]
        requests = [self.requests[request_id] for request_id in batch.request_ids]
        for request in requests:
            assert self.state[request.request_id] == "waiting"
            assert batch.bucket.low <= request.prefill_tokens < batch.bucket.high
            self.state[request.request_id] = "running"
            held[request.request_id] = request
            self.batch_of[request.request_id] = batch.batch_id
        assert batch.prefill_tokens == sum(request.prefill_tokens for request in requests)
        assert batch.reserved_kv_tokens == sum(request.reserved_tokens for request in requests)
        # Never more than the worker really has.
        assert sum(request.reserved_tokens for request in held.values()) <= self.capacities[batch.worker_id]
        self.seen[batch.worker_id] = batch.assignment

    def join(self, worker_id: WorkerId) -> Event:
        self.held[worker_id] = {}
        self.seen[worker_id] = 0
        return joined(worker_id, free=self.capacities[worker_id], max_sequences=8)

    def report(self, worker_id: WorkerId) -> Event:
        used = sum(request.reserved_tokens for request in self.held[worker_id].values())
        total = self.capacities[worker_id]
        return reported(
            worker_id,
            free=total - used,
            total=total,
            max_sequences=8,
            num_running=len(self.held[worker_id]),
            last_assignment=self.seen[worker_id],
        )

    def finish_one(self, worker_id: WorkerId) -> list[Event]:
        held = self.held[worker_id]
        if not held:
            return []
        request_id = next(iter(held))
        del held[request_id]
        batch_id = self.batch_of[request_id]
        computed = BatchPrefilled(worker_id=worker_id, batch_id=batch_id, request_ids=(request_id,), duration_s=0.1)
        done = RequestFinished(request_id=request_id, worker_id=worker_id, output_tokens=1)
        return [computed, done, self.report(worker_id)]


request_shapes = st.tuples(
    st.integers(1, 1500),
    st.integers(1, 600),
    st.sampled_from(list(RequestClass)),
    st.one_of(st.none(), st.floats(0.05, 5.0)),
    st.one_of(st.none(), st.floats(0.1, 3.0)),
    st.sampled_from(["alice", "bob"]),
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.lists(request_shapes, min_size=1, max_size=6)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("finish"), st.integers(0, 2)),
        st.tuples(st.just("report"), st.integers(0, 2)),
        st.tuples(st.just("lose"), st.integers(0, 2)),
        st.tuples(st.just("join"), st.integers(0, 2)),
    ),
    max_size=40,
)
core_settings = st.builds(
    CoreSettings,
    edges=st.sampled_from(list(EdgeRule)),
    batch_order=st.sampled_from(list(BatchOrder)),
    max_outstanding_batches=st.integers(1, 3),
    small_batch_tokens=st.sampled_from([0, 64, 256]),
    max_queued_requests=st.sampled_from([5, 1000]),
    edge_cooldown_s=st.just(0.2),
    rebucket_interval_s=st.just(0.1),
)


def play(world: World, script: list) -> None:
    workers = list(world.capacities)
    for kind, argument in script:
        if kind == "submit":
            events = []
            for shape in argument:
                prompt, output, request_class, ttft, life, tenant = shape
                request = a_request(
                    f"r{len(world.requests):03}",
                    prompt,
                    output,
                    world.now_s,
                    request_class=request_class,
                    ttft_slo_s=ttft,
                    deadline_s=None if life is None else world.now_s + life,
                    tenant=tenant,
                )
                world.requests[request.request_id] = request
                world.state[request.request_id] = "new"
                events.append(RequestSubmitted(request))
            world.turn(events)
            continue
        if kind == "cancel":
            world.turn([RequestCancelled(RequestId(f"r{argument:03}"))])
            continue
        worker_id = workers[argument % len(workers)]
        if kind == "join" and worker_id not in world.held:
            world.turn([world.join(worker_id)])
        elif worker_id in world.held:
            if kind == "finish":
                world.turn(world.finish_one(worker_id))
            elif kind == "report":
                world.turn([world.report(worker_id)])
            elif kind == "lose":
                del world.held[worker_id]
                world.turn([WorkerLost(worker_id)])
        else:
            world.turn([])


def settle(world: World) -> None:
    """Lets everything that still runs or waits come to its end."""
    for worker_id in world.capacities:
        if worker_id not in world.held:
            world.turn([world.join(worker_id)])
    for _ in range(5 * len(world.requests) + 50):
        for worker_id in list(world.held):
            world.turn(world.finish_one(worker_id) or [world.report(worker_id)], elapsed_s=2.0)
        if all(state == "ended" for state in world.state.values()):
            return


@given(core_settings, st.lists(st.integers(500, 4000), min_size=1, max_size=3), actions)
@settings(max_examples=150)
def test_every_request_ends_exactly_once_and_budgets_hold(
    config: CoreSettings, capacities: list[int], script: list
) -> None:
    world = World(config, capacities)
    play(world, script)
    settle(world)
    assert all(state == "ended" for state in world.state.values())
    assert all(count == 1 for count in world.ends.values())
    view = world.core.status()
    assert (view.num_waiting, view.num_running) == (0, 0)
    assert sum(bucket.num_waiting for bucket in view.buckets) == 0


@given(core_settings, st.lists(st.integers(500, 4000), min_size=1, max_size=3), actions)
@settings(max_examples=60)
def test_a_recorded_log_replays_to_the_same_decisions(
    config: CoreSettings, capacities: list[int], script: list
) -> None:
    world = World(config, capacities)
    play(world, script)
    replay = SchedulerCore(config, CONTEXT)
    for now_s, events, decision in world.log:
        assert replay.step(events, now_s) == decision


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
        lane = lanes.in_turn()[0]
        tokens[lane] += size
        lanes.dispatched(lane, size)
        # What is owed is never more than one dispatch's share, in either direction.
        assert -max(sizes) <= share * sum(tokens.values()) - tokens[Lane.DEFERRED] <= max(sizes)


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
    if other.arrival_s > key:
        assert order_key(other, config, **dict(zip(names, others, strict=True))) > key


@given(
    st.integers(1, 3),
    st.integers(100, 1900),
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 200)), min_size=1, max_size=8),
    st.integers(1, 6),
)
# Small batches beside the long ones took what the large one needed, each time that something became free.
@example(1, 1603, [(38, 78)], 6)
@example(1, 1552, [(69, 117), (256, 131), (387, 55), (143, 66), (316, 40), (146, 31), (163, 58), (175, 81)], 2)
@example(1, 1522, [(116, 101), (307, 117), (262, 6), (285, 124), (359, 196), (282, 38)], 5)
@settings(max_examples=60)
def test_a_deferred_request_gets_its_turn_in_a_flood_of_urgent_ones(
    num_workers: int, size: int, flood: list, per_turn: int
) -> None:
    world = World(
        CoreSettings(max_queued_requests=10_000, batch_patience_s=1.0, deferred_share=0.5), [2000] * num_workers
    )
    for worker_id in world.capacities:
        world.turn([world.join(worker_id)])

    def submit(shapes: list) -> None:
        play(world, [("submit", shapes)])

    submit([(p, n, RequestClass.INTERACTIVE, 0.5, None, "urgent") for p, n in flood * 4])
    patient = RequestId(f"r{len(world.requests):03}")
    submit([(size, 50, RequestClass.BATCH, None, None, "patient")])
    # Until those before it in its lane have gone, then until a worker saved for it has room.
    for turn in range(400):
        if world.state[patient] != "waiting":
            return
        shape = flood[turn % len(flood)]
        submit([(*shape, RequestClass.INTERACTIVE, 0.5, None, "urgent")] * per_turn)
        for worker_id in world.capacities:
            world.turn([*world.finish_one(worker_id), world.report(worker_id)], elapsed_s=0.05)
    raise AssertionError("starved")


@given(st.lists(st.integers(1, 1400), min_size=2, max_size=12))
@settings(max_examples=60)
def test_dropped_only_for_a_reason(lengths: list[int]) -> None:
    world = World(CoreSettings(), [2000])
    play(world, [("join", 0), ("submit", [(n, 50, RequestClass.INTERACTIVE, None, None, "a") for n in lengths])])
    settle(world)
    drops = [drop for _, _, decision in world.log for drop in decision.drops]
    assert not drops or {drop.reason for drop in drops} <= {DropReason.DEADLINE}
    finished = [c for _, _, decision in world.log for c in decision.commands if isinstance(c, ForgetRequest)]
    assert len(finished) == len(lengths)
