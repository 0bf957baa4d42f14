"""`bucketserve sim`: one policy on one workload in virtual time, or the highest rate that keeps an SLO attainment."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bucketserve.sim.capacity import find_capacity
from bucketserve.sim.cluster import parse_cluster
from bucketserve.sim.experiment import Experiment, best_layout
from bucketserve.sim.latency import CostMode, load_device
from bucketserve.sim.limits import OutputLimits
from bucketserve.sim.policies import find_policy, with_settings
from bucketserve.sim.report import Report
from bucketserve.sim.slo import Slo
from bucketserve.sim.workload import Arrivals, Lengths, read_trace
from bucketserve_cli.terminal import replaced_file

__all__ = ["SimOptions", "run_simulation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimOptions:
    """What the command line asked for."""

    policy: str
    workload: str
    trace: Path | None
    cost: CostMode
    cluster: str
    workers: int
    device: str
    rate_rps: float | None
    find_capacity: float | None
    requests: int
    min_span_s: float | None
    arrivals: Arrivals
    burstiness_cv: float
    limits: OutputLimits
    batch_share: float
    context_tokens: int
    slo: Slo
    seed: int
    turn_s: float
    settings: Mapping[str, str]
    json_path: Path | None


def run_simulation(options: SimOptions, console: Console, progress_console: Console) -> Report:
    """Runs, shows the table, writes the JSON file if one is wanted.

    Raises:
        BucketServeError: an option makes no sense; says which.
    """
    with replaced_file(options.json_path) if options.json_path else nullcontext() as file:
        report = _simulate(options, progress_console)
        console.print(report_table(report))
        if file is not None:
            file.write(json.dumps(report.as_dict(), indent=2) + "\n")
    return report


def _simulate(options: SimOptions, progress_console: Console) -> Report:
    source: str | Sequence[Lengths] = read_trace(options.trace) if options.trace else options.workload
    policy = find_policy(options.policy)
    if options.settings:
        policy = with_settings(policy, options.settings)
    device = load_device(options.device)
    with _RunProgress(progress_console, options.requests) as progress:
        experiment = Experiment(
            policy=policy,
            source=source,
            source_name=options.trace.name if options.trace else options.workload,
            device=device,
            num_requests=options.requests,
            min_span_s=options.min_span_s,
            seed=options.seed,
            cost=options.cost,
            arrivals=options.arrivals,
            burstiness_cv=options.burstiness_cv,
            limits=options.limits,
            batch_share=options.batch_share,
            slo=options.slo,
            context_tokens=options.context_tokens or None,
            turn_s=options.turn_s,
            stopwatch=time.perf_counter,
            on_progress=progress.update,
        )
        layouts = [parse_cluster(options.cluster)] if options.cluster else list(policy.layouts(options.workers, 1))
        if options.find_capacity is not None:
            return find_capacity(
                experiment, layouts, options.find_capacity, start_rps=options.rate_rps or float(options.workers)
            )
        return best_layout(experiment, layouts, options.rate_rps)


def report_table(report: Report) -> Table:
    """Returns a run's figures as a table."""
    title = f"{report.policy} on {report.workload}, {report.cluster}, {report.device}, {report.cost}"
    table = Table(title=title, show_header=False, title_justify="left", highlight=True)
    rate = f"{report.rate_rps:.2f} requests/s" if report.rate_rps is not None else "as recorded"
    rows = [
        ("arrivals", f"{report.num_requests} at {rate}, seed {report.seed}"),
        ("ended", f"{report.num_finished} finished, {report.num_refused} refused, {report.num_dropped} dropped"),
        ("changed to fit the context", f"{report.num_truncated_prompts} prompts, {report.num_cut_outputs} outputs"),
        ("SLO attainment", f"{report.slo_attainment:.1%} of {report.num_measured} measured"),
        ("goodput", f"{report.goodput_rps:.2f} requests/s"),
        ("throughput", f"{report.tokens_per_s:.0f} output tokens/s, {report.total_tokens_per_s:.0f} with prompts"),
        ("TTFT p50 / p90 / p99", _three(report.ttft_s, 1.0, "s")),
        ("TTFT of the worst tenth", f"{report.ttft_worst_tenth_s:.3g} s mean"),
        ("TPOT p50 / p90 / p99", _three(report.tpot_s, 1e3, "ms")),
        ("padding if padded", f"{report.waste_relative:.3f} per request, {report.waste_padded_share:.3f} of tokens"),
        ("batch", f"{report.mean_batch:.1f} requests; limited by " + _counts(report.limited_by)),
        ("utilisation", f"prefill {report.utilisation.prefill:.1%}, decode {report.utilisation.decode:.1%}"),
        ("KV peak", f"{report.utilisation.kv_peak:.1%}"),
        ("evictions", f"{report.num_evictions}, at most {report.max_evictions} of one request"),
        ("edge changes", str(report.num_edge_changes)),
        ("deciding", f"{report.decision_ms_mean:.3f} ms mean, {report.decision_ms_max:.1f} ms max a call"),
        ("overhead", f"{report.overhead_share:.3%} of busy worker time"),
    ]
    if report.decisions_per_s and report.simulated_s_per_wall_s:
        rows.append(
            ("speed", f"{report.decisions_per_s:.0f} decisions/s, {report.simulated_s_per_wall_s:.0f} s simulated a s")
        )
    if report.capacity_rps is not None:
        rows.insert(0, ("capacity", f"{report.capacity_rps:.2f} requests/s"))
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


class _RunProgress:
    """A bar per run; a search runs many."""

    def __init__(self, console: Console, total: int) -> None:
        self._progress = Progress(
            TextColumn("simulating, run {task.fields[run]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, run=1)
        self._run, self._last = 1, 0

    def __enter__(self) -> _RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, ended: int, total: int) -> None:
        if ended < self._last:
            self._run += 1
        self._last = ended
        self._progress.update(self._task, completed=ended, total=total, run=self._run)


def _three(values: object, scale: float, unit: str) -> str:
    return " / ".join(f"{getattr(values, name) * scale:.3g}" for name in ("p50", "p90", "p99")) + f" {unit}"


def _counts(limited_by: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in limited_by.items()) or "nothing"


def option_slo(ttft_s: float, ttft_factor: float, tpot_s: float, rejects_early: bool) -> Slo:
    """Returns the targets that the flags name."""
    return replace(
        Slo(),
        ttft_fixed_s=ttft_s,
        ttft_factor=ttft_factor,
        tpot_s=tpot_s,
        rejects_early=rejects_early,
    )


def parse_settings(assignments: Sequence[str]) -> dict[str, str]:
    """Returns NAME=VALUE pairs as a mapping.

    Raises:
        ValueError: one has no "=".
    """
    pairs = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set {assignment}: write --set NAME=VALUE")
        pairs[name] = value
    return pairs
