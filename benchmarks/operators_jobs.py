"""What is measured for the operators' table, and what else was aimed at: questions that start from its capacities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bucketserve.sim.capacity import find_capacity
from bucketserve.sim.experiment import run_experiment
from bucketserve.sim.limits import OutputLimits
from bucketserve.sim.operators import Case, experiment_of, layouts_of, saturation
from bucketserve.sim.report import Report
from bucketserve.sim.scenarios import SCENARIOS, Cohort, CohortFigures, run_scenario
from bucketserve.sim.workload import Arrivals

DEVICES: Mapping[str, float] = {"a100-40gb-13b": 2.0, "a100-80gb-13b": 6.0, "h100-80gb-8b": 50.0}
"""Where searches begin, requests/s."""
RIVALS = ("chunked", "chunked-edf", "qoserve")
OURS = "adaptive"
NUM_REQUESTS = 600
MOST = "most of one request"
"""Name of a figure of which the highest counts, not the mean."""


@dataclass(frozen=True, slots=True)
class Job:
    """One line of a table for one seed; `what` is the policy, or what was changed of ours."""

    group: str
    device: str
    workload: str
    arrivals: str
    what: str
    seed: int
    settings: tuple[tuple[str, str], ...] = ()
    trace: str = ""

    @property
    def key(self) -> str:
        """Names it in the file."""
        return "/".join((self.group, self.device, self.workload, self.arrivals, self.what, str(self.seed)))

    @property
    def case(self) -> Case:
        """What is simulated, without a rival's step size."""
        return Case(
            policy=self.what if self.what in RIVALS else OURS,
            settings=self.settings,
            device=self.device,
            workload=self.trace or self.workload,
            is_trace=bool(self.trace),
            arrivals=Arrivals(self.arrivals),
            num_requests=NUM_REQUESTS,
            seed=self.seed,
            start_rps=DEVICES[self.device],
        )


@dataclass(frozen=True, slots=True)
class World:
    """What a question is asked of, and what is known of it: rows by key."""

    job: Job
    found: Mapping[str, dict]

    def case(self, policy: str = OURS, **more: object) -> Case:
        """Returns a policy's case, a rival's with its best step size."""
        name = "/".join((self.job.device, self.job.workload, self.job.arrivals, policy))
        step_tokens = self.found[f"step/{name}"]["step_tokens"] if policy in RIVALS else 0
        return replace(self.job.case, policy=policy, step_tokens=step_tokens, **more)

    def capacity(self, target: str, policy: str = OURS) -> float:
        """Returns what was found before."""
        job = replace(self.job, group="mixed", what=policy)
        return self.found[job.key]["capacity_rps"][target]


def at_95(case: Case) -> Report:
    """Returns the figures at the capacity at 95%."""
    return find_capacity(experiment_of(case), layouts_of(case), 0.95, start_rps=case.start_rps)


def tail(world: World) -> dict[str, object]:
    """TTFT p99 in seconds, both at 0.9 of our capacity at 95%."""
    rate_rps = 0.9 * world.capacity("0.95")
    ours, other = (
        run_experiment(experiment_of(case), layouts_of(case)[0], rate_rps).ttft_s.p99
        for case in (world.case(), world.case("chunked"))
    )
    return {"ours": ours, "other": other}


def preemptions_of(report: Report) -> dict[str, float]:
    """Returns how many there were."""
    return {"preemptions per request": report.num_evictions / report.num_requests, MOST: report.max_evictions}


def beside_batch_class(world: World) -> dict[str, object]:
    """Capacity at 95% of interactive requests where three of ten are batch class."""
    ours, other = (at_95(world.case(policy, batch_share=0.3)) for policy in (OURS, "chunked-edf"))
    return {"ours": ours.capacity_rps, "other": other.capacity_rps, "also": preemptions_of(ours)}


def loose_limits(world: World) -> dict[str, object]:
    """Capacity at 95% with limits as clients send them, and with the true outputs as limits."""
    exact = at_95(world.case(limits=OutputLimits.EXACT))
    return {"ours": world.capacity("0.95"), "other": exact.capacity_rps}


def saturated(world: World) -> dict[str, object]:
    """Capacity at 95%, and what the hardware does at any delay."""
    most_rps = saturation(world.case("chunked"), world.capacity("0.95", "chunked"))
    return {"ours": world.capacity("0.95"), "other": most_rps, "also": {"at 99%": world.capacity("0.99") / most_rps}}


def preempted(world: World) -> dict[str, object]:
    """Preemptions and requests at the capacity at 95%."""
    case = world.case()
    report = run_experiment(experiment_of(case), layouts_of(case)[0], world.capacity("0.95"))
    return {"ours": report.num_evictions, "other": report.num_requests, "also": preemptions_of(report)}


def idle_capacity(world: World) -> dict[str, object]:
    """A job's tokens/s under interactive waves, and what the capacity could do that these leave.

    That is the job in the time that it takes alone and that these take, all at once and alone.
    """
    scenario = SCENARIOS["waves-over-batch"]
    job, waves = scenario.cohorts

    def figures(*cohorts: Cohort) -> Sequence[CohortFigures]:
        return run_scenario(replace(scenario, cohorts=cohorts, alone=""), [OURS], world.job.seed)

    served, interactive = figures(job, waves)
    at_once = replace(waves, number=waves.number * waves.waves, waves=1, gap_s=0.0)
    num_tokens = [sum(one.output_tokens for one in cohort.requests(world.job.seed)) for cohort in (job, at_once)]
    alone_s = [number / figures(c)[0].tokens_per_s for number, c in zip(num_tokens, (job, at_once), strict=True)]
    within = {"interactive ones within SLO": interactive.slo_attainment or 0.0}
    return {"ours": served.tokens_per_s, "other": num_tokens[0] / sum(alone_s), "also": within}


@dataclass(frozen=True, slots=True)
class Question:
    """Something that was aimed at: ours over something else."""

    says: str
    other: str
    wanted: str
    answer: Callable[[World], dict[str, object]]
    worlds: Sequence[tuple[str, str]]


WORLDS = [(device, arrivals) for device in DEVICES for arrivals in ("poisson", "gamma")]
POISSON = [(device, "poisson") for device in DEVICES]
QUESTIONS: Mapping[str, Question] = {
    "saturation": Question("requests/s at 95%", "saturation", "at least 0.95", saturated, POISSON),
    "tail": Question("TTFT p99 at 0.9 of our 95%, s", "chunked", "at most 1.5", tail, WORLDS),
    "batch class": Question("requests/s, 30% batch class", "chunked-edf", "at least 1.3", beside_batch_class, WORLDS),
    "limits": Question("requests/s at 95%", "exact limits", "at least 0.95", loose_limits, POISSON),
    "preemptions": Question("preemptions at 95%", "requests", "below 0.02", preempted, WORLDS),
    "idle capacity": Question(
        "tokens/s of a job under waves",
        "what they leave",
        "at least 0.9",
        idle_capacity,
        [("h100-80gb-8b", "recorded")],
    ),
}
