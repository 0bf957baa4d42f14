"""Quotas over two gateways: what one tenant has used is used everywhere, and is no matter of another's."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from bucketserve.client import BucketServeClient, Finished
from bucketserve.core.errors import OverloadedError
from bucketserve.job_client import JobClient
from bucketserve.v1 import inference_pb2
from bucketserve_cli.stack import LocalStack
from bucketserve_gateway.keys import hash_of, new_key
from tests.certificates import replace
from tests.chaos.oracle import expected_tokens
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric

pytestmark = pytest.mark.e2e

KEYS = {name: new_key() for name in ("acme", "other", "free")}


def written(file: Path, *tenants: str) -> None:
    keys = [f'[[keys]]\nname = "{n}"\nsha256 = "{hash_of(key)}"\ntenant = "{n}"\n' for n, key in KEYS.items()]
    replace(file, "\n".join([*keys, *(f"[[tenants]]\n{tenant}\n" for tenant in tenants)]).encode())


def client_of(stack: LocalStack, name: str, gateway: int = 0) -> BucketServeClient:
    return BucketServeClient(stack.gateway_addresses[gateway], api_key=KEYS[name])


async def outcome(client: BucketServeClient, max_tokens: int = 1, **more) -> str:
    """finished, or the reason of the refusal."""
    try:
        async for event in client.generate(token_ids=[5] * 9, max_tokens=max_tokens, ignore_eos=True, **more):
            if isinstance(event, Finished):
                return "finished"
    except OverloadedError as error:
        assert error.retry_delay_s > 0
        return error.reason
    raise AssertionError("no end")


def num_open(stack: LocalStack) -> float:
    return sum(metric(stack, name, "bucketserve_gateway_open_requests") for name in ("gateway", "gateway-1"))


async def test_gateways_share_what_a_tenant_may_use(new_stack: NewStack, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    written(file)
    environ = {
        "BUCKETSERVE_GATEWAY_KEYS_FILE": str(file),
        "BUCKETSERVE_API_KEY": KEYS["free"],
        "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "20000",
    }
    stack = new_stack(num_gateways=2, environ=environ)
    refused, full = "QUOTA_EXCEEDED", "finished"

    written(file, 'name = "acme"\nrequests_per_minute = 10')
    async with client_of(stack, "acme") as here, client_of(stack, "acme", 1) as there:
        start_s = time.monotonic()
        found = await asyncio.gather(*(outcome(client) for client in (here, there) * 8))
        # While it lasted some came back: one in six seconds.
        assert 10 <= found.count(full) <= 11 + (time.monotonic() - start_s) / 6
        assert found.count(full) + found.count(refused) == 16
        for name in ("other", "free"):
            async with client_of(stack, name) as another:
                assert await outcome(another) == full
        count = sum(
            metric(stack, gateway, "bucketserve_gateway_requests_total", outcome="quota_exceeded")
            for gateway in ("gateway", "gateway-1")
        )
        assert count == found.count(refused)

    # 100 tokens each as asked for, 12 as used: if nothing came back there would be room for four.
    written(file, 'name = "other"\ntokens_per_minute = 400')
    end = expected_tokens([5] * 9, 3, 0.0, 0)[-1]
    async with client_of(stack, "other") as client:
        for _ in range(10):
            assert await outcome(client, 91, stop_token_ids=[end]) == full

    # 409 tokens each.
    for limit in ("requests_at_once = 3", "tokens_at_once = 1_230"):
        written(file, f'name = "*"\n{limit}')
        async with client_of(stack, "free") as here, client_of(stack, "free", 1) as there:
            running = [asyncio.create_task(outcome(client, 400)) for client in (here, there, here)]
            await eventually(lambda: num_open(stack) == 3)
            assert [await outcome(client) for client in (here, there)] == [refused, refused]
            # Who leaves makes room, however he leaves.
            running[0].cancel()
            results = []
            async with asyncio.timeout(30):
                while not results or results[-1] == refused:
                    results.append(await outcome(there))
            assert results[-1] == full
            assert await asyncio.gather(*running[1:]) == [full, full]

    # Jobs wait for their tenant's quota as long as it takes.
    written(file, 'name = "*"\nrequests_at_once = 2')
    requests = [inference_pb2.GenerateRequest(token_ids={"ids": [5, 6]}, stopping={"max_tokens": 3}) for _ in range(12)]
    async with JobClient(stack.gateway_address, api_key=KEYS["other"]) as jobs:
        job = await jobs.submit(requests)
        results = [result async for result in jobs.results(job.job_id, follow=True)]
    assert [result.error_reason for result in results] == [""] * 12
