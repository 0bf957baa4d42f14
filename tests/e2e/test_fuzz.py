"""Random bytes and random messages to every RPC: never INTERNAL or UNKNOWN, never a hang, never a crash.

FUZZ_CASES sets how many (default 1,500; `make fuzz` sends 100,000).
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import MutableMapping
from functools import partial

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from bucketserve.facades import kserve_pb2, vllm_pb2
from bucketserve.job_client import JobClient
from bucketserve.rpc.deployment import Deployment
from bucketserve.v1 import delivery_pb2, inference_pb2, job_pb2, scheduler_pb2, worker_pb2
from bucketserve_gateway.kserve_tensors import PARAMETERS
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

CASES = int(os.environ.get("FUZZ_CASES", "1500"))
AT_ONCE = 32
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    # Long outputs of an open stream, cut by this test.
    grpc.StatusCode.DEADLINE_EXCEEDED,
    # A standby or draining scheduler, or a store that refuses; none is here, but it is a proper answer.
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    # A stranger at an internal port.
    grpc.StatusCode.PERMISSION_DENIED,
}
KSERVE, VLLM = "/inference.GRPCInferenceService", "/vllm.grpc.engine.VllmEngine"
"""Methods of others' protocols; the rest are of ours."""
KNOWN_JOBS: list[str] = []
"""So that some calls find one."""
TEXTS = ["", "a", "\x00", "é" * 50, "x" * 5000, "demo", "🙂" * 20, "-1", "../../etc/passwd", "%s%n", "{}}:{"]
NUMBERS = [0, 1, 2, 3, 7, 255, 4095, 4096, 2**31 - 1, 2**32 - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), float("-inf"), 1e-30, 1e30]


