"""`bucketserve demo`: the whole stack, short and long prompts at once, text as it comes, then what was measured."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.sim.percentiles import Percentiles
from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_cli.stack import LocalStack, StackSpec

__all__ = ["run_demo"]

SHORT_PROMPTS = (
    "And the king said",
    "In the beginning",
    "Behold, the servant of",
    "And it came to pass",
    "The Lord is my",
    "Then answered the woman,",
    "Blessed are they that",
    "And he went up into",
)
LONG_TEXT = (
    "And in those days the people gathered themselves together before the gate of the city, and every man spake unto "
    "his neighbour of the things which he had seen in the land. "
)
LONG_REPEATS = (4, 8, 14, 20)
SHOWN_CHARACTERS = 88

SAMPLING = common_pb2.SamplingParams(temperature=0.7, top_k=40, seed=7)
"""A model this small repeats itself when greedy; the seed makes every run say the same."""


@dataclass(slots=True)
class _Shown:
    """One request on the screen."""

    kind: str
    prompt: str
    max_tokens: int
    text: str = ""
    ttft_ms: float | None = None
    finished: inference_pb2.GenerateFinished | None = None


def run_demo(model: str, num_workers: int, console: Console, api_key: str = "") -> None:
    """Starts the stack, runs the requests, prints the tables, stops the stack.

    Raises:
        StackError: a service did not start.
        BucketServeError: a request failed.
    """
    # One thread each: for a model this small further threads cost more in waiting than they bring, above all where
    # other programs want the cores too.
    spec = StackSpec(model=model, num_workers=num_workers, threads_per_worker=1)
    console.print(f"[bold]starting[/] gateway, scheduler, {num_workers} worker(s), Valkey, with {Path(model).name}")
    with LocalStack(spec, lambda line: console.print(f"  {line}", highlight=False)) as stack:
        requests = _requests()
        num_short = sum(request.kind == "short" for request in requests)
        console.print(
            f"\n[bold]sending[/] {num_short} short and {len(requests) - num_short} long prompts at once "
            f"to {stack.gateway_address}\n"
        )
        start_s = time.monotonic()
        asyncio.run(_send_all(stack, requests, console, api_key))
        total_s = time.monotonic() - start_s
        console.print(_request_table(requests))
        console.print(_bucket_table(requests))
        console.print(_summary(requests, total_s), highlight=False)
        console.print("\n[bold]stopping[/]")


def _requests() -> list[_Shown]:
    long_prompts = [LONG_TEXT * repeats for repeats in LONG_REPEATS]
    mixed = [_Shown("long", prompt, 24) for prompt in long_prompts[:2]]
    mixed += [_Shown("short", prompt, 40) for prompt in SHORT_PROMPTS]
    return mixed + [_Shown("long", prompt, 24) for prompt in long_prompts[2:]]


async def _send_all(stack: LocalStack, requests: list[_Shown], console: Console, api_key: str) -> None:
    async with BucketServeClient(stack.gateway_address, tls=stack.deployment.tls, api_key=api_key) as client:
        running = [asyncio.create_task(_send(client, request)) for request in requests]
        with Live(_live_view(requests), console=console, refresh_per_second=12, transient=True) as live:
            while not all(task.done() for task in running):
                await asyncio.sleep(0.08)
                live.update(_live_view(requests))
        # The first error, if there is one.
        await asyncio.gather(*running)
    if not console.is_terminal:
        for request in requests:
            console.print(_line(request))


async def _send(client: BucketServeClient, shown: _Shown) -> None:
    start_s = time.monotonic()
    async for event in client.generate(
        prompt=shown.prompt, max_tokens=shown.max_tokens, sampling=SAMPLING, ignore_eos=True
    ):
        if isinstance(event, Chunk):
            if shown.ttft_ms is None:
                shown.ttft_ms = (time.monotonic() - start_s) * 1e3
            shown.text += event.text
        elif isinstance(event, Finished):
            shown.finished = event


def _live_view(requests: list[_Shown]) -> Group:
    return Group(*(_line(request) for request in requests))


def _line(request: _Shown) -> Text:
    """Returns the end of the prompt and of the text so far."""
    prompt = request.prompt.strip()
    head = prompt if len(prompt) < 28 else "…" + prompt[-26:]
    text = request.text.replace("\n", " ")
    line = Text(f"{request.kind:<6}", style="cyan" if request.kind == "short" else "magenta")
    line.append(f"{head:<28} ", style="dim")
    line.append(text if len(text) < SHOWN_CHARACTERS else "…" + text[-SHOWN_CHARACTERS:])
    return line


def _request_table(requests: list[_Shown]) -> Table:
    table = Table(title="requests", title_justify="left", box=None)
    for column in ("kind", "prompt", "output", "queue ms", "TTFT ms", "tokens/s", "bucket", "batch", "padding avoided"):
        table.add_column(column, justify="left" if column in ("kind", "bucket") else "right")
    for request in requests:
        done = request.finished
        if done is None:
            continue
        timings, batch = done.timings, done.batch
        rate = done.usage.output_tokens / timings.total_ms * 1e3
        table.add_row(
            request.kind,
            str(done.usage.prompt_tokens),
            str(done.usage.output_tokens),
            f"{timings.queue_ms:.0f}",
            f"{request.ttft_ms or 0:.0f}",
            f"{rate:.0f}",
            f"[{batch.bucket_low_tokens}, {batch.bucket_high_tokens})".replace("[", "\\["),
            str(batch.num_requests),
            f"{1 - batch.prompt_tokens / batch.padded_tokens:.0%}",
        )
    return table


def _bucket_table(requests: list[_Shown]) -> Table:
    batches = {r.finished.batch.batch_id: r.finished.batch for r in requests if r.finished is not None}
    table = Table(title="\nbuckets", title_justify="left", box=None)
    for column in ("bucket", "batches", "requests", "prompt tokens", "if padded", "limited by"):
        table.add_column(column, justify="left" if column in ("bucket", "limited by") else "right")
    edges = sorted({(batch.bucket_low_tokens, batch.bucket_high_tokens) for batch in batches.values()})
    for low, high in edges:
        inside = [b for b in batches.values() if (b.bucket_low_tokens, b.bucket_high_tokens) == (low, high)]
        table.add_row(
            f"\\[{low}, {high})",
            str(len(inside)),
            str(sum(batch.num_requests for batch in inside)),
            str(sum(batch.prompt_tokens for batch in inside)),
            str(sum(batch.padded_tokens for batch in inside)),
            ", ".join(sorted({batch.limited_by for batch in inside})),
        )
    return table


def _summary(requests: list[_Shown], total_s: float) -> str:
    done = [request for request in requests if request.finished is not None]
    output = sum(r.finished.usage.output_tokens for r in done if r.finished)
    prompt = sum(r.finished.usage.prompt_tokens for r in done if r.finished)
    short, long = (
        Percentiles.of([r.ttft_ms for r in done if r.kind == kind and r.ttft_ms is not None]).p50
        for kind in ("short", "long")
    )
    return (
        f"\n{len(done)} of {len(requests)} requests, {prompt} prompt and {output} output tokens in {total_s:.2f} s: "
        f"{output / total_s:.0f} output tokens/s; median TTFT short {short:.0f} ms, "
        f"long {long:.0f} ms"
    )
