"""OpenAI's HTTP API through real processes: answers, by OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from bucketserve.client import BucketServeClient, Chunk
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack
from tests.e2e.observe import events, eventually, metric
from tests.e2e.openai_client import USER, by_grpc, http, sdk, url

pytestmark = pytest.mark.e2e

MODEL = {"engine": "transformers"}


async def tokens_of(stack: LocalStack, text: str) -> list[int]:
    async with BucketServeClient(stack.gateway_address) as client:
        return await client.tokenize(text)


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
