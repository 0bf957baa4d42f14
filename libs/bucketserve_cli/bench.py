"""`bucketserve bench`: a load generator over gRPC that reports what clients felt.

Closed loop (so many requests at once, the next when one ends) or open loop (arrivals at a rate, whatever happens), on
the requests of a JSON file, on the lengths of a trace, or on lengths drawn like the simulator's workloads.
"""

from __future__ import annotations

import asyncio
import csv
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import grpc
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.core.errors import BucketServeError, UnknownModelError
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.percentiles import Percentiles
from bucketserve.sim.workload import Arrivals, make_workload, read_trace
from bucketserve.v1 import common_pb2
from bucketserve_cli.connection import Connection
from bucketserve_cli.terminal import UINT32, InputError, replaced_file

__all__ = ["BenchOptions", "run_bench"]

FIRST_ID = 100
"""Drawn prompts use ids from here on: below are often special ones."""
DEFAULT_NUMBER = 100
SHORT_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What the command line asked for."""

    address: str
    connection: Connection
    model: str
    requests: Path | None
    trace: Path | None
    workload: str
    number: int | None
    rate_rps: float | None
    arrivals: Arrivals
    concurrency: int
    ttft_s: float
    tpot_s: float
    seed: int
    timeout_s: float
    json_path: Path | None


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to send."""

    prompt_ids: tuple[int, ...]
    output_tokens: int
    arrival_s: float
    kind: str


@dataclass(slots=True)
class Felt:
    """What its client saw."""

    kind: str
    prompt_tokens: int
    output_tokens: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    total_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """The figures of a run; rates over the time from the first request to the last end."""

    requests: int
    failed: int
    errors: dict[str, int] = field(default_factory=dict)
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    slo_attainment: float
    goodput_rps: float
    ttft_s: Percentiles
    tpot_s: Percentiles
    ttft_s_by_kind: dict[str, Percentiles]


async def run_bench(options: BenchOptions, console: Console, progress_console: Console) -> BenchReport:
    """Sends everything, shows the table, writes the JSON file if one is wanted.

    Raises:
        InputError: the options or the input file can't be used.
        BucketServeError: the model is not served, or the gateway can't be reached.
    """
    if options.requests and options.trace:
        raise InputError("give one of --requests and --trace")
    with replaced_file(options.json_path) if options.json_path else nullcontext() as file:
        report, felt = await _measure(options, progress_console)
        console.print(_table(report, options))
        if file is not None:
            content = {"report": asdict(report), "requests": [asdict(one) for one in felt]}
            file.write(json.dumps(content, indent=1) + "\n")
    return report


async def _measure(options: BenchOptions, progress_console: Console) -> tuple[BenchReport, list[Felt]]:
    async with BucketServeClient(
        options.address, tls=options.connection.tls, api_key=options.connection.api_key
    ) as client:
        models = await client.list_models()
        # Who names none means the only model, and none of its adapters.
        meant = [
            model
            for model in models
            if (options.model in (model.name, *model.aliases) if options.model else not model.parent)
        ]
        if len(meant) != 1:
            raise UnknownModelError(options.model, [model.name for model in models])
        (model,) = meant
        options = replace(options, model=model.name)
        plan = _plan(options, model.context_tokens, model.vocab_size)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=progress_console,
            transient=True,
            disable=not progress_console.is_terminal,
        ) as progress:
            task = progress.add_task("requests", total=len(plan))
            start_s = time.perf_counter()
            felt = await _send_all(client, plan, options, lambda: progress.advance(task))
            duration_s = time.perf_counter() - start_s
    return _report(felt, duration_s, options), felt


def _plan(options: BenchOptions, context_tokens: int, vocab_size: int) -> list[Planned]:
    rng = random.Random(options.seed)
    if options.requests is not None:
        return _read_requests(options.requests, options, rng)
    try:
        rows = read_trace(options.trace) if options.trace else None
        drawn = make_workload(
            rows or options.workload,
            num_requests=options.number or (len(rows) if rows else DEFAULT_NUMBER),
            # A closed loop has no arrivals: any rate gives the same lengths.
            rate_rps=options.rate_rps if options.arrivals is Arrivals.RECORDED else options.rate_rps or 1.0,
            context_tokens=context_tokens,
            seed=options.seed,
            arrivals=options.arrivals,
        )
    except (SimulationError, ValueError, EOFError, csv.Error) as error:
        raise InputError(str(error)) from None
    return [
        Planned(
            tuple(rng.randrange(min(FIRST_ID, vocab_size - 1), vocab_size) for _ in range(request.prompt_tokens)),
            request.output_tokens,
            request.arrival_s,
            "short" if request.prompt_tokens < SHORT_TOKENS else "long",
        )
        for request in drawn.requests
    ]


def _read_requests(file: Path, options: BenchOptions, rng: random.Random) -> list[Planned]:
    """Returns the requests of a JSON file, {"requests": [{"prompt_ids": [...], "output_len": n, "kind": "..."}]}.

    Raises:
        InputError: it is not such a file; says which request is wrong.
    """
    if options.arrivals is Arrivals.RECORDED:
        raise InputError("--arrivals recorded needs a --trace: the requests of a file have no times")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON: {error}") from None
    rows = content.get("requests") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(f'{file}: no list "requests" with at least one request')
    rows = rows[: options.number]
    planned = []
    for i, (row, at_s) in enumerate(zip(rows, _arrival_times(len(rows), options.rate_rps, rng), strict=True)):
        prompt_ids, output_len = (row.get("prompt_ids"), row.get("output_len")) if isinstance(row, dict) else (None, 0)
        is_prompt = isinstance(prompt_ids, list) and all(
            type(each) is int and 0 <= each <= UINT32 for each in prompt_ids
        )
        if not prompt_ids or not is_prompt or type(output_len) is not int or not 1 <= output_len <= UINT32:
            raise InputError(f"{file}: requests[{i}] has no prompt_ids (token ids) and output_len (at least 1)")
        planned.append(Planned(tuple(prompt_ids), output_len, at_s, str(row.get("kind", ""))))
    return planned


