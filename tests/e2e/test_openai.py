"""OpenAI's HTTP API through real processes, by OpenAI's own client and by bare sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from bucketserve.client import BucketServeClient, Chunk, Started
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import NewStack
from tests.e2e.observe import events, eventually, metric, status
from tests.e2e.test_cancellation import LARGE_STEPS, PROMPT, SLOW, SLOW_PREFILL, generated, nothing_runs, prefilled
from tests.otlp import OtlpReceiver

pytestmark = pytest.mark.e2e

USER: Any = {"role": "user", "content": "Tell me of the king"}
LONG: dict[str, Any] = {"model": "demo", "prompt": [5] * PROMPT, "max_tokens": 1400, "extra_body": {"ignore_eos": True}}
MODEL = {"engine": "transformers"}


def url(stack: LocalStack) -> str:
    return f"http://{stack.http_address}"


@contextlib.asynccontextmanager
async def sdk(stack: LocalStack, max_retries: int = 0) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url(stack)}/v1", api_key="-", max_retries=max_retries) as client:
        yield client


@contextlib.asynccontextmanager
async def http(stack: LocalStack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url(stack), timeout=60) as client:
        yield client


async def by_grpc(stack: LocalStack, **request: Any) -> str:
    async with BucketServeClient(stack.gateway_address) as client:
        return "".join([event.text async for event in client.generate(**request) if isinstance(event, Chunk)])


@pytest.mark.stack(**MODEL)
async def test_text_is_what_the_native_api_says(stack: LocalStack) -> None:
    text, ids = "And the king said", [400, 12, 7, 1000]
    sampling = common_pb2.SamplingParams(temperature=0.9, top_p=0.8, top_k=50, seed=11)
    wanted = [
        await by_grpc(stack, prompt=text, max_tokens=24, sampling=sampling),
        await by_grpc(stack, token_ids=ids, max_tokens=24, sampling=sampling),
        await by_grpc(stack, chat=[("user", USER["content"])], max_tokens=24, sampling=sampling),
    ]
    same: dict[str, Any] = {
        "model": "demo",
        "max_tokens": 24,
        "temperature": 0.9,
        "top_p": 0.8,
        "seed": 11,
        "extra_body": {"top_k": 50},
    }
    async with sdk(stack) as client:
        for prompt, expected in zip((text, ids), wanted, strict=False):
            whole = await client.completions.create(prompt=prompt, **same)
            assert [choice.text for choice in whole.choices] == [expected]
            stream = await client.completions.create(prompt=prompt, stream=True, **same)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == expected
        chat = await client.chat.completions.create(messages=[USER], **same)
        assert [choice.message.content for choice in chat.choices] == [wanted[2]]
        pieces = await client.chat.completions.create(messages=[USER], stream=True, **same)
        deltas = [chunk.choices[0].delta async for chunk in pieces]
    assert "".join(delta.content or "" for delta in deltas) == wanted[2]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)


@pytest.mark.stack(**MODEL)
async def test_several_choices_differ_by_seed_and_are_in_order(stack: LocalStack) -> None:
    async def alone(prompt: str, seed: int) -> str:
        sampling = common_pb2.SamplingParams(temperature=1.0, seed=seed)
        return await by_grpc(stack, prompt=prompt, max_tokens=12, sampling=sampling)

    prompts = ["And the king said", "In the beginning"]
    wanted = [await alone(prompt, 7 + number) for prompt in prompts for number in range(3)]
    assert len(set(wanted)) == 6
    same: dict[str, Any] = {"model": "demo", "max_tokens": 12, "seed": 7, "n": 3}
    async with sdk(stack) as client:
        whole = await client.completions.create(prompt=prompts, **same)
        assert [choice.index for choice in whole.choices] == list(range(6))
        assert [choice.text for choice in whole.choices] == wanted
        stream = await client.completions.create(
            prompt=prompts, stream=True, stream_options={"include_usage": True}, **same
        )
        texts, reasons, last = [""] * 6, [""] * 6, None
        async for chunk in stream:
            assert chunk.id.startswith("cmpl-")
            for choice in chunk.choices:
                assert last is None, "what was used comes last"
                texts[choice.index] += choice.text
                reasons[choice.index] += choice.finish_reason or ""
            last = chunk.usage
        assert texts == wanted
        assert reasons == [choice.finish_reason for choice in whole.choices]
        # Prompts count once each.
        lengths = [len(await tokens_of(stack, prompt)) for prompt in prompts]
        for usage in (whole.usage, last):
            assert usage is not None
            assert usage.prompt_tokens == sum(lengths)
            assert usage.completion_tokens <= 6 * 12
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
            assert usage.prompt_tokens_details is not None
            assert 0 <= (usage.prompt_tokens_details.cached_tokens or 0) <= usage.prompt_tokens
        # Without a seed each is drawn by itself.
        del same["seed"]
        drawn = await client.completions.create(prompt=prompts[0], **same)
        assert len({choice.text for choice in drawn.choices}) > 1


async def tokens_of(stack: LocalStack, text: str) -> list[int]:
    async with BucketServeClient(stack.gateway_address) as client:
        return await client.tokenize(text)


@pytest.mark.stack(**MODEL)
async def test_log_probabilities_in_both_shapes(stack: LocalStack) -> None:
    positions: list[common_pb2.PositionLogprobs] = []
    text = ""
    async with BucketServeClient(stack.gateway_address) as native:
        async for event in native.generate(prompt="And the king said", max_tokens=16, num_logprobs=3):
            if isinstance(event, Chunk):
                positions += event.logprobs
                text += event.text
    chosen = [position.chosen.logprob for position in positions]
    same: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 16}
    async with sdk(stack) as client:
        whole = (await client.completions.create(prompt="And the king said", logprobs=3, **same)).choices[0]
        assert whole.text == text
        assert whole.logprobs is not None
        tokens = whole.logprobs.tokens
        assert "".join(tokens) == text
        assert whole.logprobs.token_logprobs == pytest.approx(chosen)
        assert whole.logprobs.text_offset == [len("".join(tokens[:i])) for i in range(len(tokens))]
        for token, tops in zip(tokens, whole.logprobs.top_logprobs, strict=True):
            assert len(tops) == 3
            # Greedy: the likeliest is the chosen one.
            assert token == max(tops, key=lambda each: tops[each])
        stream = await client.completions.create(prompt="And the king said", logprobs=3, stream=True, **same)
        pieces = [choice.logprobs async for chunk in stream if (choice := chunk.choices[0]).logprobs]
        assert [token for piece in pieces for token in piece.tokens] == tokens
        assert [offset for piece in pieces for offset in piece.text_offset] == whole.logprobs.text_offset

        chat = await client.chat.completions.create(messages=[USER], logprobs=True, top_logprobs=2, **same)
        content = chat.choices[0].logprobs.content
        said = chat.choices[0].message.content
        assert bytes(byte for entry in content for byte in entry.bytes).decode() == said
        assert [len(entry.top_logprobs) for entry in content] == [2] * len(content)
        assert all(entry.token == entry.top_logprobs[0].token for entry in content)
        deltas = await client.chat.completions.create(messages=[USER], logprobs=True, stream=True, **same)
        entries = [entry async for chunk in deltas for entry in (chunk.choices[0].logprobs or NONE).content]
        assert [entry.token for entry in entries] == [entry.token for entry in content]
        assert [entry.top_logprobs for entry in entries] == [[]] * len(entries)


class NONE:
    """Stands for the log-probabilities of a chunk that has none."""

    content: list[Any] = []  # noqa: RUF012


@pytest.mark.stack(**MODEL)
async def test_stop_strings_and_the_echo_of_a_prompt(stack: LocalStack) -> None:
    same: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 24, "prompt": "And the king said"}
    async with sdk(stack) as client:
        free = (await client.completions.create(**same)).choices[0]
        assert free.finish_reason == "length"
        word = free.text.split()[2]
        for stop in (word, ["never said", word]):
            cut = (await client.completions.create(stop=stop, **same)).choices[0]
            assert cut.finish_reason == "stop"
            assert cut.text == free.text[: free.text.index(word)]
        ids = await tokens_of(stack, same["prompt"])
        for prompt in (same["prompt"], ids):
            same["prompt"] = prompt
            echoed = (await client.completions.create(echo=True, **same)).choices[0]
            assert echoed.text == "And the king said" + free.text
            stream = await client.completions.create(echo=True, stream=True, **same)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == echoed.text


def test_the_client_without_asyncio_and_what_is_served(stack: LocalStack) -> None:
    five: dict[str, Any] = {"max_tokens": 5, "extra_body": {"ignore_eos": True}}
    with openai.OpenAI(base_url=f"{url(stack)}/v1", api_key="-", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").owned_by == "bucketserve"
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve("org/other")
        assert missing.value.code == "model_not_found"
        chat = client.chat.completions.create(model="demo", messages=[USER], service_tier="flex", **five)
        assert chat.service_tier == "flex"
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 5
        stream = client.completions.create(model="demo", prompt="a", stream=True, **five)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        # A batch-class request is one to everybody behind the facade as well.
        labels = {"request_class": "batch", "outcome": "length"}
        assert metric(stack, "gateway", "bucketserve_gateway_requests_total", **labels) == 1


async def test_headers_reach_the_request_and_come_back(stack: LocalStack) -> None:
    headers = {"x-request-id": "mine-4711", "x-llm-d-inference-fairness-id": "team", "x-slo-ttft-ms": "60000"}
    async with http(stack) as client:
        body = {"prompt": "a", "max_tokens": 2}
        answer = await client.post("/v1/completions", json=body, headers=headers)
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine-4711")
        await eventually(lambda: [e["request_id"] for e in events(stack, "gateway", "request.done")] == ["mine-4711"])
        named = await client.post("/v1/completions", json={**body, "user": "somebody"})
        assert named.headers["x-request-id"] == "somebody"
        wrong = await client.post("/v1/completions", json=body, headers={"x-sgl-ttft-slo-ms": "soon"})
        assert wrong.json()["error"]["param"] == "x-sgl-ttft-slo-ms"
        tenant = await client.post("/v1/completions", json=body, headers={"x-llm-d-inference-fairness-id": "t" * 65})
        assert tenant.json()["error"]["param"] == "x-llm-d-inference-fairness-id"
        assert (await client.get("/health")).json() == {"status": "SERVING"}
        assert (await client.get("/version")).json() == {"version": "0.1.0"}


JSON = {"content-type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
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
    """Sends bytes as they are; returns all that comes until the connection is closed."""
    host, _, port = stack.http_address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        await writer.drain()
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                return await reader.read()
        return b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


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


@pytest.mark.stack(environ={**SLOW, "BUCKETSERVE_WORKER_MAX_SEQUENCES": "1"})
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_goes_away_while_it_is_queued(stack: LocalStack, is_stream: bool) -> None:
    async with sdk(stack) as client:
        holder = asyncio.create_task(client.completions.create(**LONG))
        await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") == 1)
        before = prefilled(stack)

        async def leave() -> None:
            async with sdk(stack) as other:
                stream = await other.completions.create(stream=is_stream, n=3, **LONG)
                async for _ in stream:
                    raise AssertionError("its turn has come")

        leaver = asyncio.create_task(leave())

        async def num_waiting() -> int:
            return (await status(stack)).num_waiting

        async def are_queued() -> bool:
            return await num_waiting() == 3

        await eventually(are_queued)
        leaver.cancel()
        await asyncio.wait([leaver])

        async def is_forgotten() -> bool:
            return await num_waiting() == 0 and metric(stack, "gateway", "bucketserve_gateway_open_requests") == 1

        await eventually(is_forgotten, 10)
        assert prefilled(stack) == before
        holder.cancel()
        await asyncio.wait([holder])
    await eventually(lambda: nothing_runs(stack), 10)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_goes_away_during_prefill(new_stack: NewStack, is_stream: bool) -> None:
    stack = new_stack(environ=SLOW_PREFILL)
    async with sdk(stack) as client:
        leaver = asyncio.create_task(_read(client, is_stream))
        await eventually(lambda: prefilled(stack) > 0)
        leaver.cancel()
        await asyncio.wait([leaver])
        await eventually(lambda: nothing_runs(stack), 10)
    assert prefilled(stack) < PROMPT
    assert generated(stack) == 0


async def _read(client: openai.AsyncOpenAI, is_stream: bool) -> None:
    answer = await client.completions.create(stream=is_stream, **LONG)
    if is_stream:
        async for _ in answer:
            pass


@pytest.mark.stack(roles=("prefill", "decode"), environ=LARGE_STEPS)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_goes_away_during_decode(stack: LocalStack, is_stream: bool) -> None:
    async with sdk(stack) as client:
        leaver = asyncio.create_task(_read(client, is_stream))
        await eventually(lambda: generated(stack) > 5)
        leaver.cancel()
        await asyncio.wait([leaver])
        await eventually(lambda: nothing_runs(stack), 10)
    assert generated(stack) < LONG["max_tokens"]


SMALL = {
    "BUCKETSERVE_WORKER_MAX_SEQUENCES": "2",
    "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "10000",
    "BUCKETSERVE_SCHEDULER_MAX_QUEUED_REQUESTS": "4",
}


@pytest.mark.stack(environ=SMALL)
async def test_overload_is_a_status_with_a_delay_that_the_sdk_keeps_to(stack: LocalStack) -> None:
    same: dict[str, Any] = {"model": "demo", "prompt": [5] * 20, "max_tokens": 50, "extra_body": {"ignore_eos": True}}
    async with sdk(stack) as client:
        results = await asyncio.gather(*(client.completions.create(**same) for _ in range(30)), return_exceptions=True)
        refused = [each for each in results if isinstance(each, openai.RateLimitError)]
        served = [each for each in results if not isinstance(each, BaseException)]
        assert len(refused) + len(served) == 30
        assert len(refused) >= 10 and len(served) >= 4
        for error in refused:
            headers = error.response.headers
            assert int(headers["retry-after"]) >= 1
            assert 0 < int(headers["retry-after-ms"]) <= int(headers["retry-after"]) * 1000
            assert error.code == "queue_requests"
        # What asks for more than there is room for is refused as a whole, and nothing of it is left.
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(n=20, **same)
        assert metric(stack, "gateway", "bucketserve_gateway_open_requests") == 0
    async with sdk(stack, max_retries=20) as patient:
        results = await asyncio.gather(*(patient.completions.create(**same) for _ in range(12)))
        assert [each.usage.completion_tokens for each in results] == [50] * 12


async def test_calls_and_bytes_are_counted_as_those_of_the_native_api(new_stack: NewStack) -> None:
    stack = new_stack(
        environ={
            "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "20000",
            "BUCKETSERVE_GATEWAY_MAX_STREAMS_PER_CONNECTION": "3",
            "BUCKETSERVE_GATEWAY_MAX_CONNECTIONS": "16",
        }
    )
    async with sdk(stack) as client:
        # Each choice is a call.
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="demo", prompt="a", n=4)
        assert caught.value.code == "max_calls_per_connection"
        stream = await client.completions.create(stream=True, n=3, **LONG)
        await anext(aiter(stream))
        assert metric(stack, "gateway", "bucketserve_gateway_open_calls") == 3
        await stream.close()
    await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_open_calls") == 0)
    await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_held_bytes") == 0)
    host, _, port = stack.http_address.partition(":")
    idle = [await asyncio.open_connection(host, int(port)) for _ in range(40)]
    # Further ones are closed at once; those that were there are served.
    closed = 0
    for reader, writer in idle:
        with contextlib.suppress(ConnectionError):
            writer.write(b"GET /health HTTP/1.1\r\n\r\n")
            await writer.drain()
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = await reader.read(15)
        closed += answer != b"HTTP/1.1 200 OK"
    assert closed == 24
    for _, writer in idle:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    async with http(stack) as late:
        await eventually(lambda: _answers(late))


async def _answers(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False


async def test_a_stream_that_fails_ends_with_an_error(new_stack: NewStack) -> None:
    stack = new_stack(environ={**SLOW, "BUCKETSERVE_GATEWAY_MAX_ATTEMPTS": "1"})
    async with sdk(stack) as client, http(stack) as bare:
        stream = await client.completions.create(stream=True, **LONG)
        lines: list[str] = []
        body = {"prompt": [5], "max_tokens": 1000, "ignore_eos": True, "stream": True}
        async with bare.stream("POST", TEXT, json=body) as answer:
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            await anext(aiter(stream))
            stack.services["worker-0"].signal(signal.SIGKILL)
            with pytest.raises(openai.APIError) as caught:
                async for _ in stream:
                    pass
            lines = [line async for line in answer.aiter_lines() if line]
    assert caught.value.code == "attempts_exhausted"
    # The stream ends as HTTP, without the mark of one that is whole.
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "attempts_exhausted")
    assert "data: [DONE]" not in lines


async def test_without_a_scheduler_it_is_unavailable_for_a_while(new_stack: NewStack) -> None:
    stack = new_stack(environ={"BUCKETSERVE_GATEWAY_SCHEDULER_WAIT_S": "1"})
    async with http(stack) as client:
        stack.services["scheduler"].signal(signal.SIGKILL)
        stack.services["scheduler"].wait(10)

        async def says_so() -> bool:
            return (await client.get("/health")).status_code == 503

        await eventually(says_so)
        answer = await client.post(TEXT, json={"prompt": "a", "stream": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_scheduler")
        assert int(answer.headers["retry-after"]) >= 1
        stack.restart("scheduler")
        await eventually(lambda: stack.is_serving("gateway"))
        assert (await client.post(TEXT, json={"prompt": "a"})).status_code == 200


async def test_sigterm_lets_streams_finish(new_stack: NewStack) -> None:
    stack = new_stack(environ={**SLOW, "BUCKETSERVE_GATEWAY_LAME_DUCK_S": "2"})
    body = {"prompt": [5], "max_tokens": 200, "ignore_eos": True}
    async with http(stack) as client, http(stack) as other:
        running = [asyncio.create_task(_lines(client, {**body, "stream": True})) for _ in range(3)]
        whole = asyncio.create_task(client.post(TEXT, json=body))
        await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") >= 4)
        stack.services["gateway"].signal(signal.SIGTERM)

        async def says_so() -> bool:
            return (await other.get("/health")).status_code == 503

        await eventually(says_so, 2)
        # Until those who watch have left, requests are taken.
        late = await other.post(TEXT, json={"prompt": "a", "max_tokens": 2})
        assert (late.status_code, late.headers["connection"]) == (200, "close")

        async def is_closed() -> bool:
            try:
                async with http(stack) as newcomer:
                    await newcomer.get("/health")
            except httpx.TransportError:
                return True
            return False

        await eventually(is_closed, 10)
        results = await asyncio.gather(*running)
        assert [lines[-1] for lines in results] == ["data: [DONE]"] * 3
        assert (await whole).json()["usage"]["completion_tokens"] == 200
    assert stack.services["gateway"].wait(15) == 0


async def _lines(client: httpx.AsyncClient, body: dict[str, Any]) -> list[str]:
    async with client.stream("POST", TEXT, json=body) as answer:
        return [line async for line in answer.aiter_lines() if line]


async def test_traces_go_on_through_it_and_secrets_stay_out_of_them(new_stack: NewStack) -> None:
    marker, trace = "xylophone-4711", "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "authorization": f"Bearer {marker}"}
    with OtlpReceiver() as receiver:
        stack = new_stack(
            environ={
                "BUCKETSERVE_TELEMETRY_OTLP_ENDPOINT": receiver.endpoint,
                "BUCKETSERVE_TELEMETRY_LOG_LEVEL": "debug",
            }
        )
        async with http(stack) as client:
            body = {"messages": [{"role": "user", "content": f"Say {marker}"}], "max_tokens": 8, "ignore_eos": True}
            assert (await client.post(CHAT, json=body, headers=headers)).status_code == 200
            # Refused ones are logged as well.
            for wrong in ({**body, "stop": ""}, {**body, marker: marker}, {"prompt": marker}):
                assert (await client.post(CHAT, json=wrong, headers=headers)).status_code == 400
            assert (await client.post(f"/v1/{marker}", json=body, headers=headers)).status_code == 404

        def ours() -> dict[str, Any]:
            return {span.name: span for span in receiver.spans() if span.trace_id == trace}

        # Each process sends its own, in its own time.
        await eventually(lambda: len(ours()) >= 4 and "bucketserve.generate" in ours())
        spans = ours()
        assert spans["bucketserve.generate"].attributes["gen_ai.operation.name"] == "chat"
        shown = json.dumps([[s.name, {k: str(v) for k, v in s.attributes.items()}] for s in receiver.spans()])
        logs = "".join(service.log_path.read_text() for service in stack.services.values())
    assert marker not in shown
    assert marker not in logs


async def test_what_an_operator_turns_off_is_off(new_stack: NewStack) -> None:
    stack = new_stack(environ={"BUCKETSERVE_GATEWAY_HTTP_LISTEN": ""})
    assert stack.http_address == ""
    async with BucketServeClient(stack.gateway_address) as client:
        assert isinstance(await anext(client.generate(prompt="a", max_tokens=1)), Started)
