"""What arrives while a turn is being written, and what is late of something older, at the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from bucketserve.core.types import BatchId, RequestId, WorkerId
from bucketserve.ports import Admit, Dispatch, Leadership, SetOutputs, Write
from bucketserve.store.memory import MemoryState, MemoryStore
from bucketserve.v1 import common_pb2, scheduler_pb2
from bucketserve_scheduler.loop import SchedulingLoop
from bucketserve_scheduler.peers import GatewayPeer, GatewayPeers, WorkerPeer
from tests.e2e.observe import eventually
from tests.integration.scheduler.builders import a_gateway, a_loop, a_run, hello, report, running


class SlowStore(MemoryStore):
    """Takes what it is given to write when it is allowed to."""

    def __init__(self, state: MemoryState | None = None) -> None:
        super().__init__(state)
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.is_writing = asyncio.Event()

    async def apply(self, leadership: Leadership, writes: Sequence[Write]) -> Sequence[frozenset[RequestId]]:
        self.is_writing.set()
        await self.may_write.wait()
        return await super().apply(leadership, writes)


class FullStore(MemoryStore):
    """Has no room for a ticket, as a server that is out of memory: not even for one that it has."""

    async def apply(self, leadership: Leadership, writes: Sequence[Write]) -> Sequence[frozenset[RequestId]]:
        return [
            frozenset() if isinstance(write, Admit) else (await super(FullStore, self).apply(leadership, [write]))[0]
            for write in writes
        ]


class Worker:
    """What comes on a worker's stream."""

    def __init__(self, loop: SchedulingLoop, peer: WorkerPeer) -> None:
        self.loop, self.peer = loop, peer
        self.heard: list[scheduler_pb2.WorkResponse] = []
        self.task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for message in self.peer.outbox.messages():
            self.heard.append(message)

    @property
    def batches(self) -> list[scheduler_pb2.BatchAssignment]:
        return [message.batch for message in self.heard if message.WhichOneof("message") == "batch"]

    @property
    def cancelled(self) -> list[str]:
        return [run_id for message in self.heard for run_id in message.cancel.run_ids]

    async def say(self, **message) -> None:
        await self.loop.hear(self.peer, scheduler_pb2.WorkRequest(**message))

    async def finish(self, run_id: str, assignment: int, reason: common_pb2.FinishReason) -> None:
        await self.say(finished=scheduler_pb2.RunFinished(run_id=run_id, assignment=assignment, reason=reason))


def said_to(peer: GatewayPeer) -> list[tuple[str, str]]:
    """Returns what a gateway has been told, as (kind, run id)."""
    messages = [message for message in peer.outbox._queue._queue if message is not None]  # type: ignore[attr-defined]
    kinds = [str(message.WhichOneof("message")) for message in messages]
    return [(kind, getattr(message, kind).run_id) for kind, message in zip(kinds, messages, strict=True)]


async def test_a_stream_that_the_core_does_not_know_yet_gets_nothing() -> None:
    # A batch is decided for the worker's older stream and written while it connects anew: by its hello it has nothing.
    store = SlowStore()
    gateways, gateway = GatewayPeers(), a_gateway()
    gateways.connect(gateway)
    with a_loop(store, gateways) as loop:
        async with running(loop):
            first = Worker(loop, await loop.connect(hello()))
            await eventually(lambda: first.peer.is_joined, 5)
            store.may_write.clear()
            await loop.submit(a_run(1))
            await asyncio.wait_for(store.is_writing.wait(), 5)
            # The runs of a batch that it had received before are at it; what is decided now goes after that.
            second = Worker(loop, await loop.connect(hello(7)))
            await asyncio.sleep(0.05)
            store.may_write.set()
            await eventually(lambda: ("dropped", "r1.1") in said_to(gateway), 5)
            assert second.batches == []
            await loop.submit(a_run(2))
            await eventually(lambda: second.batches, 5)
            (batch,) = second.batches
            assert (batch.assignment, [run.run_id for run in batch.runs]) == (8, ["r2.1"])


async def test_the_end_of_an_older_life_is_not_that_of_the_newer_one() -> None:
    # The store lost the ticket of a run, and another scheduler leads: it cancels the run, and is told of it again.
    gateways, gateway = GatewayPeers(), a_gateway()
    gateways.connect(gateway)
    with a_loop(MemoryStore(), gateways) as loop:
        async with running(loop):
            at_worker = [scheduler_pb2.RunningRun(run_id="r1.1", assignment=4)]
            worker = Worker(loop, await loop.connect(hello(4, running=at_worker)))
            await eventually(lambda: worker.cancelled == ["r1.1"], 5)
            await loop.submit(a_run(1, is_admitted=True))
            await eventually(lambda: worker.batches, 5)
            (batch,) = worker.batches
            # That it was prefilled was on its way as well.
            await worker.say(prefilled=scheduler_pb2.BatchPrefilled(assignment=4, run_ids=["r1.1"]))
            await worker.finish("r1.1", 4, common_pb2.FINISH_REASON_CANCELLED)
            await worker.say(report=report(batch.assignment))
            await asyncio.sleep(0.3)
            assert loop.core.status().num_running == 1
            assert "dropped" not in [kind for kind, _ in said_to(gateway)]
            await worker.finish("r1.1", batch.assignment, common_pb2.FINISH_REASON_LENGTH)
            await eventually(lambda: loop.core.status().num_running == 0, 5)
            assert loop.num_finished == 1


