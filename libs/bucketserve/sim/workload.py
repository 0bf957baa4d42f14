"""Requests to simulate: lengths from published percentiles or a trace file, arrivals drawn or recorded.

Lengths, arrivals, output limits and classes are drawn from random generators of their own, seeded alike: the same seed
gives the same workload whatever the policy, and a longer workload begins with the shorter one.
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
from typing import TextIO, cast

from bucketserve.core.prefixes import BLOCK_TOKENS as CORE_BLOCK_TOKENS
from bucketserve.core.prefixes import MAX_BLOCKS
from bucketserve.core.types import RequestClass
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.limits import OutputLimits, draw_limit

__all__ = [
    "BLOCK_TOKENS",
    "WORKLOADS",
    "Arrivals",
    "Lengths",
    "SimRequest",
    "Workload",
    "core_hashes",
    "largest_request",
    "make_workload",
    "read_trace",
]

WORKLOADS = ("alpaca", "longbench", "mixed")

MIXED_PARTS = ("alpaca", "longbench")
BLOCK_TOKENS = 512
"""Prompt tokens per block hash, as in Mooncake's traces."""


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
    block_hashes: tuple[int, ...] = ()
    """A hash per BLOCK_TOKENS of the prompt, each of everything up to its block's end; empty: shares nothing."""


@dataclass(frozen=True, slots=True)
class SimRequest:
    """A request of a workload; fits the context."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    """True output; a policy sees only a limit on it."""
    max_new_tokens: int
    """The limit that its client asks for; at least the true output."""
    request_class: RequestClass = RequestClass.INTERACTIVE
    block_hashes: tuple[int, ...] = ()
    """Of the prompt's whole blocks, as in Lengths."""


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


def core_hashes(block_hashes: Sequence[int]) -> tuple[int, ...]:
    """Returns the hashes of the core's smaller blocks, as a gateway would send them."""
    each = BLOCK_TOKENS // CORE_BLOCK_TOKENS
    return tuple(block * each + i for block in block_hashes for i in range(each))[:MAX_BLOCKS]


def make_workload(
    source: str | Sequence[Lengths],
    *,
    num_requests: int,
    rate_rps: float | None,
    context_tokens: int,
    seed: int,
    arrivals: Arrivals = Arrivals.POISSON,
    burstiness_cv: float = 2.0,
    limits: OutputLimits = OutputLimits.CLIENT,
    batch_share: float = 0.0,
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
        limits: how max_new_tokens is chosen; never beyond the context.
        batch_share: share of the requests that are batch class.

    Raises:
        SimulationError: the combination makes no sense.
    """
    lengths, gaps, asked, classes = (random.Random(f"{seed}/{what}") for what in ("lengths", "gaps", "limits", "class"))
    if isinstance(source, str):
        name, rows = source, _draw(source, num_requests, lengths)
    else:
        name, rows = "trace", _rows(source, num_requests, arrivals, lengths)
    if arrivals is Arrivals.RECORDED:
        times = _recorded(rows, rate_rps)
    else:
        if rate_rps is None or rate_rps <= 0:
            raise SimulationError("drawn arrivals need a positive rate")
        times = _drawn(len(rows), rate_rps, 1.0 if arrivals is Arrivals.POISSON else burstiness_cv, gaps)
    requests, num_truncated, num_cut = [], 0, 0
    for arrival_s, row in zip(times, rows, strict=True):
        prompt, output = _fit(row, context_tokens)
        num_truncated += prompt < row.prompt_tokens
        num_cut += output < row.output_tokens
        limit = draw_limit(output, asked) if limits is OutputLimits.CLIENT else output
        requests.append(
            SimRequest(
                arrival_s,
                prompt,
                output,
                max_new_tokens=min(limit, context_tokens - prompt),
                request_class=RequestClass.BATCH if classes.random() < batch_share else RequestClass.INTERACTIVE,
                block_hashes=row.block_hashes[: prompt // BLOCK_TOKENS],
            )
        )
    return Workload(name, tuple(requests), num_truncated, num_cut)


def largest_request(source: str | Sequence[Lengths], context_tokens: int) -> tuple[int, int]:
    """Returns (prompt, output) tokens of the request with the longest output that a source may give, as it fits."""
    if isinstance(source, str):
        _check_name(source)
        parts = MIXED_PARTS if source == "mixed" else (source,)
        outputs = [int(_published()[part]["output_tokens"][-1]) for part in parts]
        prompts = [int(_published()[part]["prompt_tokens"][0]) for part in parts]
        rows: Sequence[Lengths] = [Lengths(min(prompts), max(outputs))]
    else:
        rows = source
    return max((_fit(row, context_tokens) for row in rows), key=lambda fitted: (fitted[1], fitted[0]))


def read_trace(path: Path) -> list[Lengths]:
    """Returns the rows of a trace file, which may be gzipped.

    Either a CSV with columns arrival_s, prompt_tokens, output_tokens, or (a name with .jsonl) an object per line with
    t (arrival, seconds), in and out (tokens) and h (block hashes, see Lengths).

    Raises:
        SimulationError: the file can't be read as such; names the line.
    """
    rows = _read_jsonl(path) if ".jsonl" in path.suffixes else _read_csv(path)
    if not rows:
        raise SimulationError(f"{path}: no rows")
    return rows


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", newline="", encoding="utf-8"))
    return path.open(newline="", encoding="utf-8")


def _read_jsonl(path: Path) -> list[Lengths]:
    rows: list[Lengths] = []
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                hashes = tuple(int(value) for value in row.get("h", ()))
                rows.append(Lengths(max(int(row["in"]), 1), max(int(row["out"]), 1), float(row["t"]), hashes))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise SimulationError(f"{path}, line {number}: {error!r}") from error
    return rows


def _read_csv(path: Path) -> list[Lengths]:
    rows: list[Lengths] = []
    with _open(path) as file:
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
    return rows


def _fit(row: Lengths, context_tokens: int) -> tuple[int, int]:
    """The output keeps up to a quarter of the context, so that a truncated prompt still asks for something."""
    room = min(row.output_tokens, max(context_tokens // 4, 1))
    prompt = min(row.prompt_tokens, context_tokens - room)
    return prompt, min(row.output_tokens, context_tokens - prompt)


def _rows(rows: Sequence[Lengths], number: int, arrivals: Arrivals, rng: random.Random) -> list[Lengths]:
    """Recorded rows in order; otherwise rows in random order, all once before any twice.

    Rows with block hashes keep their order, from a random one on: those that share a prefix come close to each other.
    """
    if arrivals is Arrivals.RECORDED:
        return list(rows[:number])
    if any(row.block_hashes for row in rows):
        first = rng.randrange(len(rows))
        return [rows[(first + i) % len(rows)] for i in range(number)]
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


def _check_name(name: str) -> None:
    if name not in WORKLOADS:
        raise SimulationError(f"no workload {name!r}: one of {', '.join(WORKLOADS)}")


def _draw(name: str, number: int, rng: random.Random) -> list[Lengths]:
    _check_name(name)
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
