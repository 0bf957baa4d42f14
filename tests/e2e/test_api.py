"""The public API through real processes: what is refused and how, stop strings, logprobs, chat."""

from __future__ import annotations

import asyncio
import json
import math
import sys

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from bucketserve.client import BucketServeClient
from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import NewStack
from tests.e2e.observe import metric

pytestmark = pytest.mark.e2e

CONTEXT = 2048
VOCABULARY = 4096


def request(**fields) -> bytes:
    if not {"prompt", "chat", "token_ids"} & fields.keys():
        fields["prompt"] = "In the beginning"
    return inference_pb2.GenerateRequest(**fields).SerializeToString()


def sampled(**fields) -> bytes:
    return request(sampling=common_pb2.SamplingParams(**fields))


def ids(*token_ids: int) -> bytes:
    return request(token_ids=inference_pb2.TokenIds(ids=token_ids))


def stopping(**fields) -> bytes:
    return request(stopping=common_pb2.StoppingParams(**fields))


# Field 3 (prompt) is a string: these bytes are no UTF-8.
PROMPT_FIELD = inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name["prompt"].number
INVALID_UTF8 = bytes([PROMPT_FIELD << 3 | 2, 3, 0xFF, 0xFE, 0xFD])

BAD: dict[str, tuple[bytes, set[str]]] = {
    "no input": (inference_pb2.GenerateRequest().SerializeToString(), {"input"}),
    "empty prompt": (request(prompt=""), {"prompt"}),
    "prompt and max_tokens over the context": (stopping(max_tokens=CONTEXT), {"stopping.max_tokens"}),
    "prompt over the context": (ids(*[5] * (CONTEXT + 1)), {"token_ids.ids"}),
    "negative temperature": (sampled(temperature=-1.0), {"sampling.temperature"}),
    "NaN everywhere": (
        sampled(temperature=math.nan, top_p=math.nan, min_p=math.nan, repetition_penalty=math.nan),
        {"sampling.temperature", "sampling.top_p", "sampling.min_p", "sampling.repetition_penalty"},
    ),
    "token id outside the vocabulary": (ids(5, VOCABULARY), {"token_ids.ids[1]"}),
    "prompt of 10 MB": (request(prompt="a" * 10_000_000), {"prompt"}),
    "ten million token ids": (ids(*[5] * 10_000_000), {"token_ids.ids"}),
    "bytes that are no UTF-8": (INVALID_UTF8, set()),
    "bytes that are no message": (b"\xff\xff\xff\xff", set()),
}


def detail(error: grpc.aio.AioRpcError, kind: type):
    """The status detail of a kind."""
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    raise AssertionError(f"no {kind.__name__} in {status}")


async def call(client: BucketServeClient, payload: bytes) -> grpc.aio.AioRpcError:
    """Sends the bytes as they are; returns the failure."""
    generate = client._channel.unary_stream(
        "/bucketserve.v1.InferenceService/Generate",
        request_serializer=None,
        response_deserializer=inference_pb2.GenerateResponse.FromString,
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in generate(payload, timeout=30):
            pass
    return caught.value


@pytest.mark.stack()
async def test_bad_input_is_refused_with_reasons_and_never_reaches_the_scheduler(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        for name, (payload, fields) in BAD.items():
            error = await call(client, payload)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (name, error.code(), error.details())
            violations = detail(error, error_details_pb2.BadRequest).field_violations
            assert violations and all(violation.description for violation in violations), name
            assert not fields or {violation.field for violation in violations} == fields, name

        error = await call(client, request(model="nobody"))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert detail(error, error_details_pb2.ResourceInfo).resource_name == "nobody"

        for name in ("admitted", "refused", "dropped"):
            assert metric(stack, "scheduler", f"bucketserve_scheduler_{name}_total") == 0, name

        # The gateway is none the worse for it.
        assert await client.generate_text("In the beginning", max_tokens=4)
    assert metric(stack, "scheduler", "bucketserve_scheduler_admitted_total") == 1


async def test_stop_strings_logprobs_and_chat_through_the_whole_stack(new_stack: NewStack) -> None:
    stack = new_stack(
        engine="transformers",
        environ={"BUCKETSERVE_WORKER_NUM_THREADS": "1", "BUCKETSERVE_WORKER_CONTEXT_TOKENS": "0"},
    )
    async with BucketServeClient(stack.gateway_address) as client:
        whole = await client.generate_text("And the LORD said unto Moses", max_tokens=40)
        words = whole.split()
        assert len(words) > 8
        stop = " ".join(words[4:6])
        cut = await client.generate_text("And the LORD said unto Moses", max_tokens=40, stop_strings=[stop])
        assert cut == whole[: whole.index(stop)]

        events = [e async for e in client.generate(prompt="And the LORD", max_tokens=6, num_logprobs=3)]
        chunks = [e for e in events if isinstance(e, inference_pb2.GenerateChunk)]
        logprobs = [entry for chunk in chunks for entry in chunk.logprobs]
        assert len(logprobs) == sum(len(chunk.token_ids) for chunk in chunks) == 6
        for entry in logprobs:
            assert entry.chosen.logprob <= 0
            assert len(entry.top) == 3
        told = [e async for e in client.generate(chat=[("user", "Who was Noah?")], max_tokens=6, ignore_eos=True)]
        assert told[-1].usage.output_tokens == 6


async def test_the_load_generator_reports_what_clients_felt(new_stack: NewStack, tmp_path) -> None:
    stack = new_stack(environ={"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "1000"})
    rows = [{"prompt_ids": [7] * (5 + i), "output_len": 3 + i, "kind": "short"} for i in range(12)]
    file, out = tmp_path / "requests.json", tmp_path / "out.json"
    file.write_text(json.dumps({"requests": rows}))
    command = [sys.executable, "-m", "bucketserve_cli.main", "bench", "--address", stack.gateway_address]
    for more in (["--requests", str(file)], ["--workload", "alpaca", "--number", "12", "--rate", "50"]):
        process = await asyncio.create_subprocess_exec(*command, *more, "--json", str(out))
        assert await process.wait() == 0
        content = json.loads(out.read_text())
        assert (content["report"]["requests"], content["report"]["failed"]) == (12, 0)
        assert content["report"]["slo_attainment"] > 0.9
        assert all(one["output_tokens"] > 0 and one["ttft_s"] > 0 for one in content["requests"])
    process = await asyncio.create_subprocess_exec(*command, "--model", "nobody", stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"demo" in said