def fill(message: Message, rng: random.Random, depth: int = 0) -> Message:
    """Sets random fields to random values."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() > 0.6:
            continue
        values = [value(field, rng) for _ in range(rng.randint(0, 4) if field.is_repeated else 1)]
        if field.message_type is not None:
            if depth > 3:
                continue
            if field.message_type.GetOptions().map_entry:
                fill_map(getattr(message, field.name), field.message_type, rng, depth)
                continue
            for _ in values:
                target = getattr(message, field.name)
                fill(target.add() if field.is_repeated else target, rng, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(values)
        else:
            setattr(message, field.name, values[0])
    return message


def fill_map(entries: MutableMapping, of: Descriptor, rng: random.Random, depth: int) -> None:
    """Sets random entries to random values; half of those that have names have ones that mean something."""
    key, kept = of.fields_by_name["key"], of.fields_by_name["value"]
    for _ in range(rng.randint(0, 3)):
        name = rng.choice(sorted(PARAMETERS)) if key.type == key.TYPE_STRING and rng.random() < 0.5 else value(key, rng)
        if kept.message_type is None:
            entries[name] = value(kept, rng)
        else:
            fill(entries[name], rng, depth + 1)


def value(field: FieldDescriptor, rng: random.Random) -> object:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            text = rng.choice(TEXTS)
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice(FLOATS) if rng.random() < 0.7 else rng.uniform(-10, 10)
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice([0, 1, 2, 3, 99])
        case FieldDescriptor.CPPTYPE_INT32:
            return rng.choice(NUMBERS) % 2**31
    return rng.choice(NUMBERS)


def payload(kind: type[Message], rng: random.Random) -> bytes:
    """Random bytes, a random message, or a random message with some bytes changed, or one that names a job."""
    if KNOWN_JOBS and "job_id" in kind.DESCRIPTOR.fields_by_name and rng.random() < 0.3:
        return kind(job_id=KNOWN_JOBS[0]).SerializeToString()
    if rng.random() < 0.2:
        return rng.randbytes(rng.randint(0, 60))
    data = bytearray(fill(kind(), rng).SerializeToString())
    if data and rng.random() < 0.4:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def upload(rng: random.Random) -> list[bytes]:
    """A submission that begins as it should, more often than not, or whatever comes."""
    messages = [payload(job_pb2.SubmitJobRequest, rng) for _ in range(rng.randint(0, 4))]
    if rng.random() < 0.7:
        header = job_pb2.JobHeader(idempotency_key=rng.choice(["a", "b", ""]), ttl_s=rng.choice([0, 1, 60]))
        messages.insert(0, job_pb2.SubmitJobRequest(header=header).SerializeToString())
        if rng.random() < 0.5:
            good = inference_pb2.GenerateRequest(prompt=rng.choice(["a", "b"]))
            good.stopping.max_tokens = rng.randint(1, 20)
            messages[1:] = [job_pb2.SubmitJobRequest(request=good).SerializeToString()] * rng.randint(1, 3)
    return messages


def infer(rng: random.Random) -> bytes:
    """A request with the tensors that it should have, more often than not, of which some are not as they should be."""
    if rng.random() < 0.2:
        return payload(kserve_pb2.ModelInferRequest, rng)
    message = kserve_pb2.ModelInferRequest(model_name=rng.choice(["demo", "demo", "", "x"]), id=rng.choice(TEXTS))
    contents = {
        "text_input": [b"a", b"In the beginning", b"\xff\xfe", b"", "é".encode() * 500],
        "stream": [b"\x01", b"\x00", b"\x02", b"", b"\x01\x01"],
        "sampling_parameters": [
            *(b'{"max_tokens": 3}', b'{"temperature": NaN}', b'{"top_p": 1e999}', b"[" * 5000, b'"x"', b"{"),
            *(b'{"guided_json": {"oneOf": [{}, 5], "discriminator": {}}}', b'{"guided_regex": "\\ud800"}'),
            *(b'{"response_format": "[["}', b'{"guided_choice": ["a", 1]}', b'{"guided_decoding": 5}'),
            *(b'{"stop": ["\\ud800"]}', b'{"seed": -1, "top_k": 1.5}', b'{"max_tokens": ' + b"9" * 5000 + b"}"),
        ],
        "nobody": [b"x"],
    }
    is_raw = rng.random() < 0.6
    for name in ["text_input", *rng.choices(sorted(contents), k=rng.randint(0, 2))]:
        element, kind = rng.choice(contents[name]), "BOOL" if name == "stream" else "BYTES"
        kind = kind if rng.random() < 0.9 else rng.choice(["BOOL", "BYTES", "FP32", ""])
        shape = [1] if rng.random() < 0.9 else rng.choice([[], [1, 1], [0], [-1], [2**62, 2**62], [2], [1] * 300])
        tensor = message.inputs.add(name=name, datatype=kind, shape=shape)
        if is_raw:
            size = len(element) if rng.random() < 0.9 else rng.choice([0, 1, 2**31, 2**32 - 1])
            prefix = b"" if kind == "BOOL" else size.to_bytes(4, "little")
            message.raw_input_contents.append(prefix + element)
        elif kind == "BOOL":
            tensor.contents.bool_contents.extend(element[:1] == b"\x01" for _ in range(rng.choice([1, 1, 0, 3])))
        else:
            tensor.contents.bytes_contents.extend([element] * rng.choice([1, 1, 1, 0, 2]))
    if rng.random() < 0.1:
        message.raw_input_contents.append(b"")
    if rng.random() < 0.3:
        message.outputs.add(name=rng.choice(["text_output", "finish_reason", "x", ""]))
    if rng.random() < 0.4:
        fill_map(message.parameters, type(message).DESCRIPTOR.fields_by_name["parameters"].message_type, rng, 0)
    message.parameters["max_tokens"].int64_param = rng.randint(1, 20)
    return message.SerializeToString()


UNARY = [
    ("gateway", "InferenceService/Tokenize", inference_pb2.TokenizeRequest),
    ("gateway", "InferenceService/ListModels", inference_pb2.ListModelsRequest),
    ("gateway", "InferenceService/GetModel", inference_pb2.GetModelRequest),
    ("gateway", "JobService/GetJob", job_pb2.GetJobRequest),
    ("gateway", "JobService/CancelJob", job_pb2.CancelJobRequest),
    ("scheduler", "SchedulerService/GetStatus", scheduler_pb2.GetStatusRequest),
    ("gateway", f"{KSERVE}/ModelReady", kserve_pb2.ModelReadyRequest),
    ("gateway", f"{KSERVE}/ModelMetadata", kserve_pb2.ModelMetadataRequest),
    ("gateway", f"{KSERVE}/ModelConfig", kserve_pb2.ModelConfigRequest),
    *[("gateway", f"{KSERVE}/ModelInfer", kserve_pb2.ModelInferRequest)] * 4,
    ("gateway", f"{VLLM}/Abort", vllm_pb2.AbortRequest),
    ("gateway", f"{VLLM}/GetLoads", vllm_pb2.GetLoadsRequest),
]
STREAMED = [("gateway", "InferenceService/Generate", inference_pb2.GenerateRequest)] * 4
STREAMED += [
    ("worker", "WorkerService/FetchKv", worker_pb2.FetchKvRequest),
    ("gateway", "JobService/FetchJobResults", job_pb2.FetchJobResultsRequest),
    *[("gateway", f"{VLLM}/Generate", vllm_pb2.GenerateRequest)] * 4,
]
UPLOADS = [("gateway", "JobService/SubmitJob", job_pb2.SubmitJobRequest)] * 2
BIDIRECTIONAL = [
    ("scheduler", "SchedulerService/Submit", scheduler_pb2.SubmitRequest),
    ("scheduler", "SchedulerService/Work", scheduler_pb2.WorkRequest),
    ("delivery", "DeliveryService/Deliver", delivery_pb2.DeliverRequest),
    *[("gateway", f"{KSERVE}/ModelStreamInfer", kserve_pb2.ModelInferRequest)] * 2,
]


async def send(
    channels: dict[str, grpc.aio.Channel], deployment: Deployment, rng: random.Random
) -> tuple[str, grpc.StatusCode, str]:
    target, method, kind = rng.choice(UNARY + STREAMED + UPLOADS + BIDIRECTIONAL)
    path, channel = method if method.startswith("/") else f"/bucketserve.v1.{method}", channels[target]
    make = partial(infer, rng) if kind is kserve_pb2.ModelInferRequest else partial(payload, kind, rng)
    # Most come as a service gone wrong, some as strangers.
    metadata = deployment.metadata if rng.random() < 0.9 else ()
    try:
        if (target, method, kind) in UNARY:
            await channel.unary_unary(path)(make(), timeout=20, metadata=metadata)
        elif (target, method, kind) in STREAMED:
            # Results may be waited for as long as a job takes to come in.
            timeout_s = 1 if kind is job_pb2.FetchJobResultsRequest else 20
            async for _ in channel.unary_stream(path)(make(), timeout=timeout_s, metadata=metadata):
                pass
        elif (target, method, kind) in UPLOADS:
            await channel.stream_unary(path)(iter(upload(rng)), timeout=20)
        else:
            messages = [make() for _ in range(rng.randint(1, 4))]
            call = channel.stream_stream(path)(iter(messages), timeout=1, metadata=metadata)
            async for answer in call:
                # Errors of a stream's requests are in its responses.
                said = kserve_pb2.ModelStreamInferResponse.FromString(answer) if KSERVE in method else None
                assert said is None or "INTERNAL" not in said.error_message, said
    except grpc.aio.AioRpcError as error:
        if error.details() == "Internal error from Core":
            # Said by the client's library when the server ends a stream that it is still writing to.
            return method, grpc.StatusCode.CANCELLED, ""
        return method, error.code(), error.details() or ""
    return method, grpc.StatusCode.OK, ""


async def test_no_input_breaks_anything(new_stack: NewStack) -> None:
    stack = new_stack(environ={"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "0"})
    addresses = {
        "gateway": stack.gateway_address,
        "scheduler": stack.scheduler_address,
        "worker": stack.services["worker-0"].health_address,
        "delivery": stack.delivery_address,
    }
    channels = {name: grpc.aio.insecure_channel(address) for name, address in addresses.items()}
    rng = random.Random(20261123)
    seen: Counter[tuple[str, str]] = Counter()
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> None:
        async with slots:
            method, code, details = await send(channels, stack.deployment, random.Random(seed))
            assert code in ALLOWED, (seed, method, code, details)
            seen[method, code.name] += 1

    async with JobClient(stack.gateway_address) as jobs:
        KNOWN_JOBS[:] = [(await jobs.submit([inference_pb2.GenerateRequest(prompt="a")], idempotency_key="a")).job_id]
    try:
        await asyncio.gather(*(one(rng.getrandbits(60)) for _ in range(CASES)))
        # Still there, and still right.
        request = inference_pb2.GenerateRequest(prompt="In the beginning")
        request.stopping.max_tokens = 5
        call = channels["gateway"].unary_stream("/bucketserve.v1.InferenceService/Generate")
        answers = [a async for a in call(request.SerializeToString(), timeout=20)]
        assert inference_pb2.GenerateResponse.FromString(answers[-1]).finished.usage.output_tokens == 5
    finally:
        for channel in channels.values():
            await channel.close()
    for name, service in stack.services.items():
        assert service.exit_status is None, name
        assert "Traceback" not in service.log_path.read_text(), name
    for method, code in (
        ("InferenceService/Generate", "INVALID_ARGUMENT"),
        ("JobService/SubmitJob", "OK"),
        ("JobService/SubmitJob", "INVALID_ARGUMENT"),
        ("JobService/SubmitJob", "ALREADY_EXISTS"),
        ("JobService/GetJob", "OK"),
        ("JobService/GetJob", "NOT_FOUND"),
        ("JobService/FetchJobResults", "OK"),
        (f"{KSERVE}/ModelInfer", "OK"),
        (f"{KSERVE}/ModelInfer", "INVALID_ARGUMENT"),
        (f"{KSERVE}/ModelInfer", "NOT_FOUND"),
        (f"{KSERVE}/ModelStreamInfer", "OK"),
        (f"{VLLM}/Generate", "OK"),
        (f"{VLLM}/Generate", "INVALID_ARGUMENT"),
    ):
        assert seen[method, code] > 0, (method, code, seen)
    # What was submitted as a job may still run.
    await eventually(lambda: metric(stack, "gateway", "bucketserve_gateway_open_requests") == 0)
