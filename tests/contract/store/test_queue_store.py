"""What every store does. Each test runs on memory and on a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from bucketserve.core.errors import StaleEpochError
from bucketserve.core.types import BatchId, RequestId, WorkerId
from bucketserve.ports import Admit, Dispatch, Leadership, Place, QueueStore, Remove, SetEdges, SetOutputs

NewStore = Callable[[], QueueStore]


def admit(name: str, length: int = 10, ticket: bytes = b"t") -> Admit:
    return Admit(request_id=RequestId(name), prefill_tokens=length, ticket=ticket)


def dispatch(*names: str, worker: str = "w", batch: str = "b") -> Dispatch:
    return Dispatch(
        worker_id=WorkerId(worker), batch_id=BatchId(batch), request_ids=tuple(RequestId(name) for name in names)
    )


def remove(*names: str) -> Remove:
    return Remove(request_ids=tuple(RequestId(name) for name in names))


async def led(store: QueueStore, owner: str = "a", ttl_s: float = 30.0, epoch: int = 0) -> Leadership:
    leadership = await store.lead(owner, ttl_s, epoch)
    assert leadership is not None
    return leadership


async def held(store: QueueStore, leadership: Leadership) -> dict[str, tuple[bytes, str | None, str | None]]:
    snapshot = await store.load(leadership)
    return {t.request_id: (t.ticket, t.worker_id, t.batch_id) for t in snapshot.tickets}


async def test_tickets_are_read_back_as_they_were_written(new_store: NewStore) -> None:
    store = new_store()
    lead = await led(store)
    ticket = bytes(range(256)) + b":\n"
    effects = await store.apply(
        lead, [admit("r1", ticket=ticket), admit("r 2"), SetEdges(edges=(16, 128)), dispatch("r1", "missing")]
    )
    assert effects == [{"r1"}, {"r 2"}, frozenset(), {"r1"}]
    assert await held(store, lead) == {"r1": (ticket, "w", "b"), "r 2": (b"t", None, None)}
    assert (await store.load(lead)).edges == (16, 128)
    assert await store.apply(lead, [remove("r1", "missing")]) == [{"r1"}]
    assert await held(store, lead) == {"r 2": (b"t", None, None)}


async def test_a_placed_ticket_is_at_its_worker_from_wherever_it_was(new_store: NewStore) -> None:
    store = new_store()
    lead = await led(store)
    await store.apply(lead, [admit("there"), admit("waits"), dispatch("there")])
    places = [
        Place(request_id=RequestId(name), worker_id=WorkerId("d"), batch_id=BatchId("b"))
        for name in ("there", "waits", "unknown")
    ]
    for _ in range(2):
        assert await store.apply(lead, places) == [{"there"}, {"waits"}, frozenset()]
        assert await held(store, lead) == {"there": (b"t", "d", "b"), "waits": (b"t", "d", "b")}
    # It does not wait any more, so that no batch can have it.
    assert await store.apply(lead, [dispatch("waits", worker="w2")]) == [frozenset()]


async def test_writing_twice_is_writing_once(new_store: NewStore) -> None:
    store = new_store()
    lead = await led(store)
    writes = [admit("r1"), admit("r2"), dispatch("r1"), SetEdges(edges=(8,))]
    first = await store.apply(lead, writes)
    state = await held(store, lead)
    assert await store.apply(lead, writes) == first
    assert await held(store, lead) == state


async def test_what_is_known_of_outputs_is_replaced_part_by_part(new_store: NewStore) -> None:
    store = new_store()
    lead = await led(store)
    assert (await store.load(lead)).outputs == {}
    first = SetOutputs(counts={"interactive 3": (0, 12, 7), "batch 0": (5,)})
    for _ in range(2):
        assert await store.apply(lead, [first, SetOutputs(counts={})]) == [frozenset(), frozenset()]
    assert (await store.load(lead)).outputs == first.counts
    await store.apply(lead, [SetOutputs(counts={"batch 0": (6, 1), "batch 1": ()})])
    # Another leader finds it, and it is no ticket.
    await store.resign(lead)
    other = new_store()
    snapshot = await other.load(await led(other, "b"))
    assert snapshot.outputs == {"interactive 3": (0, 12, 7), "batch 0": (6, 1), "batch 1": ()}
    assert (snapshot.tickets, snapshot.edges) == ((), ())


async def test_an_admission_that_comes_again_late_changes_nothing(new_store: NewStore) -> None:
    store = new_store()
    lead = await led(store)
    await store.apply(lead, [admit("r"), dispatch("r")])
    # The first try was thought lost; the server was only slow.
    assert await store.apply(lead, [admit("r")]) == [{"r"}]
    assert await held(store, lead) == {"r": (b"t", "w", "b")}
    assert await store.apply(lead, [dispatch("r", worker="w2")]) == [frozenset()]


async def test_one_leader_at_a_time_and_epochs_grow(new_store: NewStore) -> None:
    store, other = new_store(), new_store()
    first = await led(store, "a")
    assert await other.lead("b", 30.0) is None
    assert await led(store, "a", epoch=first.epoch) == first
    await store.resign(first)
    second = await led(other, "b")
    assert second.epoch > first.epoch
    assert await store.lead("a", 30.0) is None


async def test_an_expired_leader_is_replaced_and_fenced(new_store: NewStore) -> None:
    store, other = new_store(), new_store()
    old = await led(store, "a", ttl_s=0.05)
    await store.apply(old, [admit("r1")])
    await asyncio.sleep(0.1)
    new = await led(other, "b")
    for writes in (
        [admit("r2")],
        [dispatch("r1")],
        [remove("r1")],
        [SetEdges(edges=(4,))],
        [SetOutputs(counts={"a": (1,)})],
    ):
        with pytest.raises(StaleEpochError):
            await store.apply(old, writes)
    with pytest.raises(StaleEpochError):
        await store.load(old)
    assert await held(other, new) == {"r1": (b"t", None, None)}
    # What is not held any more can't be given up.
    await store.resign(old)
    assert await store.lead("a", 30.0) is None


async def test_an_expired_leader_that_nobody_replaced_goes_on(new_store: NewStore) -> None:
    store = new_store()
    old = await led(store, "a", ttl_s=0.05)
    await asyncio.sleep(0.1)
    assert await led(store, "a", epoch=old.epoch) == old


async def test_whoever_leads_anew_is_fenced_off_from_what_it_wrote_before(new_store: NewStore) -> None:
    store = new_store()
    old = await led(store, "a")
    await store.apply(old, [admit("r")])
    # It has lost sight of it, not the store.
    new = await led(store, "a")
    assert new.epoch > old.epoch
    with pytest.raises(StaleEpochError):
        await store.apply(old, [dispatch("r")])
    await store.resign(old)
    assert await store.lead("a", 30.0, old.epoch) is None
    assert await led(store, "a", epoch=new.epoch) == new
    assert await held(store, new) == {"r": (b"t", None, None)}


async def test_two_dispatches_never_get_the_same_ticket(new_store: NewStore) -> None:
    store, other = new_store(), new_store()
    lead = await led(store)
    names = [f"r{i}" for i in range(200)]
    await store.apply(lead, [admit(name) for name in names])
    got = await asyncio.gather(
        *(
            (store if i % 2 else other).apply(lead, [dispatch(*names[i : i + 40], worker=f"w{i % 2}", batch=f"b{i}")])
            for i in range(0, 170, 10)
        )
    )
    dispatched = [name for effects in got for name in effects[0]]
    assert len(dispatched) == len(set(dispatched)) == 200
    assert all(worker is not None for _, worker, _ in (await held(store, lead)).values())


async def test_many_tickets_survive_a_page_wise_load(new_store: NewStore) -> None:
    store = new_store()
    lead = await led(store)
    await store.apply(lead, [admit(f"r{i}", length=i) for i in range(5_000)])
    assert len(await held(store, lead)) == 5_000
