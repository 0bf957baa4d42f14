"""The highest rate that keeps an attainment: bisection over a fixed grid of rates, each run once for all targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from bucketserve.sim.errors import SimulationError
from bucketserve.sim.experiment import Experiment, run_experiment
from bucketserve.sim.policy_spec import Layout
from bucketserve.sim.report import Report

__all__ = ["PRECISION", "find_capacities", "find_capacity"]

PRECISION = 0.02
"""Relative distance of neighbouring rates: capacities are known no better."""
MAX_RATE_RPS = 1e6
FIRST_STRIDE = 8
"""Grid steps of a search that has no bracket yet; doubled until it has."""
MAX_DECLINE = 210
"""Grid steps below the start at which a search gives up: a 64th of it."""


def find_capacity(experiment: Experiment, layouts: Sequence[Layout], target: float, *, start_rps: float) -> Report:
    """Returns find_capacities for a single target."""
    return find_capacities(experiment, layouts, [target], start_rps=start_rps)[target]


def find_capacities(
    experiment: Experiment, layouts: Sequence[Layout], targets: Sequence[float], *, start_rps: float
) -> dict[float, Report]:
    """Returns, for each target, the report at the highest rate whose attainment is at least that, at its best layout.

    A layout that fails at the best rate found so far costs one run. Where no rate is good enough, capacity_rps is 0.

    Raises:
        SimulationError: every rate is good enough: there are too few requests.
    """
    start = round(math.log(start_rps) / math.log(1 + PRECISION))
    best: dict[float, tuple[int, Report]] = {}
    for layout in layouts:
        search = _Search(experiment, layout, min(targets))
        for target in sorted(targets):
            floor = best[target][0] if target in best else None
            found = search.highest(target, start, floor)
            if found is not None:
                report = search.reports[found]
                best[target] = found, replace(report, capacity_rps=report.rate_rps)
    reports = {target: report for target, (_, report) in best.items()}
    if len(reports) < len(set(targets)):
        slowest = replace(run_experiment(experiment, layouts[0], start_rps / 64), capacity_rps=0.0)
        reports = dict.fromkeys(targets, slowest) | reports
    return reports


class _Search:
    """Runs of one layout by their index in the grid of rates."""

    def __init__(self, experiment: Experiment, layout: Layout, stop_below: float) -> None:
        self.reports: dict[int, Report] = {}
        self._experiment = experiment
        self._layout = layout
        self._stop_below = stop_below

    def highest(self, target: float, start: int, floor: int | None) -> int | None:
        """Returns the highest good rate's index; None if none is good, or none above the floor."""
        if floor is not None and not self._is_good(floor + 1, target):
            return None
        stride = FIRST_STRIDE
        while True:
            good = max((i for i in self.reports if self._is_good(i, target)), default=None)
            bad = min((i for i in self.reports if good is None or i > good), default=None)
            if good is not None and bad is not None:
                if bad == good + 1:
                    return good
                self._is_good((good + bad) // 2, target)
                continue
            if good is not None:
                self._is_good(good + stride, target)
            elif bad is None:
                self._is_good(start, target)
            elif bad < start - MAX_DECLINE:
                return None
            else:
                self._is_good(bad - stride, target)
            stride *= 2

    def _is_good(self, index: int, target: float) -> bool:
        if index not in self.reports:
            rate_rps = (1 + PRECISION) ** index
            if rate_rps > MAX_RATE_RPS:
                raise SimulationError(f"{self._experiment.num_requests} requests are too few to find the capacity")
            self.reports[index] = run_experiment(self._experiment, self._layout, rate_rps, stop_below=self._stop_below)
        return self.reports[index].slo_attainment >= target
