"""The comparison that operators need: capacity at 80, 95 and 99% attainment, and what the tail waits there.

Every policy sees the same requests. The core is measured as it is served; a rival with the step size that serves it
best on the device: the one with the highest capacity at 95% on a sweep of the same workload with a seed of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from bucketserve.core.types import WorkerRole
from bucketserve.sim.capacity import find_capacities, find_capacity
from bucketserve.sim.cluster import layout_name
from bucketserve.sim.experiment import Experiment, run_experiment
from bucketserve.sim.latency import load_device
from bucketserve.sim.limits import OutputLimits
from bucketserve.sim.policies import find_policy, with_settings
from bucketserve.sim.policy_spec import STEP_SIZES, Layout, PolicySpec
from bucketserve.sim.report import Report
from bucketserve.sim.workload import Arrivals, Lengths, read_trace

__all__ = [
    "LIGHT_LOAD",
    "TARGETS",
    "AtTarget",
    "Case",
    "Measured",
    "best_step",
    "experiment_of",
    "layouts_of",
    "measure",
    "saturation",
]

TARGETS = (0.8, 0.95, 0.99)
SWEEP_TARGET = 0.95
SWEEP_SEED = 1_000_003
LIGHT_LOAD = 0.7
"""Share of the capacity at 95% at which goodput is measured: where operators run."""
SERVED_SHARE = 0.9
"""Under overload less than this share of the arrivals ends."""
LONG_SPAN = 3.0
"""Arrivals last so much longer for it: long outputs take their time to show under overload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One policy in one world; can be sent to another process."""

    policy: str
    device: str
    workload: str
    """A workload's name, or a trace file's."""
    is_trace: bool = False
    arrivals: Arrivals = Arrivals.POISSON
    burstiness_cv: float = 3.0
    limits: OutputLimits = OutputLimits.CLIENT
    batch_share: float = 0.0
    num_workers: int = 4
    num_requests: int = 1000
    min_span_s: float | None = None
    seed: int = 0
    start_rps: float = 4.0
    """Where searches begin."""
    step_tokens: int = 0
    """0: as its authors have it; for the core, as it is served."""
    settings: tuple[tuple[str, str], ...] = ()
    """Of the core, with their values, where they are not as it is served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtTarget:
    """A capacity and the waiting there, of interactive requests in the measured window. Seconds, requests/s."""

    capacity_rps: float
    ttft_p99_s: float
    ttft_worst_tenth_s: float
    num_evictions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A case's figures."""

    case: Case
    layout: str
    at: dict[float, AtTarget]
    goodput_rps: float
    """Within the SLO, at LIGHT_LOAD times the capacity at 95%."""
    light_ttft_p99_s: float


def measure(case: Case) -> Measured:
    """Returns the capacities of a case with its step size."""
    experiment, layouts = experiment_of(case), layouts_of(case)
    found = find_capacities(experiment, layouts, TARGETS, start_rps=case.start_rps)
    typical = found[0.95]
    layout = next(layout for layout in layouts if _is(layout, typical))
    light = run_experiment(experiment, layout, LIGHT_LOAD * (typical.capacity_rps or case.start_rps / 64))
    return Measured(
        case=case,
        layout=typical.cluster,
        at={target: _at(report) for target, report in found.items()},
        goodput_rps=light.goodput_rps,
        light_ttft_p99_s=light.ttft_s.p99,
    )


def best_step(case: Case) -> int:
    """Returns the step size with which a rival has the highest capacity at 95%; 0 for a policy without the choice."""
    if find_policy(case.policy).sized is None:
        return 0
    capacities = {}
    for tokens in STEP_SIZES:
        tried = replace(case, step_tokens=tokens, seed=SWEEP_SEED)
        found = find_capacity(experiment_of(tried), layouts_of(tried), SWEEP_TARGET, start_rps=case.start_rps)
        capacities[tokens] = found.capacity_rps or 0.0
    return max(capacities, key=lambda tokens: capacities[tokens])


def saturation(case: Case, capacity_rps: float) -> float:
    """Returns the requests per second that end while more arrive than the policy can serve at any delay.

    Poisson arrivals in every case, at twice the capacity at first, and twice as many until a share is left waiting.
    """
    experiment = experiment_of(replace(case, arrivals=Arrivals.POISSON))
    experiment = replace(experiment, min_span_s=LONG_SPAN * experiment.span_s())
    rate_rps = capacity_rps or case.start_rps
    while True:
        rate_rps *= 2
        most_rps = max(run_experiment(experiment, layout, rate_rps).completed_rps for layout in layouts_of(case))
        if most_rps < SERVED_SHARE * rate_rps:
            return most_rps


def _policy(case: Case) -> PolicySpec:
    policy = find_policy(case.policy)
    if case.settings:
        return with_settings(policy, dict(case.settings))
    return policy.sized(case.step_tokens) if policy.sized is not None and case.step_tokens else policy


def layouts_of(case: Case) -> Sequence[Layout]:
    """Returns the layouts to choose from: all workers do both where the policy allows it, as is served by default."""
    layouts = list(_policy(case).layouts(case.num_workers, 1))
    together = [layout for layout in layouts if all(group.role is WorkerRole.BOTH for group in layout)]
    return together or layouts


def _is(layout: Layout, report: Report) -> bool:
    return layout_name(layout) == report.cluster


def _at(report: Report) -> AtTarget:
    return AtTarget(
        capacity_rps=report.capacity_rps or 0.0,
        ttft_p99_s=report.ttft_s.p99,
        ttft_worst_tenth_s=report.ttft_worst_tenth_s,
        num_evictions=report.num_evictions,
    )


@cache
def _rows(path: str) -> tuple[Lengths, ...]:
    return tuple(read_trace(Path(path)))


def experiment_of(case: Case) -> Experiment:
    """Returns what is run for a case."""
    return Experiment(
        policy=_policy(case),
        source=_rows(case.workload) if case.is_trace else case.workload,
        source_name=Path(case.workload).name,
        device=load_device(case.device),
        num_requests=case.num_requests,
        min_span_s=case.min_span_s,
        seed=case.seed,
        arrivals=case.arrivals,
        burstiness_cv=case.burstiness_cv,
        limits=case.limits,
        batch_share=case.batch_share,
    )
