"""What may happen in a world, and scripts of it: the strategies from which hypothesis draws."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from hypothesis import strategies as st

from bucketserve.core.messages import (
    AdaptersChanged,
    AdmitFailed,
    BatchPrefilled,
    DispatchFailed,
    Event,
    KvPulled,
    RequestCancelled,
    RequestFinished,
    WorkerDraining,
    WorkerLost,
    WorkerReported,
)
from bucketserve.core.prefixes import BLOCK_TOKENS
from bucketserve.core.settings import BatchOrder, CoreSettings, EdgeRule, Placement, QueueOrder
from bucketserve.core.types import FinishReason, RequestClass, RequestId, WorkerId, WorkerRole
from tests.builders import headroom
from tests.property.core.peers import Worker
from tests.property.core.world import CONTEXT, World

__all__ = ["BOTH", "SHORT", "actions", "chain", "crowded_actions", "crowded_worlds", "play", "worlds"]


def submit(world: World, worker: Worker, rng: random.Random) -> None:
    lengths = [
        rng.choice([rng.randint(1, 60), rng.randint(1, 400), rng.randint(1, 400), rng.randint(1, 5000)])
        for _ in range(rng.randint(1, 5))
    ]
    world.submit(
        [
            world.request(
                length,
                most := rng.choice([1, rng.randint(1, 300)]),
                rng.choice([None, None, None, rng.uniform(0.1, 5.0)]),
                request_class=rng.choice(list(RequestClass)),
                ttft_slo_s=rng.choice([None, rng.uniform(0.05, 5.0)]),
                tpot_slo_s=rng.choice([None, 0.05]),
                tenant=rng.choice(["alice", "bob"]),
                tokenizer=rng.choice([""] * 4 + ["T1"] * 4 + ["T2"]),
                adapter=rng.choice(["", "", "X", "Y"]),
                reject_if_unattainable=rng.random() < 0.2,
                block_hashes=rng.choice([(), chain(rng.randint(1, 2), length)]),
                output_tokens=rng.choice([most, rng.randint(1, most)]),
            )
            for length in lengths
        ]
    )


def chain(root: int, prompt_tokens: int) -> tuple[int, ...]:
    """Prompts of one root begin alike."""
    return tuple(1000 * root + i for i in range(prompt_tokens // BLOCK_TOKENS))


def crowd(world: World, worker: Worker, rng: random.Random) -> None:
    """Requests that would all fit if outputs were as long as is believed."""
    requests = []
    for _ in range(rng.randint(1, 6)):
        prompt_tokens, most = rng.randint(1, 60), rng.choice([1, rng.randint(40, 100), rng.randint(40, 100)])
        request_class = rng.choice(list(RequestClass))
        ends = rng.choice([most, most, rng.randint(1, most)])
        slo_s = rng.choice([None, 30.0])
        requests.append(
            world.request(
                prompt_tokens, most, request_class=request_class, ttft_slo_s=slo_s, output_tokens=ends, tenant="alice"
            )
        )
    world.submit(requests)


def press_on(world: World, worker: Worker, rng: random.Random) -> None:
    """A worker computes all prompts that have room, and goes on with its outputs."""
    worker.obey()
    for _ in range(rng.randint(1, 8)):
        worker.prefill_one()
        world.end_pull(worker, is_ok=True)
    worker.decode(rng.choice([1, 15, 30]))
    worker.report()
    if worker.is_connected and rng.random() < 0.9:
        world.deliver(worker)


def lag(world: World, worker: Worker, rng: random.Random) -> None:
    """A worker goes on with what it has before it hears what it was told."""
    worker.prefill_one()
    worker.decode(rng.choice([1, 30, 60]))


def cancel(world: World, worker: Worker, rng: random.Random) -> None:
    if world.clients:
        world.cancel(rng.choice(list(world.clients.values())))


def work(world: World, worker: Worker, rng: random.Random) -> None:
    """A worker gets on; what it says may be held back."""
    worker.obey()
    for _ in range(rng.randint(1, 4)):
        decode = partial(worker.decode, rng.choice([1, 20, 100]))
        step = rng.choice([worker.prefill_one, worker.prefill_one, decode, worker.report, None, None])
        if step is not None:
            step()
        elif rng.random() < 0.5:
            worker.finish_one(ends_alone=True)
        else:
            world.end_pull(worker, is_ok=rng.random() < 0.8)
    if rng.random() < 0.7 and worker.is_connected:
        world.deliver(worker)


def fail(world: World, worker: Worker, rng: random.Random) -> None:
    worker.obey()
    worker.fail_one()


def deliver(world: World, worker: Worker, rng: random.Random) -> None:
    if worker.is_connected:
        worker.report()
        world.deliver(worker)


def connect(world: World, worker: Worker, rng: random.Random) -> None:
    """A worker comes, comes back, or connects anew before its older stream is known to have ended."""
    world.connect(worker)


def cut(world: World, worker: Worker, rng: random.Random) -> None:
    if worker.is_connected:
        worker.obey() if rng.random() < 0.5 else None
        world.cut(worker)


def die(world: World, worker: Worker, rng: random.Random) -> None:
    if worker.is_connected:
        world.cut(worker)
    worker.die()


def adapt(world: World, worker: Worker, rng: random.Random) -> None:
    """A worker's adapters change; what it has of others it finishes."""
    world.change_adapters(worker, frozenset(rng.choice(["", "X", "Y", "XY", "XY"])))


