"""Four real workers behind the scheduler against the same behind a load balancer, with prompts that share prefixes.

    python benchmarks/reference_model.py MODEL         once
    python benchmarks/live_routing.py --model MODEL --jsonl OUT

Requests come in groups, in random order: a system prompt for each group, a question of each request's own. For every
policy (core/routing.py has the load balancers) the highest Poisson rate is searched at which 95% of the requests are
within SLO, the policies in turn in one run; whoever is not measured is stopped (SIGSTOP). Every rate begins with new
system prompts, so that nobody has what another rate left behind; the first quarter of its requests does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from contextlib import ExitStack
from pathlib import Path

from arrivals import Search, arrival_times
from conditions import Records, Row, conditions
from peers.client import Outcome, open_loop
from reference_requests import VOCABULARY, Request
from reference_stack import MODES, ReferenceStack, end_on_signals, send
from rich.console import Console
from rich.table import Table

from bucketserve.client import BucketServeClient
from bucketserve.sim.percentiles import Percentiles
from bucketserve.v1 import common_pb2

WARM_SHARE = 0.25
"""Of the requests, the first ones: most of what they begin with nobody has yet."""


def main() -> None:
    """Searches and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--policies", default="adaptive,round-robin,least-loaded", help="of scheduler.policy")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--mode", choices=MODES, default="float32")
    parser.add_argument("--kv-tokens", type=int, default=8_192, help="of each worker")
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--system-tokens", type=int, default=512)
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256, help="at each rate")
    parser.add_argument("--rate", type=float, default=2.0, help="where searches begin, requests/s")
    parser.add_argument("--within", type=float, default=0.95, help="share of the requests within SLO")
    parser.add_argument("--ttft-s", type=float, default=3.0)
    parser.add_argument("--tpot-s", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jsonl", type=Path, help="where the raw figures go, as they come")
    options = parser.parse_args()
    console = Console()
    end_on_signals()
    searches = {policy: Search(options.rate, options.rate) for policy in options.policies.split(",")}
    with ExitStack() as stack:
        settings = {name: value for name, value in vars(options).items() if name not in {"model", "jsonl"}}
        records = stack.enter_context(Records(options.jsonl, conditions(**settings)))
        stacks = {policy: stack.enter_context(stack_of(policy, options)) for policy in searches}
        number = 0
        while going := {policy: search for policy, search in searches.items() if not search.is_over}:
            for policy, search in going.items():
                number += 1
                row = measure(stacks[policy], search.rate, f"{options.seed} {number}", options)
                records.add({"policy": policy, "rate_rps": search.rate, **row})
                figures = f"TTFT p50, p99 {row['ttft_p50_s']:.2f}, {row['ttft_p99_s']:.2f} s"
                console.print(f"{policy:<13}{search.rate:.3f}/s: {row['within']:.1%}, {figures}", highlight=False)
                search.note(row["within"] >= options.within)
    table = Table("policy", "requests/s", title=f"highest rate with {options.within:.0%} within SLO")
    for policy, search in searches.items():
        table.add_row(policy, "none" if search.held is None else f"{search.held:.3f}")
    console.print(table)


def stack_of(policy: str, options: argparse.Namespace) -> ReferenceStack:
    """Returns the stack that routes so."""
    return ReferenceStack(
        options.model,
        options.mode,
        options.kv_tokens,
        keeps_prefixes=True,
        num_workers=options.workers,
        policy=policy,
    )


def questions(rng: random.Random, options: argparse.Namespace) -> list[Request]:
    """Returns as many of each group as there can be, in random order."""

    def some(number: int) -> list[int]:
        return [rng.randrange(100, VOCABULARY - 100) for _ in range(number)]

    systems = [some(options.system_tokens) for _ in range(options.groups)]
    groups = [index % options.groups for index in range(options.requests)]
    rng.shuffle(groups)
    return [Request([*systems[group], *some(options.question_tokens)], options.output_tokens) for group in groups]


def measure(under_test: ReferenceStack, rate_rps: float, name: str, options: argparse.Namespace) -> Row:
    """Returns what the clients felt at a rate."""
    requests = questions(random.Random(name), options)
    at_s = arrival_times(len(requests), rate_rps, options.seed)
    slo = common_pb2.Slo(ttft_ms=round(options.ttft_s * 1e3), tpot_ms=round(options.tpot_s * 1e3))

    async def run() -> list[Outcome]:
        async with BucketServeClient(under_test.address) as client:
            outcomes, _ = await open_loop(at_s, lambda index: send(client, requests[index], slo=slo, timeout_s=600.0))
        return outcomes

    under_test.go()
    try:
        outcomes = asyncio.run(run())
    finally:
        under_test.halt()
    errors = sum(1 for outcome in outcomes if outcome.error)
    outcomes = outcomes[round(WARM_SHARE * len(outcomes)) :]
    within = sum(is_within(outcome, options) for outcome in outcomes) / len(outcomes)
    ttft_s = Percentiles.of([outcome.first_s - outcome.sent_s for outcome in outcomes if outcome.first_s is not None])
    return {"within": within, "ttft_p50_s": ttft_s.p50, "ttft_p99_s": ttft_s.p99, "errors": errors}


def is_within(outcome: Outcome, options: argparse.Namespace) -> bool:
    """Whether a request was within its SLO."""
    if outcome.error or outcome.first_s is None or outcome.last_s is None:
        return False
    tpot_s = (outcome.last_s - outcome.first_s) / max(outcome.output_tokens - 1, 1)
    return outcome.first_s - outcome.sent_s <= options.ttft_s and tpot_s <= options.tpot_s


if __name__ == "__main__":
    main()
