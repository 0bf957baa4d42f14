"""What a worker says of the orders that it was given, over the streams that brought them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.rpc.deployment import Deployment
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import common_pb2, scheduler_pb2
from bucketserve_worker.engine_thread import EngineThread, EngineTurn
from bucketserve_worker.settings import WorkerSettings
from bucketserve_worker.telemetry import WorkerTelemetry
from bucketserve_worker.worker import Worker
from tests.e2e.observe import eventually


class Said:
    """Stands in the place of the stream to the scheduler."""

    def __init__(self, worker: Worker) -> None:
        self.finished: list[scheduler_pb2.RunFinished] = []
        self.prefilled: list[scheduler_pb2.BatchPrefilled] = []
        worker.link.finished = self.finished.append  # type: ignore[method-assign]
        worker.link.prefilled = self.prefilled.append  # type: ignore[method-assign]


@contextlib.asynccontextmanager
async def a_worker(turns: list[EngineTurn]) -> AsyncIterator[Worker]:
    with open_telemetry(Service.WORKER, "w", metrics_address=None) as outlets:
        observer = WorkerTelemetry(outlets.log, outlets.metrics, outlets.tracing, "w", "m")
        worker = Worker(WorkerSettings(engine="fake"), Deployment(), "w", observer)

        def on_turn(turn: EngineTurn) -> None:
            turns.append(turn)
            worker.on_turn(turn)

        engine = EngineThread(lambda: FakeEngine(FakeSettings(step_s=0.005)), on_turn)
        engine.start()
        worker.attach(engine, await engine.started)
        try:
            yield worker
        finally:
            await worker.close()
            await engine.stop()


def a_batch(number: int, run_id: str, max_new_tokens: int) -> scheduler_pb2.BatchAssignment:
    spec = scheduler_pb2.RunSpec(token_ids=[7, 8], max_new_tokens=max_new_tokens, delivery_address="127.0.0.1:1")
    run = scheduler_pb2.AssignedRun(run_id=run_id, spec=spec.SerializeToString())
    return scheduler_pb2.BatchAssignment(assignment=number, batch=common_pb2.BatchInfo(batch_id="b"), runs=[run])


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
