"""The load of benchmarks/facades.py: a process of its own with many clients of one protocol, each as cheap as can be.

It connects, warms up, says so in a line, waits for a line, and then prints what its clients felt as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

import grpc
import orjson

from bucketserve.facades import kserve_pb2, kserve_pb2_grpc, vllm_pb2, vllm_pb2_grpc
from bucketserve.rpc.channel import CHANNEL_OPTIONS
from bucketserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

CONNECTIONS = 4
"""Of the clients of a process together; HTTP/1.1 has one for each request under way."""
TEXT = "And the king said unto him Behold I will not go to thee but to mine own land and my kindred"
WORDS = TEXT.split()
PROMPT_WORDS = 64


def prompt(number: int) -> str:
    """About as many tokens as words; no two numbers below a million have one text."""
    digits = f"{number:06}"
    return " ".join([*digits, *(WORDS[(number + i) % len(WORDS)] for i in range(PROMPT_WORDS - len(digits)))])


class Client(Protocol):
    """One client of a protocol."""

    async def one(self, number: int, output_tokens: int) -> float:
        """Runs a request to its end; returns seconds to its first text (vllm: its first token).

        Raises:
            RuntimeError: it did not end at its length.
        """
        ...


class Native:
    """bucketserve.v1."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def one(self, number: int, output_tokens: int) -> float:
        stopping = common_pb2.StoppingParams(max_tokens=output_tokens, ignore_eos=True)
        start_s, first_s, used = time.perf_counter(), 0.0, 0
        async for answer in self._stub.Generate(
            inference_pb2.GenerateRequest(prompt=prompt(number), stopping=stopping)
        ):
            if answer.chunk.text:
                first_s = first_s or time.perf_counter()
            used = answer.finished.usage.output_tokens
        check(used, output_tokens)
        return first_s - start_s


class OpenAI:
    """Server-sent events of /v1/completions, over a connection that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def one(self, number: int, output_tokens: int) -> float:
        asked = {"model": "demo", "prompt": prompt(number), "max_tokens": output_tokens, "temperature": 0}
        asked |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        body = orjson.dumps(asked)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        start_s, first_s, last = time.perf_counter(), 0.0, b""
        self._writer.write(head.encode() + b"\r\n\r\n" + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(answer.decode())
        while size := int(await self._reader.readline(), 16):
            piece = (await self._reader.readexactly(size + 2))[:-2]
            if not first_s and b'"text":""' not in piece:
                first_s = time.perf_counter()
            last = last + piece if b"[DONE]" in piece else piece
        await self._reader.readexactly(2)
        usage = orjson.loads(last.split(b"data: ")[-2])["usage"]
        check(usage["completion_tokens"], output_tokens)
        return first_s - start_s


class KServe:
    """Requests on a stream that several clients share."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = kserve_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
        self._answers: dict[str, asyncio.Queue[kserve_pb2.ModelStreamInferResponse]] = {}
        # grpc.aio takes one write at a time, and ends the call over a second one.
        self._writing = asyncio.Lock()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for answer in self._call:
            self._answers[answer.infer_response.id].put_nowait(answer)

    async def close(self) -> None:
        await self._call.done_writing()
        await self._reading

    async def one(self, number: int, output_tokens: int) -> float:
        label = str(number)
        asked = kserve_pb2.ModelInferRequest(model_name="demo", id=label)
        asked.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(
            prompt(number).encode()
        )
        asked.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
        asked.parameters["max_tokens"].int64_param = output_tokens
        asked.parameters["ignore_eos"].bool_param = True
        answers = self._answers[label] = asyncio.Queue()
        start_s, first_s, is_last = time.perf_counter(), 0.0, False
        async with self._writing:
            await self._call.write(asked)
        while not is_last:
            answer = await answers.get()
            if answer.error_message:
                raise RuntimeError(answer.error_message)
            outputs = {each.name: each.contents.bytes_contents[0] for each in answer.infer_response.outputs}
            if outputs["text_output"]:
                first_s = first_s or time.perf_counter()
            is_last = answer.infer_response.parameters["triton_final_response"].bool_param
        del self._answers[label]
        if outputs["finish_reason"] != b"length":
            raise RuntimeError(f"{label} ended with {outputs['finish_reason']!r}")
        return first_s - start_s


class Vllm:
    """vllm.grpc.engine.VllmEngine; token ids without text."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = vllm_pb2_grpc.VllmEngineStub(channel)

    async def one(self, number: int, output_tokens: int) -> float:
        params = vllm_pb2.SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        asked = vllm_pb2.GenerateRequest(text=prompt(number), sampling_params=params, stream=True)
        start_s, first_s, used = time.perf_counter(), 0.0, 0
        async for answer in self._stub.Generate(asked):
            if answer.chunk.token_ids:
                first_s = first_s or time.perf_counter()
            used = answer.complete.completion_tokens
        check(used, output_tokens)
        return first_s - start_s


def check(used: int, output_tokens: int) -> None:
    if used != output_tokens:
        raise RuntimeError(f"{used} tokens instead of {output_tokens}")


@contextlib.asynccontextmanager
async def connected(protocol: str, address: str, number: int) -> AsyncIterator[list[Client]]:
    """Yields so many clients."""
    async with contextlib.AsyncExitStack() as stack:
        if protocol == "openai":
            host, _, port = address.rpartition(":")
            pairs = [await asyncio.open_connection(host, int(port)) for _ in range(number)]
            for _, writer in pairs:
                stack.callback(writer.close)
            yield [OpenAI(*pair) for pair in pairs]
            return
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
            for _ in range(CONNECTIONS)
        ]
        if protocol == "kserve":
            streams = [KServe(channel) for channel in channels]
            for stream in streams:
                stack.push_async_callback(stream.close)
            yield [streams[i % CONNECTIONS] for i in range(number)]
        else:
            kind = {"native": Native, "vllm": Vllm}[protocol]
            yield [kind(channels[i % CONNECTIONS]) for i in range(number)]


async def load(protocol: str, address: str, at_once: int, requests: int, output_tokens: int, first: int) -> None:
    ttfts_s: list[float] = []
    async with connected(protocol, address, at_once) as clients:

        async def loop(client: Client, numbers: Iterable[int]) -> None:
            for number in numbers:
                ttfts_s.append(await client.one(number, output_tokens))

        # Each connection once.
        await asyncio.gather(*(loop(client, range(first + i, first + i + 1)) for i, client in enumerate(clients)))
        ttfts_s.clear()
        print("ready", flush=True)
        await asyncio.to_thread(input)
        numbers = iter(range(first + at_once, first + at_once + requests))
        cpu_s, start_s = time.process_time(), time.perf_counter()
        await asyncio.gather(*(loop(client, numbers) for client in clients))
        took_s = time.perf_counter() - start_s
        print(json.dumps({"ttfts_s": ttfts_s, "took_s": took_s, "cpu_s": time.process_time() - cpu_s}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("protocol", choices=("native", "openai", "kserve", "vllm"))
    parser.add_argument("address")
    for name in ("at-once", "requests", "output-tokens", "first"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asyncio.run(load(**vars(parser.parse_args())))
