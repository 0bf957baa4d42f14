"""Writes the operators' table, docs/paper/operators.md: capacities with limits as clients send them, at 95 and 99%.

Devices x arrivals x policies x seeds, what else was aimed at (QUESTIONS in operators_jobs.py, which start from their
capacities), recorded lengths (--traces), and the core with one thing changed. Every finished
run is appended to operators.jsonl, so that a run that was stopped goes on where it was; --report-only writes the page.
A rival has its best step size of a sweep with a seed of its own (sim/operators.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from operators_jobs import DEVICES, MOST, NUM_REQUESTS, OURS, QUESTIONS, RIVALS, WORLDS, Job, World
from rich.console import Console
from rich.progress import Progress

from bucketserve.sim.operators import best_step, measure

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "paper"
KEPT = OUT / "operators.jsonl"
ABLATIONS: Mapping[str, Mapping[str, str]] = {
    "one bucket": {"edges": "none"},
    "edges of Algorithm 1": {"edges": "paper"},
    "first come, first served": {"queue_order": "fcfs"},
    "slack without cost": {"cost_weight": "0"},
    "batches by memory alone": {"is_time_aware": "false"},
    "one batch at a time": {"fill_tokens": "1"},
    "nothing beside long prompts": {"small_batch_tokens": "0"},
    "KV by the median output": {"output_quantile": "0.5"},
    "KV by the 0.9 quantile": {"output_quantile": "0.9"},
    "deferred share 10%": {"deferred_share": "0.1"},
    "deferred share 30%": {"deferred_share": "0.3"},
}
TARGETS = ("0.8", "0.95", "0.99")
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}


def run(job: Job, step_tokens: int) -> dict[str, object]:
    """Returns the figures of a job."""
    found = rows()
    if job.group == "target":
        return {"key": job.key, **QUESTIONS[job.what].answer(World(job, found))}
    measured = measure(replace(job.case, step_tokens=step_tokens, start_rps=start_rps(job, found)))
    return {
        "key": job.key,
        "step_tokens": step_tokens,
        "capacity_rps": {str(target): at.capacity_rps for target, at in measured.at.items()},
        "ttft_p99_s": {str(target): at.ttft_p99_s for target, at in measured.at.items()},
        "evictions": {str(target): at.num_evictions for target, at in measured.at.items()},
        "goodput_rps": measured.goodput_rps,
    }


def start_rps(job: Job, found: Mapping[str, dict]) -> float:
    """Returns where a search begins: at what others reach in that world, where that is known."""
    group = "mixed" if job.group == "ablation" else job.group
    others = (found.get(replace(job, group=group, what=what).key) for what in (OURS, *RIVALS))
    return max((row["capacity_rps"]["0.95"] for row in others if row), default=0.0) or DEVICES[job.device]


def sweep(job: Job) -> int:
    """Returns a rival's best step size."""
    return best_step(job.case)


def jobs_of(seeds: Sequence[int], traces: Path | None) -> list[Job]:
    """All jobs, those that matter most first."""
    worlds = [(device, arrivals) for device in DEVICES for arrivals in ("poisson", "gamma")]
    jobs = []
    for seed in seeds:
        jobs += [Job("mixed", d, "mixed", a, what, seed) for what in (OURS, *RIVALS) for d, a in worlds]
        jobs += [Job("target", d, "mixed", a, name, seed) for name, asked in QUESTIONS.items() for d, a in asked.worlds]
        jobs += [
            Job("ablation", device, "mixed", arrivals, label, seed, tuple(settings.items()))
            for label, settings in ABLATIONS.items()
            for device, arrivals in worlds
        ]
        for path in sorted(traces.glob("*.csv*")) if traces else ():
            for device, arrivals in worlds:
                name = path.name.split(".")[0]
                jobs += [
                    Job("trace", device, name, arrivals, what, seed, trace=str(path)) for what in (RIVALS[0], OURS)
                ]
    return jobs