async def test_a_gateway_that_is_back_while_its_run_is_stopped_hears_of_the_end_at_once() -> None:
    gateways, gateway = GatewayPeers(), a_gateway()
    gateways.connect(gateway)
    with a_loop(MemoryStore(), gateways, gateway_lease_s=0.1) as loop:
        async with running(loop):
            worker = Worker(loop, await loop.connect(hello()))
            await loop.submit(a_run(1))
            await eventually(lambda: worker.batches, 5)
            gateways.disconnect(gateway, loop._deps.clock())
            await eventually(lambda: worker.cancelled == ["r1.1"], 5)
            back = a_gateway()
            gateways.connect(back)
            await loop.submit(a_run(1, is_admitted=True))
            await eventually(lambda: ("dispatched", "r1.1") in said_to(back), 5)
            await worker.finish("r1.1", worker.batches[0].assignment, common_pb2.FINISH_REASON_CANCELLED)
            await eventually(lambda: ("dropped", "r1.1") in said_to(back), 5)


@pytest.mark.parametrize("is_stored", [True, False])
async def test_a_full_store_refuses_only_what_it_does_not_have(is_stored: bool) -> None:
    # An earlier leader stored the ticket: admitting it again finds no room, and it is dispatched all the same.
    state = MemoryState()
    gateways, gateway = GatewayPeers(), a_gateway()
    gateways.connect(gateway)
    if is_stored:
        earlier = MemoryStore(state)
        leadership = await earlier.lead("earlier", 5.0)
        assert leadership is not None
        ticket = a_run(1).ticket
        admit = Admit(request_id=RequestId("r1.1"), prefill_tokens=2, ticket=ticket.SerializeToString())
        await earlier.apply(leadership, [admit])
        await earlier.resign(leadership)
    with a_loop(FullStore(state), gateways) as loop:
        async with running(loop):
            worker = Worker(loop, await loop.connect(hello()))
            await eventually(lambda: worker.peer.is_joined, 5)
            await loop.submit(a_run(1, is_admitted=True))
            wanted = ("dispatched", "r1.1") if is_stored else ("refused", "r1.1")
            await eventually(lambda: wanted in said_to(gateway), 5)
            # A refusal would come with the next turn.
            await asyncio.sleep(0.4)
            assert {"dispatched", "refused"} & {kind for kind, _ in said_to(gateway)} == {wanted[0]}
            assert [[run.run_id for run in batch.runs] for batch in worker.batches] == [["r1.1"]] * is_stored


async def test_a_run_that_a_late_write_has_placed_is_dispatched_all_the_same() -> None:
    # The way to the store was broken: what was sent before, and seemed lost, arrives.
    state, gateways, gateway = MemoryState(), GatewayPeers(), a_gateway()
    gateways.connect(gateway)
    with a_loop(MemoryStore(state), gateways) as loop:
        async with running(loop):
            await loop.submit(a_run(1))
            await eventually(lambda: ("accepted", "r1.1") in said_to(gateway), 5)
            assert loop.leadership is not None
            late = Dispatch(worker_id=WorkerId("w"), batch_id=BatchId("of before"), request_ids=(RequestId("r1.1"),))
            assert await MemoryStore(state).apply(loop.leadership, [late]) == [{"r1.1"}]
            worker = Worker(loop, await loop.connect(hello()))
            await eventually(lambda: worker.batches, 5)
            assert [[run.run_id for run in batch.runs] for batch in worker.batches] == [["r1.1"]]
            assert state.places["r1.1"] == ("w", worker.batches[0].batch.batch_id)


async def test_a_new_leader_learns_what_was_known_of_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = MemoryStore(state := MemoryState())
    leadership = await earlier.lead("earlier", 5.0)
    assert leadership is not None
    await earlier.apply(leadership, [SetOutputs(counts={"interactive 3": (1, 2)})])
    await earlier.resign(leadership)
    with a_loop(MemoryStore(state)) as loop:
        restored: list[object] = []
        restore = loop.core.restore
        monkeypatch.setattr(loop.core, "restore", lambda **kept: (restored.append(kept["outputs"]), restore(**kept)))
        async with running(loop):
            await eventually(lambda: restored, 5)
    assert restored == [{"interactive 3": (1, 2)}]
