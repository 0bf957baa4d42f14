"""Chaos: a live local stack, mixed load, seeded faults; then the books must balance.

    python -m tests.chaos.run --duration 600 --seed 1

2 schedulers, 2 gateways, 2 prefill and 2 decode workers (fake engine, whose every token can be foretold), Valkey with
its data on disk, a relay between each two of them, and a batch job. Exit status 1 unless accepted = completed +
cancelled by the client + cut with a killed gateway, no token differs from what it must be, nothing comes twice, nothing
is lost or left over, no attempt was executed by two workers at once under one epoch, and no request waited for more
than 15 s without a fault that lasted as long. --faults none makes a soak test of it, --faults TEXT takes only those
whose names contain it, --engine transformers serves the demo model, whose tokens transformers itself foretells.
--vllm N adds workers with vLLM, for an environment that has it (scripts/vllm_env.sh): whatever is begun by one kind of
engine is to be gone on with by that kind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bucketserve.core.errors import BucketServeError
from bucketserve.engine.native.compiler import KernelBuildError
from bucketserve.job_client import JobClient, request_from_json
from bucketserve.sim.percentiles import Percentiles
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.v1 import job_pb2
from bucketserve_cli.stack import LocalStack, StackSpec
from tests.chaos.checks import Usage, double_executions, leaks, usage, warm_up
from tests.chaos.clocks import Clocks
from tests.chaos.faults import Faults, Site, engines
from tests.chaos.links import Links
from tests.chaos.load import LONG_WAIT_S, Load, Tally
from tests.chaos.oracle import FakeOracle, MixedOracle, ModelOracle, Oracle

MODEL = str(Path(__file__).resolve().parents[2] / "models" / "demo" / "model")
ROLES = ("prefill", "prefill", "decode", "decode")
REMOTE = 1
"""The prefill worker that others can't share memory with: its KV goes over the network."""
NUM_CLIENTS = 24
JOB_REQUESTS = 300
SETTLE_S = 90.0
PROBLEMS = ("lost", "left over", "job problems", "executed twice", "waited too long")

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
FAKE_ENVIRON = {"BUCKETSERVE_WORKER_HANG_S": "2"}
VLLM_ENVIRON = {
    "BUCKETSERVE_WORKER_ENGINE": "vllm",
    "BUCKETSERVE_WORKER_ENGINE_ARGS": "enforce_eager=true,block_size=32",
    "BUCKETSERVE_WORKER_DTYPE": "float32",
    "BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": "8192",
    # New requests prefer the weights that came last, which these are: what is too many for them is the others'.
    "BUCKETSERVE_WORKER_MAX_SEQUENCES": "4",
}
MODEL_ENVIRON = {"BUCKETSERVE_WORKER_DTYPE": "float32", "BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": "20000"}


async def chaos(options: argparse.Namespace, console: Console, log_dir: Path) -> bool:
    """Runs it; returns whether everything was as it must be."""
    loop = asyncio.get_running_loop()
    if (task := asyncio.current_task()) is not None and threading.current_thread() is threading.main_thread():
        # Whoever ends us ends the stack with us.
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    is_fake = options.engine == "fake"
    of_model = MixedOracle if is_fake else ModelOracle
    has_model = options.vllm or not is_fake
    oracle = await asyncio.to_thread(of_model, MODEL, options.seed) if has_model else FakeOracle()
    async with contextlib.AsyncExitStack() as exits:
        site = await _open_site(exits, options, console, log_dir)
        tally = Tally()
        faults = Faults(
            site,
            options.seed,
            lambda fault: (
                (options.faults == "all" or options.faults in fault.name) and (is_fake or fault not in engines.FAULTS)
            ),
        )
        before = await warm_up(site.stack, lambda: site.links.hops)
        load = Load(site.stack.gateway_addresses, oracle, tally, options.seed, faults.was_killed)
        running = asyncio.create_task(load.run(options.clients))
        job = asyncio.create_task(_job(site.stack, oracle, options.seed))
        start_s = time.monotonic()
        with Progress(console=console) as progress:
            bar = progress.add_task("soak" if options.faults == "none" else "chaos", total=options.duration)
            shower = asyncio.create_task(_show(progress, bar, tally, start_s))
            if options.faults == "none":
                await asyncio.sleep(options.duration)
            else:
                await faults.run(start_s + options.duration)
            load.stop()
            await running
            shower.cancel()
        job_problems = await job
        left = await _settled(site, before)
        clock = site.clocks.reader if site.clocks else lambda worker: float
        num_runs, twice = double_executions(site.stack, clock)
        after = usage(site.stack, lambda: site.links.hops)
    report = _report(options, tally, faults, left, job_problems, num_runs, twice, before, after)
    _print(report, console, log_dir)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return bool(report["is_good"])


