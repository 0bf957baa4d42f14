"""The locked door of a real server: who is refused is not read and takes nobody's place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from bucketserve.rpc.channel import key_metadata, open_channel
from bucketserve.rpc.probe import check_health
from bucketserve.rpc.server import RpcServer
from bucketserve.v1 import inference_pb2, inference_pb2_grpc, job_pb2, job_pb2_grpc
from bucketserve_gateway.admission import Admission, AdmissionInterceptor
from bucketserve_gateway.auth import AuthInterceptor, Keys
from bucketserve_gateway.keys import hash_of, new_key
from bucketserve_gateway.names import ModelNames
from bucketserve_gateway.reads import Reads

KEY = new_key()
FILE = f'[[keys]]\nname = "a"\nsha256 = "{hash_of(KEY)}"\ntenant = "acme"\nmodels = ["demo"]\n'
PREFIX = "/bucketserve.v1."
UNARY = ["InferenceService/Tokenize", "InferenceService/ListModels", "InferenceService/GetModel"]
UNARY += ["JobService/GetJob", "JobService/CancelJob"]
STREAMING = ["InferenceService/Generate", "JobService/FetchJobResults"]


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Holds every stream until it is told to go on."""

    def __init__(self) -> None:
        self.tenants: list[str] = []
        self.go_on = asyncio.Event()

    async def Generate(self, request, context):
        self.tenants.append(request.tenant)
        yield inference_pb2.GenerateResponse()
        await self.go_on.wait()

    async def ListModels(self, request, context):
        return inference_pb2.ListModelsResponse(models=[{"name": "demo"}, {"name": "large"}])


class Jobs(job_pb2_grpc.JobServiceServicer):
    """Reads what is submitted."""

    def __init__(self) -> None:
        self.read: list[job_pb2.SubmitJobRequest] = []

    async def SubmitJob(self, request_iterator, context):
        async for message in request_iterator:
            self.read.append(message)
        return job_pb2.SubmitJobResponse()


class Door:
    """What a test sees of the server."""

    def __init__(self, channel: grpc.aio.Channel, address: str, admission: Admission) -> None:
        self.channel, self.address, self.admission = channel, address, admission
        self.inference, self.jobs = Inference(), Jobs()

    async def code(self, method: str, data: bytes, key: str = KEY) -> str:
        """Code of a call with these bytes as its request."""
        metadata = key_metadata(key)
        if method in STREAMING:
            call = self.channel.unary_stream(PREFIX + method)(data, metadata=metadata, timeout=10)
        else:
            call = self.channel.unary_unary(PREFIX + method)(data, metadata=metadata, timeout=10)
        return (await call.code()).name


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    (tmp_path / "keys.toml").write_text(FILE)
    async with opened(Keys(str(tmp_path / "keys.toml"), names=ModelNames(["demo"]))) as found:
        yield found


@asynccontextmanager
async def opened(keys: Keys) -> AsyncIterator[Door]:
    admission = Admission(max_calls=4, max_calls_per_connection=4, max_bytes=1 << 20, on_refused=lambda _: None)
    failed: list[BaseException] = []
    server = RpcServer(
        "127.0.0.1:0",
        services=[],
        on_unexpected=lambda method, error: failed.append(error),
        interceptors=[AuthInterceptor(keys), AdmissionInterceptor(admission, Reads(8, admission.refusal))],
    )
    address = f"127.0.0.1:{await server.start()}"
    async with open_channel(address) as channel:
        door = Door(channel, address, admission)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(door.inference, server.grpc_server)
        job_pb2_grpc.add_JobServiceServicer_to_server(door.jobs, server.grpc_server)
        await server.set_serving(True)
        yield door
    await server.stop(0)
    assert failed == []
    assert admission.num_calls == 0


async def test_without_a_key_nothing_is_read_and_everything_is_refused_alike(door: Door) -> None:
    for method in (*UNARY, *STREAMING, "JobService/SubmitJob", "InferenceService/None"):
        for data in (b"", b"\xff" * 100, b"x" * 1_000_000):
            for key in ("", "bsk_guess"):
                assert await door.code(method, data, key) == "UNAUTHENTICATED", method
    assert await asyncio.to_thread(check_health, door.address) == "SERVING"


async def test_with_a_key_unreadable_bytes_are_what_they_were(door: Door) -> None:
    for method in (*UNARY, *STREAMING, "JobService/SubmitJob"):
        assert await door.code(method, b"\xff" * 100) == "INVALID_ARGUMENT", method
    assert await door.code("InferenceService/None", b"") == "UNIMPLEMENTED"


async def test_strangers_are_refused_as_such_while_every_place_is_taken(door: Door) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(door.channel)
    calls = [stub.Generate(inference_pb2.GenerateRequest(model="demo"), metadata=key_metadata(KEY)) for _ in range(2)]
    for call in calls:
        await call.read()
    assert door.inference.tenants == ["acme", "acme"]
    assert await door.code("InferenceService/Generate", b"") == "RESOURCE_EXHAUSTED"
    codes = await asyncio.gather(*(door.code("InferenceService/Generate", b"", "") for _ in range(200)))
    assert set(codes) == {"UNAUTHENTICATED"}
    assert door.admission.num_calls == 2
    door.inference.go_on.set()


async def test_a_refusal_says_why_to_programs(door: Door) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(door.channel)
    for key, reason in (("", "UNAUTHENTICATED"), (KEY, "FORBIDDEN")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetModel(inference_pb2.GetModelRequest(name="large"), metadata=key_metadata(key))
        trailers = {k: v for k, v in caught.value.trailing_metadata()}
        info = error_details_pb2.ErrorInfo()
        assert status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details[0].Unpack(info)
        assert (info.reason, info.domain) == (reason, "bucketserve")


async def test_each_message_of_a_stream_is_looked_at(door: Door) -> None:
    stub = job_pb2_grpc.JobServiceStub(door.channel)
    header = job_pb2.SubmitJobRequest(header=job_pb2.JobHeader())
    good = job_pb2.SubmitJobRequest(request=inference_pb2.GenerateRequest(model="demo"))
    bad = job_pb2.SubmitJobRequest(request=inference_pb2.GenerateRequest(model="large"))

    async def messages(*sent: job_pb2.SubmitJobRequest):
        for message in sent:
            yield message

    await stub.SubmitJob(messages(header, good, good), metadata=key_metadata(KEY))
    assert len(door.jobs.read) == 3
    assert [door.jobs.read[0].header.tenant, door.jobs.read[1].request.tenant] == ["acme", "acme"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.SubmitJob(messages(header, good, bad, good), metadata=key_metadata(KEY))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert len(door.jobs.read) == 5


async def test_answers_have_what_the_key_may_use(door: Door) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(door.channel)
    found = await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=key_metadata(KEY))
    assert [model.name for model in found.models] == ["demo"]


async def test_without_a_keys_file_nobody_is_asked() -> None:
    async with opened(Keys("")) as door:
        assert await door.code("InferenceService/ListModels", b"", "") == "OK"
