"""bucketserve job: batch work over JSONL files."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import grpc
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bucketserve.core.errors import BucketServeError
from bucketserve.job_client import JobClient, Result, request_from_json
from bucketserve.v1 import common_pb2, inference_pb2, job_pb2

__all__ = ["job_app"]

job_app = typer.Typer(
    no_args_is_help=True, help="Batch jobs: submit thousands of requests at once, fetch results later."
)
console, errors = Console(), Console(stderr=True)

Address = Annotated[str, typer.Option(help="host:port of a gateway")]
DEFAULT_ADDRESS = "127.0.0.1:50051"
POLL_S = 0.5
ENDED = (job_pb2.JOB_STATE_COMPLETED, job_pb2.JOB_STATE_CANCELLED)

T = TypeVar("T")


@job_app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="JSONL: prompt, messages or token_ids; custom_id, max_tokens, ...")],
    key: Annotated[str, typer.Option(help="idempotency key: submitting again returns the same job")] = "",
    tenant: Annotated[str, typer.Option(help="who asks")] = "",
    ttl_s: Annotated[int, typer.Option(min=0, help="seconds to keep the job after its last progress; 0: a day")] = 0,
    wait: Annotated[bool, typer.Option(help="show progress until the job ends")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Submit a file of requests as one job; prints its id."""
    requests = _read(file)

    async def run() -> job_pb2.Job:
        async with JobClient(address) as jobs:
            return await jobs.submit(requests, idempotency_key=key, tenant=tenant, ttl_s=ttl_s)

    job = _run(run())
    print(job.job_id, flush=True)
    if wait:
        _watch(job.job_id, address)


@job_app.command()
def status(
    job_id: Annotated[str, typer.Argument(help="as printed by submit")],
    watch: Annotated[bool, typer.Option(help="show progress until the job ends")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show a job's state and progress."""
    if watch:
        _watch(job_id, address)
        return

    async def run() -> job_pb2.Job:
        async with JobClient(address) as jobs:
            return await jobs.get(job_id)

    _show(_run(run()))


@job_app.command()
def results(
    job_id: Annotated[str, typer.Argument(help="as printed by submit")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file for the JSONL; default: print it")] = None,
    follow: Annotated[bool, typer.Option(help="wait for results still to come")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Fetch results as JSONL, in order of the requests."""

    async def run() -> int:
        number = 0
        with output.open("w") if output else sys.stdout as file:
            async with JobClient(address) as jobs:
                async for result in jobs.results(job_id, follow=follow):
                    file.write(json.dumps(_to_json(result), ensure_ascii=False) + "\n")
                    number += 1
        return number

    number = _run(run())
    if output:
        console.print(f"{number:,} results in {output}")


@job_app.command()
def cancel(
    job_id: Annotated[str, typer.Argument(help="as printed by submit")], address: Address = DEFAULT_ADDRESS
) -> None:
    """End a job; results that are there stay."""

    async def run() -> job_pb2.Job:
        async with JobClient(address) as jobs:
            return await jobs.cancel(job_id)

    _show(_run(run()))


def _read(file: Path) -> list[inference_pb2.GenerateRequest]:
    requests = []
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        errors.print(f"[red]error:[/] {error}")
        raise typer.Exit(2) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            requests.append(request_from_json(json.loads(line)))
        except (ValueError, AttributeError) as error:
            errors.print(f"[red]error:[/] {file}:{number}: {error}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
    return requests


def _watch(job_id: str, address: str) -> None:
    async def run() -> job_pb2.Job:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=errors) as progress:
            bar = progress.add_task(job_id, total=None)
            async with JobClient(address) as jobs:
                while True:
                    job = await jobs.get(job_id)
                    failed = f"  [red]{job.num_failed} failed[/]" if job.num_failed else ""
                    progress.update(
                        bar, total=job.num_requests or None, completed=job.num_done, description=f"{job_id}{failed}"
                    )
                    if job.state in ENDED:
                        return job
                    await asyncio.sleep(POLL_S)

    _show(_run(run()))


def _show(job: job_pb2.Job) -> None:
    table = Table("job", "state", "requests", "done", "failed")
    state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
    table.add_row(job.job_id, state, f"{job.num_requests:,}", f"{job.num_done:,}", f"{job.num_failed:,}")
    console.print(table)


def _to_json(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = {"index": result.index, "custom_id": result.request_id}
    if result.error_reason:
        return {**found, "error": {"reason": result.error_reason, "message": result.error_message}}
    finished = result.finished
    return {
        **found,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": common_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower(),
        "usage": {"prompt_tokens": finished.usage.prompt_tokens, "output_tokens": finished.usage.output_tokens},
    }


def _run(call: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(call)
    except BucketServeError as error:
        errors.print(f"[red]error:[/] {error.reason}: {error}", highlight=False)
    except grpc.aio.AioRpcError as error:
        errors.print(f"[red]error:[/] {error.code().name}: {error.details()}", highlight=False)
    raise typer.Exit(1)
