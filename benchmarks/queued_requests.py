"""What a waiting request costs, for short and long prompts: bytes in Redis, and the scheduler's CPU.

A stack as processes with a store of its own. The worker holds one running request that takes all of its memory, so that
everything after it waits; then requests are queued, and cancelled again. Redis's used_memory and the scheduler's CPU
time are taken before and after.

    python benchmarks/queued_requests.py [--requests 200] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import redis
from conditions import conditions
from rich.console import Console
from rich.table import Table
from serving_path import MODEL, cpu_s

from bucketserve.client import BucketServeClient, Started
from bucketserve.store.embedded import EmbeddedServer
from bucketserve_cli.stack import LocalStack, StackSpec

PROMPTS = (64, 16_384)
CONTEXT = 20_000
ENVIRON = {
    "BUCKETSERVE_WORKER_CONTEXT_TOKENS": str(CONTEXT),
    "BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": str(CONTEXT),
    # One request holds the only place, so that the others wait.
    "BUCKETSERVE_WORKER_MAX_SEQUENCES": "1",
    "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "200000",
    "BUCKETSERVE_TELEMETRY_LOG_LEVEL": "warning",
}


def long_model(folder: Path) -> str:
    """Returns the demo model as the fake engine and a gateway need it, with a longer context."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        if (Path(MODEL) / name).exists():
            shutil.copy(Path(MODEL) / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return str(folder)


async def queue(address: str, prompt_tokens: int, number: int, measure_s: asyncio.Event, left: asyncio.Event) -> None:
    """Queues requests, sets the first event when all are accepted, and cancels them on the second."""

    async def one(client: BucketServeClient, i: int, waits: asyncio.Semaphore) -> None:
        prompt = [(i * 31 + j) % 4000 + 10 for j in range(prompt_tokens)]
        async with contextlib.aclosing(client.generate(token_ids=prompt, max_tokens=8)) as events:
            async for event in events:
                if isinstance(event, Started):
                    waits.release()
                    await left.wait()
                    return

    accepted = asyncio.Semaphore(0)
    async with BucketServeClient(address) as client:
        tasks = [asyncio.create_task(one(client, i, accepted)) for i in range(number)]
        for _ in range(number):
            await accepted.acquire()
        measure_s.set()
        await asyncio.gather(*tasks)


async def run(options: argparse.Namespace, console: Console) -> None:
    """Measures and prints."""
    table = Table("prompt tokens", "round", "Redis bytes per request", "scheduler CPU ms per request")
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack_exit:
        store = stack_exit.enter_context(EmbeddedServer())
        model = long_model(Path(stack_exit.enter_context(tempfile.TemporaryDirectory())))
        stack = LocalStack(StackSpec(model=model, engine="fake", redis_url=store.url, environ=dict(ENVIRON)))
        await loop.run_in_executor(None, stack.__enter__)
        stack_exit.push(stack)
        server = redis.Redis.from_url(store.url)
        async with BucketServeClient(stack.gateway_address) as client:
            holder = client.generate(token_ids=[5], max_tokens=CONTEXT - 2, ignore_eos=True)
            await anext(aiter(holder))
            await asyncio.sleep(1)
            for number in range(1, options.rounds + 1):
                for prompt_tokens in PROMPTS:
                    queued, left = asyncio.Event(), asyncio.Event()
                    bytes_before = server.info("memory")["used_memory"]
                    cpu_before_s = cpu_s(stack.services["scheduler"].pid)
                    task = asyncio.create_task(
                        queue(stack.gateway_address, prompt_tokens, options.requests, queued, left)
                    )
                    await queued.wait()
                    cpu_ms = 1e3 * (cpu_s(stack.services["scheduler"].pid) - cpu_before_s) / options.requests
                    num_bytes = (server.info("memory")["used_memory"] - bytes_before) / options.requests
                    table.add_row(f"{prompt_tokens:,}", str(number), f"{num_bytes:.0f}", f"{cpu_ms:.2f}")
                    left.set()
                    await task
                    await asyncio.sleep(3)
            await holder.aclose()
    console.print(table)
    console.print(conditions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--requests",
        type=int,
        default=200,
        help="requests that wait at once; their prompts must fit the gateway's max_held_bytes",
    )
    parser.add_argument("--rounds", type=int, default=3)
    asyncio.run(run(parser.parse_args(), Console()))


if __name__ == "__main__":
    main()
