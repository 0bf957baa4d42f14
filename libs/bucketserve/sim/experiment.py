"""One run, and the best layout for a rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from bucketserve.core.types import RequestId
from bucketserve.sim.cluster import build_workers, layout_name
from bucketserve.sim.driver import Simulation
from bucketserve.sim.latency import CostMode, DeviceModel
from bucketserve.sim.limits import OutputLimits
from bucketserve.sim.policy_spec import Layout, PolicyContext, PolicySpec
from bucketserve.sim.report import Report, make_report
from bucketserve.sim.slo import Slo
from bucketserve.sim.window import SPAN_FACTOR
from bucketserve.sim.workload import Arrivals, Lengths, SimRequest, Workload, largest_request, make_workload

__all__ = ["Experiment", "best_layout", "run_experiment"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Everything that a run's result depends on, but the rate and the layout."""

    policy: PolicySpec
    source: str | Sequence[Lengths]
    """A workload's name, or a trace's rows."""
    source_name: str
    device: DeviceModel
    num_requests: int = 1000
    """At least."""
    min_span_s: float | None = None
    """Arrivals last at least so long: a short run ends before its queues have filled. None: SPAN_FACTOR times the
    longest request alone (sim/window.py)."""
    seed: int = 0
    cost: CostMode = CostMode.PACKED
    arrivals: Arrivals = Arrivals.POISSON
    burstiness_cv: float = 2.0
    limits: OutputLimits = OutputLimits.CLIENT
    batch_share: float = 0.0
    """Share of requests that are batch class."""
    slo: Slo = field(default_factory=Slo)
    context_tokens: int | None = None
    """None: the device model's."""
    turn_s: float = 0.0
    stopwatch: Callable[[], float] | None = None
    """Real seconds; None: nothing is timed, and the report is the same on every machine."""
    on_progress: Callable[[int, int], None] | None = None

    def span_s(self) -> float:
        """Returns how long arrivals last at least."""
        if self.min_span_s is not None:
            return self.min_span_s
        prompt, output = largest_request(self.source, self.context_tokens or self.device.context_tokens)
        return SPAN_FACTOR * self.device.alone_s(prompt, output)

    def workload(self, rate_rps: float | None) -> Workload:
        """Returns the requests, at that many per second in the mean; None: at the trace's own rate."""
        return make_workload(
            self.source,
            num_requests=max(self.num_requests, round((rate_rps or 0.0) * self.span_s())),
            rate_rps=rate_rps,
            context_tokens=self.context_tokens or self.device.context_tokens,
            seed=self.seed,
            arrivals=self.arrivals,
            burstiness_cv=self.burstiness_cv,
            limits=self.limits,
            batch_share=self.batch_share,
        )


def run_experiment(
    experiment: Experiment, layout: Layout, rate_rps: float | None, *, stop_below: float = 0.0
) -> Report:
    """Returns the figures of one run.

    Args:
        experiment: what to run.
        layout: on which workers.
        rate_rps: mean arrivals per second; None: the trace's own.
        stop_below: the run may end once its attainment is certain to be below that; it is, then, and no more is known.
    """
    context_tokens = experiment.context_tokens or experiment.device.context_tokens
    workload = experiment.workload(rate_rps)

    def drawn(request_id: RequestId) -> SimRequest:
        return workload.requests[int(request_id[1:])]

    stopwatch = experiment.stopwatch or (lambda: 0.0)
    simulation = Simulation(
        experiment.policy.build(PolicyContext(context_tokens, experiment.seed, drawn)),
        build_workers(layout, experiment.device, experiment.cost, experiment.policy.mode),
        workload,
        replace(experiment.device, context_tokens=context_tokens),
        experiment.slo,
        turn_s=experiment.turn_s,
        stop_below=stop_below,
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
