"""What a hostile client sends to a gateway, each kind as a function of how much of it.

Each returns the outcomes that it saw, {name of the status: number}. A bare status, of which nobody has said why and
when to come again, has a question mark behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc

from bucketserve.facades import kserve_pb2
from bucketserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc, job_pb2, job_pb2_grpc
from tests.e2e.hostile_http import HOSTILE_HTTP

__all__ = ["GENERATE", "HOSTILE", "burst", "idle_connections", "invented_names", "unread_calls"]

Outcomes = Counter[str]
GENERATE = "/bucketserve.v1.InferenceService/Generate"
TIMEOUT_S = 120.0
# Channels of one process share a connection unless told otherwise; what is sent is not limited here.
OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
SHORT = inference_pb2.GenerateRequest(
    token_ids=inference_pb2.TokenIds(ids=[5]), stopping=common_pb2.StoppingParams(max_tokens=3, ignore_eos=True)
)


async def outcome(call: Any) -> str:
    """Returns how a call ended."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        is_told = "grpc-status-details-bin" in dict(error.trailing_metadata() or ())
        return error.code().name + ("" if is_told else "?")
    return "OK"


async def raw(address: str, payloads: list[bytes], method: str = GENERATE) -> Outcomes:
    """Sends requests as they are, at once, each on a connection of its own."""

    async def one(payload: bytes) -> str:
        async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
            return await outcome(channel.unary_stream(method)(payload, timeout=TIMEOUT_S))

    return Counter(await asyncio.gather(*map(one, payloads)))


async def long_texts(address: str, scale: float) -> Outcomes:
    """Texts of 4 MB, of words, of one word, of spaces, and of what no vocabulary knows."""
    texts = ["And the king said. " * 220_000, "x" * 4_190_000, " " * 4_190_000, "\u1e9e" * 1_390_000]
    requests = [inference_pb2.GenerateRequest(prompt=text) for text in texts * max(round(2 * scale), 1)]
    return await raw(address, [request.SerializeToString() for request in requests])


async def long_tokenising(address: str, scale: float) -> Outcomes:
    """The same for Tokenize."""
    requests = [inference_pb2.TokenizeRequest(prompt="And the king " * 300_000)] * round(8 * scale)
    method = "/bucketserve.v1.InferenceService/Tokenize"
    return await raw(address, [request.SerializeToString() for request in requests], method)


async def long_chats(address: str, scale: float) -> Outcomes:
    """Conversations of as many messages, of as many bytes, or with roles as long as may be."""

    def chat(turns: list[tuple[str, str]]) -> bytes:
        messages = [inference_pb2.ChatMessage(role=role, content=content) for role, content in turns]
        return inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=messages)).SerializeToString()

    payloads = [
        chat([("user", "x")] * 4096),
        chat([("user", " " * 1000)] * 4096),
        chat([("user", "x " * 2_000_000)]),
        chat([("r" * 4_000_000, "x")]),
        chat([("", "")] * 1_000_000),
        chat([("nobody", "x" * 1_000_000)]),
    ]
    return await raw(address, payloads * max(round(2 * scale), 1))


async def many_ids(address: str, scale: float) -> Outcomes:
    """66 MB of token ids."""
    number = round(66_000_000 * min(scale, 1))
    ids = b"\x0a" + varint(number) + b"\x05" * number
    return await raw(address, [b"\x2a" + varint(len(ids)) + ids] * max(round(3 * scale), 1))


async def many_messages(address: str, scale: float) -> Outcomes:
    """Conversations of four million messages, which take two hundred megabytes to look at."""
    turns = b"\x0a\x00" * 4_000_000
    return await raw(address, [b"\x22" + varint(len(turns)) + turns] * max(round(9 * scale), 2))


async def many_stops(address: str, scale: float) -> Outcomes:
    """A million stop strings, stop ids; the largest allowed ones."""
    stops = [
        common_pb2.StoppingParams(stop_strings=[""] * 1_000_000),
        common_pb2.StoppingParams(stop_token_ids=[10**6] * 1_000_000),
        *[common_pb2.StoppingParams(stop_strings=["a" * 256] * 16, max_tokens=50)] * round(20 * scale),
    ]
    return await raw(
        address, [inference_pb2.GenerateRequest(prompt="aaa", stopping=each).SerializeToString() for each in stops]
    )


async def burst(address: str, num_streams: int, num_connections: int) -> Outcomes:
    """Streams at once."""
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options=OPTIONS))
            for _ in range(num_connections)
        ]
        stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
        calls = [outcome(stubs[i % num_connections].Generate(SHORT, timeout=TIMEOUT_S)) for i in range(num_streams)]
        return Counter(await asyncio.gather(*calls))


async def bursts(address: str, scale: float) -> Outcomes:
    """Many streams on one connection, and more on fifty."""
    found = await burst(address, round(2000 * scale), 1)
    return found + await burst(address, round(5000 * scale), 50)


@contextlib.asynccontextmanager
async def idle_connections(address: str, number: int) -> AsyncIterator[None]:
    """Connections that say nothing, or begin to speak HTTP/2 and say nothing more."""
    host, _, port = address.rpartition(":")
    sockets = [socket.socket() for _ in range(number)]
    try:
        for i, each in enumerate(sockets):
            each.setblocking(False)
            with contextlib.suppress(OSError):
                await asyncio.wait_for(asyncio.get_running_loop().sock_connect(each, (host, int(port))), 5)
                if i % 2:
                    each.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        yield
    finally:
        for each in sockets:
            each.close()