async def _open_site(
    exits: contextlib.AsyncExitStack, options: argparse.Namespace, console: Console, log_dir: Path
) -> Site:
    """Starts everything; what is to be stopped goes to exits."""
    is_fake = options.engine == "fake"
    roles = ROLES + ("both",) * options.vllm
    links = Links(len(roles), num_gateways=2, num_schedulers=2, remote=(REMOTE,))
    exits.push_async_callback(links.close)
    services = ["scheduler", "scheduler-1", "gateway", "gateway-1", *(f"worker-{i}" for i in range(len(roles)))]
    clocks = None
    with contextlib.suppress(KernelBuildError):
        clocks = Clocks(Path(exits.enter_context(tempfile.TemporaryDirectory())), [*services, "store"])
    store = exits.enter_context(EmbeddedServer(is_durable=True, environ=clocks.environ("store") if clocks else None))
    spec = StackSpec(
        model=MODEL,
        engine=options.engine,
        roles=roles,
        num_schedulers=2,
        num_gateways=2,
        redis_url=store.url,
        log_dir=log_dir,
        environ={**ENVIRON, **({} if is_fake else MODEL_ENVIRON)},
        gateway_environ=links.gateway_environ,
        scheduler_environ=links.scheduler_environ,
        worker_environ=links.worker_environ,
        worker_module="tests.chaos.worker",
    )
    stack = LocalStack(spec, lambda line: console.print(f"  {line}", highlight=False))
    await links.connect(stack, f"127.0.0.1:{store.port}")
    orders = Path(exits.enter_context(tempfile.TemporaryDirectory()))
    for index, environ in enumerate(links.worker_environ):
        environ["CHAOS_ORDERS"] = str(orders)
        environ.update(VLLM_ENVIRON if index >= len(ROLES) else FAKE_ENVIRON if is_fake else {})
    if clocks is not None:
        for name in services:
            links.environ_of(name).update(clocks.environ(name))
    await asyncio.to_thread(stack.__enter__)
    exits.push_async_callback(asyncio.to_thread, stack.__exit__, None, None, None)
    return Site(stack, store, links, clocks, orders)


async def _job(stack: LocalStack, oracle: Oracle, seed: int) -> list[str]:
    """Submits a job and fetches its results, however often it takes; returns what is wrong with them."""
    rng = random.Random(seed)
    drawn = [oracle.request(rng) for _ in range(JOB_REQUESTS)]
    asked = [replace(request, max_tokens=min(request.max_tokens, 5 + i % 30)) for i, request in enumerate(drawn)]
    requests = [
        request_from_json(
            {
                "custom_id": f"c{i}",
                "token_ids": list(request.prompt),
                "max_tokens": request.max_tokens,
                "temperature": request.temperature,
                "seed": request.seed,
                "ignore_eos": True,
            }
        )
        for i, request in enumerate(asked)
    ]
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
    for i, request in enumerate(asked):
        if i not in results or list(results[i].token_ids) not in oracle.outputs(request):
            wrong.append(f"job request {i}: {results[i].error_reason if i in results else 'no result'}")
    return wrong


