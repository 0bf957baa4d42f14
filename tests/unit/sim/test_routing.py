"""A load balancer in front of the workers, simulated: queues of their own, their prefix caches, ours beside it."""

from __future__ import annotations

import pytest

from bucketserve.sim.cluster import aggregated, build_workers
from bucketserve.sim.driver import Simulation
from bucketserve.sim.experiment import Experiment, run_experiment
from bucketserve.sim.latency import CostMode, load_device
from bucketserve.sim.policies import POLICIES, find_policy
from bucketserve.sim.policy_spec import PolicyContext, PolicySpec
from bucketserve.sim.sequence import KvPolicy
from bucketserve.sim.slo import Slo
from bucketserve.sim.workload import Arrivals, Lengths, SimRequest, Workload

ROUTERS = ("round-robin", "least-loaded", "least-prefill")
A100, H100 = load_device("a100-80gb-13b"), load_device("h100-80gb-8b")


def run(policy: PolicySpec, requests: list[SimRequest], num_workers: int):
    core = policy.build(PolicyContext(A100.context_tokens, 0, lambda request_id: requests[int(request_id[1:])]))
    workers = build_workers(aggregated(num_workers), A100, CostMode.PACKED, policy.mode)
    ledger = Simulation(core, workers, Workload("given", tuple(requests), 0, 0), A100, Slo()).run()
    return [ledger.records[f"r{i:07d}"] for i in range(len(requests))]


@pytest.mark.parametrize("step_tokens", [0, 512])
def test_a_request_waits_at_the_worker_whose_turn_it_was_though_the_other_is_idle(step_tokens: int) -> None:
    policy = find_policy("round-robin")
    policy = policy.sized(step_tokens) if step_tokens and policy.sized else policy
    # Every other one is long: all long ones come to the same worker, the short ones to the idle one.
    requests = [SimRequest(0.001 * i, (4000, 20)[i % 2], 2, 2) for i in range(20)]
    records = run(policy, requests, 2)
    long, short = records[::2], records[1::2]
    assert max(record.ttft_s for record in short) < min(record.ttft_s for record in long)
    alone_s = A100.latency[1].prefill_s(4000)
    assert long[-1].ttft_s > 8 * alone_s
    # First come, first served.
    assert [record.ttft_s + record.request.arrival_s for record in long] == sorted(
        record.ttft_s + record.request.arrival_s for record in long
    )


def test_least_loaded_sees_that_requests_are_still_there() -> None:
    requests = [SimRequest(0.1 * i, 100, (1000, 2)[i % 2], 1000) for i in range(20)]
    by_turn, by_load = (run(find_policy(name), requests, 2) for name in ROUTERS[:2])
    # By turn all long outputs are at one worker, whose steps take longer for it.
    assert max(r.end_s for r in by_load) < max(r.end_s for r in by_turn)


@pytest.mark.parametrize("name", ROUTERS)
def test_with_a_step_size_the_workers_loop_is_vllm_s(name: str) -> None:
    served, sized = POLICIES[name], POLICIES[name].sized
    assert served.mode == POLICIES["adaptive"].mode
    assert sized is not None
    assert sized(512).mode == POLICIES["chunked"].sized(512).mode
    assert sized(512).mode.kv is KvPolicy.PAGED_RECOMPUTE
    assert sized(512).settings == served.settings


@pytest.mark.parametrize("name", ROUTERS)
def test_workers_prefix_caches_have_hits_without_placement_by_them(name: str) -> None:
    shared = [Lengths(4_000, 20, None, tuple(range(7)))] * 200
    alone = [Lengths(4_000, 20, None, tuple(range(10 * i, 10 * i + 7))) for i in range(200)]
    shares = []
    for rows in (shared, alone):
        what = Experiment(
            policy=find_policy(name), source=rows, source_name="prefixes", device=H100, num_requests=200, min_span_s=0.0
        )
        shares.append(run_experiment(what, aggregated(4), 8.0).utilisation.prefill)
    assert shares[0] < 0.5 * shares[1]


def test_late_placement_in_order_of_slack_serves_more_in_bursts() -> None:
    attained = {
        name: run_experiment(
            Experiment(
                policy=find_policy(name),
                source="mixed",
                source_name="mixed",
                device=A100,
                num_requests=1200,
                min_span_s=0.0,
                seed=1,
                arrivals=Arrivals.GAMMA,
                burstiness_cv=3.0,
            ),
            aggregated(4),
            7.0,
        ).slo_attainment
        for name in ("adaptive", *ROUTERS)
    }
    by_turn, by_load, by_prefill = (attained[name] for name in ROUTERS)
    assert attained["adaptive"] > by_prefill > by_load
    assert attained["adaptive"] > 0.05 + max(by_turn, by_load)
