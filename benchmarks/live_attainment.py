"""Attainment of the live stack beside what the simulator predicts: real services, fake engines with a GPU's clock.

Four workers whose step takes 25 ms and 0.1 ms more per prompt token, with KV for 12,800 tokens: about LLaMA-2-13B on
A100-40GB. The Mixed workload, Poisson arrivals or bursts, max_tokens the true output, since the fake engine ends no
sooner. The rates are shares of the capacity of `adaptive` at 95% as simulated; both worlds get the same requests at
the same times with the same targets, and count those that arrive in the same window.

    python benchmarks/live_attainment.py [--shares 0.5,0.8,1.0,1.1] [--policies adaptive,paper] [--span 45]
        [--jsonl FILE]

What is in the file already, with the same policy, share, span, burstiness and seed, is not run again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import grpc
from conditions import Records, Row, conditions, read_records
from queued_requests import long_model
from rich.console import Console
from rich.table import Table

from bucketserve.client import BucketServeClient, Chunk
from bucketserve.core.errors import BucketServeError
from bucketserve.sim.capacity import find_capacity
from bucketserve.sim.cluster import aggregated
from bucketserve.sim.experiment import Experiment, run_experiment
from bucketserve.sim.latency import DeviceModel, parse_device
from bucketserve.sim.limits import OutputLimits
from bucketserve.sim.percentiles import Percentiles
from bucketserve.sim.policies import find_policy
from bucketserve.sim.slo import Slo
from bucketserve.sim.window import Window
from bucketserve.sim.workload import Arrivals, SimRequest
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack, StackSpec

CONTEXT, KV_TOKENS, NUM_WORKERS = 4_096, 12_800, 4
STEP_MS, PREFILL_MS = 25.0, 0.1
LAYOUT = aggregated(NUM_WORKERS)
TARGET = 0.95
WORLDS = ("simulated", "live")
CLOCK: Mapping[str, object] = {
    "name": "fake",
    "source": "the fake engine's own clock",
    "context_tokens": CONTEXT,
    "coefficients_unit": "ms",
    "parallel": {
        "1": {"prefill": [STEP_MS, PREFILL_MS, 0.0], "decode": [[0, STEP_MS, 0.0, 0.0]], "kv_total_tokens": KV_TOKENS}
    },
    "scale": {"prefill_fixed": 1.0, "prefill_variable": 1.0, "decode": 1.0},
    "memory": {"kv_bytes_per_token": 8},
    "kv_link": {"bytes_per_s": 1e9, "latency_s": 0.001},
}
ENVIRON = {
    "BUCKETSERVE_WORKER_CONTEXT_TOKENS": str(CONTEXT),
    "BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": str(KV_TOKENS),
    "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": str(STEP_MS * 1e3),
    "BUCKETSERVE_WORKER_FAKE_PREFILL_US_PER_TOKEN": str(PREFILL_MS * 1e3),
    "BUCKETSERVE_TELEMETRY_LOG_LEVEL": "warning",
}


def experiment(policy: str, options: argparse.Namespace) -> Experiment:
    """Returns the simulated world."""
    return Experiment(
        policy=find_policy(policy),
        source="mixed",
        source_name="mixed",
        device=parse_device(CLOCK),
        num_requests=1,
        min_span_s=options.span,
        seed=options.seed,
        arrivals=Arrivals.GAMMA,
        burstiness_cv=options.burstiness,
        limits=OutputLimits.EXACT,
    )


async def serve(address: str, requests: list[SimRequest], device: DeviceModel, slo: Slo) -> tuple[float, Percentiles]:
    """Sends requests at their times; returns attainment and TTFT, in seconds, of those that count."""
    rng = random.Random(1)
    prompts = [[rng.randrange(10, 4_000) for _ in range(request.prompt_tokens)] for request in requests]
    longest_s = max(device.alone_s(request.prompt_tokens, request.output_tokens) for request in requests)
    window = Window.of(requests[-1].arrival_s, longest_s)
    ttft: dict[int, float] = {}
    num_good = 0

    async def one(client: BucketServeClient, number: int, start_s: float) -> None:
        nonlocal num_good
        request, target_s = requests[number], slo.ttft_s(device, requests[number].prompt_tokens)
        await asyncio.sleep(max(start_s + request.arrival_s - time.perf_counter(), 0.0))
        sent_s, first_s, last_s, num_tokens = time.perf_counter(), 0.0, 0.0, 0
        wanted = common_pb2.Slo(ttft_ms=round(target_s * 1e3), tpot_ms=round(slo.tpot_s * 1e3))
        try:
            async for event in client.generate(
                token_ids=prompts[number], max_tokens=request.output_tokens, ignore_eos=True, slo=wanted
            ):
                if isinstance(event, Chunk):
                    last_s = time.perf_counter()
                    first_s = first_s or last_s
                    num_tokens += len(event.token_ids)
        except (BucketServeError, grpc.aio.AioRpcError):
            return
        if request.arrival_s in window:
            ttft[number] = first_s - sent_s
            tpot_s = (last_s - first_s) / max(num_tokens - 1, 1)
            num_good += first_s - sent_s <= target_s and tpot_s <= slo.tpot_s

    async with BucketServeClient(address) as client:
        start_s = time.perf_counter()
        tasks = [asyncio.create_task(one(client, number, start_s)) for number in range(len(requests))]
        counted = [task for task, request in zip(tasks, requests, strict=True) if request.arrival_s in window]
        await asyncio.gather(*counted)
        # What arrived later was there to be in their way.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return num_good / len(counted), Percentiles.of(list(ttft.values()))


async def measure(policy: str, share: float, rate_rps: float, model: str, options: argparse.Namespace) -> Row:
    """Returns one rate's attainment and TTFT in both worlds."""
    world = experiment(policy, options)
    predicted = run_experiment(world, LAYOUT, rate_rps)
    drawn = world.workload(rate_rps)
    environ = {**ENVIRON, "BUCKETSERVE_SCHEDULER_POLICY": policy}
    stack = LocalStack(StackSpec(model=model, engine="fake", num_workers=NUM_WORKERS, environ=environ))
    loop, began_s = asyncio.get_running_loop(), time.perf_counter()
    await loop.run_in_executor(None, stack.__enter__)
    try:
        live, ttft_s = await serve(stack.gateway_address, list(drawn.requests), world.device, world.slo)
    finally:
        await loop.run_in_executor(None, stack.__exit__, None, None, None)
    return {
        **named(policy, share, options),
        "rate_rps": rate_rps,
        "requests": len(drawn.requests),
        "simulated": predicted.slo_attainment,
        "live": live,
        "ttft_p50_s": {"simulated": predicted.ttft_s.p50, "live": ttft_s.p50},
        "ttft_p99_s": {"simulated": predicted.ttft_s.p99, "live": ttft_s.p99},
        "took_s": time.perf_counter() - began_s,
    }


