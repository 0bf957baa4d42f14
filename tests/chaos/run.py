"""Chaos: a live local stack, mixed load, seeded faults; then the books must balance.

    python -m tests.chaos.run --duration 600 --seed 1

2 schedulers, 2 gateways, 2 prefill and 2 decode workers (fake engine, whose every token can be foretold), Valkey with
its data on disk, and a batch job. Exit status 1 unless accepted = completed + cancelled by the client + cut with a
killed gateway, no token differs from what it must be, nothing comes twice, nothing is lost or left over, and no attempt
was executed by two workers at once under one epoch. --faults none makes a soak test of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bucketserve.core.errors import BucketServeError
from bucketserve.job_client import JobClient, request_from_json
from bucketserve.sim.percentiles import Percentiles
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.v1 import job_pb2
from bucketserve_cli.stack import LocalStack, StackSpec
from tests.chaos.checks import Usage, double_executions, leaks, usage, warm_up
from tests.chaos.faults import Faults
from tests.chaos.load import Load, Tally
from tests.chaos.oracle import expected_tokens
from tests.chaos.proxy import Relay

MODEL = str(Path(__file__).resolve().parents[2] / "models" / "demo" / "model")
NUM_CLIENTS = 24
JOB_REQUESTS = 300
SETTLE_S = 90.0

ENVIRON = {
    "BUCKETSERVE_WORKER_CONTEXT_TOKENS": "2048",
    "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "10000",
    "BUCKETSERVE_WORKER_KV_LEASE_S": "10",
    "BUCKETSERVE_SCHEDULER_WORKER_LEASE_S": "3",
    "BUCKETSERVE_GATEWAY_MAX_ATTEMPTS": "20",
    "BUCKETSERVE_GATEWAY_JOB_LEASE_S": "5",
    "BUCKETSERVE_GATEWAY_JOB_CONCURRENCY": "4",
    "BUCKETSERVE_TELEMETRY_LOG_LEVEL": "debug",
}


async def chaos(options: argparse.Namespace, console: Console, log_dir: Path) -> bool:
    """Runs it; returns whether everything was as it must be."""
    loop = asyncio.get_running_loop()
    if (task := asyncio.current_task()) is not None and threading.current_thread() is threading.main_thread():
        # Whoever ends us ends the stack with us.
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.ExitStack() as stack_exit:
        store = stack_exit.enter_context(EmbeddedServer(is_durable=True))
        spec = StackSpec(
            model=MODEL,
            engine="fake",
            roles=("prefill", "prefill", "decode", "decode"),
            num_schedulers=2,
            num_gateways=2,
            redis_url=store.url,
            log_dir=log_dir,
            environ=dict(ENVIRON),
        )
        stack = LocalStack(spec, lambda line: console.print(f"  {line}", highlight=False))
        relays = [Relay(address) for address in stack.scheduler_addresses]
        for relay in relays:
            await relay.start()
        through = ",".join(relay.address for relay in relays)
        for section in ("GATEWAY", "WORKER"):
            spec.environ[f"BUCKETSERVE_{section}_SCHEDULER_ADDRESS"] = through  # type: ignore[index]
        await loop.run_in_executor(None, stack.__enter__)
        stack_exit.push(stack)
        tally, faults = Tally(), Faults(stack, store, relays, options.seed)
        before = await warm_up(stack)
        start_s = time.monotonic()
        load = Load(stack.gateway_addresses, tally, options.seed, faults.was_killed)
        running = asyncio.create_task(load.run(options.clients))
        job = asyncio.create_task(_job(stack, options.seed))
        with Progress(console=console) as progress:
            bar = progress.add_task("chaos" if options.faults == "all" else "soak", total=options.duration)
            shower = asyncio.create_task(_show(progress, bar, tally, start_s))
            until_s = start_s + options.duration
            if options.faults == "all":
                await faults.run(until_s)
            else:
                await asyncio.sleep(options.duration)
            load.stop()
            await running
            shower.cancel()
        job_problems = await job
        left = await _settled(stack, before)
        num_runs, twice = double_executions(stack)
        after = usage(stack)
        for relay in relays:
            await relay.close()
        await loop.run_in_executor(None, lambda: stack.__exit__(None, None, None))
    report = _report(options, tally, faults, left, job_problems, num_runs, twice, before, after)
    _print(report, console, log_dir)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return bool(report["is_good"])


async def _job(stack: LocalStack, seed: int) -> list[str]:
    """Submits a job and fetches its results, however often it takes; returns what is wrong with them."""
    rows = [{"custom_id": f"c{i}", "token_ids": [3 + (i * 7 + seed) % 200] * (1 + i % 40)} for i in range(JOB_REQUESTS)]
    requests = [request_from_json({**row, "max_tokens": 5 + i % 30, "ignore_eos": True}) for i, row in enumerate(rows)]
    results, turn = {}, 0
    while True:
        turn += 1
        address = stack.gateway_addresses[turn % 2]
        try:
            async with asyncio.timeout(120), JobClient(address) as jobs:
                # Again and again with the same key: there is one job, also if the store lost it meanwhile.
                job = await jobs.submit(requests, idempotency_key=f"chaos-{seed}")
                async for result in jobs.results(job.job_id, follow=True):
                    results[result.index] = result
                if (await jobs.get(job.job_id)).state == job_pb2.JOB_STATE_COMPLETED:
                    break
        except (BucketServeError, TimeoutError, OSError):
            pass
        except Exception as error:  # a call cut in any other way is tried again as well
            if type(error).__name__ != "AioRpcError":
                raise
        await asyncio.sleep(1)
    wrong = []
    for i, row in enumerate(rows):
        wanted = expected_tokens(row["token_ids"], 5 + i % 30, 0.0, 0)  # type: ignore[arg-type]
        if i not in results or list(results[i].token_ids) != wanted:
            wrong.append(f"job request {i}: {results[i].error_reason if i in results else 'no result'}")
    return wrong


async def _show(progress: Progress, bar: object, tally: Tally, start_s: float) -> None:
    while True:
        text = f"{tally.completed:,} completed, {tally.resumed:,} resumed, {len(tally.lost)} lost"
        progress.update(bar, completed=time.monotonic() - start_s, description=text)  # type: ignore[arg-type]
        await asyncio.sleep(0.5)


async def _settled(stack: LocalStack, before: dict[str, Usage]) -> list[str]:
    """Returns what is left over once nothing changes any more."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        try:
            left = await leaks(stack, before)
        except Exception as error:  # the leader may just have changed
            left = [f"not to be seen: {error!r}"]
        if not left or time.monotonic() > deadline_s:
            return left
        await asyncio.sleep(1)


