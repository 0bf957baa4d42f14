"""How long is nobody scheduling when the leader is killed? Two schedulers, two workers (fake engine), some load.

In each round the scheduler that leads is killed with SIGKILL and started again once the other one has taken over.
Reported are the time until the standby holds the seat, until a request sent at the moment of the kill has its first
token, and the longest pause between two tokens of any stream that was running.

    python benchmarks/takeover.py [--rounds 10] [--jsonl OUT]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import time
from datetime import datetime
from pathlib import Path

from conditions import Records, Row, conditions
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bucketserve.client import BucketServeClient, Chunk
from bucketserve_cli.stack import LocalStack, StackSpec

ROOT = Path(__file__).resolve().parents[1]
STEP_US = 20_000
STREAMS, STREAM_TOKENS = 8, 500
COLUMNS = ("seat_s", "first_token_s", "longest_pause_s")


def seats(stack: LocalStack) -> dict[str, tuple[int, float]]:
    """Returns, for each scheduler, epoch and Unix time of the last seat that it took."""
    found = {}
    for name, service in stack.services.items():
        if not name.startswith("scheduler"):
            continue
        for line in service.log_path.read_text().splitlines():
            if '"seat.taken"' in line:
                entry = json.loads(line)
                found[name] = (entry["epoch"], datetime.fromisoformat(entry["time"]).timestamp())
    return found


async def stream(client: BucketServeClient, num_tokens: int) -> tuple[float, float]:
    """Runs a request; returns the time to its first token and the longest pause after it, seconds."""
    at_s, first_s, longest_s = time.monotonic(), None, 0.0
    async for event in client.generate(token_ids=[5] * 40, max_tokens=num_tokens, ignore_eos=True):
        if isinstance(event, Chunk):
            now_s = time.monotonic()
            if first_s is None:
                first_s = now_s - at_s
            else:
                longest_s = max(longest_s, now_s - at_s)
            at_s = now_s
    assert first_s is not None
    return first_s, longest_s


async def one_round(stack: LocalStack) -> Row:
    """Kills the leader under load."""
    before = seats(stack)
    leader = max(before, key=lambda name: before[name][0])
    async with BucketServeClient(stack.gateway_address) as client:
        running = [asyncio.create_task(stream(client, STREAM_TOKENS)) for _ in range(STREAMS)]
        await asyncio.sleep(2.0)
        killed_s = time.time()
        stack.services[leader].signal(signal.SIGKILL)
        first_token_s, _ = await stream(client, 5)
        pauses = [longest for _, longest in await asyncio.gather(*running)]
    epoch, taken_s = max(seats(stack).values())
    assert epoch > before[leader][0], "nobody took over"
    stack.restart(leader)
    await asyncio.to_thread(stack.wait_until_serving, 30)
    return {"seat_s": taken_s - killed_s, "first_token_s": first_token_s, "longest_pause_s": max(pauses)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--jsonl", type=Path)
    options = parser.parse_args()
    console = Console()
    spec = StackSpec(
        model=str(ROOT / "models" / "demo" / "model"),
        engine="fake",
        num_workers=2,
        num_schedulers=2,
        environ={"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": str(STEP_US)},
    )
    with Records(options.jsonl, conditions(step_us=STEP_US, streams=STREAMS)) as records, LocalStack(spec) as stack:
        for number in track(range(options.rounds), "takeover", console=console):
            records.add({"round": number, **asyncio.run(one_round(stack))})
    table = Table("seconds", "median", "shortest", "longest", title=f"{options.rounds} leaders killed")
    for column in COLUMNS:
        values = [float(str(row[column])) for row in records.rows]
        table.add_row(column, f"{statistics.median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
