"""Triton's own client against the gateway: the same text as by our API, and nothing is left of what it leaves."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bucketserve import __version__
from bucketserve.client import BucketServeClient
from bucketserve.facades import kserve_pb2, kserve_pb2_grpc
from bucketserve.rpc.probe import check_health
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric
from tests.e2e.test_cancellation import nothing_runs
from tests.e2e.test_stack import SLOW

pytestmark = pytest.mark.e2e

PROMPT = "In the beginning"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "clients-grpc.md"


async def start(stack: LocalStack, what: str) -> asyncio.subprocess.Process:
    """A client that does that."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.e2e.triton_client", stack.gateway_address, what),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def seen(stack: LocalStack, what: str) -> Any:
    """What a client saw that did that."""
    process = await start(stack, what)
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return json.loads(out)


@pytest.mark.stack(environ=SLOW)
async def test_tritons_client_sees_server_and_model(stack: LocalStack) -> None:
    found = await seen(stack, "describe")
    assert (found["live"], found["ready"], found["models"]) == (True, True, [True, False])
    assert found["server"] == {"name": "bucketserve", "version": __version__, "extensions": ["model_configuration"]}
    assert [tensor["name"] for tensor in found["metadata"]["inputs"]] == ["text_input", "stream", "sampling_parameters"]
    assert [tensor["name"] for tensor in found["metadata"]["outputs"]] == ["text_output", "finish_reason"]
    assert found["config"]["model_transaction_policy"] == {"decoupled": True}
    assert found["statistics"] == "StatusCode.UNIMPLEMENTED"


@pytest.mark.stack(environ=SLOW)
async def test_tritons_client_gets_the_text_of_our_api(stack: LocalStack) -> None:
    found = await seen(stack, "generate")
    async with BucketServeClient(stack.gateway_address) as client:
        text = await client.generate_text(PROMPT, max_tokens=12)
        long = await client.generate_text(PROMPT, max_tokens=60, ignore_eos=True)
        sampling = common_pb2.SamplingParams(temperature=0.9, seed=7, top_k=20)
        seeded = await client.generate_text(PROMPT, max_tokens=12, sampling=sampling)
    assert found["alone"][0] == text
    wanted = {"long": long, "0": text, "1": text, "2": text, "whole": text, "seeded": seeded}
    assert {label: "".join(pieces) for label, pieces in found["answers"].items()} == wanted
    # Piece by piece where that was asked for.
    assert len(found["answers"]["whole"]) == 1 < len(found["answers"]["0"])
    assert found["reasons"].keys() == wanted.keys() and set(found["reasons"].values()) <= {"length", "stop"}
    assert found["order"].index("0") < found["order"].index("long")
    assert (found["only"], found["errors"]) == (["text_output"], [])


@pytest.mark.stack(environ=SLOW)
async def test_a_stream_that_is_left_leaves_nothing(stack: LocalStack) -> None:
    assert await seen(stack, "cancel") == {}
    await eventually(lambda: nothing_runs(stack), 10)
    assert metric(stack, "gateway", "bucketserve_gateway_requests_total", outcome="cancelled") == 5
    assert metric(stack, "gateway", "bucketserve_gateway_open_calls") == 0


@pytest.mark.stack(environ=SLOW)
async def test_a_client_that_is_killed_leaves_nothing(stack: LocalStack) -> None:
    process = await start(stack, "cancel_one")
    await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") == 1)
    process.kill()
    await process.wait()
    await eventually(lambda: nothing_runs(stack), 10)


@pytest.mark.stack(environ=SLOW)
async def test_a_call_that_is_cancelled_leaves_nothing(stack: LocalStack) -> None:
    process = await start(stack, "cancel_one")
    await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") == 1)
    out, _ = await process.communicate(b"\n")
    assert json.loads(out) == "StatusCode.CANCELLED"
    await eventually(lambda: nothing_runs(stack), 10)


@pytest.mark.stack(environ=SLOW)
async def test_deadlines_of_the_client_and_of_a_request(stack: LocalStack) -> None:
    codes, errors, reasons = await seen(stack, "deadlines")
    assert codes == ["StatusCode.DEADLINE_EXCEEDED"] * 2
    (error,) = errors
    assert "request late: DEADLINE_EXCEEDED" in error
    assert reasons == {"good": "length"}
    await eventually(lambda: nothing_runs(stack), 10)


@pytest.mark.stack(environ=SLOW)
async def test_what_can_not_be_served_is_told_and_harms_nothing_beside_it(stack: LocalStack) -> None:
    found = await seen(stack, "errors")
    assert found["codes"].pop("unknown model") == "StatusCode.NOT_FOUND"
    assert len(found["codes"]) == 9
    assert set(found["codes"].values()) == {"StatusCode.INVALID_ARGUMENT"}
    assert len(found["errors"]) == 9
    assert all("request bad: INVALID_ARGUMENT: " in error for error in found["errors"])
    assert found["reasons"] == {"before": "length", "after": "length"}
    refused = metric(stack, "gateway", "bucketserve_gateway_requests_total", outcome="invalid_request")
    assert refused == 2 * 9


