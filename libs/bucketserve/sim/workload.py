"""Requests to simulate: lengths from published percentiles or a trace file, arrivals drawn or recorded.

Everything is drawn from a seeded random.Random: the same seed gives the same workload, whatever the policy.
"""

from __future__ import annotations

import csv
import enum
import gzip
import json
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from bucketserve.sim.errors import SimulationError

__all__ = ["WORKLOADS", "Arrivals", "Lengths", "SimRequest", "Workload", "make_workload", "read_trace"]

WORKLOADS = ("alpaca", "longbench", "mixed")

MIXED_PARTS = ("alpaca", "longbench")


class Arrivals(enum.Enum):
    """How requests arrive."""

    POISSON = "poisson"
    GAMMA = "gamma"
    """Bursty: gamma-distributed gaps with a given coefficient of variation."""
    RECORDED = "recorded"
    """The trace's own times, stretched to the wanted rate."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """One request's lengths in tokens, and its recorded arrival in seconds if there is one."""

    prompt_tokens: int
    output_tokens: int
    arrival_s: float | None = None


@dataclass(frozen=True, slots=True)
class SimRequest:
    """A request of a workload; fits the context."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    """True output; a policy sees only a limit on it."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival."""

    name: str
    requests: tuple[SimRequest, ...]
    num_truncated_prompts: int
    num_cut_outputs: int

    @property
    def span_s(self) -> float:
        """Time from the start to the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0


def make_workload(
    source: str | Sequence[Lengths],
    *,
    num_requests: int,
    rate_rps: float | None,
    context_tokens: int,
    seed: int,
    arrivals: Arrivals = Arrivals.POISSON,
    burstiness_cv: float = 2.0,
) -> Workload:
    """Returns a workload.

    Args:
        source: one of WORKLOADS, or the rows of a trace.
        num_requests: how many; recorded arrivals give at most the trace's rows.
        rate_rps: mean arrivals per second; None keeps the recorded times.
        context_tokens: prompt and output together fit in it; longer prompts are truncated, outputs cut, both counted.
        seed: of all draws.
        arrivals: drawn lengths have no recorded times.
        burstiness_cv: coefficient of variation of gamma gaps.

    Raises:
        SimulationError: the combination makes no sense.
    """
    rng = random.Random(seed)
    name = source if isinstance(source, str) else "trace"
    rows = _draw(source, num_requests, rng) if isinstance(source, str) else _rows(source, num_requests, arrivals, rng)
    if arrivals is Arrivals.RECORDED:
        times = _recorded(rows, rate_rps)
    else:
        if rate_rps is None or rate_rps <= 0:
            raise SimulationError("drawn arrivals need a positive rate")
        times = _drawn(len(rows), rate_rps, 1.0 if arrivals is Arrivals.POISSON else burstiness_cv, rng)
    requests, num_truncated, num_cut = [], 0, 0
    for arrival_s, row in zip(times, rows, strict=True):
        prompt, output = _fit(row, context_tokens)
        num_truncated += prompt < row.prompt_tokens
        num_cut += output < row.output_tokens
        requests.append(SimRequest(arrival_s, prompt, output))
    return Workload(name, tuple(requests), num_truncated, num_cut)


def read_trace(path: Path) -> list[Lengths]:
    """Returns the rows of a CSV (may be gzipped) with columns arrival_s, prompt_tokens, output_tokens.

    Raises:
        SimulationError: the file can't be read as such; names the line.
    """
    rows: list[Lengths] = []
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {"prompt_tokens", "output_tokens"} - set(reader.fieldnames or ())
        if missing:
            raise SimulationError(f"{path}: no column {', '.join(sorted(missing))}")
        for line in reader:
            try:
                arrival = line.get("arrival_s") or ""
                rows.append(
                    Lengths(
                        max(int(line["prompt_tokens"]), 1),
                        max(int(line["output_tokens"]), 1),
                        float(arrival) if arrival.strip() else None,
                    )
                )
            except (TypeError, ValueError) as error:
                raise SimulationError(f"{path}, line {reader.line_num}: {error}") from error
    if not rows:
        raise SimulationError(f"{path}: no rows")
    return rows


def _fit(row: Lengths, context_tokens: int) -> tuple[int, int]:
    """The output keeps up to a quarter of the context, so that a truncated prompt still asks for something."""
    room = min(row.output_tokens, max(context_tokens // 4, 1))
    prompt = min(row.prompt_tokens, context_tokens - room)
    return prompt, min(row.output_tokens, context_tokens - prompt)


def _rows(rows: Sequence[Lengths], number: int, arrivals: Arrivals, rng: random.Random) -> list[Lengths]:
    """Recorded rows in order; otherwise rows in random order, all once before any twice."""
    if arrivals is Arrivals.RECORDED:
        return list(rows[:number])
    drawn: list[Lengths] = []
    while len(drawn) < number:
        shuffled = list(rows)
        rng.shuffle(shuffled)
        drawn += shuffled[: number - len(drawn)]
    return drawn


def _recorded(rows: Sequence[Lengths], rate_rps: float | None) -> list[float]:
    times: list[float] = []
    for row in rows:
        if row.arrival_s is None:
            raise SimulationError("the trace has rows without arrival_s: draw Poisson or gamma arrivals")
        times.append(row.arrival_s)
    start_s, span_s = min(times), max(times) - min(times)
    stretch = 1.0 if rate_rps is None or span_s <= 0 else len(times) / rate_rps / span_s
    return sorted((time_s - start_s) * stretch for time_s in times)


def _drawn(number: int, rate_rps: float, cv: float, rng: random.Random) -> list[float]:
    """Gamma gaps of mean 1 / rate; shape 1 / cv^2, which is the Poisson process for cv = 1."""
    shape = 1.0 / (cv * cv)
    now_s, times = 0.0, []
    for _ in range(number):
        now_s += rng.gammavariate(shape, 1.0 / (rate_rps * shape))
        times.append(now_s)
    return times


@cache
def _published() -> dict[str, dict[str, list[float]]]:
    text = (resources.files("bucketserve.sim") / "data" / "workloads.json").read_text(encoding="utf-8")
    data = json.loads(text)
    return {
        name: {"quantiles": data["quantiles"], **{key: data[name][key] for key in ("prompt_tokens", "output_tokens")}}
        for name in MIXED_PARTS
    }


def _draw(name: str, number: int, rng: random.Random) -> list[Lengths]:
    if name not in WORKLOADS:
        raise SimulationError(f"no workload {name!r}: one of {', '.join(WORKLOADS)}")
    rows = []
    for _ in range(number):
        part = _published()[rng.choice(MIXED_PARTS) if name == "mixed" else name]
        prompt = _quantile(part["quantiles"], part["prompt_tokens"], rng.random())
        rows.append(Lengths(prompt, _quantile(part["quantiles"], part["output_tokens"], rng.random())))
    return rows


def _quantile(shares: Sequence[float], values: Sequence[float], share: float) -> int:
    """Inverse distribution, log-linear between the published percentiles."""
    i = min(max(bisect_right(shares, share) - 1, 0), len(shares) - 2)
    within = (share - shares[i]) / (shares[i + 1] - shares[i])
    low, high = math.log(values[i]), math.log(values[i + 1])
    return max(round(math.exp(low + within * (high - low))), 1)
