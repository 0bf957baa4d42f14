"""How long SchedulerCore.step takes as queues and clusters grow. Nothing here passes or fails.

For each size the queue is filled, then steps like those of a loaded service are timed: a few arrivals, a few
finished requests with their workers' reports, and the batches that follow. --plot draws the growth. --shared lets that
share of the prompts begin like some others, with block hashes that say so.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bucketserve.core.messages import (
    BatchPrefilled,
    DispatchBatch,
    Event,
    RequestFinished,
    RequestSubmitted,
    WorkerJoined,
    WorkerReported,
)
from bucketserve.core.prefixes import BLOCK_TOKENS
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings
from bucketserve.core.types import Batch, Headroom, Request, RequestClass, RequestId, WorkerId, WorkerRole
from bucketserve.sim.percentiles import nearest_rank

CONTEXT = 4096
KV_TOKENS = 60_000
NUM_BEGINNINGS = 200
SIZES = ((1_000, 8), (10_000, 64), (100_000, 64), (100_000, 1_000), (1_000_000, 1_000))


@dataclass(frozen=True, slots=True)
class Result:
    """Milliseconds per step."""

    queued: int
    workers: int
    median_ms: float
    p99_ms: float
    max_ms: float
    batches_per_step: float
    submit_us: float
    """Microseconds per request while the queue was filled."""


class Bench:
    """A core with workers that finish what they are given."""

    def __init__(self, queued: int, workers: int, seed: int, shared: float) -> None:
        self.random = random.Random(seed)
        self.shared = shared
        self.pending: list[BatchPrefilled] = []
        self.core = SchedulerCore(
            CoreSettings(max_queued_requests=10_000_000, max_queued_tokens=10**12, default_ttft_s=1e6), CONTEXT
        )
        self.number = 0
        self.now_s = 0.0
        self.used: dict[WorkerId, int] = {}
        self.assigned: dict[WorkerId, int] = {}
        self.running: list[tuple[Batch, RequestId]] = []
        self.requests: dict[RequestId, Request] = {}
        start = time.perf_counter()
        for _ in range(0, queued, 1000):
            self.step(self.submitted(min(1000, queued)))
        self.submit_us = 1e6 * (time.perf_counter() - start) / queued
        for i in range(workers):
            worker_id = WorkerId(f"w{i:04d}")
            self.used[worker_id], self.assigned[worker_id] = 0, 0
            self.step([*self.pending, self.joined(worker_id)])

    def submitted(self, number: int) -> list[Event]:
        events: list[Event] = []
        for _ in range(number):
            self.number += 1
            is_long = self.random.random() < 0.3
            prompt = self.random.randint(400, 3000) if is_long else max(int(self.random.lognormvariate(4, 0.8)), 1)
            request = Request(
                request_id=RequestId(f"r{self.number:08d}"),
                prompt_tokens=min(prompt, 3000),
                max_new_tokens=self.random.randint(16, 512),
                arrival_s=self.now_s,
                request_class=RequestClass.BATCH if self.random.random() < 0.2 else RequestClass.INTERACTIVE,
                tenant=f"t{self.random.randrange(8)}",
                block_hashes=self.hashes(prompt),
            )
            self.requests[request.request_id] = request
            events.append(RequestSubmitted(request))
        return events

    def hashes(self, prompt_tokens: int) -> tuple[int, ...]:
        """Returns those of a prompt that begins, up to a random block, as all do of one of the beginnings."""
        if not self.shared or self.random.random() >= self.shared:
            return ()
        number = min(prompt_tokens, 3000) // BLOCK_TOKENS
        common, begins = self.random.randint(0, number), 1000 * self.random.randrange(NUM_BEGINNINGS)
        own = [self.random.getrandbits(62) for _ in range(number - common)]
        return (*(begins + i for i in range(common)), *own)

    def headroom(self, worker_id: WorkerId) -> Headroom:
        return Headroom(
            kv_total_tokens=KV_TOKENS,
            kv_free_tokens=KV_TOKENS - self.used[worker_id],
            max_sequences=256,
            last_assignment=self.assigned[worker_id],
        )

    def joined(self, worker_id: WorkerId) -> Event:
        return WorkerJoined(
            worker_id=worker_id,
            role=WorkerRole.BOTH,
            headroom=self.headroom(worker_id),
            context_tokens=CONTEXT,
        )

    def finished(self, number: int) -> list[Event]:
        events: list[Event] = []
        for _ in range(min(number, len(self.running))):
            index = self.random.randrange(len(self.running))
            self.running[index], self.running[-1] = self.running[-1], self.running[index]
            batch, request_id = self.running.pop()
            self.used[batch.worker_id] -= self.requests.pop(request_id).reserved_tokens
            worker_id = batch.worker_id
            events += [
                RequestFinished(
                    request_id=request_id, worker_id=worker_id, assignment=batch.assignment, output_tokens=100
                ),
                WorkerReported(worker_id=worker_id, headroom=self.headroom(worker_id)),
            ]
        return events

    def step(self, events: list[Event]) -> tuple[float, int]:
        """Returns (seconds, batches)."""
        self.now_s += 0.01
        start = time.perf_counter()
        decision = self.core.step(events, self.now_s)
        took_s = time.perf_counter() - start
        batches = [command.batch for command in decision.commands if isinstance(command, DispatchBatch)]
        for batch in batches:
            self.used[batch.worker_id] += batch.reserved_kv_tokens
            self.assigned[batch.worker_id] = batch.assignment
            self.running += [(batch, request_id) for request_id in batch.request_ids]
        self.pending = [
            BatchPrefilled(worker_id=b.worker_id, assignment=b.assignment, request_ids=b.request_ids) for b in batches
        ]
        return took_s, len(batches)


def measure(queued: int, workers: int, steps: int, seed: int, shared: float) -> Result:
    gc.disable()
    try:
        bench = Bench(queued, workers, seed, shared)
        for _ in range(30):
            bench.step([*bench.pending, *bench.finished(4), *bench.submitted(4)])
        times, batches = [], 0
        for _ in range(steps):
            took_s, formed = bench.step([*bench.pending, *bench.finished(4), *bench.submitted(4)])
            times.append(1e3 * took_s)
            batches += formed
    finally:
        gc.enable()
    times.sort()
    return Result(
        queued,
        workers,
        statistics.median(times),
        nearest_rank(times, 99),
        times[-1],
        batches / steps,
        bench.submit_us,
    )


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    axes.plot([r.queued for r in results], [r.median_ms for r in results], "o-", label="median")
    axes.plot([r.queued for r in results], [r.p99_ms for r in results], "s--", label="p99")
    for result in results:
        axes.annotate(f"{result.workers} workers", (result.queued, result.median_ms), fontsize=7)
    axes.set(
        xscale="log", yscale="log", xlabel="requests queued", ylabel="core.step, ms", title="4 arrivals, 4 ends a step"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=float, default=0.0, help="share of prompts with block hashes")
    parser.add_argument("--largest", type=int, default=1_000_000, help="skip longer queues")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    console = Console()
    table = Table("queued", "workers", "median ms", "p99 ms", "max ms", "batches a step", "us per request queued")
    results = []
    for queued, workers in SIZES:
        if queued > arguments.largest:
            continue
        with console.status(f"{queued} queued, {workers} workers"):
            result = measure(queued, workers, arguments.steps, arguments.seed, arguments.shared)
        results.append(result)
        table.add_row(
            str(queued),
            str(workers),
            f"{result.median_ms:.3f}",
            f"{result.p99_ms:.3f}",
            f"{result.max_ms:.1f}",
            f"{result.batches_per_step:.1f}",
            f"{result.submit_us:.1f}",
        )
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