def named(policy: str, share: float, options: argparse.Namespace) -> Row:
    """Returns what tells a measurement from others."""
    cv = options.burstiness
    return {"policy": policy, "share": share, "span_s": options.span, "burstiness_cv": cv, "seed": options.seed}


async def run(options: argparse.Namespace, console: Console) -> None:
    """Measures what is not in the file yet and prints all of it."""
    ours = experiment("adaptive", options)
    capacity_rps = find_capacity(ours, [LAYOUT], TARGET, start_rps=2.0).capacity_rps or 0.0
    is_begun = options.jsonl is not None and options.jsonl.is_file()
    first, known = read_records(options.jsonl) if is_begun else (conditions(), [])
    with tempfile.TemporaryDirectory() as folder, Records(options.jsonl, first) as records:
        model = long_model(Path(folder))
        for row in known:
            records.add(row)
        for policy in options.policies.split(","):
            for share in map(float, options.shares.split(",")):
                if not any(row.items() >= named(policy, share, options).items() for row in known):
                    row = await measure(policy, share, share * capacity_rps, model, options)
                    records.add(row)
                    console.print(f"{policy} at {share:g}: {row['live']:.1%}, {row['took_s']:.0f} s")
    console.print(
        shown(records.rows, f"capacity of adaptive at {TARGET:.0%}, simulated: {capacity_rps:.2f} requests/s")
    )
    console.print(first)


def shown(rows: Iterable[Row], title: str) -> Table:
    """Returns the table."""
    heads = ("policy", "share", "requests/s", "simulated", "live", "difference", "TTFT p50 / p99 simulated", "live")
    table = Table(*heads, title=title)
    for row in rows:
        tails = ("{:.2f} / {:.1f} s".format(*(row[f"ttft_{p}_s"][world] for p in ("p50", "p99"))) for world in WORLDS)
        table.add_row(
            row["policy"],
            f"{row['share']:g}",
            f"{row['rate_rps']:.2f}",
            *(f"{row[world]:.1%}" for world in WORLDS),
            f"{100 * (row['live'] - row['simulated']):+.1f}",
            *tails,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", default="0.5,0.8,1.0,1.1")
    parser.add_argument("--policies", default="adaptive,paper", help="of scheduler.policy")
    parser.add_argument("--span", type=float, default=45.0, help="seconds of arrivals at each rate")
    parser.add_argument("--burstiness", type=float, default=1.0, help="coefficient of variation of arrivals' gaps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jsonl", type=Path, help="where the raw figures go, as they come")
    asyncio.run(run(parser.parse_args(), Console()))


if __name__ == "__main__":
    main()
