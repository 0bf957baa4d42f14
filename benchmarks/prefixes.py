"""Placement by prefix against the same core without hashes, simulated on a trace that has them.

For each rate, means over seeds of the TTFT of interactive requests in the measured window, attainment, and the share of
the workers' time that goes into prompts.

    python benchmarks/prefixes.py mooncake_synthetic_prefix_hashes.jsonl.gz --rates 2,3 [--workers 4] [--burstiness 3]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bucketserve.sim.cluster import aggregated
from bucketserve.sim.experiment import Experiment, run_experiment
from bucketserve.sim.latency import load_device
from bucketserve.sim.policies import blind, find_policy
from bucketserve.sim.report import Report
from bucketserve.sim.workload import Arrivals, read_trace

FIGURES = {
    "TTFT p50": lambda report: report.ttft_s.p50,
    "p90": lambda report: report.ttft_s.p90,
    "p99": lambda report: report.ttft_s.p99,
    "attainment": lambda report: report.slo_attainment,
    "prompts": lambda report: report.utilisation.prefill,
}


def mean(reports: list[Report], name: str) -> float:
    return statistics.mean(FIGURES[name](report) for report in reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--rates", default="2,2.5,3", help="requests per second")
    parser.add_argument("--device", default="h100-80gb-8b")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--burstiness", type=float, default=1.0, help="coefficient of variation of arrivals' gaps")
    arguments = parser.parse_args()
    rows, device = read_trace(arguments.trace), load_device(arguments.device)
    table = Table("requests/s", "placement", *FIGURES)
    console = Console()
    for rate in (float(text) for text in arguments.rates.split(",")):
        reports: dict[str, list[Report]] = {}
        for policy in (blind(find_policy("adaptive")), find_policy("adaptive")):
            with console.status(f"{rate} requests/s, {policy.name}"):
                reports[policy.name] = [
                    run_experiment(
                        Experiment(
                            policy=policy,
                            source=rows,
                            source_name=arguments.trace.name,
                            device=device,
                            num_requests=arguments.requests,
                            min_span_s=0.0,
                            seed=seed,
                            arrivals=Arrivals.GAMMA,
                            burstiness_cv=arguments.burstiness,
                        ),
                        aggregated(arguments.workers),
                        rate,
                    )
                    for seed in range(1, arguments.seeds + 1)
                ]
        without, by_prefix = reports.values()
        for name, found in (("without prefixes", without), ("by prefix", by_prefix)):
            table.add_row(f"{rate:g}", name, *(f"{mean(found, figure):.3f}" for figure in FIGURES))
        ratios = (f"{mean(by_prefix, figure) / mean(without, figure):.2f}" for figure in FIGURES)
        table.add_row("", "ratio", *ratios)
    console.print(table)


if __name__ == "__main__":
    main()
