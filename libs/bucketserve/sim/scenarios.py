"""Public complaints about serving engines, each as a few requests in virtual time that show whether it applies here.

The figures of those who complained are in `right`; ours are of another device and are compared between policies. Where
a scenario names a cohort that also runs alone, the difference is what the others cost it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bucketserve.core.types import RequestClass
from bucketserve.sim.cluster import aggregated, build_workers
from bucketserve.sim.driver import Simulation
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.latency import CostMode, load_device
from bucketserve.sim.ledger import Record
from bucketserve.sim.percentiles import Percentiles
from bucketserve.sim.policies import find_policy
from bucketserve.sim.policy_spec import PolicyContext
from bucketserve.sim.slo import Slo
from bucketserve.sim.workload import SimRequest, Workload

__all__ = ["SCENARIOS", "Cohort", "CohortFigures", "Scenario", "find_scenario", "run_scenario"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Requests of one kind. Lengths in tokens, times in seconds; max_tokens is the output."""

    name: str
    number: int
    prompt: int
    output: int
    spread: float = 0.0
    """Lengths vary evenly by up to this share in both directions."""
    start_s: float = 0.0
    gap_s: float = 0.0
    """Between arrivals; 0: all at once."""
    waves: int = 1
    wave_gap_s: float = 0.0
    """The whole cohort comes so many times, so far apart."""
    is_batch: bool = False

    def requests(self, seed: int) -> list[SimRequest]:
        """Returns its requests."""
        rng = random.Random(f"{seed}/{self.name}")
        return [
            SimRequest(
                self.start_s + wave * self.wave_gap_s + i * self.gap_s,
                self._varied(self.prompt, rng),
                output := self._varied(self.output, rng),
                max_new_tokens=output,
                request_class=RequestClass.BATCH if self.is_batch else RequestClass.INTERACTIVE,
            )
            for wave in range(self.waves)
            for i in range(self.number)
        ]

    def _varied(self, tokens: int, rng: random.Random) -> int:
        return round(tokens * (1 + self.spread * rng.uniform(-1, 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A complaint."""

    name: str
    source: str
    right: str
    """What a good scheduler does; in brackets what the complaint saw."""
    cohorts: Sequence[Cohort]
    alone: str = ""
    """A cohort that runs alone as well."""
    device: str = "h100-80gb-8b"
    kv_tokens: int = 0
    """Of each worker; 0: the device's."""
    num_workers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CohortFigures:
    """What happened to a cohort under a policy. Times in seconds."""

    policy: str
    cohort: str
    ttft_s: Percentiles
    ttft_max_s: float
    tpot_s: Percentiles
    slo_attainment: float | None
    """None for batch class."""
    tokens_per_s: float
    """Its generated tokens, from its first arrival to its last end."""
    num_evictions: int
    max_evictions: int
    """Of one request."""


SCENARIOS: Mapping[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            name="long-before-short",
            source="sglang#22831",
            right="p99 TTFT of the small ones within seconds (27 s)",
            cohorts=(
                Cohort(name="long", number=40, prompt=11_000, output=256),
                Cohort(name="small", number=120, prompt=200, output=256, start_s=0.5, gap_s=0.02),
            ),
            alone="small",
        ),
        Scenario(
            name="head-of-line",
            source="vllm#33499",
            right="the head no later than in strict order (31 s) and the small ones within 1 s: both, not either",
            cohorts=(
                Cohort(name="running", number=1, prompt=8000, output=512),
                Cohort(name="head", number=1, prompt=16_000, output=512, start_s=1.0),
                Cohort(name="small", number=8, prompt=1000, output=512, start_s=1.1),
            ),
            alone="small",
            kv_tokens=24_000,
        ),
        Scenario(
            name="fifth-long-prompt",
            source="vllm#37307",
            right="those that run keep their pace when a prompt comes that does not fit (100 -> 1.5 tokens/s)",
            cohorts=(
                Cohort(name="first four", number=4, prompt=100_000, output=3000),
                Cohort(name="fifth", number=1, prompt=100_000, output=500, start_s=60.0),
            ),
            alone="first four",
            kv_tokens=444_000,
        ),
        Scenario(
            name="outgrown-memory",
            source="vllm#44594",
            right="few preemptions (1,065 without a watermark, 187 with one) and a TTFT p50 of no more than 6.6 s",
            cohorts=(Cohort(name="all", number=128, prompt=1000, output=5000, spread=0.2),),
            kv_tokens=299_584,
        ),
        Scenario(
            name="thrash",
            source="vllm#25538",
            right="every request is preempted at most twice",
            cohorts=(Cohort(name="all", number=60, prompt=300, output=1500, spread=0.5, gap_s=0.2),),
            device="a100-40gb-13b",
        ),
        Scenario(
            name="waves-over-batch",
            source="batch-gateway#491",
            right="interactive requests keep their SLO, the batch job uses what they leave",
            cohorts=(
                Cohort(name="job", number=1000, prompt=1500, output=300, spread=0.5, is_batch=True),
                Cohort(
                    name="interactive",
                    number=150,
                    prompt=800,
                    output=150,
                    spread=0.5,
                    start_s=10.0,
                    gap_s=0.06,
                    waves=3,
                    wave_gap_s=30.0,
                ),
            ),
            alone="interactive",
        ),
        Scenario(
            name="job-before-chat",
            source="vllm#6077",
            right="interactive requests that come where a batch job has filled everything are served as if it were not",
            cohorts=(
                Cohort(name="job", number=300, prompt=400, output=1000, spread=0.5, is_batch=True),
                Cohort(name="interactive", number=200, prompt=800, output=150, spread=0.5, start_s=60.0, gap_s=0.4),
            ),
            alone="interactive",
            device="a100-80gb-13b",
        ),
        Scenario(
            name="costly-client",
            source="vllm#37594",
            right="a client's eight sequences with logprobs leave the neighbours' TTFT as it is (76 to 423 times it); "
            "what logprobs cost an engine is not simulated",
            cohorts=(
                Cohort(name="client", number=8, prompt=300, output=1000, start_s=2.0),
                Cohort(name="neighbours", number=60, prompt=300, output=50, gap_s=0.25),
            ),
            alone="neighbours",
        ),
    )
}


def find_scenario(name: str) -> Scenario:
    """Returns a scenario by name.

    Raises:
        SimulationError: there is none; names those there are.
    """
    if name not in SCENARIOS:
        raise SimulationError(f"no scenario {name!r}: one of {', '.join(SCENARIOS)}")
    return SCENARIOS[name]


def run_scenario(scenario: Scenario, policies: Sequence[str], seed: int = 0) -> list[CohortFigures]:
    """Returns the figures of every cohort under every policy, and of the cohort that runs alone as well."""
    figures = []
    for policy in policies:
        figures += _run(scenario, scenario.cohorts, policy, seed)
        lonely = [cohort for cohort in scenario.cohorts if cohort.name == scenario.alone]
        if lonely:
            figures += [replace(row, cohort=f"{row.cohort}, alone") for row in _run(scenario, lonely, policy, seed)]
    return figures


def _run(scenario: Scenario, cohorts: Sequence[Cohort], policy_name: str, seed: int) -> list[CohortFigures]:
    policy, device = find_policy(policy_name), load_device(scenario.device)
    if scenario.kv_tokens:
        device = replace(device, kv_total_tokens={1: scenario.kv_tokens})
    drawn = [(request, cohort.name) for cohort in cohorts for request in cohort.requests(seed)]
    drawn.sort(key=lambda pair: pair[0].arrival_s)
    requests = tuple(request for request, _ in drawn)
    simulation = Simulation(
        policy.build(PolicyContext(device.context_tokens, seed, lambda request_id: requests[int(request_id[1:])])),
        build_workers(aggregated(scenario.num_workers), device, CostMode.PACKED, policy.mode),
        Workload(scenario.name, requests, 0, 0),
        device,
        Slo(),
    )
    records = simulation.run().records
    # Ids count up in order of arrival.
    named = [(name, records[key]) for key, (_, name) in zip(sorted(records), drawn, strict=True)]
    return [
        _figures(policy_name, cohort, [record for name, record in named if name == cohort.name]) for cohort in cohorts
    ]


def _figures(policy: str, cohort: Cohort, records: Sequence[Record]) -> CohortFigures:
    ttft_s = [math.inf if record.ttft_s is None else record.ttft_s for record in records]
    first_s = min(record.request.arrival_s for record in records)
    last_s = max(record.end_s or 0.0 for record in records)
    return CohortFigures(
        policy=policy,
        cohort=cohort.name,
        ttft_s=Percentiles.of(ttft_s),
        ttft_max_s=max(ttft_s),
        tpot_s=Percentiles.of([record.tpot_s for record in records if record.tpot_s is not None]),
        slo_attainment=None if cohort.is_batch else sum(r.is_within_slo for r in records) / len(records),
        tokens_per_s=sum(record.request.output_tokens for record in records) / (last_s - first_s),
        num_evictions=sum(record.num_evictions for record in records),
        max_evictions=max(record.num_evictions for record in records),
    )
