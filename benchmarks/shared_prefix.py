"""Users behind one system prompt: time to first token of BucketServe's whole stack with shared prefixes, and without.

    python benchmarks/reference_model.py MODEL         once
    python benchmarks/shared_prefix.py --model MODEL --jsonl OUT

Each round is a system prompt that nobody has seen and --users questions behind it: all at once, and as a Poisson
process (--rate). Both stacks run in turn in one run; whoever is not measured is stopped (SIGSTOP).
"""

from __future__ import annotations

import argparse
import asyncio
import random
from contextlib import ExitStack
from pathlib import Path

from arrivals import arrival_times
from conditions import Records, conditions
from peers.client import open_loop
from reference_requests import VOCABULARY, Request
from reference_stack import ReferenceStack, end_on_signals, send
from rich.console import Console
from rich.table import Table

from bucketserve.client import BucketServeClient
from bucketserve.sim.percentiles import Percentiles


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--system-tokens", type=int, default=1024)
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.0, help="questions per second")
    parser.add_argument("--mode", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jsonl", type=Path, help="where the raw figures go, as they come")
    options = parser.parse_args()
    console = Console()
    end_on_signals()
    with ExitStack() as stack:
        settings = {name: value for name, value in vars(options).items() if name not in {"model", "jsonl"}}
        records = stack.enter_context(Records(options.jsonl, conditions(**settings)))
        stacks = {
            name: stack.enter_context(ReferenceStack(options.model, options.mode, keeps_prefixes=name == "shared"))
            for name in ("shared", "not shared")
        }
        table = Table("round", "arrivals", "prefixes", "TTFT p50", "p99", "last end", title="seconds")
        for number in range(options.rounds):
            for arrivals in ("at once", "Poisson"):
                rng = random.Random(f"{number} {arrivals}")
                requests = questions(rng, options)
                at_s = [0.0] * options.users
                if arrivals == "Poisson":
                    at_s = arrival_times(options.users, options.rate, number)
                for name, under_test in stacks.items():
                    ttfts_s, seconds = measure(under_test, requests, at_s)
                    found = Percentiles.of(ttfts_s)
                    row = {"round": number, "arrivals": arrivals, "prefixes": name, "seconds": seconds}
                    records.add({**row, "ttft p50": found.p50, "ttft p99": found.p99})
                    table.add_row(f"{number}", arrivals, name, f"{found.p50:.2f}", f"{found.p99:.2f}", f"{seconds:.1f}")
                    console.print(f"{number} {arrivals}, {name}: TTFT p50 {found.p50:.2f} s", highlight=False)
        console.print(table)


def questions(rng: random.Random, options: argparse.Namespace) -> list[Request]:
    """Returns a request for each user: the system prompt and a question."""

    def some(number: int) -> list[int]:
        return [rng.randrange(100, VOCABULARY - 100) for _ in range(number)]

    system = some(options.system_tokens)
    return [Request([*system, *some(options.question_tokens)], options.output_tokens) for _ in range(options.users)]


def measure(under_test: ReferenceStack, requests: list[Request], at_s: list[float]) -> tuple[list[float], float]:
    """Returns each user's seconds to the first token, and those until the last end."""

    async def run() -> tuple[list[float], float]:
        async with BucketServeClient(under_test.address) as client:
            outcomes, seconds = await open_loop(at_s, lambda index: send(client, requests[index], timeout_s=600.0))
        if errors := [outcome.error for outcome in outcomes if outcome.error]:
            raise SystemExit(f"{len(errors)} requests failed: {errors[0]}")
        return [outcome.first_s - outcome.sent_s for outcome in outcomes if outcome.first_s is not None], seconds

    under_test.go()
    try:
        return asyncio.run(run())
    finally:
        under_test.halt()


if __name__ == "__main__":
    main()
