"""`bucketserve sim --compare` and `--scenario`: policies side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from statistics import fmean

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bucketserve.sim.latency import CostMode
from bucketserve.sim.operators import LIGHT_LOAD, TARGETS, Case, Measured, best_step, measure, saturation
from bucketserve.sim.policies import POLICIES, find_policy
from bucketserve.sim.scenarios import SCENARIOS, CohortFigures, Scenario, find_scenario, run_scenario
from bucketserve.sim.slo import Slo
from bucketserve.sim.workload import Arrivals
from bucketserve_cli.sim import SimOptions
from bucketserve_cli.terminal import replaced_file

__all__ = ["comparison_table", "run_comparison", "run_scenarios", "scenario_table"]

OURS = "adaptive"
REFERENCE = "chunked"
"""Its saturation is what the hardware can do at any delay."""
SCENARIO_POLICIES = (OURS, REFERENCE, "chunked-edf")


def run_comparison(names: str, num_seeds: int, options: SimOptions, console: Console, progress: Console) -> None:
    """Finds the capacities of the policies, shows the table, writes the JSON file if one is wanted.

    Raises:
        BucketServeError: an option makes no sense; says which.
    """
    policies = list(POLICIES) if names == "all" else names.split(",")
    for name in policies:
        find_policy(name)
    _check_comparable(options)
    cases = [_case(name, options) for name in policies]
    with (
        replaced_file(options.json_path) if options.json_path else nullcontext() as file,
        ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool,
    ):
        steps = list(track(pool.map(best_step, cases), "step sizes", len(cases), console=progress, transient=True))
        sized = [replace(case, step_tokens=tokens) for case, tokens in zip(cases, steps, strict=True)]
        jobs = [replace(case, seed=options.seed + i) for case in sized for i in range(num_seeds)]
        measured = list(track(pool.map(measure, jobs), "capacities", len(jobs), console=progress, transient=True))
        reference = next((one for one in measured if one.case.policy == REFERENCE), None)
        most_rps = saturation(reference.case, reference.at[0.8].capacity_rps) if reference else None
        console.print(comparison_table(measured, most_rps))
        if file is not None:
            content = {"saturation_rps": most_rps, "measured": [_as_dict(one) for one in measured]}
            file.write(json.dumps(content, indent=1) + "\n")


def run_scenarios(name: str, options: SimOptions, console: Console) -> None:
    """Runs a scenario, or all, under SCENARIO_POLICIES; shows a table each, writes the JSON file if one is wanted.

    Raises:
        BucketServeError: there is no such scenario.
    """
    chosen = list(SCENARIOS.values()) if name == "all" else [find_scenario(name)]
    with replaced_file(options.json_path) if options.json_path else nullcontext() as file:
        found = {}
        for scenario in chosen:
            rows = run_scenario(scenario, SCENARIO_POLICIES, options.seed)
            console.print(scenario_table(scenario, rows))
            found[scenario.name] = [asdict(row) for row in rows]
        if file is not None:
            file.write(json.dumps(found, indent=1) + "\n")


def comparison_table(measured: Sequence[Measured], saturation_rps: float | None) -> Table:
    """Returns capacities side by side, means over seeds; after each the ratio of ours to it."""
    case = measured[0].case
    title = (
        f"{case.workload} on {case.num_workers} x {case.device}, {case.arrivals.value} arrivals"
        + (f" (cv {case.burstiness_cv:g})" if case.arrivals is Arrivals.GAMMA else "")
        + f", limits {case.limits.value}, {len({one.case.seed for one in measured})} seeds"
        + (f"; saturation of {REFERENCE} {saturation_rps:.2f} requests/s" if saturation_rps is not None else "")
    )
    table = Table(title=title, title_justify="left", caption_justify="left", highlight=True, show_lines=True)
    table.caption = (
        f"requests/s at each attainment (x: {OURS} over it), below it TTFT p99 / mean of the worst tenth there, "
        f"interactive; at {LIGHT_LOAD:g} of the 95% capacity goodput and TTFT p99; step: best of a sweep at 95%"
    )
    table.add_column("policy")
    for heading in ("step", *(f"{target:.0%}" for target in TARGETS), f"at {LIGHT_LOAD:g}", "evictions at 95%"):
        table.add_column(heading, justify="right")
    ours = [one for one in measured if one.case.policy == OURS]
    for policy in dict.fromkeys(one.case.policy for one in measured):
        rows = [one for one in measured if one.case.policy == policy]
        table.add_row(
            policy,
            str(rows[0].case.step_tokens or ("served" if find_policy(policy).settings else "")),
            *(_capacity(rows, ours, target) for target in TARGETS),
            f"{fmean(row.goodput_rps for row in rows):.2f}\n{fmean(row.light_ttft_p99_s for row in rows):.2f} s",
            f"{fmean(row.at[0.95].num_evictions for row in rows):.0f}",
        )
    return table


def scenario_table(scenario: Scenario, rows: Sequence[CohortFigures]) -> Table:
    """Returns what happened to each cohort under each policy."""
    title = f"{scenario.name} ({scenario.source}) on {scenario.num_workers} x {scenario.device}\n{scenario.right}"
    table = Table(title=title, title_justify="left", highlight=True)
    for heading in ("policy", "requests"):
        table.add_column(heading)
    for heading in ("TTFT p50", "p99", "max, s", "TPOT p99, ms", "in SLO", "tokens/s", "preemptions", "most of one"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.policy,
            row.cohort,
            *(f"{value:.2f}" for value in (row.ttft_s.p50, row.ttft_s.p99, row.ttft_max_s)),
            f"{1e3 * row.tpot_s.p99:.0f}",
            "" if row.slo_attainment is None else f"{row.slo_attainment:.0%}",
            f"{row.tokens_per_s:.0f}",
            str(row.num_evictions),
            str(row.max_evictions),
        )
    return table


def _capacity(rows: Sequence[Measured], ours: Sequence[Measured], target: float) -> str:
    """The capacity, the ratio of ours to it, and the tail there."""
    capacity = fmean(row.at[target].capacity_rps for row in rows)
    ratio = ""
    if ours and capacity:
        ratio = f" (x {fmean(row.at[target].capacity_rps for row in ours) / capacity:.2f})"
    p99_s = fmean(row.at[target].ttft_p99_s for row in rows)
    worst_s = fmean(row.at[target].ttft_worst_tenth_s for row in rows)
    return f"{capacity:.2f}{ratio}\n{p99_s:.2f} / {worst_s:.2f} s"


def _check_comparable(options: SimOptions) -> None:
    """A comparison chooses layouts by itself and has the default targets, so that its tables can be compared."""
    own = (options.cluster, options.settings, options.context_tokens, options.turn_s, options.find_capacity)
    if options.slo != Slo() or any(own) or options.cost is not CostMode.PACKED:
        raise ValueError(
            "--compare has targets, cost mode, context and layouts of its own, and the core as it is served"
        )
    if options.arrivals is Arrivals.RECORDED:
        raise ValueError("--compare searches rates: draw poisson or gamma arrivals")


def _case(policy: str, options: SimOptions) -> Case:
    return Case(
        policy=policy,
        device=options.device,
        workload=str(options.trace) if options.trace else options.workload,
        is_trace=options.trace is not None,
        arrivals=options.arrivals,
        burstiness_cv=options.burstiness_cv,
        limits=options.limits,
        batch_share=options.batch_share,
        num_workers=options.workers,
        num_requests=options.requests,
        min_span_s=options.min_span_s,
        start_rps=options.rate_rps or float(options.workers),
    )


def _as_dict(measured: Measured) -> dict[str, object]:
    case = asdict(measured.case)
    case |= {"arrivals": measured.case.arrivals.value, "limits": measured.case.limits.value}
    return asdict(measured) | {"case": case, "at": {str(key): asdict(value) for key, value in measured.at.items()}}
