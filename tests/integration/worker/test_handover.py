"""Runs that go from one worker to another: only pages that are not there move, and nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest

from bucketserve.core.types import FinishReason
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import Engine
from bucketserve.rpc.convert import finish_reason_to_pb
from bucketserve.rpc.deployment import Deployment
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import common_pb2, delivery_pb2, scheduler_pb2, worker_pb2_grpc
from bucketserve_worker.engine_thread import EngineThread
from bucketserve_worker.kv_source import Fetched
from bucketserve_worker.servicer import WorkerServicer
from bucketserve_worker.settings import WorkerSettings
from bucketserve_worker.telemetry import WorkerTelemetry
from bucketserve_worker.worker import Worker
from tests.chaos.oracle import expected_tokens
from tests.e2e.observe import eventually
from tests.integration.engine.models import engine as packed
from tests.integration.engine.models import generate
from tests.integration.engine.test_equality import prompt

PAGE = 32


def spec_of(token_ids: list[int], max_new_tokens: int, **more) -> scheduler_pb2.RunSpec:
    return scheduler_pb2.RunSpec(
        token_ids=token_ids, max_new_tokens=max_new_tokens, delivery_address="127.0.0.1:1", **more
    )


class Side:
    """A worker without a scheduler and gateways: what it would tell them is kept."""

    def __init__(self, worker: Worker, thread: EngineThread) -> None:
        self.worker, self.thread = worker, thread
        self.held: dict[str, scheduler_pb2.HeldKv] = {}
        self.pulled: list[tuple[str, bool]] = []
        self.finished: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.fetched: list[Fetched | None] = []
        self.address = ""
        worker.link.prefilled = self._prefilled  # type: ignore[method-assign]
        worker.link.pulled = lambda said: self.pulled.append((said.run_id, said.is_ok))  # type: ignore[method-assign]
        worker.link.finished = self._finished  # type: ignore[method-assign]
        worker.delivery.send = self._deliver  # type: ignore[method-assign]

    def _prefilled(self, said: scheduler_pb2.BatchPrefilled) -> None:
        self.held.update({kv.run_id: kv for kv in said.held})

    def _finished(self, said: scheduler_pb2.RunFinished) -> None:
        self.finished[said.run_id] = said.reason

    def _deliver(self, address: str, delivery: delivery_pb2.TokenDelivery) -> None:
        tokens = self.tokens[delivery.run_id]
        tokens[delivery.first_index :] = delivery.token_ids

    def watch_transfers(self) -> None:
        observe = self.worker._puller._on_transfer

        def note(pull: scheduler_pb2.PullKv, fetched: Fetched | None, start_s: float, error: str) -> None:
            self.fetched.append(fetched)
            observe(pull, fetched, start_s, error)

        self.worker._puller._on_transfer = note

    async def prefill(self, runs: dict[str, scheduler_pb2.RunSpec]) -> None:
        """Computes prompts and holds their KV."""
        assigned = [
            scheduler_pb2.AssignedRun(run_id=name, spec=spec.SerializeToString()) for name, spec in runs.items()
        ]
        batch = common_pb2.BatchInfo(batch_id="b")
        self.worker._on_batch(scheduler_pb2.BatchAssignment(assignment=1, batch=batch, runs=assigned))
        await eventually(lambda: self.held.keys() >= runs.keys(), 60)

    def pull(self, source: Side, name: str, transport: str) -> None:
        """Orders the KV of a run here."""
        kv = scheduler_pb2.HeldKv()
        kv.CopyFrom(source.held[name])
        if transport == "grpc":
            kv.ClearField("shared_memory")
        batch = common_pb2.BatchInfo(batch_id="b")
        self.worker._on_pull(
            scheduler_pb2.PullKv(
                run_id=name, batch=batch, source_worker_id="source", source_address=source.address, kv=kv, assignment=2
            )
        )

    def is_clean(self) -> bool:
        """Whether nothing of anybody is here."""
        headroom = self.worker._headroom
        counts = (len(self.worker.running), len(self.worker._puller), len(self.worker.holder))
        is_free = headroom.kv_free_tokens == headroom.kv_total_tokens
        return is_free and counts == (0, 0, 0) and not self.thread.staging.num_blocks


@asynccontextmanager
async def sides(source: Engine, target: Engine) -> AsyncIterator[tuple[Side, Side]]:
    made = []
    with open_telemetry(Service.WORKER, "w", metrics_address=None) as outlets:
        for name, role, engine in (("source", "prefill", source), ("target", "decode", target)):
            observer = WorkerTelemetry(outlets.log, outlets.metrics, outlets.tracing, name, "m")
            worker = Worker(WorkerSettings(engine="fake", role=role), Deployment(), name, observer)
            thread = EngineThread(lambda engine=engine: engine, worker.on_turn)  # type: ignore[misc]
            side = Side(worker, thread)
            thread.start()
            worker.attach(thread, await thread.started)
            side.watch_transfers()
            made.append(side)
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(made[0].worker.holder, Deployment()), server)
        made[0].address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield made[0], made[1]
        finally:
            for side in made:
                await side.worker.close()
                await side.thread.stop()
            await server.stop(0)


@pytest.mark.engine
@pytest.mark.parametrize("transport", ["shared_memory", "grpc"])
async def test_of_32_that_begin_alike_only_the_own_pages_move(transport: str) -> None:
    system = prompt(4 * PAGE, seed=2)
    prompts = {f"r{i}": [*system, *prompt(1 + 2 * i, seed=i)] for i in range(32)}
    source, target = packed("llama", num_threads=1), packed("llama", num_threads=1)
    async with sides(source, target) as (left, right):
        await left.prefill({name: spec_of(token_ids, 6) for name, token_ids in prompts.items()})
        for number, name in enumerate(prompts):
            right.pull(left, name, transport)
            if not number:
                await eventually(lambda: len(right.pulled) == 1, 60)
        await eventually(lambda: len(right.finished) == 32, 60)
        for name in prompts:
            # The scheduler's word.
            left.worker._on_cancel([name])
        await eventually(lambda: left.is_clean() and right.is_clean(), 60)
    assert sorted(right.pulled) == sorted((name, True) for name in prompts)
    assert right.tokens == {name: generate("llama", token_ids, 6) for name, token_ids in prompts.items()}
    moved = [fetched.kv_bytes for fetched in right.fetched if fetched is not None]
    lengths = [len(token_ids) - (4 * PAGE if number else 0) for number, token_ids in enumerate(prompts.values())]
    assert sorted(moved) == sorted(number * source.info.kv_bytes_per_token for number in lengths)
    assert {fetched.transport for fetched in right.fetched if fetched is not None} == {transport}


@pytest.mark.parametrize("transport", ["shared_memory", "grpc"])
async def test_nothing_of_another_tenant_s_is_taken_as_known(transport: str) -> None:
    token_ids = list(range(5, 5 + 3 * PAGE))
    async with sides(FakeEngine(), FakeEngine()) as (left, right):
        salts = {"r0": b"a", "r1": b"b", "r2": b"a"}
        await left.prefill({name: spec_of(token_ids, 4000, prefix_salt=salt) for name, salt in salts.items()})
        for number, name in enumerate(salts, start=1):
            right.pull(left, name, transport)
            await eventually(lambda number=number: len(right.pulled) == number, 20)
        assert [fetched.num_known_pages for fetched in right.fetched if fetched] == [0, 0, 3]
        for side in (left, right):
            side.worker._on_cancel(list(salts))
        await eventually(lambda: left.is_clean() and right.is_clean(), 20)


class Forgetful(FakeEngine):
    """Gives pages up between the question what is here and the coming of the rest."""

    def known_pages(self, token_ids: Sequence[int], salt: bytes) -> int:
        return 0 if threading.current_thread().name == "engine" else 2


LONG = list(range(9, 9 + 2 * PAGE + 5))


@pytest.mark.parametrize("transport", ["shared_memory", "grpc"])
async def test_pages_that_are_given_up_meanwhile_come_after_all(transport: str) -> None:
    async with sides(FakeEngine(), Forgetful()) as (left, right):
        await left.prefill({"r": spec_of(LONG, 6)})
        right.pull(left, "r", transport)
        await eventually(lambda: right.finished, 20)
        assert [fetched.num_known_pages for fetched in right.fetched if fetched] == [2, 0]
        assert (right.pulled, right.finished) == ([("r", True)], {"r": finish_reason_to_pb(FinishReason.LENGTH)})
        assert right.tokens["r"] == expected_tokens(LONG, 6, 0.0, 0)
        left.worker._on_cancel(["r"])
        await eventually(lambda: left.is_clean() and right.is_clean(), 20)


@pytest.mark.parametrize(
    "call_off",
    [
        lambda side: side.worker._on_cancel(["r"]),
        lambda side: side.worker._hello(),
        lambda side: side.worker._on_gateway_lost("127.0.0.1:1", {"r"}),
    ],
    ids=["cancelled", "a new stream", "its gateway is lost"],
)
async def test_what_was_called_off_while_the_engine_looked_at_it_does_not_begin_anew(
    call_off: Callable[[Side], object],
) -> None:
    async with sides(FakeEngine(), Forgetful()) as (left, right):
        await left.prefill({"r": spec_of(LONG, 6)})
        taken = right.worker.on_turn
        is_through = asyncio.Event()

        def on_turn(turn) -> None:
            if turn.resumed:
                call_off(right)
                is_through.set()
            taken(turn)

        right.thread._on_turn = on_turn
        right.pull(left, "r", "shared_memory")
        await asyncio.wait_for(is_through.wait(), 20)
        left.worker._on_cancel(["r"])
        await eventually(lambda: left.is_clean() and right.is_clean(), 20)
        # It came once, and could not be taken.
        assert [fetched is None for fetched in right.fetched] == [False, True]
        assert right.pulled == [("r", False)]
        assert right.tokens["r"][:1] == expected_tokens(LONG, 1, 0.0, 0)
        assert right.finished.keys() == {"r"}


@pytest.mark.parametrize("transport", ["shared_memory", "grpc"])
async def test_a_page_that_was_spoiled_ends_the_attempt(transport: str) -> None:
    async with sides(FakeEngine(), FakeEngine()) as (left, right):
        await left.prefill({"r": spec_of(LONG, 6)})
        held = left.worker.holder.find("r")
        assert held is not None
        held.handed_over.block.data[PAGE * 8 + 3] ^= 1
        right.pull(left, "r", transport)
        await eventually(lambda: right.pulled, 20)
        assert (right.pulled, right.fetched) == ([("r", False)], [None])
        left.worker._on_cancel(["r"])
        await eventually(lambda: left.is_clean() and right.is_clean(), 20)


@pytest.mark.parametrize("transport", ["shared_memory", "grpc"])
async def test_a_pull_that_is_cancelled_leaves_nothing_wherever_it_is(transport: str) -> None:
    async with sides(FakeEngine(), FakeEngine(FakeSettings(kv_total_tokens=1000))) as (left, right):
        names = [f"r{i}" for i in range(20)]
        await left.prefill({name: spec_of(LONG, 50) for name in names})
        for number, name in enumerate(names):
            right.pull(left, name, transport)
            for _ in range(number % 7):
                await asyncio.sleep(0.0005 * (number % 3))
            right.worker._on_cancel([name])
            left.worker._on_cancel([name])
        await eventually(lambda: left.is_clean() and right.is_clean(), 20)
        assert {name for name, _ in right.pulled} == set(names)


async def test_kv_of_a_version_that_hands_over_otherwise_is_refused() -> None:
    async with sides(FakeEngine(), FakeEngine()) as (left, right):
        await left.prefill({"r": spec_of(LONG, 6)})
        left.held["r"].layout = "fake"
        right.pull(left, "r", "shared_memory")
        await eventually(lambda: right.pulled, 20)
        assert (right.pulled, right.fetched) == ([("r", False)], [None])
        assert left.worker.holder.find("r") is not None
        left.worker._on_cancel(["r"])
        await eventually(lambda: left.is_clean() and right.is_clean(), 20)
