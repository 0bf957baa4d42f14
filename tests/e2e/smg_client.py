"""A client with the stubs that routers use to drive engines, in a process of its own: their messages have the names of
the gateway's.

`python -m tests.e2e.smg_client ADDRESS WHAT` does one of the things below and prints what it saw as JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from smg_grpc_proto import vllm_engine_pb2 as engine
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as common
from tokenizers import Tokenizer

PROMPT, IDS = "In the beginning", [5, 6, 7]
ALONE = [("grpc.use_local_subchannel_pool", 1)]
Stub = vllm_engine_pb2_grpc.VllmEngineStub


def request(label: str = "", *, stream: bool = True, text: str | None = None, **params) -> engine.GenerateRequest:
    asked = engine.GenerateRequest(request_id=label, stream=stream)
    if text is None:
        asked.tokenized.CopyFrom(engine.TokenizedInput(original_text="not looked at", input_ids=IDS))
    else:
        asked.text = text
    asked.sampling_params.CopyFrom(engine.SamplingParams(**{"temperature": 0.0, "top_p": 1.0, **params}))
    return asked


def long(label: str) -> engine.GenerateRequest:
    return request(label, max_tokens=1500, ignore_eos=True)


async def taken(call: Any) -> dict[str, Any]:
    """All of a call: its tokens, and how it ended."""
    found: dict[str, Any] = {"tokens": [], "chunks": 0, "completes": []}
    try:
        while (answer := await call.read()) is not grpc.aio.EOF:
            if answer.WhichOneof("response") == "chunk":
                assert answer.chunk.completion_tokens == len(answer.chunk.token_ids) > 0
                found["tokens"] += answer.chunk.token_ids
                found["chunks"] += 1
            else:
                found["completes"].append(MessageToDict(answer.complete, preserving_proto_field_name=True))
    except grpc.aio.AioRpcError as error:
        found["error"] = f"{error.code().name}: {error.details()}"
    return found


async def describe(stub: Stub, address: str) -> object:
    answers = {
        name: MessageToDict(
            await getattr(stub, name)(getattr(engine, f"{name}Request")()),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        for name in ("HealthCheck", "GetModelInfo", "GetServerInfo", "GetLoads")
    }
    try:
        await stub.Embed(engine.EmbedRequest())
    except grpc.aio.AioRpcError as error:
        answers["Embed"] = error.code().name
    return answers


async def generate(stub: Stub, address: str) -> object:
    calls = {
        "ids": request("a", max_tokens=20, ignore_eos=True),
        "whole": request("b", stream=False, max_tokens=20, ignore_eos=True, logprobs=2),
        "text": request("c", text=PROMPT, max_tokens=20, ignore_eos=True),
        "seeded": request("d", max_tokens=20, ignore_eos=True, temperature=0.9, top_k=20, seed=7),
    }
    found = await asyncio.gather(*(taken(stub.Generate(asked)) for asked in calls.values()))
    return dict(zip(calls, found, strict=True))


async def tokenizer(stub: Stub, address: str) -> object:
    """The ids of a prompt by the files that the gateway gives out."""
    pieces = [piece async for piece in stub.GetTokenizer(common.GetTokenizerRequest())]
    data = b"".join(piece.data for piece in pieces)
    assert [piece.sha256 for piece in pieces[:-1]] == [""] * (len(pieces) - 1)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        made = Tokenizer.from_str(archive.read("tokenizer.json").decode())
        names = archive.namelist()
    digest = hashlib.sha256(data).hexdigest()
    return {"names": names, "ids": made.encode(PROMPT).ids, "is_whole": pieces[-1].sha256 == digest, "digest": digest}


async def stop_at(stub: Stub, address: str) -> object:
    """Stops at the third token that the model generates."""
    first = await taken(stub.Generate(request(max_tokens=5, ignore_eos=True)))
    token = first["tokens"][2]
    stopped = await taken(stub.Generate(request(max_tokens=5, ignore_eos=True, stop_token_ids=[token])))
    return {"token": token, "before": first["tokens"][:2], **stopped}


async def cancel(stub: Stub, address: str) -> object:
    """Leaves while five requests run."""
    calls = [stub.Generate(long(str(number))) for number in range(5)]
    for call in calls:
        await call.read()
    for call in calls:
        call.cancel()
    return len(calls)


async def abort(stub: Stub, address: str) -> object:
    """Of three requests, one of them another client's of the same name, ends one."""
    async with grpc.aio.insecure_channel(address, options=ALONE) as channel:
        stranger = Stub(channel)
        calls = [stub.Generate(long("x")), stub.Generate(long("y")), stranger.Generate(long("x"))]
        for call in calls:
            await call.read()
        await stranger.Abort(engine.AbortRequest(request_ids=["y", "nobody"]))
        await stub.Abort(engine.AbortRequest(request_ids=["x", "nobody"]))
        ended = await taken(calls[0])
        # These two are told nothing, and go on.
        for call in calls[1:]:
            for _ in range(3):
                assert (await call.read()).HasField("chunk")
        await stranger.Abort(engine.AbortRequest(request_ids=["x"]))
        await stub.Abort(engine.AbortRequest(request_ids=["y"]))
        return [each["completes"] for each in (ended, *await asyncio.gather(*map(taken, calls[1:])))]


async def deadline(stub: Stub, address: str) -> object:
    return (await taken(stub.Generate(long("late"), timeout=1.0)))["error"]


async def errors(stub: Stub, address: str) -> object:
    bad = {
        "no input": engine.GenerateRequest(),
        "no ids": engine.GenerateRequest(tokenized=engine.TokenizedInput()),
        "ids beyond the vocabulary": engine.GenerateRequest(tokenized=engine.TokenizedInput(input_ids=[2**32 - 1])),
        "ids beyond the context": engine.GenerateRequest(tokenized=engine.TokenizedInput(input_ids=[5] * 2_000_000)),
        "NaN": request(temperature=float("nan"), top_p=float("nan")),
        "no tokens": request(max_tokens=0),
        "too many tokens": request(max_tokens=2**32 - 1),
        "all logprobs": request(logprobs=-1),
        "many logprobs": request(logprobs=2**31 - 1),
        "several outputs": request(n=2),
        "a schema": request(json_schema="{"),
        "a large bias": request(logit_bias={5: 101.0}),
        "a label of two words": request("two words"),
        "images": engine.GenerateRequest(text="a", mm_inputs=engine.MultimodalInputs(mm_hashes=["x"])),
        "KV of another": engine.GenerateRequest(text="a", kv_transfer_params_json="{}"),
    }
    found = {name: await taken(stub.Generate(asked)) for name, asked in bad.items()}
    assert not any(each["tokens"] or each["completes"] for each in found.values())
    return {name: each.get("error", "") for name, each in found.items()}


async def overload(stub: Stub, address: str) -> object:
    """Twenty at once."""
    calls = [stub.Generate(request(max_tokens=100, ignore_eos=True)) for _ in range(20)]
    found = await asyncio.gather(*map(taken, calls))
    found.append(await taken(stub.Generate(request(max_tokens=3, ignore_eos=True))))
    return [Counter(each.get("error", "OK").partition(":")[0] for each in found), found[-1]["tokens"]]


DO: dict[str, Callable[[Stub, str], Coroutine[Any, Any, object]]] = {
    each.__name__: each for each in (describe, generate, tokenizer, stop_at, cancel, abort, deadline, errors, overload)
}


async def main(address: str, what: str) -> None:
    async with grpc.aio.insecure_channel(address, options=ALONE) as channel:
        print(json.dumps(await DO[what](Stub(channel), address)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
