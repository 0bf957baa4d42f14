"""What the other protocols cost beside the native one: the whole stack as processes, the fake engine takes no time.

In each round every protocol has its turn (A B C D B C D A ...), with the same prompts as text:

- alone:   one request at a time; TTFT, and what a protocol adds to the native one's in the same round.
- short:   a closed loop of many clients, outputs of --output-tokens; the gateway's CPU per request, requests/s.
- long:    the same with --long-tokens; the gateway's CPU per token, tokens/s.

"per core" is requests or tokens divided by the seconds of CPU that the gateway process spent on them: what it could do
with a core of its own. Load generators are processes of their own (--generators) and share the machine. TTFT is that of
the first text; of vllm, which has none, of the first token. Nothing here passes or fails.

    python benchmarks/facades.py [--requests 2000] [--clients 64] [--rounds 3] [--jsonl OUT]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from conditions import Records, Row, conditions
from rich.console import Console
from rich.table import Table
from serving_path import FAST, MODEL, cpu_s

from bucketserve.sim.percentiles import nearest_rank
from bucketserve_cli.stack import LocalStack, StackSpec

PROTOCOLS = ("native", "openai", "kserve", "vllm")
LOAD = Path(__file__).with_name("facade_load.py")
COLUMNS: dict[str, tuple[str, str, Callable[[Row], float]]] = {
    "TTFT p50, ms": ("alone", ".2f", lambda row: float(str(row["ttft_ms_p50"]))),
    "TTFT p99, ms": ("alone", ".2f", lambda row: float(str(row["ttft_ms_p99"]))),
    "CPU ms/request alone": ("alone", ".2f", lambda row: float(str(row["gateway_cpu_ms_per_request"]))),
    "CPU ms/request": ("short", ".2f", lambda row: float(str(row["gateway_cpu_ms_per_request"]))),
    "requests/s per core": ("short", ".0f", lambda row: float(str(row["requests_per_core_s"]))),
    "requests/s": ("short", ".0f", lambda row: float(str(row["requests_per_s"]))),
    "CPU us/token": ("long", ".1f", lambda row: float(str(row["gateway_cpu_us_per_token"]))),
    "tokens/s per core": ("long", ".0f", lambda row: float(str(row["tokens_per_core_s"]))),
    "tokens/s": ("long", ".0f", lambda row: float(str(row["tokens_per_s"]))),
}


def measure(
    stack: LocalStack, protocol: str, *, at_once: int, requests: int, output_tokens: int, generators: int, first: int
) -> Row:
    """Runs one load; returns its figures. Each generator has an equal share of clients and requests."""
    address = stack.http_address if protocol == "openai" else stack.gateway_address
    share = ["--at-once", str(at_once // generators), "--requests", str(requests // generators)]
    share += ["--output-tokens", str(output_tokens)]
    with contextlib.ExitStack() as exits:
        running = []
        for index in range(generators):
            begin = ["--first", str(first + index * (at_once + requests))]
            command = [sys.executable, str(LOAD), protocol, address, *share, *begin]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            running.append(exits.enter_context(process))
            exits.callback(process.kill)
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"the load of {protocol} did not begin")
        before = {name: cpu_s(service.pid) for name, service in stack.services.items()}
        for process in running:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = [json.loads(line) for process in running if process.stdout and (line := process.stdout.readline())]
        spent_s = {name: cpu_s(service.pid) - before[name] for name, service in stack.services.items()}
    if len(found) < generators:
        raise SystemExit(f"the load of {protocol} failed")
    ttfts_s = [ttft_s for each in found for ttft_s in each["ttfts_s"]]
    number, took_s = len(ttfts_s), max(each["took_s"] for each in found)
    tokens = number * output_tokens
    # A short run may be less than a tick of the clock that counts CPU.
    gateway_s = max(spent_s["gateway"], 1e-9)
    return {
        "protocol": protocol,
        "requests": number,
        "output_tokens": output_tokens,
        "at_once": at_once,
        "took_s": took_s,
        "ttft_ms_p50": 1e3 * nearest_rank(ttfts_s, 50),
        "ttft_ms_p99": 1e3 * nearest_rank(ttfts_s, 99),
        "requests_per_s": number / took_s,
        "tokens_per_s": tokens / took_s,
        "gateway_cpu_ms_per_request": 1e3 * gateway_s / number,
        "gateway_cpu_us_per_token": 1e6 * gateway_s / tokens,
        "requests_per_core_s": number / gateway_s,
        "tokens_per_core_s": tokens / gateway_s,
        "cpu_s": {**spent_s, "load": sum(each["cpu_s"] for each in found)},
    }


def table(rows: list[Row], rounds: int) -> Table:
    """Medians over the rounds, and below each the median (and least to most) of its ratios to native, by round."""
    made = Table(title=f"medians of {rounds} rounds; x: relative to native in the same round, least to most")
    made.add_column("")
    for protocol in PROTOCOLS:
        made.add_column(protocol, justify="right")
    for name, (load, form, figure) in COLUMNS.items():
        values = {
            protocol: [figure(row) for row in rows if (row["load"], row["protocol"]) == (load, protocol)]
            for protocol in PROTOCOLS
        }
        made.add_row(name, *(format(statistics.median(found), form) for found in values.values()))
        ratios = [
            [one / native for one, native in zip(found, values["native"], strict=True)] for found in values.values()
        ]
        made.add_row("", *(f"{statistics.median(each):.2f} x ({min(each):.2f} - {max(each):.2f})" for each in ratios))
        if name.startswith("TTFT"):
            added = [
                [one - native for one, native in zip(found, values["native"], strict=True)] for found in values.values()
            ]
            made.add_row(
                "  added, ms",
                *(f"{statistics.median(each):+.2f} ({min(each):+.2f} - {max(each):+.2f})" for each in added),
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="requests of each closed loop")
    parser.add_argument("--alone", type=int, default=300, help="requests one at a time")
    parser.add_argument("--clients", type=int, default=64, help="requests at once in the closed loops")
    parser.add_argument("--generators", type=int, default=1, help="processes that make the load of the closed loops")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--long-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jsonl", type=Path, help="where the raw figures go, as they come")
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "jsonl"}
    many = {"at_once": options.clients, "requests": options.requests, "generators": options.generators}
    loads = {
        "alone": {"at_once": 1, "requests": options.alone, "generators": 1, "output_tokens": options.output_tokens},
        "short": {**many, "output_tokens": options.output_tokens},
        "long": {**many, "output_tokens": options.long_tokens},
    }
    console = Console()
    # Prompts are the same for all protocols in a round; in the next one others, and another protocol comes first.
    firsts = count(0, 4 * (options.clients + options.requests + options.alone) * options.generators)
    spec = StackSpec(model=MODEL, engine="fake", environ=FAST)
    with Records(options.jsonl, conditions(**settings)) as records, LocalStack(spec) as stack:
        with console.status("measuring") as said:
            for number in range(1, options.rounds + 1):
                for load, amounts in loads.items():
                    first = next(firsts)
                    for index in range(len(PROTOCOLS)):
                        protocol = PROTOCOLS[(index + number - 1) % len(PROTOCOLS)]
                        said.update(f"round {number} of {options.rounds}: {load}, {protocol}")
                        records.add({"round": number, "load": load, **measure(stack, protocol, **amounts, first=first)})
        console.print(table(records.rows, options.rounds))
    console.print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
