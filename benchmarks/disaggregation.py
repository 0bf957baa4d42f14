"""Prefill and decode apart, or together? Two workers with one core each: `both, both` and `prefill, decode`.

The load is open. In every case short interactive requests arrive steadily. In `bursts`, groups of long prompts come on
top, sized so that prefill takes about three times the work of decode; in `decoding` there are none, and outputs are
long. Reported are TTFT and TPOT of the short requests, how many of them met both targets, the cost (TTFT and TPOT
relative to their targets, in equal parts), and tokens per second.

    python benchmarks/disaggregation.py [--model DIR] [--case bursts] [--seconds 40] [--rounds 2] [--jsonl OUT]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from conditions import Records, Row, conditions
from reference_requests import Request
from reference_stack import send
from rich.console import Console
from rich.table import Table

from bucketserve.client import BucketServeClient
from bucketserve.rpc.channel import open_channel
from bucketserve.sim.percentiles import Percentiles
from bucketserve.v1 import common_pb2, scheduler_pb2, scheduler_pb2_grpc
from bucketserve_cli.stack import LocalStack, StackSpec

ROOT = Path(__file__).resolve().parents[1]
ROLES = {"together": ("both", "both"), "apart": ("prefill", "decode")}
WORST = 4.0
"""How much a missed target counts at most."""
COLUMNS = {
    "ttft_p50_ms": ".0f",
    "ttft_p99_ms": ".0f",
    "tpot_p50_ms": ".1f",
    "tpot_p99_ms": ".1f",
    "within_slo": ".0%",
    "cost": ".2f",
    "long_ttft_p50_ms": ".0f",
    "tokens_per_s": ".0f",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A load: rates a second, lengths in tokens, from and to."""

    short_rate: float
    short_prompt: tuple[int, int]
    short_output: tuple[int, int]
    burst: int
    every_s: float
    long_prompt: tuple[int, int] = (800, 1600)
    long_output: tuple[int, int] = (4, 12)


CASES = {
    "bursts": Case(4.0, (16, 64), (48, 96), burst=12, every_s=5.0),
    "decoding": Case(8.0, (16, 64), (96, 192), burst=0, every_s=1e9),
}


@dataclass(frozen=True, slots=True)
class Felt:
    """What the client of one request felt."""

    sent_s: float
    is_long: bool
    ttft_s: float
    tpot_s: float
    tokens: int


async def load(address: str, case: Case, seconds: float, ttft_s: float, tpot_s: float) -> list[Felt]:
    """Runs the load; every request must succeed."""
    rng = random.Random(1)
    felt: list[Felt] = []
    slo = common_pb2.Slo(ttft_ms=round(ttft_s * 1e3), tpot_ms=round(tpot_s * 1e3))
    async with BucketServeClient(address) as client, asyncio.TaskGroup() as tasks:
        begin_s = time.perf_counter()

        async def one(prompt: int, output: int, is_long: bool) -> None:
            ids = [rng.randrange(2, 4000) for _ in range(prompt)]
            outcome = await send(client, Request(ids, output), slo=None if is_long else slo)
            if outcome.error or outcome.first_s is None or outcome.last_s is None:
                raise SystemExit(f"a request failed: {outcome.error}")
            spent_s = outcome.last_s - outcome.first_s
            ttft_s = outcome.first_s - outcome.sent_s
            felt.append(Felt(outcome.sent_s - begin_s, is_long, ttft_s, spent_s / max(output - 1, 1), output))

        next_short_s, next_burst_s = 0.0, case.every_s / 2
        while (now_s := time.perf_counter() - begin_s) < seconds:
            if now_s >= next_short_s:
                next_short_s += rng.expovariate(case.short_rate)
                tasks.create_task(one(rng.randint(*case.short_prompt), rng.randint(*case.short_output), False))
            if now_s >= next_burst_s:
                next_burst_s += case.every_s
                for _ in range(case.burst):
                    tasks.create_task(one(rng.randint(*case.long_prompt), rng.randint(*case.long_output), True))
            await asyncio.sleep(0.005)
    return felt


