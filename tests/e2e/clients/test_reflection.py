"""Tools that know nothing but what reflection tells them: grpcurl, and Buf's `buf curl`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bucketserve.client import BucketServeClient
from bucketserve.core.errors import OverloadedError
from bucketserve_cli.stack import LocalStack
from tests.e2e.clients.environment import ROOT, output
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, status
from tests.e2e.test_cancellation import nothing_runs
from tests.e2e.test_openai_failures import SMALL
from tests.e2e.test_stack import SLOW
from tests.e2e.test_tls import Locked

pytestmark = [pytest.mark.e2e, pytest.mark.clients]

BUF = str(Path(sys.executable).with_name("buf"))
GENERATE = "bucketserve.v1.InferenceService/Generate"
REQUEST = {"prompt": "In the beginning", "stopping": {"maxTokens": 20, "ignoreEos": True}}
LONG = {"prompt": "In the beginning", "stopping": {"maxTokens": 1500, "ignoreEos": True}}
PROTO = ["-import-path", ROOT / "protos", "-proto", "bucketserve/v1/inference.proto"]


async def grpcurl(*arguments: object) -> tuple[int, str, str]:
    return await output("grpcurl", *arguments)


async def buf_curl(*arguments: object) -> tuple[int, str, str]:
    return await output(BUF, "curl", "--protocol", "grpc", *arguments)


def messages(text: str) -> list[dict[str, Any]]:
    """The JSON objects of an output, one after the other."""
    found, decoder, text = [], json.JSONDecoder(), text.strip()
    while text:
        message, end = decoder.raw_decode(text)
        found.append(message)
        text = text[end:].lstrip()
    return found


def text_of(out: str) -> str:
    started, *chunks, finished = messages(out)
    assert started.keys() == {"started"} and finished["finished"]["reason"] == "FINISH_REASON_LENGTH"
    return "".join(chunk["chunk"].get("text", "") for chunk in chunks)


@pytest.mark.stack(environ=SLOW)
async def test_all_that_is_listed_is_described(stack: LocalStack, tmp_path: Path) -> None:
    address = stack.gateway_address
    code, listed, errors = await grpcurl("-plaintext", address, "list")
    assert code == 0, errors
    services = listed.split()
    assert {"bucketserve.v1.InferenceService", "inference.GRPCInferenceService"} <= set(services)
    code, described, errors = await grpcurl("-plaintext", address, "describe")
    assert code == 0, errors
    assert [f"{name} is a service:" in described for name in services] == [True] * len(services)
    # All of it as a file, with which the next call needs no reflection.
    code, _, errors = await grpcurl("-plaintext", "-protoset-out", tmp_path / "all.binpb", address, "list")
    assert code == 0, errors
    everything = ["-plaintext", "-protoset", tmp_path / "all.binpb", "-d", json.dumps(REQUEST)]
    code, out, errors = await grpcurl(*everything, address, GENERATE)
    assert code == 0 and text_of(out), errors
    code, out, errors = await buf_curl("--list-methods", f"http://{address}")
    assert code == 0, errors
    assert {GENERATE, "vllm.grpc.engine.VllmEngine/Generate"} <= set(out.split())


@pytest.mark.stack(environ=SLOW)
async def test_they_get_the_text_of_our_client(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        text = await client.generate_text(REQUEST["prompt"], max_tokens=20, ignore_eos=True)
    data = ["-d", json.dumps(REQUEST)]
    for answer in (
        await grpcurl("-plaintext", *data, stack.gateway_address, GENERATE),
        await buf_curl(*data, f"http://{stack.gateway_address}/{GENERATE}"),
    ):
        assert answer[0] == 0, answer
        assert text_of(answer[1]) == text


@pytest.mark.stack(environ=SLOW)
async def test_errors_and_deadlines(stack: LocalStack) -> None:
    wrong = ["-d", json.dumps({**REQUEST, "sampling": {"temperature": -1, "topP": 2}})]
    code, _, errors = await grpcurl("-plaintext", *wrong, stack.gateway_address, GENERATE)
    assert code == 64 + 3 and "Code: InvalidArgument" in errors
    assert '"field":"sampling.temperature"' in errors and '"field":"sampling.top_p"' in errors
    code, _, errors = await buf_curl(*wrong, f"http://{stack.gateway_address}/{GENERATE}")
    assert code and json.loads(errors)["code"] == "invalid_argument"
    late = ["-max-time", "1", "-d", json.dumps(LONG)]
    code, _, errors = await grpcurl("-plaintext", *late, stack.gateway_address, GENERATE)
    assert code == 64 + 4 and "Code: DeadlineExceeded" in errors
    await eventually(lambda: nothing_runs(stack), 10)


@pytest.mark.stack(environ=SMALL)
async def test_overload_comes_with_a_delay(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        long = {"prompt": REQUEST["prompt"], "max_tokens": 1500, "ignore_eos": True}
        async with asyncio.TaskGroup() as tasks:
            held = [tasks.create_task(insist(client, **long)) for _ in range(8)]
            await eventually(lambda: is_full(stack))
            call = ["-plaintext", "-d", json.dumps(REQUEST), stack.gateway_address, GENERATE]
            code, _, errors = await grpcurl(*call)
            for task in held:
                task.cancel()
    assert code == 64 + 8 and "Code: ResourceExhausted" in errors
    assert "google.rpc.RetryInfo" in errors and '"retry_delay":"' in errors
    await eventually(lambda: nothing_runs(stack), 10)


async def insist(client: BucketServeClient, **request: Any) -> None:
    while True:
        with contextlib.suppress(OverloadedError):
            async for _ in client.generate(**request):
                pass


async def is_full(stack: LocalStack) -> bool:
    now = await status(stack)
    return (now.num_running, now.num_waiting) == (2, int(SMALL["BUCKETSERVE_SCHEDULER_MAX_QUEUED_REQUESTS"]))


async def test_with_keys_reflection_is_off_and_on_if_it_is_wanted(new_stack: NewStack, tmp_path: Path) -> None:
    locked = Locked(tmp_path / "locked")
    stack = new_stack(environ=locked.environ)
    address, trusted = stack.gateway_address, ["-cacert", locked.papers.ca]
    key = ["-H", f"authorization: Bearer {locked.keys['acme']}"]
    wrong = ["-H", f"authorization: Bearer {'x' * 43}"]
    code, _, errors = await grpcurl(*trusted, *key, address, "list")
    assert code and "server does not support the reflection API" in errors
    data = ["-d", json.dumps(REQUEST)]
    for headers, wanted in ((key, 0), ([], 64 + 16), (wrong, 64 + 16)):
        code, out, errors = await grpcurl(*trusted, *headers, *PROTO, *data, address, GENERATE)
        assert code == wanted, errors
    code, _, errors = await grpcurl("-plaintext", "-connect-timeout", "2", *key, *PROTO, *data, address, GENERATE)
    assert code and "ailed to dial" in errors
    schema = ["--schema", ROOT / "protos", "--cacert", locked.papers.ca]
    code, out, errors = await buf_curl(*schema, *key, *data, f"https://{address}/{GENERATE}")
    assert code == 0 and text_of(out), errors
    code, _, errors = await buf_curl(*schema, *data, f"https://{address}/{GENERATE}")
    assert code and json.loads(errors)["code"] == "unauthenticated"

    stack = new_stack(environ={**locked.environ, "BUCKETSERVE_GATEWAY_ENABLE_REFLECTION": "true"})
    for headers, is_told in ((key, True), ([], False), (wrong, False)):
        code, out, errors = await grpcurl(*trusted, *headers, stack.gateway_address, "list")
        assert (code == 0) is is_told, errors
        assert ("bucketserve.v1.InferenceService" in out) is is_told
        assert is_told or "Unauthenticated" in errors
