"""A simulated worker whose role is switched: what it has goes on as it was, and what it holds it holds once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from bucketserve.core.messages import (
    AdmitRequest,
    BatchPrefilled,
    Decision,
    DispatchBatch,
    Event,
    PullKv,
    RequestSubmitted,
    SwitchRole,
)
from bucketserve.core.types import Batch, BatchId, Bucket, LimitedBy, RequestId, WorkerId, WorkerRole
from bucketserve.sim.cluster import aggregated, build_workers, parse_cluster
from bucketserve.sim.driver import Simulation
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.experiment import Experiment, run_experiment
from bucketserve.sim.latency import CostMode, load_device
from bucketserve.sim.policies import find_policy, with_settings
from bucketserve.sim.sequence import SimSequence, WorkerMode
from bucketserve.sim.slo import Slo
from bucketserve.sim.worker import SimWorker
from bucketserve.sim.workload import Arrivals, SimRequest, Workload

DEVICE = load_device("a100-40gb-13b")
PROMPT, OUTPUT = 600, 100
WORKER = WorkerId("p0000")


def pull(request_id: RequestId, worker_id: WorkerId) -> PullKv:
    return PullKv(request_id=request_id, source_id=worker_id, target_id=worker_id, assignment=2)


class Switches:
    """Sends the first request to a prefill worker, makes it a decode worker, and lets it go on with what it holds."""

    def __init__(self) -> None:
        self.held: list[str] = []

    def step(self, events: Sequence[Event], now_s: float) -> Decision:
        commands: list = []
        for event in events:
            if isinstance(event, RequestSubmitted):
                request = event.request
                batch = Batch(
                    batch_id=BatchId("b"),
                    worker_id=WORKER,
                    assignment=1,
                    bucket=Bucket(1, 4096),
                    request_ids=(request.request_id,),
                    prefill_tokens=PROMPT,
                    padded_tokens=PROMPT,
                    reserved_kv_tokens=PROMPT,
                    limited_by=LimitedBy.SUPPLY,
                )
                commands += [
                    AdmitRequest(request),
                    DispatchBatch(batch),
                    SwitchRole(WORKER, WorkerRole.DECODE),
                ]
            if isinstance(event, BatchPrefilled):
                self.held += event.held
                commands += [pull(one, event.worker_id) for one in event.held]
        return Decision(tuple(commands))


def test_what_a_worker_prefilled_before_its_role_changed_it_holds_and_goes_on_with_in_place() -> None:
    policy, memory = Switches(), PROMPT + OUTPUT
    device = replace(DEVICE, kv_total_tokens={1: memory})
    workload = Workload("one", (SimRequest(0.0, PROMPT, OUTPUT, OUTPUT),), 0, 0)
    workers = build_workers(parse_cluster("1p1d"), device, CostMode.PACKED, WorkerMode())
    simulation = Simulation(policy, workers, workload, device, Slo())
    (record,) = simulation.run().records.values()
    assert policy.held == ["r0000000"]
    worker = simulation.workers[WORKER]
    assert PROMPT < worker.max_kv_used <= memory
    assert worker.headroom().kv_free_tokens == memory
    # Nothing moves, so that it takes no time.
    latency = device.latency[1]
    decode_s = latency.decode_run_s(OUTPUT - 1, 1, PROMPT + 1)
    assert record.end_s == pytest.approx(latency.step_s(PROMPT, PROMPT**2, 0, 0) + decode_s)


def test_workers_that_change_sides_are_never_overfilled() -> None:
    settings = {"switch_roles": "true"}
    for layout, rate_rps in (("2p2d", 1.0), ("3p1d", 1.81), ("3p1d", 3.0)):
        experiment = Experiment(
            policy=with_settings(find_policy("adaptive"), settings),
            source="mixed",
            source_name="mixed",
            device=DEVICE,
            num_requests=150,
            min_span_s=0.0,
            seed=1,
            arrivals=Arrivals.GAMMA,
            burstiness_cv=3.0,
        )
        report = run_experiment(experiment, parse_cluster(layout), rate_rps)
        assert report.num_requests == 150


def test_what_is_expected_and_never_fits_is_an_error() -> None:
    (spec,) = build_workers(aggregated(1), replace(DEVICE, kv_total_tokens={1: 1000}), CostMode.PACKED, WorkerMode())
    worker = SimWorker(spec)
    for i in range(2):
        worker.expect(
            SimSequence(
                request_id=RequestId(f"r{i}"),
                prompt_tokens=PROMPT,
                output_tokens=OUTPUT,
                max_new_tokens=OUTPUT,
                batch_id=BatchId("b"),
                assignment=1,
            )
        )
    with pytest.raises(SimulationError, match="1200 KV tokens in a memory of 1000"):
        worker.plan(0.0)
