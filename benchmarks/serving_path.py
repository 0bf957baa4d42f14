"""What gateway and scheduler add: the whole stack as processes, with the fake engine in place of a model.

Three measurements, each with the CPU time of every process:

- idle:     one request at a time; the fake engine takes no time, so that TTFT is what the path adds.
- quarter:  open loop at a quarter of the measured capacity. Batches of messages are smaller there, so that a request
            costs more: half the capacity would nearly fill two cores.
- capacity: closed loop with many clients; requests/s and tokens/s.

The load generator is a process of its own and shares the machine with everything else, so that capacity is that of the
whole machine, and "per core" is worked out from CPU time. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.sim.percentiles import nearest_rank
from bucketserve_cli.stack import LocalStack, StackSpec

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "models" / "demo" / "model")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PROMPT_TOKENS = 64
FAST = {
    "BUCKETSERVE_WORKER_FAKE_PREFILL_US_PER_TOKEN": "0",
    "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "0",
    "BUCKETSERVE_WORKER_MAX_SEQUENCES": "256",
    "BUCKETSERVE_WORKER_CONTEXT_TOKENS": "2048",
    "BUCKETSERVE_TELEMETRY_LOG_LEVEL": "warning",
}
"""The fake engine computes nothing and takes no time: what is left is the path."""


def cpu_s(pid: int) -> float:
    """User and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


async def one(client: BucketServeClient, output_tokens: int, number: int) -> tuple[float, int]:
    """Returns (TTFT seconds, tokens)."""
    start_s = time.perf_counter()
    ttft_s, tokens = 0.0, 0
    prompt = [(number * 31 + i) % 4000 + 10 for i in range(PROMPT_TOKENS)]
    async for event in client.generate(token_ids=prompt, max_tokens=output_tokens, ignore_eos=True):
        if isinstance(event, Chunk):
            ttft_s = ttft_s or time.perf_counter() - start_s
            tokens += len(event.token_ids)
        elif isinstance(event, Finished) and event.usage.output_tokens != output_tokens:
            raise RuntimeError(f"{event.usage.output_tokens} tokens instead of {output_tokens}")
    return ttft_s, tokens


async def idle(clients: list[BucketServeClient], number: int, output_tokens: int) -> dict[str, object]:
    started_s = time.perf_counter()
    results = [await one(clients[0], output_tokens, i) for i in range(number)]
    return summary(results, time.perf_counter() - started_s)


async def closed(clients: list[BucketServeClient], number: int, output_tokens: int, at_once: int) -> dict[str, object]:
    left = iter(range(number))
    results: list[tuple[float, int]] = []

    async def client_loop(client: BucketServeClient) -> None:
        for i in left:
            results.append(await one(client, output_tokens, i))

    started_s = time.perf_counter()
    await asyncio.gather(*(client_loop(clients[i % len(clients)]) for i in range(at_once)))
    return summary(results, time.perf_counter() - started_s)


async def opened(clients: list[BucketServeClient], number: int, output_tokens: int, rate: float) -> dict[str, object]:
    started_s = time.perf_counter()
    tasks = []
    for i in range(number):
        await asyncio.sleep(max(started_s + i / rate - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(one(clients[i % len(clients)], output_tokens, i)))
    return summary(await asyncio.gather(*tasks), time.perf_counter() - started_s)


def summary(results: list[tuple[float, int]], took_s: float) -> dict[str, object]:
    ttfts = [ttft for ttft, _ in results]
    return {
        "requests": len(results),
        "took_s": took_s,
        "requests_per_s": len(results) / took_s,
        "tokens_per_s": sum(tokens for _, tokens in results) / took_s,
        "ttft_ms_p50": 1e3 * nearest_rank(ttfts, 50),
        "ttft_ms_p99": 1e3 * nearest_rank(ttfts, 99),
    }


def generate_load(mode: str, address: str, number: int, output_tokens: int, amount: float) -> dict[str, object]:
    """Runs the load in another process, so that its CPU time is its own."""
    command = [sys.executable, __file__, "--load", mode, "--address", address, "--requests", str(number)]
    command += ["--output-tokens", str(output_tokens), "--amount", str(amount)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    result: dict[str, object] = json.loads(finished.stdout)
    return result


async def load(arguments: argparse.Namespace) -> None:
    clients = [BucketServeClient(arguments.address) for _ in range(4)]
    try:
        for i in range(8):
            await one(clients[i % len(clients)], 2, i)
        before_s = time.process_time()
        number, tokens = arguments.requests, arguments.output_tokens
        if arguments.load == "idle":
            result = await idle(clients, number, tokens)
        elif arguments.load == "open":
            result = await opened(clients, number, tokens, arguments.amount)
        else:
            result = await closed(clients, number, tokens, int(arguments.amount))
        result["load_cpu_s"] = time.process_time() - before_s
        print(json.dumps(result))
    finally:
        for client in clients:
            await client.close()


def measure(stack: LocalStack, mode: str, number: int, output_tokens: int, amount: float) -> dict[str, object]:
    before = {name: cpu_s(service.pid) for name, service in stack.services.items()}
    result = generate_load(mode, stack.gateway_address, number, output_tokens, amount)
    result["cpu_ms_per_request"] = {
        name: 1e3 * (cpu_s(service.pid) - before[name]) / number for name, service in stack.services.items()
    }
    return result


def row(table: Table, name: str, result: Mapping[str, object]) -> None:
    cpu = result["cpu_ms_per_request"]
    assert isinstance(cpu, dict)
    figures = {key: float(str(value)) for key, value in result.items() if isinstance(value, int | float)}
    table.add_row(
        name,
        f"{figures['requests_per_s']:.0f}",
        f"{figures['tokens_per_s']:.0f}",
        f"{figures['ttft_ms_p50']:.1f} / {figures['ttft_ms_p99']:.1f}",
        f"{cpu['gateway']:.2f}",
        f"{cpu['scheduler']:.2f}",
        f"{sum(value for service, value in cpu.items() if service.startswith('worker')):.2f}",
        f"{1e3 * figures['load_cpu_s'] / figures['requests']:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="requests per measurement")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, default=64, help="requests at once in the closed loop")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the table shows each")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--load", choices=("idle", "open", "closed"), help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--amount", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        asyncio.run(load(arguments))
        return
    console = Console()
    table = Table(title=f"fake engine, {PROMPT_TOKENS} prompt and {arguments.output_tokens} output tokens, one worker")
    for heading in ("load", "requests/s", "tokens/s", "added TTFT p50 / p99 ms", "gateway", "scheduler", "worker"):
        table.add_column(heading, justify="left" if heading == "load" else "right")
    table.add_column("client CPU ms/request", justify="right")
    results: list[dict[str, object]] = []
    with (
        LocalStack(StackSpec(model=MODEL, engine="fake", environ=FAST)) as stack,
        console.status("measuring") as said,
    ):
        for number in range(1, arguments.rounds + 1):
            capacity = 0.0
            for name, mode in (("idle", "idle"), ("capacity", "closed"), ("quarter", "open")):
                said.update(f"round {number} of {arguments.rounds}: {name}")
                amount = capacity / 4 if mode == "open" else float(arguments.clients)
                count = min(arguments.requests, 300) if mode == "idle" else arguments.requests
                result = measure(stack, mode, count, arguments.output_tokens, amount)
                if mode == "closed":
                    capacity = float(str(result["requests_per_s"]))
                row(table, f"{name} {number}", result)
                results.append({"load": name, "round": number, **result})
    console.print(table)
    console.print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}; load average {os.getloadavg()[0]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
