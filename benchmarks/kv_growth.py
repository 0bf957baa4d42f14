"""How much goes at once where KV is planned by what outputs were like: the whole stack, limits far above the outputs.

The fake engine has a clock like a GPU's: a decode step takes as long for many sequences as for one. Every request asks
for 2,048 tokens and ends after 50 to 300 at a stop token. Before ADR 24 engines could reserve all that a request may
use, which is what docs/benchmarks.md compares with.

    python benchmarks/kv_growth.py [--requests 600] [--rounds 2]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from conditions import conditions
from queued_requests import CONTEXT, long_model
from rich.console import Console
from rich.table import Table

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.core.types import RequestId
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import SequenceSpec
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack, StackSpec

MAX_TOKENS, PROMPT_TOKENS = 2_048, 200
ENVIRON = {
    "BUCKETSERVE_WORKER_CONTEXT_TOKENS": str(CONTEXT),
    "BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": "40000",
    "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "30000",
    "BUCKETSERVE_TELEMETRY_LOG_LEVEL": "warning",
}


@dataclass(frozen=True)
class Asked:
    """A request and its whole output."""

    prompt: tuple[int, ...]
    stop: int
    output: list[int]


def draw(number: int, seed: int = 1) -> list[Asked]:
    """Returns requests whose outputs end at a stop token after 50 to 300 tokens."""
    rng, drawn = random.Random(seed), []
    while len(drawn) < number:
        prompt = tuple(rng.randrange(2, 250) for _ in range(PROMPT_TOKENS))
        engine, tokens = FakeEngine(FakeSettings()), list[int]()
        engine.add([SequenceSpec(request_id=RequestId("r"), token_ids=prompt, max_new_tokens=301)])
        while engine.has_work():
            tokens += [output.token_id for output in engine.step().tokens if output.token_id is not None]
        length = rng.randint(50, 300)
        if tokens.index(tokens[length]) == length:
            drawn.append(Asked(prompt, tokens[length], tokens[:length]))
    return drawn


async def serve(address: str, asked: list[Asked]) -> tuple[float, int, int]:
    """Sends all at once; returns (output tokens/s, most requests between first and last token at once, preemptions)."""
    running, most, num_attempts = 0, 0, 0

    async def one(client: BucketServeClient, request: Asked) -> None:
        nonlocal running, most, num_attempts
        tokens: list[int] = []
        async for event in client.generate(
            token_ids=request.prompt, max_tokens=MAX_TOKENS, ignore_eos=True, stop_token_ids=[request.stop]
        ):
            if isinstance(event, Chunk):
                running += not tokens
                most = max(most, running)
                tokens += event.token_ids
            elif isinstance(event, Finished):
                assert event.reason == common_pb2.FINISH_REASON_STOP, event
                num_attempts += event.attempts - 1
        running -= 1
        assert tokens == request.output, "wrong tokens"

    async with BucketServeClient(address) as client:
        start_s = time.perf_counter()
        await asyncio.gather(*(one(client, request) for request in asked))
        took_s = time.perf_counter() - start_s
    return sum(len(request.output) for request in asked) / took_s, most, num_attempts


async def run(options: argparse.Namespace, console: Console) -> None:
    """Measures and prints."""
    asked = draw(options.requests)
    table = Table("round", "output tokens/s", "at once, most", "preemptions")
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory() as folder:
        model = long_model(Path(folder))
        for number in range(1, options.rounds + 1):
            stack = LocalStack(StackSpec(model=model, engine="fake", environ=dict(ENVIRON)))
            await loop.run_in_executor(None, stack.__enter__)
            try:
                rate, most, preemptions = await serve(stack.gateway_address, asked)
            finally:
                await loop.run_in_executor(None, stack.__exit__, None, None, None)
            table.add_row(str(number), f"{rate:,.0f}", str(most), str(preemptions))
    console.print(table)
    console.print(conditions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=2)
    asyncio.run(run(parser.parse_args(), Console()))


if __name__ == "__main__":
    main()