def _arrival_times(number: int, rate_rps: float | None, rng: random.Random) -> list[float]:
    now_s, times = 0.0, []
    for _ in range(number):
        now_s += rng.expovariate(rate_rps) if rate_rps else 0.0
        times.append(now_s)
    return times


async def _send_all(
    client: BucketServeClient, plan: Sequence[Planned], options: BenchOptions, on_end: Callable[[], None]
) -> list[Felt]:
    is_open = options.rate_rps is not None or options.arrivals is Arrivals.RECORDED
    slots = asyncio.Semaphore(len(plan) if is_open else options.concurrency)
    start_s = time.perf_counter()

    async def one(planned: Planned) -> Felt:
        if is_open:
            await asyncio.sleep(max(start_s + planned.arrival_s - time.perf_counter(), 0.0))
        async with slots:
            felt = await _send(client, planned, options)
        on_end()
        return felt

    return list(await asyncio.gather(*(one(planned) for planned in plan)))


async def _send(client: BucketServeClient, planned: Planned, options: BenchOptions) -> Felt:
    felt = Felt(planned.kind, len(planned.prompt_ids))
    sent_s = time.perf_counter()
    first_s = last_s = sent_s
    try:
        async for event in client.generate(
            model=options.model,
            token_ids=planned.prompt_ids,
            max_tokens=planned.output_tokens,
            ignore_eos=True,
            slo=common_pb2.Slo(
                ttft_ms=max(round(options.ttft_s * 1e3), 1), tpot_ms=max(round(options.tpot_s * 1e3), 1)
            ),
            timeout_s=options.timeout_s,
        ):
            if isinstance(event, Chunk):
                last_s = time.perf_counter()
                if not felt.output_tokens:
                    first_s = last_s
                felt.output_tokens += len(event.token_ids)
            elif isinstance(event, Finished):
                felt.output_tokens = event.usage.output_tokens
    except (BucketServeError, grpc.aio.AioRpcError) as error:
        felt.error = error.reason if isinstance(error, BucketServeError) else error.code().name
    if felt.output_tokens:
        felt.ttft_s = first_s - sent_s
    if felt.output_tokens > 1:
        felt.tpot_s = (last_s - first_s) / (felt.output_tokens - 1)
    felt.total_s = time.perf_counter() - sent_s
    return felt


def _report(felt: Sequence[Felt], duration_s: float, options: BenchOptions) -> BenchReport:
    good = [one for one in felt if not one.error]
    errors: dict[str, int] = {}
    for one in felt:
        if one.error:
            errors[one.error] = errors.get(one.error, 0) + 1
    within = [one for one in good if (one.ttft_s or 0.0) <= options.ttft_s and (one.tpot_s or 0.0) <= options.tpot_s]
    output = sum(one.output_tokens for one in good)
    kinds = sorted({one.kind for one in good if one.kind})
    return BenchReport(
        requests=len(felt),
        failed=len(felt) - len(good),
        errors=errors,
        duration_s=duration_s,
        requests_per_s=len(good) / duration_s,
        output_tokens_per_s=output / duration_s,
        total_tokens_per_s=(output + sum(one.prompt_tokens for one in good)) / duration_s,
        slo_attainment=len(within) / len(felt),
        goodput_rps=len(within) / duration_s,
        ttft_s=Percentiles.of([one.ttft_s for one in good if one.ttft_s is not None]),
        tpot_s=Percentiles.of([one.tpot_s for one in good if one.tpot_s is not None]),
        ttft_s_by_kind={
            kind: Percentiles.of([one.ttft_s for one in good if one.kind == kind and one.ttft_s is not None])
            for kind in kinds
        },
    )


def _table(report: BenchReport, options: BenchOptions) -> Table:
    table = Table(show_header=False, highlight=True)

    def three(values: Percentiles, scale: float, unit: str) -> str:
        return f"{values.p50 * scale:.3g} / {values.p90 * scale:.3g} / {values.p99 * scale:.3g} {unit}"

    rows = [
        ("requests", f"{report.requests} in {report.duration_s:.2f} s, {report.failed} failed"),
        ("throughput", f"{report.requests_per_s:.2f} requests/s, {report.output_tokens_per_s:.0f} output tokens/s"),
        ("with prompts", f"{report.total_tokens_per_s:.0f} tokens/s"),
        ("TTFT p50 / p90 / p99", three(report.ttft_s, 1e3, "ms")),
        *((f"  of {kind} prompts", three(values, 1e3, "ms")) for kind, values in report.ttft_s_by_kind.items()),
        ("TPOT p50 / p90 / p99", three(report.tpot_s, 1e3, "ms")),
        (
            f"within {options.ttft_s:g} s and {options.tpot_s:g} s",
            f"{report.slo_attainment:.1%}, goodput {report.goodput_rps:.2f} requests/s",
        ),
        *(("failed with", f"{name}: {number}") for name, number in report.errors.items()),
    ]
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table