def _report(
    options: argparse.Namespace,
    tally: Tally,
    faults: Faults,
    left: list[str],
    job_problems: list[str],
    num_runs: int,
    twice: list[str],
    before: dict[str, Usage],
    after: dict[str, Usage],
) -> dict[str, object]:
    balance = tally.accepted - tally.completed - tally.cancelled - tally.cut
    is_good = not (balance or tally.lost or tally.mismatched or tally.duplicates or left or job_problems or twice)
    latency = Percentiles.of(tally.latencies_s)
    return {
        "is_good": is_good,
        "duration_s": options.duration,
        "seed": options.seed,
        "faults": dict(faults.injected),
        "fault_log": faults.log,
        "sent": tally.sent,
        "accepted": tally.accepted,
        "completed": tally.completed,
        "cancelled by the client": tally.cancelled,
        "cut with a killed gateway": tally.cut,
        "refused": dict(tally.refused),
        "resumed": tally.resumed,
        "mismatched": tally.mismatched,
        "duplicates": tally.duplicates,
        "accepted and unaccounted for": balance,
        "lost": tally.lost[:20],
        "left over": left,
        "job problems": job_problems[:20],
        "runs at workers": num_runs,
        "executed twice": twice[:20],
        "latency_s": {"p50": latency.p50, "p99": latency.p99},
        "usage": {name: {"before": asdict(before[name]), "after": asdict(after[name])} for name in after},
    }


def _print(report: dict[str, object], console: Console, log_dir: Path) -> None:
    table = Table("what", "number", title=f"seed {report['seed']}, {report['duration_s']:.0f} s")
    faults: dict[str, int] = report["faults"]  # type: ignore[assignment]
    table.add_row("faults injected", str(sum(faults.values())))
    for name, number in sorted(faults.items()):
        table.add_row(f"  {name}", str(number))
    for name in ("sent", "accepted", "completed", "cancelled by the client", "cut with a killed gateway"):
        table.add_row(name, f"{report[name]:,}")
    refused: dict[str, int] = report["refused"]  # type: ignore[assignment]
    table.add_row("refused", f"{sum(refused.values()):,}")
    for name, number in sorted(refused.items()):
        table.add_row(f"  {name}", f"{number:,}")
    for name in ("resumed", "runs at workers", "mismatched", "duplicates", "accepted and unaccounted for"):
        table.add_row(name, f"{report[name]:,}")
    for name in ("lost", "left over", "job problems", "executed twice"):
        table.add_row(name, str(len(report[name])))  # type: ignore[arg-type]
    console.print(table)
    for name in ("lost", "left over", "job problems", "executed twice"):
        for line in report[name]:  # type: ignore[attr-defined]
            console.print(f"[red]{name}:[/] {line}", highlight=False)
    console.print("[green]everything accounted for[/]" if report["is_good"] else f"[red]failed[/]; logs: {log_dir}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=NUM_CLIENTS)
    parser.add_argument("--faults", choices=["all", "none"], default="all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path)
    options = parser.parse_args()
    log_dir = options.logs or Path(tempfile.mkdtemp(prefix="bucketserve-chaos-"))
    sys.exit(0 if asyncio.run(chaos(options, Console(), log_dir)) else 1)


if __name__ == "__main__":
    main()
