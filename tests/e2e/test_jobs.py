"""Batch jobs through real processes: submitted once, run once, kept through restarts, in nobody's way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bucketserve.client import BucketServeClient
from bucketserve.core.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from bucketserve.job_client import JobClient, Result, request_from_json
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.store.redis import connect
from bucketserve.v1 import inference_pb2, job_pb2
from bucketserve_cli.main import app
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric
from tests.e2e.test_stack import SLOW, run

pytestmark = pytest.mark.e2e


def requests(number: int, max_tokens: int = 10) -> list[inference_pb2.GenerateRequest]:
    rows = [{"custom_id": f"c{i}", "token_ids": [5 + i % 50] * (1 + i % 30)} for i in range(number)]
    return [request_from_json({**row, "max_tokens": max_tokens, "ignore_eos": True}) for row in rows]


async def collect(jobs: JobClient, job_id: str, **more) -> list[Result]:
    return [result async for result in jobs.results(job_id, **more)]


async def test_a_job_is_submitted_once_and_every_request_has_one_result(new_stack: NewStack) -> None:
    stack = new_stack(num_gateways=2)
    async with JobClient(stack.gateway_addresses[0]) as jobs, JobClient(stack.gateway_addresses[1]) as others:
        job = await jobs.submit(requests(700), idempotency_key="k", tenant="t")
        assert (job.num_requests, job.ttl_s) == (700, 86_400)
        # Twice the same is one job, whoever is asked; something else under its name is refused; another tenant is free.
        assert (await others.submit(requests(700), idempotency_key="k", tenant="t")).job_id == job.job_id
        with pytest.raises(DuplicateRequestError):
            await others.submit(requests(699), idempotency_key="k", tenant="t")
        assert (await others.submit(requests(3), idempotency_key="k", tenant="u")).job_id != job.job_id
        results = await collect(others, job.job_id, follow=True)
        assert [result.index for result in results] == list(range(700))
        assert [result.request_id for result in results] == [f"c{i}" for i in range(700)]
        assert all(len(result.token_ids) == 10 and not result.error_reason for result in results)
        done = await jobs.get(job.job_id)
        assert (done.state, done.num_done, done.num_failed) == (job_pb2.JOB_STATE_COMPLETED, 700, 0)
        assert len(await collect(jobs, job.job_id, first_index=690)) == 10
    async with BucketServeClient(stack.gateway_address) as client:
        # What a job generates is what anybody else gets for the same prompt.
        tokens = [
            token
            async for event in client.generate(token_ids=[7] * 3, max_tokens=10, ignore_eos=True)
            if hasattr(event, "token_ids")
            for token in event.token_ids
        ]
    assert list(results[2].token_ids) == tokens


@pytest.mark.stack()
async def test_a_job_is_seen_by_its_tenant_alone(stack: LocalStack) -> None:
    async with JobClient(stack.gateway_address) as owner, JobClient(stack.gateway_address) as stranger:
        job = await owner.submit(requests(3), idempotency_key="nightly", tenant="acme")
        assert len(await collect(owner, job.job_id, follow=True)) == 3
        # Whoever knows the id, but not whose it is, is told the same as of a job that never was.
        for tenant in ("", "default", "other"):
            for call in (
                stranger.get,
                stranger.cancel,
                lambda job_id, tenant: collect(stranger, job_id, tenant=tenant),
            ):
                with pytest.raises(NotFoundError) as caught:
                    await call(job.job_id, tenant=tenant)
                assert str(caught.value) == f"no job {job.job_id!r}"
        # The same key of another tenant is another job, of which the first says nothing.
        same = await stranger.submit(requests(2), idempotency_key="nightly", tenant="other")
        assert same.job_id != job.job_id
        assert len(await collect(stranger, job.job_id, tenant="acme")) == 3


async def test_jobs_are_bounded_in_the_store_by_tenant_and_all_together(new_stack: NewStack) -> None:
    stack = new_stack(
        environ={
            "BUCKETSERVE_GATEWAY_MAX_TENANT_JOB_BYTES": "100000",
            "BUCKETSERVE_GATEWAY_MAX_ALL_JOB_BYTES": "150000",
        }
    )
    large = [request_from_json({"prompt": "x" * 9000, "max_tokens": 1})] * 7
    async with JobClient(stack.gateway_address) as jobs:
        # Jobs of three seconds: what they take is free again after them, and an hour.
        await jobs.submit(large, tenant="a")
        with pytest.raises(OverloadedError) as caught:
            await jobs.submit(large, tenant="a")
        assert (caught.value.reason, caught.value.retry_delay_s) == ("JOBS_OF_TENANT", 60.0)
        with pytest.raises(OverloadedError) as caught:
            await jobs.submit(large, tenant="b")
        assert caught.value.reason == "JOBS_OF_STORE"
        # What was refused has left nothing that counts: a small one fits.
        job = await jobs.submit(large[:1], tenant="b")
        assert len(await collect(jobs, job.job_id, follow=True)) == 1
        # A prompt that no context can hold is refused as it is submitted, not stored.
        with pytest.raises(InvalidRequestError, match="context of 2048"):
            await jobs.submit([request_from_json({"prompt": "x" * 40_000})], tenant="b")


async def test_a_request_that_was_run_as_gateways_died_twice_is_given_up(new_stack: NewStack) -> None:
    stack = new_stack(
        environ={
            "BUCKETSERVE_GATEWAY_JOB_LEASE_S": "1",
            "BUCKETSERVE_GATEWAY_JOB_CONCURRENCY": "2",
            "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "20000",
        }
    )
    running, quick = requests(1, max_tokens=2000), requests(20, max_tokens=2)
    async with JobClient(stack.gateway_address) as jobs:
        job = await jobs.submit([*running, *quick])
    for _ in range(2):
        await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_open_requests") >= 1)
        stack.services["gateway"].signal(signal.SIGKILL)
        stack.services["gateway"].wait(5)
        stack.restart("gateway")
        await asyncio.to_thread(stack.wait_until_serving)
    async with JobClient(stack.gateway_address) as jobs:
        results = await collect(jobs, job.job_id, follow=True)
    assert results[0].error_reason == "ATTEMPTS_EXHAUSTED"
    # Those that were run with it may have been lost with it; no other is.
    assert sum(bool(result.error_reason) for result in results) <= 2
    assert len(results) == 21


@pytest.mark.stack()
async def test_bad_jobs_are_refused_with_the_request_that_is_wrong(stack: LocalStack) -> None:
    async with JobClient(stack.gateway_address) as jobs:
        wrong = requests(3)
        wrong[1].sampling.temperature = -1
        with pytest.raises(InvalidRequestError) as error:
            await jobs.submit(wrong)
        assert [violation.field for violation in error.value.violations] == ["items[1].sampling.temperature"]
        with pytest.raises(InvalidRequestError, match="at least one"):
            await jobs.submit([])
        with pytest.raises(InvalidRequestError, match="ttl_s"):
            await jobs.submit(requests(1), ttl_s=10**9)
        with pytest.raises(NotFoundError, match="no-such-job"):
            await jobs.get("no-such-job")
        # A request that is too long shows only when it is tokenised: an error is a result like any other.
        too_long = request_from_json({"token_ids": [5] * 2047, "max_tokens": 100, "custom_id": "long"})
        job = await jobs.submit([*requests(2), too_long])
        results = await collect(jobs, job.job_id, follow=True)
        assert [result.error_reason for result in results] == ["", "", "INVALID_REQUEST"]
        assert (await jobs.get(job.job_id)).num_failed == 1


@pytest.mark.stack()
async def test_a_job_is_kept_for_its_ttl_and_no_longer(stack: LocalStack) -> None:
    async with JobClient(stack.gateway_address) as jobs:
        job = await jobs.submit(requests(20), idempotency_key="kept", ttl_s=3)
        assert len(await collect(jobs, job.job_id, follow=True)) == 20

        async def is_gone() -> bool:
            try:
                await jobs.get(job.job_id)
            except NotFoundError:
                return True
            return False

        assert not await is_gone()
        await eventually(is_gone, 10)
        with pytest.raises(NotFoundError):
            await collect(jobs, job.job_id)
        client = connect(stack.redis_url)
        assert [key async for key in client.scan_iter(f"bs:{{{job.job_id}}}:*")] == []
        await client.aclose()
        # Its name is free again.
        assert (await jobs.submit(requests(3), idempotency_key="kept")).num_requests == 3
        assert len(await collect(jobs, job.job_id, follow=True)) == 3


async def test_a_job_that_is_too_large_is_refused(new_stack: NewStack) -> None:
    stack = new_stack(
        environ={"BUCKETSERVE_GATEWAY_MAX_JOB_REQUESTS": "300", "BUCKETSERVE_GATEWAY_MAX_JOB_BYTES": "20000"}
    )
    async with JobClient(stack.gateway_address) as jobs:
        with pytest.raises(InvalidRequestError, match="at most 300 in a job"):
            await jobs.submit(requests(301))
        large = request_from_json({"prompt": "x" * 9000, "max_tokens": 1})
        with pytest.raises(InvalidRequestError, match="at most 20,000 bytes"):
            await jobs.submit([large] * 3)
        assert (await jobs.submit([large] * 2)).num_requests == 2


async def test_a_cancelled_job_stops_at_once_and_keeps_what_is_there(new_stack: NewStack) -> None:
    stack = new_stack(environ={**SLOW, "BUCKETSERVE_GATEWAY_JOB_CONCURRENCY": "8"})
    async with JobClient(stack.gateway_address) as jobs:
        job = await jobs.submit(requests(500, max_tokens=50))
        await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_job_requests_total") >= 8)
        cancelled = await jobs.cancel(job.job_id)
        assert cancelled.state == job_pb2.JOB_STATE_CANCELLED
        await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_open_requests") == 0)
        results = await collect(jobs, job.job_id, follow=True)
        assert 8 <= len(results) < 500
        assert (await jobs.cancel(job.job_id)).state == job_pb2.JOB_STATE_CANCELLED


async def test_a_job_survives_every_service_and_no_request_has_two_results(
    new_stack: NewStack, stores: contextlib.ExitStack
) -> None:
    store = stores.enter_context(EmbeddedServer(is_durable=True))
    stack = new_stack(
        redis_url=store.url,
        num_gateways=2,
        num_schedulers=2,
        num_workers=2,
        environ={**SLOW, "BUCKETSERVE_GATEWAY_JOB_LEASE_S": "2", "BUCKETSERVE_GATEWAY_JOB_CONCURRENCY": "16"},
    )
    async with JobClient(stack.gateway_addresses[0]) as jobs:
        job = await jobs.submit(requests(300, max_tokens=40))
    num_begun = 0

    async def are_safe() -> bool:
        """Whether all requests that ran when the first gateway died have their results."""
        async with JobClient(stack.gateway_addresses[1]) as jobs:
            return {result.index for result in await collect(jobs, job.job_id)} >= set(range(num_begun))

    for name in ("gateway", "worker-0", "scheduler", "gateway-1"):
        await asyncio.sleep(1.5)
        if name == "gateway":
            async with JobClient(stack.gateway_addresses[1]) as jobs:
                # Both gateways run sixteen at a time, in order.
                num_begun = min((await jobs.get(job.job_id)).num_done + 32, 300)
        elif name == "gateway-1":
            # A request that runs while gateways die twice is given up, by intent.
            await eventually(are_safe, 60)
        stack.services[name].signal(signal.SIGKILL)
        stack.services[name].wait(5)
        stack.restart(name)
    store.kill()
    await asyncio.sleep(1.5)
    await asyncio.to_thread(store.start)
    await asyncio.to_thread(stack.wait_until_serving)
    async with JobClient(stack.gateway_addresses[1]) as jobs:
        results = await collect(jobs, job.job_id, follow=True)
        assert [(result.index, len(result.token_ids), result.error_reason) for result in results] == [
            (i, 40, "") for i in range(300)
        ]
        done = await jobs.get(job.job_id)
        assert (done.state, done.num_done) == (job_pb2.JOB_STATE_COMPLETED, 300)


async def test_interactive_requests_do_not_wait_for_a_job(new_stack: NewStack) -> None:
    # Eight sequences at once: a job of 400 fills them for a long time.
    stack = new_stack(
        environ={"BUCKETSERVE_WORKER_MAX_SEQUENCES": "8", "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "5000"}
    )
    async with JobClient(stack.gateway_address) as jobs, BucketServeClient(stack.gateway_address) as client:
        job = await jobs.submit(requests(400, max_tokens=20))
        await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") >= 4)
        queued = []
        for _ in range(20):
            _, finished = await run(client, 10, 5)
            queued.append(finished.timings.queue_ms)
        # The order is what counts: each went before hundreds that had come earlier.
        assert (await jobs.get(job.job_id)).num_done < 400
        await collect(jobs, job.job_id, follow=True)
        assert (await jobs.get(job.job_id)).num_done == 400


async def test_without_redis_jobs_are_unavailable_and_the_rest_works(new_stack: NewStack) -> None:
    stack = new_stack(redis_url="memory://")
    async with JobClient(stack.gateway_address) as jobs, BucketServeClient(stack.gateway_address) as client:
        with pytest.raises(UnavailableError, match="redis_url"):
            await jobs.submit(requests(1))
        assert len((await run(client, 5, 5))[0]) == 5


@pytest.mark.stack()
def test_the_command_line_submits_watches_fetches_and_cancels(stack: LocalStack, tmp_path: Path) -> None:
    at = ["--address", stack.gateway_address]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(
        "".join(json.dumps({"custom_id": f"c{i}", "prompt": f"Say {i}", "max_tokens": 4}) + "\n" for i in range(20))
    )
    cli = CliRunner()
    submitted = cli.invoke(app, ["job", "submit", str(file), "--key", "by hand", "--wait", *at])
    assert submitted.exit_code == 0, submitted.output
    job_id = submitted.stdout.split()[0]
    assert "completed" in cli.invoke(app, ["job", "status", job_id, *at]).stdout
    assert cli.invoke(app, ["job", "results", job_id, "-o", str(out), *at]).exit_code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == [f"c{i}" for i in range(20)]
    assert all(row["usage"]["output_tokens"] == len(row["token_ids"]) for row in rows)
    # Ended already: nothing to cancel.
    assert "completed" in cli.invoke(app, ["job", "cancel", job_id, *at]).stdout
    file.write_text('{"prompt": "x"}\n{"promt": "y"}\n')
    wrong = cli.invoke(app, ["job", "submit", str(file), *at])
    assert wrong.exit_code == 2
    assert "in.jsonl:2: unknown keys: promt" in wrong.output.replace("\n", "")
