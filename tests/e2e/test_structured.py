"""Structured output and tools through real processes: by the native API, OpenAI's SDK and vLLM's protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from datetime import date
from ipaddress import IPv4Network
from typing import Any, Literal

import grpc
import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field, create_model
from tokenizers import Tokenizer

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.core.errors import InvalidRequestError
from bucketserve.facades import kserve_pb2, kserve_pb2_grpc, vllm_pb2, vllm_pb2_grpc
from bucketserve.job_client import JobClient, request_from_json
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack
from tests.cli import run_command
from tests.e2e.conftest import DEMO_MODEL
from tests.e2e.observe import events, eventually, metric
from tests.e2e.test_kserve import seen as triton

pytestmark = pytest.mark.e2e

MODEL = {"engine": "transformers"}
TWO = {"engine": "transformers", "num_workers": 2}
USER: Any = {"role": "user", "content": "Tell me of the king"}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "maximum": 999, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "find_person", "description": "finds one", "parameters": PERSON}},
    {"type": "function", "function": {"name": "rest"}},
    {
        "type": "function",
        "function": {
            "name": "count",
            "strict": True,
            # What it refers to is in itself.
            "parameters": {
                "type": "object",
                "properties": {"by": {"$ref": "#/$defs/by"}},
                "required": ["by"],
                "additionalProperties": False,
                "$defs": {"by": {"enum": ["tribe", "house"]}},
            },
        },
    },
]
Wanted = common_pb2.StructuredOutput


@contextlib.asynccontextmanager
async def sdk(stack: LocalStack) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://{stack.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0) as client:
        yield client


async def by_grpc(stack: LocalStack, wanted: Wanted, **more: Any) -> tuple[str, Finished]:
    text, finished = "", Finished()
    more.setdefault("prompt", "And the king said")
    async with BucketServeClient(stack.gateway_address) as client:
        async for event in client.generate(structured_output=wanted, **more):
            if isinstance(event, Chunk):
                text += event.text
            elif isinstance(event, Finished):
                finished = event
    return text, finished


@pytest.mark.stack(**MODEL)
async def test_the_native_api_keeps_to_what_is_asked_for(stack: LocalStack) -> None:
    hot = common_pb2.SamplingParams(temperature=1.5, seed=3)
    text, end = await by_grpc(stack, Wanted(json_schema=json.dumps(PERSON)), max_tokens=200, sampling=hot)
    jsonschema.validate(json.loads(text), PERSON)
    assert (end.reason, end.HasField("matched_stop_token_id")) == (common_pb2.FINISH_REASON_STOP, False)
    choices = Wanted(choices=common_pb2.Choices(texts=["the king of Israel", "Größe"]))
    text, end = await by_grpc(stack, choices, sampling=hot)
    assert text in choices.choices.texts
    # The end token of the model is let in where it may end, also if it is to be ignored otherwise.
    text, end = await by_grpc(stack, Wanted(regex="[0-9]{3}"), ignore_eos=True)
    assert (len(text), text.isdecimal(), end.reason) == (3, True, common_pb2.FINISH_REASON_STOP)
    text, end = await by_grpc(stack, Wanted(grammar='start: "(" start ")" | "x"'), max_tokens=5, sampling=hot)
    assert end.reason == common_pb2.FINISH_REASON_LENGTH or text.count("(") == text.count(")")
    text, end = await by_grpc(stack, Wanted(regex="[a-z]{500}"), max_tokens=4)
    assert (end.reason, end.usage.output_tokens) == (common_pb2.FINISH_REASON_LENGTH, 4)


@pytest.mark.stack(**MODEL)
async def test_openai_s_client_gets_its_schema(stack: LocalStack) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    same: dict[str, Any] = {"model": "demo", "messages": [USER], "max_tokens": 200, "seed": 5, "response_format": asked}
    async with sdk(stack) as client:
        whole = await client.chat.completions.create(n=3, **same)
        for choice in whole.choices:
            jsonschema.validate(json.loads(choice.message.content or ""), PERSON)
            assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
        pieces = [chunk async for chunk in await client.chat.completions.create(stream=True, **same)]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
        assert text == whole.choices[0].message.content
        assert pieces[-1].choices[0].finish_reason == "stop"
        anything = {**same, "response_format": {"type": "json_object"}, "max_tokens": 300}
        answer = (await client.chat.completions.create(**anything)).choices[0]
        assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content or ""), dict)
        for extra, fits in (
            ({"guided_json": PERSON}, lambda text: jsonschema.validate(json.loads(text), PERSON) is None),
            ({"guided_regex": "[0-9]{2}"}, lambda text: len(text) == 2 and text.isdecimal()),
            ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
            ({"guided_grammar": 'start: "a" "b"'}, lambda text: text == "ab"),
            ({"structured_outputs": {"choice": ["yes"]}}, lambda text: text == "yes"),
        ):
            found = await client.completions.create(model="demo", prompt="a", max_tokens=200, extra_body=extra)
            assert fits(found.choices[0].text), extra


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str | None = Field(max_length=5)


class Owner(BaseModel):
    """Of one pet."""

    born: date
    pet: Cat | Dog = Field(discriminator="kind")
    colors: list[Literal["red", "blue"]] = Field(max_length=2)


@pytest.mark.stack(**MODEL)
async def test_openai_s_parse_gets_models_of_pydantic_s(stack: LocalStack) -> None:
    tool = openai.pydantic_function_tool(Owner)
    same: dict[str, Any] = {"model": "demo", "messages": [USER], "max_tokens": 400, "seed": 1}
    async with sdk(stack) as client:
        answer = (await client.chat.completions.parse(response_format=Owner, **same)).choices[0].message
        assert isinstance(answer.parsed, Owner)
        called = (await client.chat.completions.parse(tools=[tool], tool_choice="required", **same)).choices[0].message
        (call,) = called.tool_calls or ()
        assert isinstance(call.function.parsed_arguments, Owner)
        async with client.chat.completions.stream(response_format=Owner, **same) as stream:
            async for _ in stream:
                pass
            streamed = (await stream.get_final_completion()).choices[0].message
        assert streamed.parsed == answer.parsed
        for wanted, words in (
            (set[int], "uniqueItems at #/properties/found "),
            (IPv4Network, "format ipv4network at #"),
        ):
            refused = create_model("Refused", found=(wanted, ...))
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.parse(response_format=refused, **same)
            assert words in caught.value.message and caught.value.param == "response_format"


@pytest.mark.stack(**MODEL)
async def test_a_tool_that_must_be_called_is_called(stack: LocalStack) -> None:
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {"type": "object"}) for tool in TOOLS}
    same: dict[str, Any] = {"model": "demo", "messages": [USER], "max_tokens": 300, "tools": TOOLS}
    async with sdk(stack) as client:
        for choice, reason in (
            ("required", "tool_calls"),
            ({"type": "function", "function": {"name": "find_person"}}, "stop"),
            ({"type": "function", "function": {"name": "count"}}, "stop"),
        ):
            for seed in range(3):
                asked = {**same, "tool_choice": choice, "seed": seed}
                whole = (await client.chat.completions.create(**asked)).choices[0]
                names, arguments, reasons = set(), "", []
                async for chunk in await client.chat.completions.create(stream=True, **asked):
                    delta = chunk.choices[0].delta
                    assert not delta.content
                    reasons.append(chunk.choices[0].finish_reason)
                    for call in delta.tool_calls or ():
                        names.add(call.function.name)
                        arguments += call.function.arguments or ""
                if whole.finish_reason == "length":
                    # Only what may be of any size is cut.
                    assert whole.message.tool_calls[0].function.name == "rest"
                    continue
                assert whole.message.content is None
                (call,) = whole.message.tool_calls
                jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
                assert choice == "required" or call.function.name == choice["function"]["name"]
                assert (whole.finish_reason, reasons[-1]) == (reason, reason)
                assert (names - {None}, arguments) == ({call.function.name}, call.function.arguments)
        # Told of, and free: what it says is text.
        free = (await client.chat.completions.create(**{**same, "max_tokens": 5})).choices[0]
        assert free.message.content
        assert free.message.tool_calls is None
        cut = await client.chat.completions.create(**{**same, "tool_choice": "required", "max_tokens": 2})
        assert cut.choices[0].finish_reason == "length"


@pytest.mark.stack(**MODEL)
async def test_vllm_s_protocol_has_constraints(stack: LocalStack) -> None:
    async with grpc.aio.insecure_channel(stack.gateway_address) as channel:
        stub = vllm_pb2_grpc.VllmEngineStub(channel)
        params = vllm_pb2.SamplingParams(choice=vllm_pb2.ChoiceConstraint(choices=["yes", "no"]), temperature=0)
        calls = stub.Generate(vllm_pb2.GenerateRequest(text="And", sampling_params=params))
        (answer,) = [each async for each in calls]
        assert answer.complete.finish_reason == "stop"
        assert 1 <= len(answer.complete.output_ids) <= 3


@pytest.mark.stack(**MODEL)
async def test_tritons_client_has_constraints(stack: LocalStack) -> None:
    found = await triton(stack, "structures")
    assert json.loads(found["schema"])["a"] in (1, 2)
    assert found["answers"]["choice"] in ("yes", "no")
    assert found["answers"]["format"].lstrip().startswith("{")
    (error,) = found["errors"]
    assert error.startswith("request bad: INVALID_ARGUMENT: structured_output.regex: ")


@pytest.mark.stack(**TWO)
async def test_an_output_is_what_was_asked_for_though_its_worker_dies(stack: LocalStack) -> None:
    schema = {"type": "array", "items": PERSON, "minItems": 8, "maxItems": 8}
    wanted = Wanted(json_schema=json.dumps(schema))

    async def one(seed: int) -> tuple[str, Finished]:
        sampling = common_pb2.SamplingParams(temperature=0.7, seed=seed)
        return await by_grpc(stack, wanted, max_tokens=900, sampling=sampling)

    alone = await asyncio.gather(*map(one, range(4)))
    so_far = {name: metric(stack, name, "vllm:generation_tokens_total") for name in stack.worker_names()}
    runs = [asyncio.create_task(one(seed)) for seed in range(4)]

    def busy() -> list[str]:
        # All may be at one worker: whoever has some will do, once they have come some way.
        return [
            name
            for name in stack.worker_names()
            if metric(stack, name, "vllm:num_requests_running") >= 2
            and metric(stack, name, "vllm:generation_tokens_total") >= so_far[name] + 40
        ]

    await eventually(busy)
    stack.services[busy()[0]].signal(signal.SIGKILL)
    ended = await asyncio.gather(*runs)
    assert any(end.attempts > 1 for _, end in ended)
    for (text, end), (before, _) in zip(ended, alone, strict=True):
        assert end.reason == common_pb2.FINISH_REASON_STOP
        jsonschema.validate(json.loads(text), schema)
        assert text == before


@pytest.mark.stack(**MODEL)
def test_the_command_line_has_schemas_and_expressions(stack: LocalStack) -> None:
    at = ("--address", stack.gateway_address, "--max-tokens", "200", "--temperature", "1")
    status, out, _ = run_command("generate", "x", "--json-schema", json.dumps(PERSON), *at)
    assert status == 0
    jsonschema.validate(json.loads(out), PERSON)
    assert run_command("generate", "x", "--regex", "ab", *at)[:2] == (0, "ab\n")
    status, out, err = run_command("generate", "x", "--regex", "(", *at)
    assert (status, out) == (1, "")
    assert "structured_output.regex" in err


@pytest.mark.stack(**MODEL)
async def test_requests_of_jobs_are_kept_to_it_and_fail_by_themselves(stack: LocalStack) -> None:
    lines = [
        {"custom_id": "schema", "prompt": "x", "max_tokens": 200, "json_schema": PERSON},
        {"custom_id": "choice", "prompt": "x", "choices": ["yes", "no"]},
        {"custom_id": "bad", "prompt": "x", "regex": "("},
    ]
    async with JobClient(stack.gateway_address) as client:
        job = await client.submit([request_from_json(line) for line in lines])
        schema, choice, bad = [result async for result in client.results(job.job_id, follow=True)]
    jsonschema.validate(json.loads(schema.text), PERSON)
    assert choice.text in ("yes", "no")
    assert "structured_output.regex" in bad.error_message


async def test_engines_that_cannot_are_not_asked(stack: LocalStack) -> None:
    with pytest.raises(InvalidRequestError, match="no worker of this model can constrain its output"):
        await by_grpc(stack, Wanted(regex="a"))
    async with sdk(stack) as client:
        for extra, param in (
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"tools": TOOLS, "tool_choice": "required"}, "tools"),
            ({"guided_regex": "a"}, "guided_regex"),
        ):
            with pytest.raises(openai.BadRequestError) as bad:
                await client.chat.completions.create(model="demo", messages=[USER], extra_body=extra)
            assert bad.value.param == param
    assert not metric(stack, "scheduler", "bucketserve_scheduler_batches_total")


def nested(depth: int) -> object:
    inner: object = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "array", "items": inner}
    return inner


HOSTILE: dict[str, Any] = {
    "deep": nested(200),
    "huge": {"enum": ["x" * 10 for _ in range(1_000_000)]},
    "large enum": {"enum": [f"v{i}" for i in range(5_000)]},
    "catastrophic": {"type": "string", "pattern": "^((a+)+)+$|(.*a){30}"},
    "counted": {"type": "string", "pattern": "^((.{0,1000}){0,1000}){0,1000}$"},
    "itself": {"$ref": "#"},
    "recursive": {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}},
    "remote": {"$ref": "http://127.0.0.1:9/x.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "no object": [1, 2],
    "false": False,
    "many": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1_500)}},
    "all of any": {"allOf": [{"anyOf": [{"const": i}, {"const": -i}]} for i in range(100)]},
    "bounds": {"type": "array", "minItems": 2**62, "items": {"multipleOf": 1e-300}},
    "words": {"type": "banana", "x-guidance": {"lenient": True}},
}


@pytest.mark.stack(**MODEL)
async def test_hostile_schemas_end_or_are_refused_and_harm_nobody(stack: LocalStack) -> None:
    async def one(client: httpx.AsyncClient, schema: object, key: str) -> int:
        members: dict[str, Any] = {"prompt": "a", "max_tokens": 8, key: schema}
        response = await client.post("/v1/completions", json=members)
        assert response.status_code in (200, 400, 413, 500), response.text
        if response.status_code == 400:
            assert response.json()["error"]["param"] == key
        return response.status_code

    async with httpx.AsyncClient(base_url=f"http://{stack.http_address}", timeout=120) as client:
        plain = asyncio.create_task(by_grpc(stack, Wanted(), max_tokens=200, ignore_eos=True))
        found = await asyncio.gather(*(one(client, schema, "guided_json") for schema in HOSTILE.values()))
        assert (await plain)[1].usage.output_tokens == 200
        outcomes = dict(zip(HOSTILE, found, strict=True))
        refused = {"huge", "itself", "remote", "file", "no object", "false", "words"}
        assert {name for name, status in outcomes.items() if status in (400, 413)} >= refused
        # Texts, by every field.
        for key, text in (
            ("guided_json", "{" * 60_000),
            ("guided_json", "\0"),
            ("guided_regex", "(" * 60_000),
            ("guided_regex", "(a{1000}){1000}{1000}"),
            ("guided_grammar", "start: start | start start"),
            ("guided_grammar", "x" * 200_000),
            ("guided_choice", ["a"] * 2_000),
            ("guided_choice", []),
            ("guided_regex", "é" * 40_000),
        ):
            assert await one(client, text, key) == 400
        text, end = await by_grpc(stack, Wanted(choices=common_pb2.Choices(texts=["well"])))
        assert (text, end.reason) == ("well", common_pb2.FINISH_REASON_STOP)
    for service in ("gateway", "worker-0"):
        assert not events(stack, service, "rpc.failed")


@pytest.mark.stack(**MODEL)
async def test_any_object_is_the_same_in_pieces_and_by_each_protocol(stack: LocalStack) -> None:
    """json_object, which is LangChain's json_mode."""
    tokenizer, ends = Tokenizer.from_file(f"{DEMO_MODEL}/tokenizer.json"), list[str]()
    form: Any = {"type": "json_object"}
    # Else the demo model would go on and on.
    biases = {str(tokenizer.token_to_id(token)): 8 for token in '"}'}
    async with sdk(stack) as client, grpc.aio.insecure_channel(stack.gateway_address) as channel:
        triton, engine = kserve_pb2_grpc.GRPCInferenceServiceStub(channel), vllm_pb2_grpc.VllmEngineStub(channel)
        for seed in range(3):
            same: dict[str, Any] = {"max_tokens": 150, "temperature": 1.5, "seed": seed, "logit_bias": biases}
            asked = {"model": "demo", "prompt": "Tell me", "extra_body": {"response_format": form}, **same}
            whole = (await client.completions.create(**asked)).choices[0]
            pieces = [chunk.choices[0] async for chunk in await client.completions.create(stream=True, **asked)]
            request = kserve_pb2.ModelInferRequest(model_name="demo")
            for name, value in (("text_input", "Tell me"), ("sampling_parameters", json.dumps(same))):
                tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
                tensor.contents.bytes_contents.append(value.encode())
            request.parameters["response_format"].string_param = json.dumps(form)
            (text, *_) = (await triton.ModelInfer(request)).outputs
            same["logit_bias"] = {int(token_id): bias for token_id, bias in biases.items()}
            params = vllm_pb2.SamplingParams(json_object=True, **same)
            answers = engine.Generate(vllm_pb2.GenerateRequest(text="Tell me", sampling_params=params))
            ids = [token_id async for answer in answers for token_id in answer.complete.output_ids]
            found = {whole.text, "".join(piece.text for piece in pieces), text.contents.bytes_contents[0].decode()}
            assert found == {tokenizer.decode(ids)}
            ends.append(str(whole.finish_reason))
            assert pieces[-1].finish_reason == whole.finish_reason
            assert isinstance(json.loads(whole.text), dict) if ends[-1] == "stop" else whole.text[0] == "{"
    assert "stop" in ends
