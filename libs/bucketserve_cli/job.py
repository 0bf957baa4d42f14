"""bucketserve job: batch work over JSONL files."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bucketserve.core.errors import InvalidRequestError, UnavailableError
from bucketserve.job_client import JobClient, Result, request_from_line
from bucketserve.v1 import common_pb2, inference_pb2, job_pb2
from bucketserve_cli.connection import Connection, connects
from bucketserve_cli.terminal import (
    InputError,
    an_address,
    as_json,
    console,
    errors,
    plain_table,
    print_json,
    replaced_file,
)

__all__ = ["job_app"]

job_app = typer.Typer(help="Batch jobs: submit thousands of requests at once, fetch results later.")

Address = Annotated[str, typer.Option(help="host:port of a gateway", callback=an_address)]
Tenant = Annotated[str, typer.Option(help="whose job it is, if submit was told")]
Json = Annotated[bool, typer.Option("--json", help="print the job as a JSON object")]
DEFAULT_ADDRESS = "127.0.0.1:50051"
POLL_S = 0.5
PATIENCE_S = 60.0
"""For so long a watched job may be out of reach, as when gateways are restarted."""
MAX_TTL_S = 30 * 86_400
ENDED = (job_pb2.JOB_STATE_COMPLETED, job_pb2.JOB_STATE_CANCELLED)
_ITEM = re.compile(r"items\[(\d+)\]\.")
BOM = b"\xef\xbb\xbf"


@job_app.command()
@connects
def submit(
    file: Annotated[Path, typer.Argument(help="JSONL: prompt, messages or token_ids; custom_id, max_tokens, ...")],
    key: Annotated[str, typer.Option(help="idempotency key: submitting again returns the same job")] = "",
    tenant: Annotated[str, typer.Option(help="who asks")] = "",
    ttl_s: Annotated[
        int, typer.Option(min=0, max=MAX_TTL_S, help="seconds to keep the job after its last progress; 0: a day")
    ] = 0,
    wait: Annotated[bool, typer.Option(help="show progress until the job ends; status 1 if a request failed")] = False,
    is_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    *,
    connection: Connection,
) -> None:
    """Submit a file of requests as one job; prints its id."""
    requests = _read(file)
    lines = list(requests)

    async def run() -> job_pb2.Job:
        async with JobClient(address, tls=connection.tls, api_key=connection.api_key) as jobs:
            return await jobs.submit(requests.values(), idempotency_key=key, tenant=tenant, ttl_s=ttl_s)

    try:
        job = asyncio.run(run())
    except InvalidRequestError as error:
        # What the gateway finds wrong with the Nth request is wrong with a line.
        raise InputError(_ITEM.sub(lambda match: f"{file}:{lines[int(match[1])]}: ", str(error))) from None
    if is_json and not wait:
        _show(job, is_json)
    elif not is_json:
        print(job.job_id, flush=True)
    if wait:
        _watch(job.job_id, tenant, address, connection, is_json)


@job_app.command()
@connects
def status(
    job_id: Annotated[str, typer.Argument(help="as printed by submit")],
    watch: Annotated[bool, typer.Option(help="show progress until the job ends; status 1 if a request failed")] = False,
    tenant: Tenant = "",
    is_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    *,
    connection: Connection,
) -> None:
    """Show a job's state and progress."""
    if watch:
        _watch(job_id, tenant, address, connection, is_json)
        return

    async def run() -> job_pb2.Job:
        async with JobClient(address, tls=connection.tls, api_key=connection.api_key) as jobs:
            return await jobs.get(job_id, tenant=tenant)

    _show(asyncio.run(run()), is_json)


@job_app.command()
@connects
def results(
    job_id: Annotated[str, typer.Argument(help="as printed by submit")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file for the JSONL; default: print it")] = None,
    follow: Annotated[bool, typer.Option(help="wait for results still to come")] = False,
    tenant: Tenant = "",
    address: Address = DEFAULT_ADDRESS,
    *,
    connection: Connection,
) -> None:
    """Fetch results as JSONL, in order of the requests."""

    async def run() -> int:
        num_results = 0
        with replaced_file(output) if output else nullcontext(sys.stdout) as file:
            async with JobClient(address, tls=connection.tls, api_key=connection.api_key) as jobs:
                async for result in jobs.results(job_id, follow=follow, tenant=tenant):
                    file.write(json.dumps(_to_json(result), ensure_ascii=False) + "\n")
                    num_results += 1
                    if follow:
                        file.flush()
        return num_results

    num_results = asyncio.run(run())
    if output:
        errors.print(f"{num_results:,} results in {escape(str(output))}", soft_wrap=True)


@job_app.command()
@connects
def cancel(
    job_id: Annotated[str, typer.Argument(help="as printed by submit")],
    tenant: Tenant = "",
    is_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    *,
    connection: Connection,
) -> None:
    """End a job; results that are there stay."""

    async def run() -> job_pb2.Job:
        async with JobClient(address, tls=connection.tls, api_key=connection.api_key) as jobs:
            return await jobs.cancel(job_id, tenant=tenant)

    _show(asyncio.run(run()), is_json)


def _read(file: Path) -> dict[int, inference_pb2.GenerateRequest]:
    """Returns the requests of a JSONL file by line number: UTF-8, with or without a BOM; blank lines are skipped."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    requests = {}
    # At line feeds alone: strings of JSON may contain what Unicode counts as line ends too.
    for number, line in enumerate(content.removeprefix(BOM).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            requests[number] = request_from_line(line)
        except ValueError as error:
            raise InputError(f"{file}:{number}: {error}") from None
    if not requests:
        raise InputError(f"{file}: no requests")
    return requests


def _watch(job_id: str, tenant: str, address: str, connection: Connection, is_json: bool) -> None:
    async def run() -> job_pb2.Job:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
            bar = progress.add_task(escape(job_id), total=None)
            async with JobClient(address, tls=connection.tls, api_key=connection.api_key) as jobs:
                job = await jobs.get(job_id, tenant=tenant)
                while True:
                    failed = f"  [red]{job.num_failed} failed[/]" if job.num_failed else ""
                    progress.update(
                        bar,
                        total=job.num_requests or None,
                        completed=job.num_done,
                        description=f"{escape(job_id)}{failed}",
                    )
                    if job.state in ENDED:
                        return job
                    await asyncio.sleep(POLL_S)
                    job = await _get_patiently(jobs, job_id, tenant)

    job = asyncio.run(run())
    _show(job, is_json)
    if job.num_failed or job.state != job_pb2.JOB_STATE_COMPLETED:
        raise typer.Exit(1)


async def _get_patiently(jobs: JobClient, job_id: str, tenant: str) -> job_pb2.Job:
    give_up_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await jobs.get(job_id, tenant=tenant)
        except UnavailableError as error:
            if time.monotonic() > give_up_s:
                raise
            await asyncio.sleep(max(error.retry_delay_s, POLL_S))


def _show(job: job_pb2.Job, is_json: bool) -> None:
    state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
    if is_json:
        print_json({**as_json(job), "state": state})
        return
    table = plain_table("job", "state", "requests", "done", "failed")
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
