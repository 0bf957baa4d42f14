"""What a worker says of the orders that it was given, over the streams that brought them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from bucketserve.core.types import MAX_PREEMPTIONS, WorkerRole
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.engine.kv_staging import KvStaging
from bucketserve.rpc.deployment import Deployment
from bucketserve.store.embedded import free_port
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import common_pb2, delivery_pb2, scheduler_pb2
from bucketserve_worker import worker as worker_module
from bucketserve_worker.engine_thread import EngineThread, EngineTurn
from bucketserve_worker.settings import WorkerSettings
from bucketserve_worker.telemetry import WorkerTelemetry
from bucketserve_worker.worker import Worker
from tests.chaos.oracle import expected_tokens
from tests.e2e.observe import eventually

SLOW = FakeSettings(step_s=0.005)


class Said:
    """Stands in the place of the streams to the scheduler and to the gateways."""

    def __init__(self, worker: Worker) -> None:
        self.finished: list[scheduler_pb2.RunFinished] = []
        self.prefilled: list[scheduler_pb2.BatchPrefilled] = []
        self.delivered: list[delivery_pb2.TokenDelivery] = []
        worker.link.finished = self.finished.append  # type: ignore[method-assign]
        worker.link.prefilled = self.prefilled.append  # type: ignore[method-assign]
        worker.delivery.send = lambda address, output: self.delivered.append(output)  # type: ignore[method-assign]

    def tokens(self, run_id: str) -> list[int]:
        """What was delivered of a run, which must have come in order."""
        tokens: list[int] = []
        for output in self.delivered:
            if output.run_id == run_id:
                assert output.first_index == len(tokens)
                tokens += output.token_ids
        return tokens

    def ends(self) -> list[tuple[str, int]]:
        """Whose output has ended, and why, as gateways are told; nothing comes after it."""
        ends = [(output.run_id, output.finished.reason) for output in self.delivered if output.HasField("finished")]
        for run_id, _ in ends:
            assert [output for output in self.delivered if output.run_id == run_id][-1].HasField("finished")
        return ends


@contextlib.asynccontextmanager
async def a_worker(
    turns: list[EngineTurn], engine_settings: FakeSettings = SLOW, role: WorkerRole = WorkerRole.BOTH
) -> AsyncIterator[Worker]:
    with open_telemetry(Service.WORKER, "w", metrics_address=None) as outlets:
        observer = WorkerTelemetry(outlets.log, outlets.metrics, outlets.tracing, "w", "m")
        worker = Worker(WorkerSettings(engine="fake", role=role.value), Deployment(), "w", observer)

        def on_turn(turn: EngineTurn) -> None:
            turns.append(turn)
            worker.on_turn(turn)

        engine = EngineThread(lambda: FakeEngine(engine_settings), on_turn)
        engine.start()
        worker.attach(engine, await engine.started)
        try:
            yield worker
        finally:
            await worker.close()
            await engine.stop()


def a_batch(number: int, run_id: str, max_new_tokens: int, **more) -> scheduler_pb2.BatchAssignment:
    values = {"token_ids": [7, 8], "delivery_address": "127.0.0.1:1", **more}
    spec = scheduler_pb2.RunSpec(max_new_tokens=max_new_tokens, **values)
    run = scheduler_pb2.AssignedRun(run_id=run_id, spec=spec.SerializeToString())
    return scheduler_pb2.BatchAssignment(assignment=number, batch=common_pb2.BatchInfo(batch_id="b"), runs=[run])


async def test_what_is_kept_of_other_workers_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "SWEEP_S", 0.01)
    theirs = KvStaging(1 << 16)
    async with a_worker([]) as worker:
        files = worker._puller._sources._files
        assert theirs.path is not None
        files._open(theirs.path)
        sweeper = asyncio.create_task(worker.sweep())
        theirs.close()
        await eventually(lambda: not files._maps, 10)
        sweeper.cancel()


async def test_the_numbers_of_orders_go_on_over_streams() -> None:
    turns: list[EngineTurn] = []
    async with a_worker(turns) as worker:
        worker._on_batch(a_batch(5, "a.1", 100))
        # Whether the engine has taken it or not, the next stream counts on from it.
        hello = worker._hello()
        assert hello.report.last_assignment == 5
        assert [(run.run_id, run.assignment) for run in hello.running] == [("a.1", 5)]
        # Turns of before the new stream are late, and account for what they did.
        await eventually(lambda: len(turns) > 2, 10)
        assert worker._report().last_assignment == 5
        worker._on_pull(scheduler_pb2.PullKv(run_id="b.1", assignment=6, source_worker_id="away"))
        assert worker._hello().report.last_assignment == 6
        # A pull is in no report.
        assert worker._report().last_assignment == 5
        worker._on_cancel(["a.1"])
        await eventually(lambda: not len(worker.running), 10)


async def test_a_report_says_what_the_step_under_way_computes() -> None:
    turns: list[EngineTurn] = []
    said: list[tuple[int, int]] = []
    async with a_worker(turns, replace(SLOW, max_step_tokens=64)) as worker:

        def note() -> None:
            report = worker._report()
            said.append((report.waiting_prefill_tokens, report.computing_prefill_tokens))

        worker.link.report_soon = note  # type: ignore[method-assign]
        worker._on_batch(a_batch(5, "a.1", 4, token_ids=[*range(150)]))
        await eventually(lambda: len(turns) >= 6, 10)
    assert said[:3] == [(86, 64), (22, 22), (0, 0)]


async def test_what_is_said_of_a_run_names_the_order_that_brought_it() -> None:
    turns: list[EngineTurn] = []
    async with a_worker(turns) as worker:
        said = Said(worker)
        worker._on_batch(a_batch(5, "a.1", 100))
        await eventually(lambda: said.prefilled, 10)
        worker._on_cancel(["a.1"])
        await eventually(lambda: said.finished, 10)
        worker._on_batch(a_batch(9, "a.1", 3))
        await eventually(lambda: len(said.finished) == 2, 10)
        assert [message.assignment for message in said.prefilled] == [5, 9]
        ends = [(message.assignment, message.reason) for message in said.finished]
        assert ends == [(5, common_pb2.FINISH_REASON_CANCELLED), (9, common_pb2.FINISH_REASON_LENGTH)]


async def test_a_run_that_the_scheduler_wants_let_go_ends_preempted_after_its_tokens() -> None:
    turns: list[EngineTurn] = []
    async with a_worker(turns) as worker:
        said = Said(worker)
        worker._on_batch(a_batch(5, "a.1", 1000))
        worker._on_batch(a_batch(6, "b.1", 40))
        await eventually(lambda: len(said.tokens("a.1")) > 3, 10)
        for _ in range(3):
            worker._on_preempt(["a.1", "nobody.1"])
        await eventually(lambda: said.finished, 10)
        (end,) = said.finished
        assert (end.run_id, end.assignment, end.reason) == ("a.1", 5, common_pb2.FINISH_REASON_PREEMPTED)
        tokens = said.tokens("a.1")
        assert tokens == expected_tokens([7, 8], len(tokens), 0.0, 0)
        assert end.output_tokens == len(tokens)
        # The other one has not noticed, and what was let go may come again at once.
        worker._on_batch(a_batch(7, "a.2", 3, token_ids=[7, 8, *tokens], num_resumed_tokens=len(tokens)))
        await eventually(lambda: len(said.finished) == 3, 10)
        assert said.tokens("b.1") == expected_tokens([7, 8], 40, 0.0, 0)
        assert tokens + said.tokens("a.2") == expected_tokens([7, 8], len(tokens) + 3, 0.0, 0)
        length = common_pb2.FINISH_REASON_LENGTH
        preempted = ("a.1", common_pb2.FINISH_REASON_PREEMPTED)
        assert sorted(said.ends()) == [preempted, ("a.2", length), ("b.1", length)]
        assert worker._report().kv_free_tokens == worker._report().kv_total_tokens


async def test_a_run_is_let_go_before_it_has_begun_as_well() -> None:
    turns: list[EngineTurn] = []
    async with a_worker(turns, FakeSettings(step_s=0.005, max_sequences=1)) as worker:
        said = Said(worker)
        worker._on_batch(a_batch(5, "a.1", 1000))
        worker._on_batch(a_batch(6, "b.1", 10))
        await eventually(lambda: len(said.tokens("a.1")) > 3, 10)
        worker._on_preempt(["b.1"])
        await eventually(lambda: said.finished, 10)
        assert (said.finished[0].run_id, said.finished[0].output_tokens) == ("b.1", 0)
        assert said.ends() == [("b.1", common_pb2.FINISH_REASON_PREEMPTED)]
        worker._on_cancel(["a.1"])
        await eventually(lambda: not len(worker.running), 10)


async def test_what_is_held_for_a_decode_worker_is_not_let_go() -> None:
    turns: list[EngineTurn] = []
    async with a_worker(turns, role=WorkerRole.PREFILL) as worker:
        said = Said(worker)
        worker._on_batch(a_batch(5, "a.1", 10))
        await eventually(lambda: len(worker.holder), 10)
        worker._on_preempt(["a.1"])
        await eventually(lambda: any(turn.preempted for turn in turns), 10)
        assert (said.finished, said.ends(), len(worker.holder), len(worker.running)) == ([], [], 1, 1)
        assert worker._report().kv_free_tokens == worker._report().kv_total_tokens - 2
        worker._on_cancel(["a.1"])
        await eventually(lambda: said.finished, 10)
        assert (len(worker.holder), len(worker.running)) == (0, 0)


async def test_runs_that_the_engine_lets_go_are_gone_on_with_and_lose_nothing() -> None:
    turns: list[EngineTurn] = []
    wanted = {f"r{i}": expected_tokens([7, 8 + i], 80, 0.0, 0) for i in range(6)}
    async with a_worker(turns, FakeSettings(step_s=0.001, kv_total_tokens=200)) as worker:
        said = Said(worker)
        tokens: dict[str, list[int]] = {name: [] for name in wanted}
        attempts = dict.fromkeys(wanted, 1)
        for number, name in enumerate(wanted, 1):
            worker._on_batch(a_batch(number, f"{name}.1", 80, token_ids=[7, 7 + number]))
        number = len(wanted)
        seen: list[scheduler_pb2.RunFinished] = []
        while len(seen) < sum(attempts.values()):
            await eventually(lambda: len(said.finished) > len(seen), 10)
            end = said.finished[len(seen)]
            seen.append(end)
            name = end.run_id.partition(".")[0]
            tokens[name] += said.tokens(end.run_id)
            if end.reason == common_pb2.FINISH_REASON_PREEMPTED:
                # As its gateway goes on with it.
                done, number = tokens[name], number + 1
                more = {
                    "token_ids": [7, 8 + int(name[1:]), *done],
                    "num_resumed_tokens": len(done),
                    "num_preemptions": attempts[name],
                }
                attempts[name] += 1
                worker._on_batch(a_batch(number, f"{name}.{attempts[name]}", 80 - len(done), **more))
        assert tokens == wanted
        assert 1 < max(attempts.values()) <= 1 + MAX_PREEMPTIONS
        assert {run_id for run_id, _ in said.ends()} == {end.run_id for end in said.finished}
        assert len(said.ends()) == len(said.finished) == sum(attempts.values())
        assert worker._report().kv_free_tokens == 200


async def test_a_worker_that_leaves_says_that_its_output_has_not_arrived() -> None:
    turns: list[EngineTurn] = []
    async with a_worker(turns) as worker:
        reports: list[scheduler_pb2.WorkerReport] = []
        worker.link.report = reports.append  # type: ignore[method-assign]
        worker.link.report_soon = lambda: reports.append(worker._report())  # type: ignore[method-assign]
        assert not worker._report().is_delivering
        # Nobody is at the address where its output should go.
        worker._on_batch(a_batch(1, "a.1", 3, delivery_address=f"127.0.0.1:{free_port()}"))
        await eventually(lambda: bool(turns) and not len(worker.running), 10)
        await eventually(lambda: bool(reports) and reports[-1].is_delivering, 10)
        worker.link._search.may_come = lambda _: True  # type: ignore[method-assign]
        worker.link.drain()
        drained = asyncio.create_task(worker.drained(30.0))
        # It is given up in the end, which the scheduler hears at once and before that nothing is on its way.
        ends: list[object] = []
        worker.link.finished = ends.append  # type: ignore[method-assign]
        await eventually(lambda: not reports[-1].is_delivering, 20)
        assert [(end.run_id, end.is_retryable) for end in ends] == [("a.1", True)]  # type: ignore[attr-defined]
        worker.link._is_released = True
        assert await asyncio.wait_for(drained, 10)