def simulate(jobs: Iterable[Job], processes: int, console: Console) -> None:
    """Runs what is not in the file yet."""
    found = rows()
    steps = {key.removeprefix("step/"): int(row["step_tokens"]) for key, row in found.items() if key[:5] == "step/"}
    left = [job for job in jobs if job.key not in found]
    with ProcessPoolExecutor(processes) as pool, Progress(console=console) as progress, KEPT.open("a") as file:

        def keep(row: Mapping[str, object]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        def world(job: Job) -> str:
            return "/".join((job.device, "mixed", job.arrivals, job.what))

        swept = [replace(job, group="mixed", workload="mixed", trace="") for job in left]
        rivals = {world(job): job for job in swept if job.what in RIVALS and world(job) not in steps}
        bar = progress.add_task("step sizes", total=len(rivals))
        sweeps = {pool.submit(sweep, job): name for name, job in rivals.items()}
        for done in as_completed(sweeps):
            steps[sweeps[done]] = done.result()
            keep({"key": f"step/{sweeps[done]}", "step_tokens": done.result()})
            progress.advance(bar)
        bar = progress.add_task("capacities", total=len(left))
        # Questions start from the capacities.
        for stage in ([j for j in left if j.group != "target"], [j for j in left if j.group == "target"]):
            for done in as_completed([pool.submit(run, job, steps.get(world(job), 0)) for job in stage]):
                keep(done.result())
                progress.advance(bar)


def rows() -> dict[str, dict]:
    """What was measured, by key."""
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.is_file() else []
    return {row["key"]: row for row in map(json.loads, lines)}


# --- the page ---------------------------------------------------------------------------------------------------------


class Results:
    """Figures by group, device, workload, arrivals, policy or change, and seed."""

    def __init__(self, found: Mapping[str, dict]) -> None:
        self._rows = {tuple(key.split("/")): row for key, row in found.items() if not key.startswith("step/")}

    def of(self, *name: str) -> dict[str, dict]:
        """Seed -> row of (group, device, workload, arrivals, what)."""
        return {key[5]: row for key, row in self._rows.items() if key[:5] == name}

    def workloads(self, group: str) -> list[str]:
        """All of a group."""
        return sorted({key[2] for key in self._rows if key[0] == group})

    def capacity(self, target: str, *name: str) -> list[float]:
        """Of each seed."""
        return [row["capacity_rps"][target] for row in self.of(*name).values()]

    def ratio(self, target: str, top: Sequence[str], bottom: Sequence[str]) -> list[float]:
        """Of each seed that both have."""
        above, below = self.of(*top), self.of(*bottom)
        pairs = [
            (above[seed]["capacity_rps"][target], below[seed]["capacity_rps"][target])
            for seed in above
            if seed in below
        ]
        return [a / b for a, b in pairs if b]


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean and half-width of its 95% confidence interval, where there is more than one."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    half = STUDENT_T.get(len(values) - 1, 2.6) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 118, break_on_hyphens=False)


def page(results: Results) -> str:
    """Returns the document."""
    lines = [
        "# The operators' table",
        "",
        paragraph(
            "Written by `make operators` (`benchmarks/operators.py`) from `operators.jsonl` beside it. Four "
            "workers, limits as clients send them, Poisson arrivals and bursts (gamma, cv 3), at least "
            f"{NUM_REQUESTS} requests and ten times the longest one's time (see [../simulator.md](../simulator.md)). "
            "Requests/s within SLO at 80, 95 and 99%; in brackets TTFT p99 of interactive requests, in seconds. A "
            "rival has its best step size. What was run with which version of the core is said there as well. "
            "Mean ± 95% confidence where there is more than one seed; ratios per seed."
        ),
        "",
    ]
    lines += capacities_table(results) + targets_table(results) + ablation_table(results) + traces_table(results)
    lines += ["![capacities](operators.png)", ""]
    return "\n".join(lines)


def capacities_table(results: Results) -> list[str]:
    """Capacities and tails of all policies."""
    lines = []
    for device in DEVICES:
        lines += [
            f"## Mixed, {device}",
            "",
            "| policy | arrivals | 80% | 95% | 99% | ours over it, 95% | 99% | preemptions at 95% |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for arrivals in ("poisson", "gamma"):
            for what in (OURS, *RIVALS):
                name = ("mixed", device, "mixed", arrivals, what)
                if not (found := results.of(*name)):
                    continue
                tails = [statistics.fmean(row["ttft_p99_s"][target] for row in found.values()) for target in TARGETS]
                cells = [
                    f"{shown(results.capacity(target, *name))} ({tail:.1f})"
                    for target, tail in zip(TARGETS, tails, strict=True)
                ]
                ours = (*name[:4], OURS)
                over = ["", ""] if what == OURS else [shown(results.ratio(t, ours, name)) for t in TARGETS[1:]]
                evictions = statistics.fmean(row["evictions"]["0.95"] for row in found.values())
                lines.append(f"| {what} | {arrivals} | {' | '.join([*cells, *over])} | {evictions:.0f} |")
        lines.append("")
    return lines


def targets_table(results: Results) -> list[str]:
    """Answers to the questions."""
    if not results.workloads("target"):
        return []
    lines = [
        "## What else was aimed at",
        "",
        paragraph("What each row means is said by its function in `benchmarks/operators_jobs.py`."),
        "",
        "| figure | world | ours | other | over it | wanted | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, question in QUESTIONS.items():
        for device, arrivals in question.worlds:
            found = list(results.of("target", device, "mixed", arrivals, name).values())
            if not found:
                continue
            ours, other = (statistics.fmean(row[whose] for row in found) for whose in ("ours", "other"))
            ratio = shown([row["ours"] / row["other"] for row in found])
            also = {what: [row["also"][what] for row in found] for what in found[0].get("also", {})}
            remark = ", ".join(f"{what} {max(v) if what == MOST else shown(v, 3)}" for what, v in also.items())
            figures = f"{ours:.4g} | {other:.4g} {question.other} | {ratio}"
            lines.append(f"| {question.says} | {device}, {arrivals} | {figures} | {question.wanted} | {remark} |")
    return [*lines, ""]


def ablation_table(results: Results) -> list[str]:
    """What is kept of the capacity with one thing changed."""
    if not results.workloads("ablation"):
        return []
    lines = [
        "## What earns what",
        "",
        "Capacity at 95 / 99% with one thing changed, over the core as it is served.",
        "",
        *head_of("changed"),
    ]
    for label in ABLATIONS:
        names = [
            (("ablation", device, "mixed", arrivals, label), ("mixed", device, "mixed", arrivals, OURS))
            for device, arrivals in WORLDS
        ]
        lines += row_of(results, label, names)
    return [*lines, ""]


def traces_table(results: Results) -> list[str]:
    """Ours over chunked on recorded lengths."""
    if not (workloads := results.workloads("trace")):
        return []
    lines = ["## On recorded lengths", "", "Ours over `chunked`, capacity at 95 / 99%.", "", *head_of("trace")]
    for workload in workloads:
        names = [
            (("trace", device, workload, arrivals, OURS), ("trace", device, workload, arrivals, RIVALS[0]))
            for device, arrivals in WORLDS
        ]
        lines += row_of(results, workload, names)
    return [*lines, ""]


def head_of(first: str) -> list[str]:
    """The head of a table with a column for each world."""
    names = [f"{device} {arrivals}" for device, arrivals in WORLDS]
    return [f"| {first} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]


def row_of(results: Results, label: str, names: Iterable[tuple[Sequence[str], Sequence[str]]]) -> list[str]:
    """A line of ratios at 95 / 99%, a cell for each world; none if nothing was measured."""
    cells = [
        " / ".join(shown(results.ratio(target, top, bottom)) for target in TARGETS[1:]).strip(" /")
        for top, bottom in names
    ]
    return [f"| {label} | {' | '.join(cells)} |"] if any(cells) else []


def draw(results: Results) -> None:
    """Capacities at 95 and 99% of every policy, a panel for each device and kind of arrivals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(DEVICES), figsize=(10, 5))
    for column, device in enumerate(DEVICES):
        for axis, arrivals in zip(panels[:, column], ("poisson", "gamma"), strict=True):
            policies = [what for what in (OURS, *RIVALS) if results.of("mixed", device, "mixed", arrivals, what)]
            for offset, target in ((-0.2, "0.95"), (0.2, "0.99")):
                means = [
                    statistics.fmean(results.capacity(target, "mixed", device, "mixed", arrivals, p)) for p in policies
                ]
                axis.barh([i + offset for i in range(len(policies))], means, height=0.38, label=f"{float(target):.0%}")
            axis.set_yticks(range(len(policies)), policies, fontsize=7)
            axis.invert_yaxis()
            axis.set_title(f"{device}, {'bursts' if arrivals == 'gamma' else 'Poisson'}: requests/s", fontsize=8)
            axis.tick_params(labelsize=7)
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(OUT / "operators.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--traces", type=Path, default=Path(os.environ["TRACES"]) if os.environ.get("TRACES") else None)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="jobs whose name begins so, such as mixed/a100-40gb-13b")
    parser.add_argument("--report-only", action="store_true", help="write the page and the plot from what is there")
    arguments = parser.parse_args()
    console = Console()
    if not arguments.report_only:
        jobs = jobs_of(range(1, arguments.seeds + 1), arguments.traces)
        simulate([job for job in jobs if job.key.startswith(arguments.only)], arguments.processes, console)
    results = Results(rows())
    (OUT / "operators.md").write_text(page(results), encoding="utf-8")
    draw(results)
    console.print(f"wrote {OUT / 'operators.md'}")


if __name__ == "__main__":
    main()
