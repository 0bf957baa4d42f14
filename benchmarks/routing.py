"""Four workers behind the scheduler against the same four behind a load balancer: goodput at 95% within SLO, simulated.

`round-robin`, `least-loaded` (fewest open requests) and `least-prefill` (fewest prompt tokens to compute, which a load
balancer does not know) give each request to a worker when it arrives, and it waits in that worker's own queue
(core/routing.py). The workers are the same for all, with their prefix caches; `vLLM's` are workers with the loop of
sim/baselines/chunked.py, at the best of the step sizes tried on the same requests. Capacities are the highest rates at
which 95% of the requests are within their SLO, on a grid of 2%; limits as clients send them.

    python benchmarks/routing.py docs/benchmarks/routing-2026-11-26.jsonl [--traces DIR] [--only mixed/poisson]

Every capacity found is appended to the file, so that a run that was stopped goes on where it was; the table is printed
at the end, and with --report-only from what is there.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bucketserve.sim.capacity import find_capacity
from bucketserve.sim.cluster import aggregated
from bucketserve.sim.experiment import Experiment
from bucketserve.sim.latency import load_device
from bucketserve.sim.policies import find_policy
from bucketserve.sim.workload import BLOCK_TOKENS, Arrivals, Lengths, read_trace

NUM_WORKERS, TARGET, BURSTINESS = 4, 0.95, 3.0
NUM_REQUESTS = 1000
OURS, BALANCERS, INFORMED, STEP_SIZES = "adaptive", ("round-robin", "least-loaded"), "least-prefill", (512, 2048)
TRACE = "mooncake_synthetic_prefix_hashes"
WORLDS: Mapping[tuple[str, str], tuple[float, float | None]] = {
    ("mixed", "a100-80gb-13b"): (6.0, None),
    ("conversations", "a100-80gb-13b"): (7.5, None),
    ("conversations", "h100-80gb-8b"): (13.0, None),
    ("system-prompts", "a100-80gb-13b"): (6.0, None),
    (TRACE, "h100-80gb-8b"): (2.5, 0.0),
    ("mixed", "h100-80gb-8b"): (50.0, 120.0),
    ("system-prompts", "h100-80gb-8b"): (80.0, None),
    ("mixed", "a100-40gb-13b"): (2.0, None),
}
"""What is measured: where searches begin, requests/s, and how long requests arrive at least, seconds.

