"""Clients on Node: its own gRPC library, which reads nothing but the proto files, and OpenAI's library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bucketserve.client import BucketServeClient
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack
from tests.certificates import Authority
from tests.e2e.clients.environment import ROOT, output, seen
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric
from tests.e2e.openai_client import by_grpc
from tests.e2e.test_cancellation import nothing_runs
from tests.e2e.test_openai_failures import SMALL
from tests.e2e.test_stack import SLOW
from tests.e2e.test_tls import Locked
from tests.e2e.test_vllm_grpc import tokens

pytestmark = [pytest.mark.e2e, pytest.mark.clients]

PROMPT = "In the beginning"
CHAT = [("user", "Tell me of the king")]


async def with_grpc(stack: LocalStack, what: str, **environ: object) -> Any:
    return await seen("node", "grpc_client.mjs", stack.gateway_address, what, **environ)


async def with_openai(stack: LocalStack, what: str, **environ: object) -> Any:
    scheme = "https" if "NODE_EXTRA_CA_CERTS" in environ else "http"
    return await seen("node", "openai_client.mjs", f"{scheme}://{stack.http_address}/v1", what, **environ)


@pytest.mark.stack(environ=SLOW)
async def test_grpc_gets_the_tokens_of_our_client(stack: LocalStack) -> None:
    found = await with_grpc(stack, "stream")
    async with BucketServeClient(stack.gateway_address) as client:
        wanted = {
            "text": await tokens(client, prompt=PROMPT),
            "ids": await tokens(client, token_ids=[5, 6, 7]),
            "chat": await tokens(client, chat=[("user", PROMPT)]),
            "seeded": await tokens(
                client, prompt=PROMPT, sampling=common_pb2.SamplingParams(temperature=0.9, top_k=20, seed=7)
            ),
        }
        text = await client.generate_text(PROMPT, max_tokens=20, ignore_eos=True)
        (model,) = await client.list_models()
    assert {name: each["tokens"] for name, each in found.items()} == wanted
    assert found["text"]["text"] == text
    assert all(each["chunks"] > 1 and each["reason"] == "FINISH_REASON_LENGTH" for each in found.values())
    assert {each["usage"]["output_tokens"] for each in found.values()} == {20}
    (listed,) = (await with_grpc(stack, "models"))["models"]
    assert (listed["name"], listed["context_tokens"]) == (model.name, model.context_tokens) == ("demo", 2048)


@pytest.mark.stack(environ=SLOW)
async def test_the_example_of_the_documents_runs(stack: LocalStack) -> None:
    document = (ROOT / "docs" / "clients-grpc.md").read_text()
    (example,) = re.findall(r"^```js\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    for said, here in {"127.0.0.1:50051": stack.gateway_address, '"protos"': f'"{ROOT}/protos"'}.items():
        assert example.count(said) == 1
        example = example.replace(said, here)
    code, out, errors = await output("node", "--input-type=module", "-e", example)
    assert (code, errors) == (0, "")
    assert out == await by_grpc(stack, prompt="And the king said", max_tokens=16)


@pytest.mark.stack(environ=SLOW)
async def test_grpc_calls_that_are_left_leave_nothing(stack: LocalStack) -> None:
    assert await with_grpc(stack, "cancel") == ["CANCELLED"] * 5
    await eventually(lambda: nothing_runs(stack), 10)
    status, _, _ = await output("node", "grpc_client.mjs", stack.gateway_address, "leave")
    assert status == 7
    await eventually(lambda: nothing_runs(stack), 10)
    assert metric(stack, "gateway", "bucketserve_gateway_requests_total", outcome="cancelled") == 6


@pytest.mark.stack(environ=SLOW)
async def test_a_grpc_deadline(stack: LocalStack) -> None:
    assert (await with_grpc(stack, "deadline"))["code"] == "DEADLINE_EXCEEDED"
    await eventually(lambda: nothing_runs(stack), 10)


@pytest.mark.stack(environ=SLOW)
async def test_grpc_errors_name_every_wrong_field(stack: LocalStack) -> None:
    found = await with_grpc(stack, "errors")
    unknown = found.pop("unknown model")
    assert unknown["code"] == "NOT_FOUND"
    assert unknown["details"]["google.rpc.ResourceInfo"]["resource_name"] == "nobody"
    assert {name: each["code"] for name, each in found.items()} == dict.fromkeys(found, "INVALID_ARGUMENT")
    fields = {
        name: [violation["field"] for violation in each["details"]["google.rpc.BadRequest"]["field_violations"]]
        for name, each in found.items()
    }
    assert fields["NaN"] == ["sampling.temperature"]
    assert fields["two wrong fields"] == ["sampling.temperature", "sampling.top_p"]
    assert all(fields.values())


@pytest.mark.stack(environ=SMALL)
async def test_grpc_overload_comes_with_a_delay(stack: LocalStack) -> None:
    seen = await with_grpc(stack, "overload")
    found, after = seen["found"], seen["after"]
    refused = [each for each in found if each["code"] != "OK"]
    assert len(found) - len(refused) >= 4 and len(refused) >= 10
    for each in refused:
        assert (each["code"], each["tokens"]) == ("RESOURCE_EXHAUSTED", [])
        delay = each["details"]["google.rpc.RetryInfo"]["retry_delay"]
        assert delay["seconds"] + delay["nanos"] / 1e9 > 0
    assert (after["code"], len(after["tokens"])) == ("OK", 20)


@pytest.mark.stack(environ=SLOW)
async def test_openais_library_gets_the_text_of_our_client(stack: LocalStack) -> None:
    assert await with_openai(stack, "models") == ["demo"]
    found = await with_openai(stack, "stream")
    text = await by_grpc(stack, chat=CHAT, max_tokens=20, ignore_eos=True)
    assert (found["whole"], found["text"], found["put"]) == (text, text, text)
    assert (found["reason"], found["usage"]["completion_tokens"]) == ("length", 20)
    assert found["completion"]


@pytest.mark.stack(environ=SLOW)
async def test_openais_calls_that_are_left_leave_nothing(stack: LocalStack) -> None:
    assert (await with_openai(stack, "cancel"))["kind"] == "APIUserAbortError"
    assert (await with_openai(stack, "deadline"))["kind"] == "APIConnectionTimeoutError"
    await eventually(lambda: nothing_runs(stack), 10)
    assert metric(stack, "gateway", "bucketserve_gateway_requests_total", outcome="cancelled") == 4


@pytest.mark.stack(environ=SLOW)
async def test_errors_reach_openais_library_as_its_own(stack: LocalStack) -> None:
    found = await with_openai(stack, "errors")
    assert found.pop("unknown model")["kind"] == "NotFoundError"
    assert {(each["kind"], each["status"]) for each in found.values()} == {("BadRequestError", 400)}
    assert {name: each["param"] for name, each in found.items()} == {
        "unknown parameter": "unheard_of", "wrong type": "max_tokens", "no messages": "messages",
        "too hot": "temperature",
    }  # fmt: skip


@pytest.mark.stack(environ=SMALL)
async def test_openais_library_waits_as_it_is_told(stack: LocalStack) -> None:
    seen = await with_openai(stack, "overload")
    refused = [each for each in seen["found"] if each]
    assert 10 <= len(refused) <= 26
    assert {(each["kind"], each["code"]) for each in refused} == {("RateLimitError", "queue_requests")}
    assert all(int(each["delay"]) > 0 for each in refused)
    assert seen["served"] == [20] * 12


async def test_certificates_and_keys(new_stack: NewStack, tmp_path: Path) -> None:
    locked = Locked(tmp_path / "locked")
    stack = new_stack(environ=locked.environ)
    theirs = {"API_KEY": locked.keys["acme"]}
    trusted = {**theirs, "CA_FILE": locked.papers.ca}
    assert [each["code"] for each in await with_grpc(stack, "keys", **trusted)] == ["OK", *["UNAUTHENTICATED"] * 2]
    assert (await with_grpc(stack, "models", **trusted))["models"][0]["name"] == "demo"
    for what, environ in {"plain text": theirs, "another CA": {**theirs, "CA_FILE": another_ca(tmp_path)}}.items():
        assert (await with_grpc(stack, "models", **environ))["code"] == "UNAVAILABLE", what
    found = await with_openai(stack, "keys", **theirs, NODE_EXTRA_CA_CERTS=locked.papers.ca)
    assert found[0] == {}
    assert [(each["kind"], each["status"]) for each in found[1:]] == [("AuthenticationError", 401)] * 2


def another_ca(folder: Path) -> Path:
    return Authority(folder / "theirs").ca_file