def lose(world: World, worker: Worker, rng: random.Random) -> None:
    world.lose(worker.worker_id)


def drain(world: World, worker: Worker, rng: random.Random) -> None:
    if worker.is_connected:
        worker.is_draining = True
        world.turn([WorkerDraining(worker.worker_id)])


def resume(world: World, worker: Worker, rng: random.Random) -> None:
    world.resume()


def take_over(world: World, worker: Worker, rng: random.Random) -> None:
    world.take_over()
    if rng.random() < 0.5:
        world.say_again()


def say_again(world: World, worker: Worker, rng: random.Random) -> None:
    world.say_again()


def evict(world: World, worker: Worker, rng: random.Random) -> None:
    """The store loses a ticket.

    Of one at a worker a new leader knows nothing: it cancels that run and is told the same run again by its gateway, so
    that the end of the older life may come after the newer one has begun, at the same worker as well.
    """
    if world.store:
        del world.store[rng.choice(list(world.store))]


def lose_sight(world: World, worker: Worker, rng: random.Random) -> None:
    """The store loses the tickets of a worker's runs and another scheduler leads, which hears of them all the same."""
    for request_id in [request_id for request_id, (_, at) in world.store.items() if at == worker.worker_id]:
        del world.store[request_id]
    world.take_over()
    world.connect(worker)
    world.say_again()


def fill_store(world: World, worker: Worker, rng: random.Random) -> None:
    world.num_not_stored = rng.randint(1, 3)


def extend(world: World, worker: Worker, rng: random.Random) -> None:
    world.extend(rng.choice([CONTEXT, 4096, 6000]))


def wait(world: World, worker: Worker, rng: random.Random) -> None:
    world.turn([], elapsed_s=rng.choice([0.5, 0.5, 3.0, 40.0]))


def repeat(world: World, worker: Worker, rng: random.Random) -> None:
    """What is late, double or false: of runs that have ended, or of workers that have nothing to say about them."""
    ended = [request_id for request_id in world.client_of if world.ends[request_id]]
    strangers = [RequestId("nobody.1"), *ended]
    ids = tuple(rng.choices(strangers, k=2))
    here = worker.worker_id
    other = [rid for rid, client in world.client_of.items() if rid not in worker.runs and client.is_open]
    # A live run is spoken of only by a worker that it has never been at.
    foreign = next((rid for rid in other if world.placed_at.get(rid) is None), ids[0])
    events: list[Event] = [
        RequestFinished(
            request_id=rng.choice([*ids, foreign]),
            worker_id=here,
            assignment=rng.randint(1, 3),
            output_tokens=3,
            reason=rng.choice(list(FinishReason)),
        ),
        BatchPrefilled(worker_id=here, assignment=1, request_ids=ids, held=ids),
        BatchPrefilled(worker_id=WorkerId("stranger"), assignment=1, request_ids=ids),
        KvPulled(request_id=rng.choice([*ids, foreign]), target_id=here, assignment=1, is_ok=rng.random() < 0.5),
        RequestCancelled(ids[0]),
        DispatchFailed(worker_id=here, request_ids=ids),
        AdmitFailed(ids),
        WorkerReported(worker_id=WorkerId("stranger"), headroom=headroom()),
        WorkerDraining(WorkerId("stranger")),
        AdaptersChanged(WorkerId("stranger"), frozenset("X")),
        WorkerLost(WorkerId("stranger")),
    ]
    world.turn(rng.sample(events, 4))