@pytest.mark.stack(environ=SLOW)
async def test_the_examples_of_the_documents_run(stack: LocalStack, tmp_path: Path) -> None:
    found = []
    for snippet in re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL):
        assert "127.0.0.1:50051" in snippet
        file = tmp_path / "snippet.py"
        file.write_text(snippet.replace("127.0.0.1:50051", stack.gateway_address))
        process = await asyncio.create_subprocess_exec(sys.executable, str(file), stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        assert process.returncode == 0
        found.append(out.decode())
    ours, tritons = found
    assert ours and tritons.startswith(f"{ours[:-1]} length")
    assert {line[:1] for line in tritons.splitlines()[-4:]} == {"a", "b"}


async def test_a_stream_that_wants_too_much_is_told_when_to_come_again(new_stack: NewStack) -> None:
    stack = new_stack(environ={**SLOW, "BUCKETSERVE_GATEWAY_MAX_OPEN_CALLS": "8"})
    found = await seen(stack, "overload")
    refused = sum(found["errors"].values())
    # The stream and three of its requests are as many calls as are then still free.
    assert len(found["reasons"]) == 21 - refused >= 4
    assert refused > 0 and found["reasons"]["after"] == "length"
    assert all("RESOURCE_EXHAUSTED: " in error and "(again in 1 s)" in error for error in found["errors"]), found
    assert metric(stack, "gateway", "bucketserve_gateway_refused_total", reason="max_calls") == refused


def asked(label: str, **parameters: int) -> kserve_pb2.ModelInferRequest:
    request = kserve_pb2.ModelInferRequest(id=label)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(PROMPT.encode())
    request.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
    request.parameters["ignore_eos"].bool_param = True
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return request


async def test_who_does_not_read_a_stream_ends_its_own_work(new_stack: NewStack) -> None:
    stack = new_stack(environ={"BUCKETSERVE_GATEWAY_OUTPUT_QUEUE_TOKENS": "50"})
    # A window that does not grow: what the client does not take stays at the server.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]
    async with (
        grpc.aio.insecure_channel(stack.gateway_address, options=options) as channel,
        BucketServeClient(stack.gateway_address) as client,
    ):
        call = kserve_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
        for number in range(20):
            await call.write(asked(str(number), max_tokens=2000))
        await call.read()
        others = [await client.generate_text(PROMPT, max_tokens=20) for _ in range(3)]
        assert len(set(others)) == 1
        await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") == 0)
        await call.done_writing()
        ends: dict[str, str] = {}
        while (answer := await call.read()) is not grpc.aio.EOF:
            if answer.infer_response.parameters["triton_final_response"].bool_param:
                assert answer.infer_response.id not in ends
                ends[answer.infer_response.id] = answer.error_message
        assert len(ends) == 20
        # Whoever did not end within what is kept was cut.
        cut = [error for error in ends.values() if error]
        assert cut and all("RESOURCE_EXHAUSTED: the client does not read its stream" in error for error in cut), ends


@pytest.mark.stack(environ=SLOW)
async def test_a_gateway_that_ends_finishes_what_runs_on_a_stream(stack: LocalStack) -> None:
    gateway = stack.services["gateway"]
    async with grpc.aio.insecure_channel(stack.gateway_address) as channel:
        stub = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)
        idle, busy = stub.ModelStreamInfer(), stub.ModelStreamInfer()
        await idle.write(asked("idle", max_tokens=1))
        await busy.write(asked("busy", max_tokens=100))
        await busy.read()
        gateway.signal(signal.SIGTERM)
        last = kserve_pb2.ModelStreamInferResponse()
        while not last.infer_response.parameters["triton_final_response"].bool_param:
            last = await busy.read()
        assert not last.error_message
        assert await asyncio.to_thread(gateway.wait, 60) == 0


@pytest.mark.stack(environ=SLOW)
async def test_health_and_reflection_know_all_services(stack: LocalStack) -> None:
    services = ["bucketserve.v1.InferenceService", "inference.GRPCInferenceService", "vllm.grpc.engine.VllmEngine"]
    for service in services:
        assert check_health(stack.gateway_address, service=service, timeout_s=10) == "SERVING"
    async with grpc.aio.insecure_channel(stack.gateway_address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = [service.name for service in (await call.read()).list_services_response.service]
        assert set(listed) >= set(services)
        # Whatever is listed is described: tools ask for it all.
        for name in listed:
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name))
            assert (await call.read()).file_descriptor_response.file_descriptor_proto, name