def figures(felt: list[Felt], ttft_s: float, tpot_s: float) -> dict[str, float]:
    """Figures of what clients felt; `felt` is in order of completion."""
    short = [one for one in felt if not one.is_long]
    long = [one.ttft_s for one in felt if one.is_long]
    ttft, tpot = (Percentiles.of([getattr(one, name) for one in short]) for name in ("ttft_s", "tpot_s"))
    spent_s = max(one.sent_s + one.ttft_s + one.tpot_s * (one.tokens - 1) for one in felt) - min(
        one.sent_s for one in felt
    )

    return {
        "requests": len(short),
        "ttft_p50_ms": 1e3 * ttft.p50,
        "ttft_p99_ms": 1e3 * ttft.p99,
        "tpot_p50_ms": 1e3 * tpot.p50,
        "tpot_p99_ms": 1e3 * tpot.p99,
        "within_slo": statistics.mean(one.ttft_s <= ttft_s and one.tpot_s <= tpot_s for one in short),
        "cost": statistics.mean((min(o.ttft_s / ttft_s, WORST) + min(o.tpot_s / tpot_s, WORST)) / 2 for o in short),
        "long_ttft_p50_ms": statistics.median(long) * 1e3 if long else 0.0,
        "tokens_per_s": sum(one.tokens for one in felt) / spent_s,
    }


async def roles(stack: LocalStack) -> list[str]:
    """Returns the roles that the workers have now."""
    async with open_channel(stack.scheduler_address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        response = await stub.GetStatus(scheduler_pb2.GetStatusRequest(), timeout=5)
    names = common_pb2.WorkerRole.Name
    return sorted(names(worker.role).removeprefix("WORKER_ROLE_").lower() for worker in response.models[0].workers)


def measure(options: argparse.Namespace, layout: str, case: Case) -> Row:
    """Runs one case on one layout and returns its figures."""
    spec = StackSpec(
        model=options.model,
        roles=ROLES[layout],
        environ={
            "BUCKETSERVE_WORKER_NUM_THREADS": "1",
            "BUCKETSERVE_WORKER_DTYPE": options.dtype,
            "BUCKETSERVE_WORKER_QUANTIZATION": options.quantization,
        },
    )
    with LocalStack(spec) as stack:
        felt = asyncio.run(load(stack.gateway_address, case, options.seconds, options.ttft_s, options.tpot_s))
        at_end = asyncio.run(roles(stack))
    return {"layout": layout, "roles_at_end": at_end, **figures(felt, options.ttft_s, options.tpot_s)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "demo" / "model"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--layout", action="append", choices=list(ROLES))
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ttft-s", type=float, default=0.5, help="target of short requests")
    parser.add_argument("--tpot-s", type=float, default=0.05, help="likewise")
    parser.add_argument("--short-rate", type=float, help="short requests per second, in place of the case's")
    parser.add_argument("--burst", type=int, help="long prompts in a burst, in place of the case's")
    parser.add_argument("--every-s", type=float, help="seconds between bursts, in place of the case's")
    parser.add_argument("--jsonl", type=Path)
    options = parser.parse_args()
    console = Console(width=140)
    changed = {name: getattr(options, name) for name in ("short_rate", "burst", "every_s")}
    changed = {name: value for name, value in changed.items() if value is not None}
    cases = {name: replace(CASES[name], **changed) for name in options.case or CASES}
    settings = {key: value for key, value in vars(options).items() if key not in ("jsonl", "model")}
    with Records(options.jsonl, conditions(**settings, model=Path(options.model).name)) as records:
        for number in range(options.rounds):
            for name, case in cases.items():
                for layout in options.layout or ROLES:
                    records.add({"round": number, "case": name, **measure(options, layout, case)})
                    console.print(records.rows[-1], highlight=False)
    table = Table(title="short requests, two workers with one thread each")
    for column in ("case", "layout", "roles at the end", *COLUMNS):
        table.add_column(column, justify="right" if column in COLUMNS else "left")
    for row in sorted(records.rows, key=lambda row: (str(row["case"]), list(ROLES).index(str(row["layout"])))):
        cells = (format(row[name], form) for name, form in COLUMNS.items())
        table.add_row(str(row["case"]), str(row["layout"]), ", ".join(row["roles_at_end"]), *cells)  # type: ignore[arg-type]
    console.print(table)


if __name__ == "__main__":
    main()
