"""Placement by prefix in the simulator: conversations that grow, at workers that know how they began."""

from __future__ import annotations

import random

import pytest

from bucketserve.core.prefixes import BLOCK_TOKENS as CORE_BLOCK_TOKENS
from bucketserve.core.prefixes import MAX_BLOCKS
from bucketserve.sim.cluster import aggregated, build_workers
from bucketserve.sim.driver import Simulation
from bucketserve.sim.latency import CostMode, load_device
from bucketserve.sim.percentiles import Percentiles
from bucketserve.sim.policies import blind, find_policy
from bucketserve.sim.policy_spec import PolicyContext
from bucketserve.sim.slo import Slo
from bucketserve.sim.workload import BLOCK_TOKENS, SimRequest, Workload, core_hashes

H100 = load_device("h100-80gb-8b")


def conversations(number: int, num_requests: int, rate_rps: float, seed: int) -> Workload:
    """Returns conversations that go on in random order; four begin with the same 4,096 tokens, all grow to 16,384."""
    rng = random.Random(seed)
    requests, blocks, now_s = [], dict[int, list[int]](), 0.0
    for named in range(num_requests):
        now_s += rng.expovariate(rate_rps)
        i = rng.randrange(number)
        chain = blocks.setdefault(i, [10_000 * (i % (number // 4)) + k for k in range(8)])
        chain += [10_000 * (1000 + named) + k for k in range(rng.randint(1, 4))]
        prompt, output = BLOCK_TOKENS * len(chain) + rng.randint(0, BLOCK_TOKENS - 1), rng.randint(20, 200)
        requests.append(SimRequest(now_s, prompt, output, output, block_hashes=tuple(chain)))
        if len(chain) > 32:
            del blocks[i]
    return Workload("conversations", tuple(requests), 0, 0)


def run(workload: Workload, *, is_blind: bool, num_workers: int = 4):
    policy = find_policy("adaptive")
    policy = blind(policy) if is_blind else policy
    core = policy.build(PolicyContext(H100.context_tokens, 0, lambda request_id: workload.requests[0]))
    workers = build_workers(aggregated(num_workers), H100, CostMode.PACKED, policy.mode)
    return Simulation(core, workers, workload, H100, Slo()).run()


@pytest.mark.parametrize("seed", [1, 2])
def test_prompts_that_begin_alike_start_sooner_at_workers_that_know_them(seed: int) -> None:
    workload = conversations(80, 800, 12.0, seed)
    ttft_s = {}
    for is_blind in (True, False):
        records = run(workload, is_blind=is_blind).records.values()
        ttft_s[is_blind] = Percentiles.of([record.ttft_s or 1e9 for record in records])
    assert ttft_s[False].p50 <= 0.5 * ttft_s[True].p50
    assert ttft_s[False].p99 <= 0.7 * ttft_s[True].p99


def test_a_simulated_prompt_has_the_hashes_that_a_gateway_would_send() -> None:
    each = BLOCK_TOKENS // CORE_BLOCK_TOKENS
    one, other = core_hashes([5, 6]), core_hashes([5, 7])
    assert len(one) == len(set(one)) == 2 * each
    assert one[:each] == other[:each] and not set(one[each:]) & set(other[each:])
    assert len(core_hashes(range(1000))) == MAX_BLOCKS