None: ten times as long as the longest request takes alone (sim/window.py).
"""
GROUPS, PREFIX_BLOCKS, QUESTION_TOKENS, OUTPUT_TOKENS = 64, 4, 128, 256


@dataclass(frozen=True, slots=True)
class Job:
    """One capacity."""

    workload: str
    arrivals: str
    device: str
    policy: str
    step_tokens: int
    """0: the workers that serve."""
    seed: int

    @property
    def key(self) -> str:
        """Names it in the file."""
        return "/".join(map(str, (self.workload, self.arrivals, self.device, self.policy, self.step_tokens, self.seed)))


def system_prompts(number: int = 20_000) -> list[Lengths]:
    """Returns requests of 64 groups in random order: 2,048 tokens in common, 128 of their own, 256 of output.

    The numbers of SGLang's benchmark for shared prefixes (generated-shared-prefix).
    """
    rng = random.Random("system-prompts")
    rows = []
    for _ in range(number):
        group = rng.randrange(GROUPS)
        hashes = tuple(group * PREFIX_BLOCKS + i for i in range(PREFIX_BLOCKS))
        rows.append(Lengths(PREFIX_BLOCKS * BLOCK_TOKENS + QUESTION_TOKENS, OUTPUT_TOKENS, None, hashes))
    return rows


def conversations(context_tokens: int, number: int = 20_000) -> list[Lengths]:
    """Returns turns of 80 conversations at a time in random order, each with all that came before in its prompt.

    Four begin with the same quarter of the longest; each turn adds up to an eighth. The longest is 16,384 tokens, or
    three quarters of the context if that is less. Outputs of 20 to 200 tokens.
    """
    rng = random.Random("conversations")
    most = min(16_384, context_tokens * 3 // 4) // BLOCK_TOKENS
    rows, chains = [], dict[int, list[int]]()
    for turn in range(number):
        name = rng.randrange(80)
        chain = chains.setdefault(name, [name % 20 * 100 + i for i in range(most // 4)])
        chain += [100 * (turn + 20) + i for i in range(rng.randint(1, max(most // 8, 1)))]
        prompt = BLOCK_TOKENS * len(chain) + rng.randrange(BLOCK_TOKENS)
        rows.append(Lengths(prompt, rng.randint(20, 200), None, tuple(chain)))
        if len(chain) >= most:
            del chains[name]
    return rows


@cache
def source(workload: str, context_tokens: int, traces: Path | None) -> str | list[Lengths]:
    """Returns what requests are drawn from."""
    if workload == "system-prompts":
        return system_prompts()
    if workload == "conversations":
        return conversations(context_tokens)
    return read_trace(traces / f"{TRACE}.jsonl.gz") if workload == TRACE and traces else workload


def run(job: Job, traces: Path | None) -> dict[str, object]:
    """Returns a capacity and what requests see there."""
    policy = find_policy(job.policy)
    if job.step_tokens and policy.sized is not None:
        policy = policy.sized(job.step_tokens)
    device = load_device(job.device)
    start_rps, span_s = WORLDS[job.workload, job.device]
    start_rps *= 1.0 if job.policy == OURS else 0.8
    experiment = Experiment(
        policy=policy,
        source=source(job.workload, device.context_tokens, traces),
        source_name=job.workload,
        device=device,
        num_requests=NUM_REQUESTS,
        min_span_s=span_s,
        seed=job.seed,
        arrivals=Arrivals(job.arrivals),
        burstiness_cv=BURSTINESS,
    )
    found = find_capacity(experiment, [aggregated(NUM_WORKERS)], TARGET, start_rps=start_rps)
    return {
        "key": job.key,
        "capacity_rps": found.capacity_rps,
        "attainment": found.slo_attainment,
        "ttft_p50_s": found.ttft_s.p50,
        "ttft_p99_s": found.ttft_s.p99,
        "tpot_p99_s": found.tpot_s.p99,
        "prefill_share": found.utilisation.prefill,
        "evictions": found.num_evictions,
    }


def jobs_of(seeds: Sequence[int], traces: Path | None) -> list[Job]:
    """All jobs, those that matter most first."""
    worlds = [
        (workload, arrivals, device)
        for workload, device in WORLDS
        for arrivals in ("poisson", "gamma")
        if workload != TRACE or traces
    ]
    main = [(OURS, 0), *((balancer, 0) for balancer in BALANCERS)]
    vllm = [(balancer, step) for balancer in BALANCERS for step in STEP_SIZES]
    return [
        Job(*world, policy, step, seed)
        for seed in seeds
        for some in (main, [(INFORMED, 0)], vllm)
        for world in worlds
        for policy, step in some
    ]


def table(found: Mapping[str, float], seeds: Sequence[int]) -> str:
    """Returns the table, in Markdown; capacities of several seeds side by side, and ours over the better balancer's."""
    heads = ["workload, device", "arrivals", "ours", *BALANCERS, "ours / better", INFORMED, "ours / it"]
    heads += [*(f"{balancer}, vLLM's" for balancer in BALANCERS), "ours / better"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for workload, device in WORLDS:
        for arrivals in ("poisson", "gamma"):
            world = (workload, arrivals, device)

            def best(policy: str, steps: Sequence[int], world: tuple[str, str, str] = world) -> list[float]:
                keys = [[Job(*world, policy, step, seed).key for step in steps] for seed in seeds]
                return [max(found[key] for key in some) if found.keys() >= set(some) else 0.0 for some in keys]

            ours = best(OURS, (0,))
            if not any(ours):
                continue
            cells = [f"{workload}, {device}", "Poisson" if arrivals == "poisson" else f"gamma, cv {BURSTINESS:g}"]
            cells.append(shown(ours))
            for policies, steps in ((BALANCERS, (0,)), ((INFORMED,), (0,)), (BALANCERS, STEP_SIZES)):
                rivals = [best(policy, steps) for policy in policies]
                better = [max(rates) for rates in zip(*rivals, strict=True)]
                ratios = [
                    rate / other if other and all(rates) else 0.0
                    for rate, other, rates in zip(ours, better, zip(*rivals, strict=True), strict=True)
                ]
                cells += [*map(shown, rivals), shown(ratios)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(values: Sequence[float]) -> str:
    """Returns one value for each seed; nothing where there is none."""
    return " ".join(f"{value:.2f}" for value in values if value)


def read(path: Path) -> dict[str, float]:
    """Returns the capacities found so far, by key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {row["key"]: row["capacity_rps"] for row in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines, one for each capacity")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--traces", type=Path, help=f"folder with {TRACE}.jsonl.gz")
    parser.add_argument("--only", default="", help="jobs whose key begins so, such as mixed/gamma/h100-80gb-8b")
    parser.add_argument("--report-only", action="store_true", help="print the table from what is there")
    options = parser.parse_args()
    seeds = range(1, options.seeds + 1)
    known = read(options.file)
    jobs = [] if options.report_only else jobs_of(seeds, options.traces)
    for job in jobs:
        if job.key in known or not job.key.startswith(options.only):
            continue
        row = run(job, options.traces)
        with options.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{job.key}: {row['capacity_rps']:.2f} requests/s", flush=True)
    print(table(read(options.file), seeds))


if __name__ == "__main__":
    main()
