"""One run, the best layout for a rate, and the highest rate that keeps an attainment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from bucketserve.core.types import RequestId
from bucketserve.sim.cluster import WorkerGroup, build_workers, layout_name
from bucketserve.sim.driver import Simulation
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.latency import CostMode, DeviceModel
from bucketserve.sim.policies import PolicyContext, PolicySpec
from bucketserve.sim.report import Report, make_report
from bucketserve.sim.slo import Slo
from bucketserve.sim.workload import Arrivals, Lengths, make_workload

__all__ = ["Experiment", "best_layout", "find_capacity", "run_experiment"]

Layout = tuple[WorkerGroup, ...]

MAX_RATE_RPS = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Everything that a run's result depends on, but the rate and the layout."""

    policy: PolicySpec
    source: str | Sequence[Lengths]
    """A workload's name, or a trace's rows."""
    source_name: str
    device: DeviceModel
    num_requests: int = 2000
    min_span_s: float = 0.0
    """At high rates more requests are drawn, so that they arrive over at least this time: a short run ends before its
    queues have filled."""
    seed: int = 0
    cost: CostMode = CostMode.PACKED
    arrivals: Arrivals = Arrivals.POISSON
    burstiness_cv: float = 2.0
    slo: Slo = field(default_factory=Slo)
    context_tokens: int | None = None
    """None: the device model's."""
    turn_s: float = 0.0
    stopwatch: Callable[[], float] | None = None
    """Real seconds; None: nothing is timed, and the report is the same on every machine."""
    on_progress: Callable[[int, int], None] | None = None


def run_experiment(experiment: Experiment, layout: Layout, rate_rps: float | None) -> Report:
    """Returns the figures of one run at that rate; None: the trace's own."""
    context_tokens = experiment.context_tokens or experiment.device.context_tokens
    workload = make_workload(
        experiment.source,
        num_requests=max(experiment.num_requests, round((rate_rps or 0.0) * experiment.min_span_s)),
        rate_rps=rate_rps,
        context_tokens=context_tokens,
        seed=experiment.seed,
        arrivals=experiment.arrivals,
        burstiness_cv=experiment.burstiness_cv,
    )

    def true_output(request_id: RequestId) -> int:
        return workload.requests[int(request_id[1:])].output_tokens

    stopwatch = experiment.stopwatch or (lambda: 0.0)
    simulation = Simulation(
        experiment.policy.build(PolicyContext(context_tokens, experiment.seed, true_output)),
        build_workers(layout, experiment.device, experiment.cost, experiment.policy.mode),
        workload,
        replace(experiment.device, context_tokens=context_tokens),
        experiment.slo,
        turn_s=experiment.turn_s,
        stopwatch=stopwatch,
        on_progress=experiment.on_progress,
    )
    start = stopwatch()
    simulation.run()
    return make_report(
        simulation,
        policy=experiment.policy.name,
        workload=experiment.source_name,
        cluster=layout_name(layout),
        device=experiment.device.name,
        seed=experiment.seed,
        rate_rps=rate_rps,
        num_truncated_prompts=workload.num_truncated_prompts,
        num_cut_outputs=workload.num_cut_outputs,
        wall_s=stopwatch() - start,
    )


def best_layout(experiment: Experiment, layouts: Sequence[Layout], rate_rps: float | None) -> Report:
    """Returns the report of the layout with the highest attainment at that rate; ties by tokens per second."""
    reports = [run_experiment(experiment, layout, rate_rps) for layout in layouts]
    return max(reports, key=lambda report: (report.slo_attainment, report.tokens_per_s))


def find_capacity(
    experiment: Experiment, layouts: Sequence[Layout], target: float, *, precision: float = 0.02, start_rps: float = 4.0
) -> Report:
    """Returns the report at the highest rate whose attainment is at least the target, at the best of the layouts.

    Bisection per layout, to a relative precision; a layout that fails at the best rate found so far costs one run. If
    no rate is good enough, capacity_rps is 0.
    """
    best: Report | None = None
    for layout in layouts:
        floor_rps = best.capacity_rps or 0.0 if best else 0.0
        found = _bisect(experiment, layout, target, precision, floor_rps, start_rps)
        if found is not None and (best is None or (found.capacity_rps or 0.0) > (best.capacity_rps or 0.0)):
            best = found
    return best or replace(run_experiment(experiment, layouts[0], start_rps / 64), capacity_rps=0.0)


def _bisect(
    experiment: Experiment, layout: Layout, target: float, precision: float, floor_rps: float, start_rps: float
) -> Report | None:
    """Looks above floor_rps only; None if it isn't good enough even just above it."""
    good: Report | None = None
    low = floor_rps
    rate = floor_rps * (1 + precision) or start_rps
    high = float("inf")
    while high == float("inf") or (high - low) > precision * high:
        report = run_experiment(experiment, layout, rate)
        if report.slo_attainment >= target:
            good, low = replace(report, capacity_rps=rate), rate
        else:
            high = rate
            if floor_rps and good is None:
                return None
        if high == float("inf"):
            rate *= 1.5
            if rate > MAX_RATE_RPS:
                raise SimulationError(f"{experiment.num_requests} requests are too few to find the capacity: draw more")
        elif good is None:
            rate /= 2
            if rate < start_rps / 64:
                return None
        else:
            rate = (low + high) / 2
    return good