async def _show(progress: Progress, bar: object, tally: Tally, start_s: float) -> None:
    while True:
        text = f"{tally.completed:,} completed, {tally.resumed:,} resumed, {len(tally.lost)} lost"
        progress.update(bar, completed=time.monotonic() - start_s, description=text)  # type: ignore[arg-type]
        await asyncio.sleep(0.5)


async def _settled(site: Site, before: dict[str, Usage]) -> list[str]:
    """Returns what is left over once nothing changes any more."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        try:
            left = await leaks(site.stack, before, lambda: site.links.hops)
        except Exception as error:  # the leader may just have changed
            left = [f"not to be seen: {error!r}"]
        if not left or time.monotonic() > deadline_s:
            return left
        await asyncio.sleep(1)


def _clock(at_s: float) -> str:
    """A monotonic time as the logs have it."""
    return datetime.fromtimestamp(at_s + time.time() - time.monotonic(), UTC).strftime("%H:%M:%S.%f")[:-3]


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
    longest = max(tally.waits, key=lambda wait: wait.length_s, default=None)
    too_long = [
        f"{_clock(wait.began_s)}: {wait.length_s:.1f} s for {wait.what}"
        for wait in tally.waits
        if wait.length_s > LONG_WAIT_S and not faults.excuses(wait.began_s, wait.ended_s)
    ]
    wrong = (balance, tally.lost, tally.mismatched, tally.duplicates, left, job_problems, twice, too_long)
    is_good = not any(wrong)
    latency = Percentiles.of(tally.latencies_s)
    return {
        "is_good": is_good,
        "duration_s": options.duration,
        "seed": options.seed,
        "faults": dict(faults.injected),
        "fault_log": [
            f"{_clock(fault.began_s)} {fault.fault}: {fault.at}, {fault.ended_s - fault.began_s:.1f} s"
            for fault in faults.intervals
        ],
        "sent": tally.sent,
        "accepted": tally.accepted,
        "completed": tally.completed,
        "cancelled by the client": tally.cancelled,
        "cut with a killed gateway": tally.cut,
        "refused": dict(tally.refused),
        "behaviours": dict(tally.kinds),
        "deadlines": dict(tally.deadlines),
        "resumed": tally.resumed,
        "mismatched": tally.mismatched,
        "duplicates": tally.duplicates,
        "accepted and unaccounted for": balance,
        "lost": tally.lost[:20],
        "left over": left,
        "job problems": job_problems[:20],
        "runs at workers": num_runs,
        "executed twice": twice[:20],
        "waited too long": too_long[:20],
        "longest wait, s": round(longest.length_s, 1) if longest else 0.0,
        "latency_s": {"p50": latency.p50, "p99": latency.p99},
        "usage": {name: {"before": vars(before[name]), "after": vars(after[name])} for name in after},
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
    for name, number in sorted(report["deadlines"].items()):  # type: ignore[attr-defined]
        table.add_row(f"deadline passed {name}", f"{number:,}")
    for name in (
        "resumed",
        "runs at workers",
        "longest wait, s",
        "mismatched",
        "duplicates",
        "accepted and unaccounted for",
    ):
        table.add_row(name, f"{report[name]:,}")
    for name in PROBLEMS:
        table.add_row(name, str(len(report[name])))  # type: ignore[arg-type]
    console.print(table)
    for name in PROBLEMS:
        for line in report[name]:  # type: ignore[attr-defined]
            console.print(f"[red]{name}:[/] {line}", highlight=False)
    console.print("[green]everything accounted for[/]" if report["is_good"] else f"[red]failed[/]; logs: {log_dir}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=NUM_CLIENTS)
    parser.add_argument("--faults", default="all", help="all, none, or what their names contain")
    parser.add_argument("--engine", choices=["fake", "transformers"], default="fake")
    parser.add_argument("--vllm", type=int, default=0, help="workers with vLLM beside the others")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path)
    options = parser.parse_args()
    log_dir = options.logs or Path(tempfile.mkdtemp(prefix="bucketserve-chaos-"))
    sys.exit(0 if asyncio.run(chaos(options, Console(), log_dir)) else 1)


if __name__ == "__main__":
    main()
