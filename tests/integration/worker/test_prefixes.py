"""What a worker says it had of a prompt, with an engine that keeps prefixes."""

from __future__ import annotations

import pytest

from bucketserve.engine.kv_memory import PAGE_TOKENS
from bucketserve.rpc.deployment import Deployment
from bucketserve.telemetry.names import Service
from bucketserve.telemetry.process import open_telemetry
from bucketserve.v1 import common_pb2, scheduler_pb2
from bucketserve_worker.engine_thread import EngineThread
from bucketserve_worker.settings import WorkerSettings
from bucketserve_worker.telemetry import WorkerTelemetry
from bucketserve_worker.worker import Worker
from tests.e2e.observe import eventually
from tests.integration.engine.models import engine
from tests.integration.engine.test_equality import prompt

pytestmark = pytest.mark.engine


async def test_a_worker_says_how_much_of_each_prompt_it_had() -> None:
    said: list[scheduler_pb2.BatchPrefilled] = []
    shared = prompt(3 * PAGE_TOKENS, seed=9)
    with open_telemetry(Service.WORKER, "w", metrics_address=None) as outlets:
        observer = WorkerTelemetry(outlets.log, outlets.metrics, outlets.tracing, "w", "m")
        worker = Worker(WorkerSettings(engine="fake"), Deployment(), "w", observer)
        worker.link.prefilled = said.append  # type: ignore[method-assign]
        thread = EngineThread(lambda: engine("llama", kv_budget_tokens=1000), worker.on_turn)
        thread.start()
        worker.attach(thread, await thread.started)
        try:
            for number, tails in enumerate(([5], [20, 1]), start=1):
                runs = []
                for tail in tails:
                    spec = scheduler_pb2.RunSpec(
                        token_ids=[*shared, *prompt(tail, tail)], max_new_tokens=2, delivery_address="127.0.0.1:1"
                    )
                    run_id = f"r{number}.{tail}"
                    runs.append(scheduler_pb2.AssignedRun(run_id=run_id, spec=spec.SerializeToString()))
                batch = common_pb2.BatchInfo(batch_id="b")
                worker._on_batch(scheduler_pb2.BatchAssignment(assignment=number, batch=batch, runs=runs))
                await eventually(lambda: not len(worker.running), 20)
        finally:
            await worker.close()
            await thread.stop()
    had = {run_id: tokens for m in said for run_id, tokens in zip(m.run_ids, m.cached_prompt_tokens, strict=True)}
    assert had == {"r1.5": 0, "r2.20": len(shared), "r2.1": len(shared)}
