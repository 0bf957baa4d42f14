"""How fast KV moves between two worker processes, against the bare means: a gRPC stream, a memcpy.

A child process holds the KV of one prompt behind the real WorkerService; this one, which has none of it, fetches it
with the real KvSources, by stream and by shared memory, lengths and checksums verified. Beside each, in turn (A B A B):

- bare stream: the same bytes in the same pieces from a handler that does nothing else to a reader that drops them;
- memcpy:      the same bytes copied within this process, both sides touched before.

    python benchmarks/kv_transfer.py [--model DIR] [--tokens 1024] [--rounds 40] [--json OUT]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from bucketserve.core.types import RequestId
from bucketserve.engine.kv_memory import PAGE_TOKENS
from bucketserve.engine.kv_staging import KvStaging, checksum, page_checksums
from bucketserve.rpc.channel import CHANNEL_OPTIONS, SERVER_OPTIONS
from bucketserve.rpc.deployment import Deployment
from bucketserve.sim.percentiles import nearest_rank
from bucketserve.v1 import common_pb2, scheduler_pb2, worker_pb2, worker_pb2_grpc
from bucketserve_worker.engine_thread import HandedOver
from bucketserve_worker.kv_holder import KvHolder
from bucketserve_worker.kv_source import PIECE_BYTES, KvSources
from bucketserve_worker.running import Running
from bucketserve_worker.servicer import WorkerServicer

ROOT = Path(__file__).resolve().parents[1]
BARE = "/benchmark.Bare/Stream"


def holding(holder: KvHolder, num_bytes: int, page_bytes: int) -> scheduler_pb2.HeldKv:
    """Holds random bytes of that length as the KV of request r."""
    staging = KvStaging(2 * num_bytes)
    kv = memoryview(bytes(torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).numpy()))
    trailer = worker_pb2.KvTrailer(page_checksums=page_checksums(kv, page_bytes)).SerializeToString()
    block = staging.take(num_bytes + len(trailer))
    block.data[:num_bytes], block.data[num_bytes:] = kv, trailer
    holder.hold(
        Running("r.1", scheduler_pb2.RunSpec(), common_pb2.BatchInfo(), 0, 0.0),
        HandedOver(RequestId("r.1#1"), 1, num_bytes, block, checksum(block.data[num_bytes:])),
    )
    return next(iter(holder)).describe("L", staging.path)


async def serve(num_bytes: int, page_bytes: int) -> None:
    """The child: the holder, and the bare stream beside it."""
    holder = KvHolder(1e9, time.monotonic)
    kv = holding(holder, num_bytes, page_bytes)
    data = bytes(next(iter(holder)).handed_over.block.data[:num_bytes])

    async def bare(request: bytes, context: object) -> AsyncIterator[bytes]:
        for begin in range(0, num_bytes, PIECE_BYTES):
            yield data[begin : begin + PIECE_BYTES]

    server = grpc.aio.server(options=list(SERVER_OPTIONS))
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(holder, Deployment()), server)
    handler = grpc.method_handlers_generic_handler(
        "benchmark.Bare", {"Stream": grpc.unary_stream_rpc_method_handler(bare)}
    )
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    print(f"127.0.0.1:{port} {kv.SerializeToString().hex()}", flush=True)
    await server.start()
    await server.wait_for_termination()


async def measure(address: str, kv: scheduler_pb2.HeldKv, page_bytes: int, rounds: int) -> dict[str, list[float]]:
    """Returns seconds for each way, in pairs."""
    num_bytes = kv.kv_bytes
    holder, staging = KvHolder(1e9, time.monotonic), KvStaging(4 * num_bytes)
    sources = KvSources("reader", Deployment(), holder, staging, "L", page_bytes, lambda spec: 0)
    near = scheduler_pb2.PullKv(run_id="r.1", source_worker_id="source", source_address=address, kv=kv)
    # As a reader on another host sees it.
    far = scheduler_pb2.PullKv()
    far.CopyFrom(near)
    far.kv.ClearField("shared_memory")
    source = memoryview(bytearray(num_bytes))
    target = memoryview(bytearray(num_bytes))
    async with grpc.aio.insecure_channel(address, options=list(CHANNEL_OPTIONS)) as channel:
        bare = channel.unary_stream(BARE)

        async def fetch(pull: scheduler_pb2.PullKv) -> None:
            (await sources.fetch(pull)).block.release()

        async def stream() -> None:
            number = 0
            async for piece in bare(b""):
                number += len(piece)
            assert number == num_bytes

        async def copy() -> None:
            target[:] = source

        ways: dict[str, Callable[[], Awaitable[None]]] = {
            "bare gRPC stream": stream,
            "FetchKv by stream": lambda: fetch(far),
            "memcpy": copy,
            "FetchKv by shared memory": lambda: fetch(near),
        }
        took: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 3):
            for name, way in ways.items():
                start_s = time.perf_counter()
                await way()
                if number >= 3:
                    took[name].append(time.perf_counter() - start_s)
        took["copy and checksums alone"] = []
        for _ in range(rounds):
            start_s = time.perf_counter()
            target[:] = source
            page_checksums(target, page_bytes)
            took["copy and checksums alone"].append(time.perf_counter() - start_s)
    await sources.close()
    return took


def kv_bytes(model: str) -> int:
    """Returns KV bytes of a token in float32 (paper, formula 1)."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "demo" / "model"))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(*options.serve))
        return
    num_bytes, page_bytes = (number * kv_bytes(options.model) for number in (options.tokens, PAGE_TOKENS))
    child = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(num_bytes), str(page_bytes)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        address, kv = child.stdout.readline().split()
        held = scheduler_pb2.HeldKv.FromString(bytes.fromhex(kv))
        took = asyncio.run(measure(address, held, page_bytes, options.rounds))
    finally:
        child.terminate()
        child.wait()
    report(took, num_bytes, options.tokens)
    if options.json:
        options.json.write_text(json.dumps({"num_bytes": num_bytes, "seconds": took}) + "\n")


def report(took: dict[str, list[float]], num_bytes: int, tokens: int) -> None:
    """Prints medians, and each way's share of its bare counterpart, pair by pair."""
    table = Table(title=f"KV of {tokens:,} tokens, {num_bytes / 2**20:.1f} MiB")
    for column in ("way", "GB/s median", "ms median", "ms p10..p90", "share of the bare means"):
        table.add_column(column, justify="left" if column == "way" else "right")
    against = {
        "FetchKv by stream": "bare gRPC stream",
        "FetchKv by shared memory": "memcpy",
        "copy and checksums alone": "memcpy",
    }
    for name, seconds in took.items():
        share = ""
        if name in against:
            ratios = [bare / ours for bare, ours in zip(took[against[name]], seconds, strict=True)]
            low, high = nearest_rank(ratios, 10), nearest_rank(ratios, 90)
            share = f"{statistics.median(ratios):.0%} ({low:.0%} to {high:.0%})"
        median = statistics.median(seconds)
        table.add_row(
            name,
            f"{num_bytes / median / 1e9:.2f}",
            f"{median * 1e3:.2f}",
            f"{nearest_rank(seconds, 10) * 1e3:.2f}..{nearest_rank(seconds, 90) * 1e3:.2f}",
            share,
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