ACTIONS: list[Callable[[World, Worker, random.Random], None]] = [
    *[submit] * 4,
    *[work] * 9,
    *[connect] * 4,
    *[deliver, resume, cancel, adapt] * 2,
    *(fail, cut, die, lose, drain, take_over, say_again, evict, lose_sight, fill_store, extend, wait, repeat),
]
actions = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3), st.integers(0, 1000)), min_size=20, max_size=50
)
core_settings = st.builds(
    CoreSettings,
    edges=st.sampled_from(list(EdgeRule)),
    batch_order=st.sampled_from(list(BatchOrder)),
    queue_order=st.sampled_from([*QueueOrder, QueueOrder.SLACK]),
    placement=st.sampled_from([*[Placement.LATE] * 4, *Placement]),
    fill_tokens=st.sampled_from([1, 64, 1024]),
    small_batch_tokens=st.sampled_from([0, 64, 256]),
    max_queued_requests=st.sampled_from([5, 1000, 1000]),
    batch_patience_s=st.just(60.0),
    switch_roles=st.booleans(),
)
CROWDED: list[Callable[[World, Worker, random.Random], None]] = [
    *[crowd] * 10,
    *[press_on] * 30,
    *[resume, lag] * 8,
    *[connect] * 3,
    *(work, deliver, cancel, cut, lose, die, take_over, say_again, evict, lose_sight, wait),
]
crowded_actions = st.lists(
    st.tuples(st.sampled_from(CROWDED), st.integers(0, 3), st.integers(0, 1000)), min_size=40, max_size=90
)
BOTH, PREFILL, DECODE = WorkerRole.BOTH, WorkerRole.PREFILL, WorkerRole.DECODE
fleets = st.sampled_from(
    [(BOTH,), (BOTH, BOTH), (PREFILL, DECODE), (PREFILL, DECODE, BOTH), (PREFILL, DECODE, DECODE), (BOTH, BOTH, BOTH)]
)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    workers = []
    for i, role in enumerate(draw(fleets)):
        capacity, kind = draw(st.integers(500, 6000)), draw(st.sampled_from(["AT1", "AT1", "BT1", "A"]))
        context = draw(st.sampled_from([1024, CONTEXT, 4096]))
        workers.append(Worker(WorkerId(f"w{i}"), capacity, role, kind[:1], kind[1:], context, {}))
    return World(draw(core_settings), workers, draw(outputs))


outputs = st.dictionaries(
    st.sampled_from([request_class.value for request_class in RequestClass]),
    st.lists(st.integers(0, 60), min_size=4, max_size=16).map(tuple),
)
"""What is known of outputs, by chance: what comes may be far longer or shorter."""
SHORT = {request_class.value: (100,) for request_class in RequestClass}


@st.composite
def crowded_worlds(draw: st.DrawFn) -> World:
    """Small workers, and outputs that are believed to be short."""
    workers = []
    for i, role in enumerate(draw(fleets)):
        workers.append(Worker(WorkerId(f"w{i}"), draw(st.integers(170, 500)), role, "A", "", CONTEXT, {}))
    world = World(draw(core_settings), workers, draw(st.sampled_from([SHORT, {"batch": SHORT["batch"]}, {}])))
    for worker in workers:
        world.connect(worker)
    return world


def play(world: World, script: list[tuple]) -> None:
    workers = list(world.workers.values())
    for action, number, seed in script:
        action(world, workers[number % len(workers)], random.Random(seed))