async def idle(address: str, scale: float) -> Outcomes:
    """Twelve hundred of them, for a while."""
    async with idle_connections(address, round(1200 * scale)):
        await asyncio.sleep(1 + 9 * min(scale, 1))
    return Counter()


async def unread_calls(address: str, number: int, hold_s: float, method: str = GENERATE) -> Outcomes:
    """Calls that never send their request."""

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(hold_s)
        return
        yield b""

    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        call = channel.stream_stream(method)
        return Counter(await asyncio.gather(*(outcome(call(nothing(), timeout=hold_s + 60)) for _ in range(number))))


async def slow_calls(address: str, scale: float) -> Outcomes:
    """Six hundred of them."""
    return await unread_calls(address, round(600 * scale), 2 + 8 * min(scale, 1))


async def invented_names(address: str, number: int, seed: int = 1) -> Outcomes:
    """Requests of models, tenants, ids, services and with metadata that nobody has heard of."""
    rng = random.Random(seed)
    found: Outcomes = Counter()
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub, jobs = inference_pb2_grpc.InferenceServiceStub(channel), job_pb2_grpc.JobServiceStub(channel)
        watch = channel.unary_unary("/grpc.health.v1.Health/Check")

        async def one() -> None:
            name = f"invented-{rng.randrange(10**12)}"
            request = inference_pb2.GenerateRequest()
            request.CopyFrom(SHORT)
            request.tenant, request.request_id = name, name
            found[await outcome(stub.Generate(request, metadata=[(name, name), ("traceparent", name)]))] += 1
            request.model = name
            found[await outcome(stub.Generate(request))] += 1
            found[await outcome(stub.GetModel(inference_pb2.GetModelRequest(name=name)))] += 1
            found[await outcome(jobs.GetJob(job_pb2.GetJobRequest(job_id=name, tenant=name)))] += 1
            found[(await outcome(watch(b"\x0a" + varint(len(name)) + name.encode()))).rstrip("?")] += 1

        await asyncio.gather(*(one() for _ in range(number)))
    return found


async def names(address: str, scale: float) -> Outcomes:
    """Four hundred names, each in five places."""
    return await invented_names(address, round(400 * scale))


async def large_jobs(address: str, scale: float) -> Outcomes:
    """Jobs of 63 prompts of 4 MB, and submissions that are never finished."""

    async def messages(prompt: str, number: int, hold_s: float) -> AsyncIterator[job_pb2.SubmitJobRequest]:
        yield job_pb2.SubmitJobRequest(header=job_pb2.JobHeader(tenant="hostile"))
        for _ in range(number):
            yield job_pb2.SubmitJobRequest(request=inference_pb2.GenerateRequest(prompt=prompt))
        await asyncio.sleep(hold_s)

    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)
        text = "And the king said. " * 220_000
        calls = [stub.SubmitJob(messages(text, 63, 0), timeout=TIMEOUT_S) for _ in range(max(round(2 * scale), 1))]
        calls += [stub.SubmitJob(messages("x", 1, 5 * min(scale, 1)), timeout=TIMEOUT_S) for _ in range(20)]
        return Counter(await asyncio.gather(*map(outcome, calls)))


async def large_tensors(address: str, scale: float) -> Outcomes:
    """Streams of tensors of 11 MB, and of a million tensors or parameters, more at once than may be open."""
    tensor = kserve_pb2.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
    text = b"x" * 11_000_000
    large = kserve_pb2.ModelInferRequest(
        inputs=[tensor], raw_input_contents=[len(text).to_bytes(4, "little") + text]
    ).SerializeToString()
    # Of nothing each: inputs, raw contents.
    sent = [large, b"\x2a\x00" * 4_000_000, b"\x3a\x00" * 4_000_000]
    parameters = {str(i): kserve_pb2.InferParameter() for i in range(300_000)}
    sent.append(kserve_pb2.ModelInferRequest(parameters=parameters).SerializeToString())

    async def one(channel: grpc.aio.Channel, kinds: list[bytes]) -> Outcomes:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter(kinds), timeout=TIMEOUT_S)
        answers: list[bytes] = []

        async def taken() -> AsyncIterator[None]:
            async for answer in call:
                answers.append(answer)
                yield

        end = await outcome(taken())
        errors = [kserve_pb2.ModelStreamInferResponse.FromString(answer).error_message for answer in answers]
        return Counter([end, *(error.partition(":")[0] for error in errors)])

    found: Outcomes = Counter()
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options=OPTIONS)) for _ in range(8)
        ]
        calls = [one(channel, [large] * 3) for channel in channels for _ in range(max(round(6 * scale), 1))]
        calls += [one(channel, sent) for channel in channels[: max(round(4 * scale), 1)]]
        for each in await asyncio.gather(*calls):
            found += each
    return found


def varint(number: int) -> bytes:
    """Returns a number as protobuf writes it."""
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    return bytes([*written, number])


HOSTILE: dict[str, Callable[[str, float], Coroutine[Any, Any, Outcomes]]] = {
    kind.__name__: kind
    for kind in (
        long_texts,
        long_tokenising,
        long_chats,
        many_ids,
        many_messages,
        many_stops,
        bursts,
        idle,
        slow_calls,
        names,
        large_jobs,
        large_tensors,
    )
}


def main(arguments: list[str]) -> int:
    """`python -m tests.e2e.hostile ADDRESS KIND SCALE`: a client of its own; prints what it saw as JSON."""
    address, kind, scale = arguments
    print(json.dumps(asyncio.run({**HOSTILE, **HOSTILE_HTTP}[kind](address, float(scale)))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
