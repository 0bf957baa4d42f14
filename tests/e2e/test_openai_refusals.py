"""What OpenAI's HTTP API does not serve, and what is no HTTP, through real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import openai
import pytest

from bucketserve_cli.stack import LocalStack
from tests.e2e.observe import events
from tests.e2e.openai_client import CHAT, TEXT, by_grpc, http, sdk

pytestmark = pytest.mark.e2e

JSON = {"content-type": "application/json"}
BAD: dict[str, tuple[str, str, bytes, dict[str, str], int]] = {
    "no route": ("POST", "/v1/embeddings", b"{}", JSON, 404),
    "no route at all": ("GET", "/", b"", {}, 404),
    "an odd path": ("GET", "/v1/%ff%00/models", b"", {}, 404),
    "a model without a name": ("GET", "/v1/models/", b"", {}, 404),
    "wrong method": ("GET", TEXT, b"", {}, 405),
    "another wrong method": ("DELETE", "/v1/models/demo", b"", {}, 405),
    "no content type": ("POST", TEXT, b'{"prompt": "a"}', {}, 415),
    "a form": ("POST", TEXT, b"prompt=a", {"content-type": "application/x-www-form-urlencoded"}, 415),
    "compressed": ("POST", TEXT, b'{"prompt": "a"}', {**JSON, "content-encoding": "gzip"}, 415),
    "no body": ("POST", TEXT, b"", JSON, 400),
    "no JSON": ("POST", TEXT, b"prompt", JSON, 400),
    "half of it": ("POST", TEXT, b'{"prompt": "a', JSON, 400),
    "more than one": ("POST", TEXT, b'{"prompt": "a"} {}', JSON, 400),
    "no object": ("POST", TEXT, b'"prompt"', JSON, 400),
    "an array": ("POST", TEXT, b"[]", JSON, 400),
    "nothing": ("POST", TEXT, b"null", JSON, 400),
    "NaN": ("POST", TEXT, b'{"prompt": "a", "temperature": NaN}', JSON, 400),
    "infinity": ("POST", TEXT, b'{"prompt": "a", "temperature": Infinity}', JSON, 400),
    "a huge number": ("POST", TEXT, b'{"prompt": "a", "temperature": 1e400}', JSON, 400),
    "a number beyond a float": ("POST", TEXT, b'{"prompt": "a", "temperature": 1e300}', JSON, 400),
    "a huge integer": ("POST", TEXT, b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", JSON, 400),
    "half of a character": ("POST", TEXT, b'{"prompt": "\\ud800"}', JSON, 400),
    "the other half": ("POST", CHAT, b'{"messages": [{"role": "user", "content": "\\udc00"}]}', JSON, 400),
    "no UTF-8": ("POST", TEXT, b'{"prompt": "\xff\xfe"}', JSON, 400),
    "UTF-16": ("POST", TEXT, '{"prompt": "a"}'.encode("utf-16"), JSON, 400),
    "too deep": ("POST", TEXT, b'{"prompt": ' + b"[" * 500_000, JSON, 400),
    "too deep, closed": ("POST", TEXT, b'{"x": ' + b'{"x":' * 100_000 + b"1" + b"}" * 100_001, JSON, 400),
    "too long": ("POST", TEXT, b'{"prompt": "' + b"a" * 13_000_000 + b'"}', JSON, 413),
    "a text over the limit": ("POST", TEXT, b'{"prompt": "' + b"a" * 5_000_000 + b'"}', JSON, 400),
    "ids over the context": ("POST", TEXT, b'{"prompt": [' + b"5," * 1_000_000 + b"5]}", JSON, 400),
    "an id outside of the vocabulary": ("POST", TEXT, b'{"prompt": [5, 1000000]}', JSON, 400),
    "objects for messages": ("POST", CHAT, b'{"messages": [' + b"{}," * 2_000_000 + b"{}]}", JSON, 400),
    "an empty prompt": ("POST", TEXT, b'{"prompt": ""}', JSON, 400),
    "no messages": ("POST", CHAT, b'{"messages": []}', JSON, 400),
    "an empty stop string": ("POST", TEXT, b'{"prompt": "a", "stop": ""}', JSON, 400),
    "nothing to generate": ("POST", TEXT, b'{"prompt": "a", "max_tokens": 0}', JSON, 400),
    "over the context": ("POST", TEXT, b'{"prompt": "a", "max_tokens": 100000}', JSON, 400),
    "too many log-probabilities": ("POST", TEXT, b'{"prompt": "a", "logprobs": 21}', JSON, 400),
    "another model": ("POST", TEXT, b'{"prompt": "a", "model": "other"}', JSON, 404),
    "tools": ("POST", CHAT, b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}', JSON, 400),
    "an unknown parameter": ("POST", TEXT, b'{"prompt": "a", "promt": "b"}', JSON, 400),
    "many of them": ("POST", TEXT, b"{" + b",".join(b'"%d":1' % i for i in range(200_000)) + b"}", JSON, 400),
}


@pytest.mark.parametrize("name", BAD)
async def test_whatever_is_wrong_is_answered_in_one_form(stack: LocalStack, name: str) -> None:
    method, path, body, headers, wanted = BAD[name]
    async with http(stack) as client:
        answer = await client.request(method, path, content=body, headers=headers)
        assert answer.status_code == wanted
        error = answer.json()["error"]
        assert set(answer.json()) == {"error"}
        assert set(error) == {"message", "type", "code", "param"}
        assert error["type"] == "invalid_request_error"
        assert 0 < len(error["message"]) <= 1024
        assert answer.headers["x-request-id"]
        # The connection is none the worse.
        good = await client.post(TEXT, json={"prompt": "a", "max_tokens": 2, "ignore_eos": True})
        assert good.json()["usage"]["completion_tokens"] == 2
    assert not events(stack, "gateway", "rpc.failed")


@pytest.mark.parametrize(
    ("path", "members", "is_too_long"),
    [
        (TEXT, {"prompt": [5] * 2048}, True),
        (TEXT, {"prompt": "king " * 2100}, True),
        (TEXT, {"prompt": "king " * 20_000}, True),
        (TEXT, {"prompt": "x" * 2_000_000}, True),
        (TEXT, {"prompt": [5] * 2000, "max_tokens": 100}, True),
        (CHAT, {"messages": [{"role": "user", "content": "king " * 2100}]}, True),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 2047}, True),
        # With these no prompt would be served.
        (TEXT, {"prompt": "a", "max_tokens": 2048}, False),
        (TEXT, {"prompt": [5] * 2048, "n": 0}, False),
        (TEXT, {"prompt": [1_000_000]}, False),
    ],
)
async def test_clients_are_told_that_a_shorter_prompt_would_be_served(
    stack: LocalStack, path: str, members: dict[str, Any], is_too_long: bool
) -> None:
    async with http(stack) as client:
        answer = await client.post(path, json=members)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"] == "context_length_exceeded") == is_too_long
    assert ("prompt is too long: " in error["message"]) == is_too_long


async def test_errors_reach_the_sdk_as_its_own(stack: LocalStack) -> None:
    same: dict[str, Any] = {"model": "demo", "prompt": "a"}
    async with sdk(stack) as client:
        for members, param in [({"temperature": 101}, "temperature"), ({"logit_bias": {"5": 101}}, "logit_bias[5]")]:
            for is_stream in (False, True):
                with pytest.raises(openai.BadRequestError) as bad:
                    await client.completions.create(stream=is_stream, **members, **same)
                assert bad.value.param == param
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="a")


async def raw(stack: LocalStack, data: bytes) -> bytes:
    """Sends bytes as they are; returns all that comes until the connection is closed.

    On a plain socket: what came before a reset is lost in asyncio's streams.
    """
    host, _, port = stack.http_address.partition(":")
    loop, received = asyncio.get_running_loop(), bytearray()
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, (host, int(port)))
        with contextlib.suppress(ConnectionError):
            await loop.sock_sendall(client, data)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                while piece := await loop.sock_recv(client, 1 << 16):
                    received += piece
    return bytes(received)


@pytest.mark.parametrize(
    ("data", "status_line"),
    [
        (b"hello\r\n\r\n", b"HTTP/1.1 400 "),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HTTP/1.1 400 "),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /health HTTP/9.9\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /health HTTP/1.1\r\nHost\r\n\r\n", b"HTTP/1.1 400 "),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"HTTP/1.1 400 "),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 400 "),
        (b"CONNECT example.org:443 HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000, b"HTTP/1.1 431 "),
        (b"GET /health HTTP/1.1\r\n" + b"X: a\r\n" * 100_000, b"HTTP/1.1 431 "),
        (b"GET /" + b"a" * 1_000_000, b"HTTP/1.1 431 "),
    ],
)
async def test_what_is_no_request_is_answered_and_the_connection_closed(
    stack: LocalStack, data: bytes, status_line: bytes
) -> None:
    answer = await raw(stack, data)
    # What is much too long is cut before the answer can be read.
    if len(data) < 500_000 or answer:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(status_line)
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert (await by_grpc(stack, prompt="a", max_tokens=2)) is not None


async def test_bodies_in_pieces_requests_in_a_row_and_questions_for_the_head(stack: LocalStack) -> None:
    body = b'{"prompt": "a", "max_tokens": 2, "ignore_eos": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    last = b"HEAD /health HTTP/1.1\r\nConnection: close\r\n\r\n"
    answers = await raw(stack, head + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + whole + whole + last)
    assert answers.count(b"HTTP/1.1 200 OK") == 4
    assert answers.count(b'"completion_tokens":2') == 3
    assert answers.endswith(b"\r\n\r\n"), "nothing follows the head"
    # Who asks whether to send a body that is too long is told at once.
    asked = b"Content-Length: 999999999\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    assert (await raw(stack, head + asked)).startswith(b"HTTP/1.1 413 ")
    # Trailers, and frames without end, are not kept.
    endless = head + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: " + b"a" * 3_000_000
    assert await raw(stack, endless) == b""
