"""OpenAI's HTTP API when clients leave, services end, and there is too much to do, through real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from typing import Any

import httpx
import openai
import pytest

from bucketserve.client import BucketServeClient, Started
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric, status
from tests.e2e.openai_client import CHAT, TEXT, http, sdk
from tests.e2e.test_cancellation import LARGE_STEPS, PROMPT, SLOW, SLOW_PREFILL, generated, nothing_runs, prefilled
from tests.otlp import OtlpReceiver

pytestmark = pytest.mark.e2e

LONG: dict[str, Any] = {"model": "demo", "prompt": [5] * PROMPT, "max_tokens": 1400, "extra_body": {"ignore_eos": True}}


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
