"""Requests of vLLM's engine service as they will run; what an Abort ends, and what it does not."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import random
import zipfile
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest

from bucketserve.core.errors import (
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnauthenticatedError,
    UnknownModelError,
)
from bucketserve.facades import vllm_pb2
from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_gateway.auth import Keys
from bucketserve_gateway.keys import hash_of, new_key
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.requests import OpenRequests
from bucketserve_gateway.validation import validate
from bucketserve_gateway.vllm_engine import VllmEngineServicer, request_of
from tests.unit.gateway.builders import Caller, Generation, an_admission, an_open_request, catalog

CARD = catalog().get("demo").card
Answers = AsyncGenerator[vllm_pb2.GenerateResponse, None]


def a_request(**fields) -> vllm_pb2.GenerateRequest:
    if not {"text", "tokenized"} & fields.keys():
        fields["text"] = "hello"
    return vllm_pb2.GenerateRequest(**fields)


def params(**fields) -> vllm_pb2.GenerateRequest:
    return a_request(sampling_params=vllm_pb2.SamplingParams(**fields))


BAD = {
    "KV of another": (a_request(kv_transfer_params=vllm_pb2.KvTransferParams()), "kv_transfer_params"),
    "KV of another, as JSON": (a_request(kv_transfer_params_json=""), "kv_transfer_params_json"),
    "images": (a_request(mm_inputs=vllm_pb2.MultimodalInputs()), "mm_inputs"),
    "more images": (a_request(extra_mm_inputs=[vllm_pb2.MultimodalInputs()]), "extra_mm_inputs"),
    "images elsewhere": (a_request(media_refs=vllm_pb2.MediaRefs()), "media_refs"),
    "a rank": (a_request(data_parallel_rank=-1), "data_parallel_rank"),
    "min_tokens": (params(min_tokens=1), "sampling_params.min_tokens"),
    "several outputs": (params(n=2**32 - 1), "sampling_params.n"),
    "tag": (params(structural_tag=""), "sampling_params.structural_tag"),
    "all logprobs": (params(logprobs=-1), "sampling_params.logprobs"),
    "the prompt's logprobs": (params(prompt_logprobs=0), "sampling_params.prompt_logprobs"),
    "negative seed": (params(seed=-(2**31)), "sampling_params.seed"),
    "bias": (params(logit_bias={-1: 1.0}), "sampling_params.logit_bias"),
    "many biases": (params(logit_bias=dict.fromkeys(range(1025), 1.0)), "sampling_params.logit_bias"),
    "truncation": (params(truncate_prompt_tokens=5), "sampling_params.truncate_prompt_tokens"),
    "ids beyond the context": (
        a_request(tokenized=vllm_pb2.TokenizedInput(input_ids=[1] * CARD.context_tokens)),
        "tokenized.input_ids",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_served_is_refused(name: str) -> None:
    request, field = BAD[name]
    with pytest.raises(InvalidRequestError) as caught:
        request_of(request, CARD)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_everything_that_is_wrong_at_once() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request_of(params(n=2, seed=-1, structural_tag="a", min_tokens=3), CARD)
    assert len(caught.value.violations) == 4


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, None),
        ({"json_object": False}, None),
        ({"json_object": True}, {"json_schema": '{"type":"object"}'}),
        ({"json_schema": "{}"}, {"json_schema": "{}"}),
        ({"json_schema": ""}, {"json_schema": ""}),
        ({"regex": "a"}, {"regex": "a"}),
        ({"grammar": "a"}, {"grammar": "a"}),
        ({"choice": vllm_pb2.ChoiceConstraint(choices=["a"])}, {"choices": common_pb2.Choices(texts=["a"])}),
    ],
    ids=str,
)
def test_what_an_output_must_be(given: dict[str, object], wanted: dict[str, object] | None) -> None:
    found = request_of(params(**given), CARD)
    assert found.HasField("structured_output") is (wanted is not None)
    assert found.structured_output == common_pb2.StructuredOutput(**(wanted or {}))


def test_every_field_that_is_served() -> None:
    request = a_request(
        request_id="a",
        tokenized=vllm_pb2.TokenizedInput(input_ids=[1, 2]),
        sampling_params=vllm_pb2.SamplingParams(
            temperature=0.5,
            top_p=0.25,
            top_k=3,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-2,
            frequency_penalty=1.25,
            logit_bias={5: -100},
            max_tokens=4,
            stop=["x"],
            stop_token_ids=[7],
            ignore_eos=True,
            n=1,
            logprobs=0,
            seed=8,
        ),
    )
    found = request_of(request, CARD)
    assert (found.request_id, found.model, list(found.token_ids.ids)) == ("a", "demo", [1, 2])
    sampling, stopping = found.sampling, found.stopping
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 3, 0.125)
    assert (sampling.repetition_penalty, sampling.seed) == (1.5, 8)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2, 1.25)
    assert dict(sampling.logit_bias) == {5: -100}
    assert (stopping.max_tokens, list(stopping.stop_strings), list(stopping.stop_token_ids)) == (4, ["x"], [7])
    assert stopping.ignore_eos
    assert found.response.HasField("num_logprobs") and found.response.num_logprobs == 0


def test_what_is_left_out_is_the_engines_default() -> None:
    found = request_of(a_request(text="hello"), CARD)
    assert found.prompt == "hello"
    assert found.sampling.temperature == 1.0
    assert not any(found.sampling.HasField(name) for name in ("top_p", "repetition_penalty", "seed"))
    assert not found.stopping.HasField("max_tokens") and not found.response.HasField("num_logprobs")
    # A temperature of 0 is one that is given.
    assert request_of(params(temperature=0.0), CARD).sampling.temperature == 0.0
    # The input that is there without ids is not one that is missing: it is told as such.
    assert request_of(a_request(tokenized=vllm_pb2.TokenizedInput()), CARD).WhichOneof("input") == "token_ids"


class Site:
    """A servicer, and what it works with."""

    def __init__(self, models: ModelCatalog | None = None, keys: Keys | None = None, **limits: int) -> None:
        self.generate = Generation()
        self.admission = an_admission(**limits)
        self.requests = OpenRequests()
        self.refused: list[BaseException] = []
        self.servicer = VllmEngineServicer(
            self.generate,
            models or catalog(),
            self.admission,
            self.requests,
            identify=(keys or Keys("")).identify,
            is_serving=lambda: True,
            on_refused=self.refused.append,
        )

    def run(self, label: str, peer: str = "a", **fields) -> Answers:
        return self.servicer.Generate(a_request(request_id=label, **fields), Caller(peer))

    async def abort(self, *labels: str, peer: str = "a") -> None:
        await self.servicer.Abort(vllm_pb2.AbortRequest(request_ids=labels), Caller(peer))

    def is_empty(self) -> bool:
        return (self.generate.num_open, self.admission.num_bytes, self.servicer._runs) == (0, 0, {})


async def test_chunks_and_complete_or_complete_alone() -> None:
    site = Site()
    site.generate.may_end.set()
    logprobs = vllm_pb2.SamplingParams(logprobs=2)
    *chunks, last = [answer async for answer in site.run("a", stream=True, sampling_params=logprobs)]
    assert [list(answer.chunk.token_ids) for answer in chunks] == [[0], [1]]
    assert [list(answer.chunk.output_logprobs.token_ids) for answer in chunks] == [[0], [1]]
    assert all(len(answer.chunk.output_logprobs.top_logprobs[0].values) == 2 for answer in chunks)
    assert all((answer.chunk.prompt_tokens, answer.chunk.completion_tokens) == (3, 1) for answer in chunks)
    (only,) = [answer.complete async for answer in site.run("a", sampling_params=logprobs)]
    assert (list(only.output_ids), list(last.complete.output_ids)) == ([0, 1], [])
    assert list(only.output_logprobs.token_logprobs) == [-1.0, -1.0]
    for complete in (only, last.complete):
        assert (complete.finish_reason, complete.matched_stop_str) == ("stop", "end")
        assert (complete.prompt_tokens, complete.completion_tokens, complete.cached_tokens) == (3, 2, 1)
    plain = [answer async for answer in site.run("a", sampling_params=vllm_pb2.SamplingParams(logprobs=0))]
    assert not plain[0].complete.output_logprobs.top_logprobs
    assert site.is_empty()


async def test_abort_ends_the_requests_of_its_connection_and_no_others() -> None:
    site = Site()
    async with contextlib.AsyncExitStack() as exits:
        runs = [
            await exits.enter_async_context(contextlib.aclosing(site.run(label, peer, stream=True)))
            for label, peer in (("x", "a"), ("x", "a"), ("y", "a"), ("x", "stranger"))
        ]
        for run in runs:
            assert (await anext(run)).HasField("chunk")
        waiting = [asyncio.ensure_future(anext(run)) for run in runs]
        await asyncio.sleep(0)
        await site.abort("x", "x", "nobody", "")
        await site.abort("x")
        for ended in waiting[:2]:
            complete = (await ended).complete
            assert (complete.finish_reason, complete.completion_tokens) == ("abort", 1)
        assert site.generate.num_open == 2
        await site.abort("y", peer="stranger")
        site.generate.may_end.set()
        assert [list((await each).chunk.token_ids) for each in waiting[2:]] == [[1], [1]]
        for run in runs:
            await _rest(run)
    assert site.is_empty()


async def _rest(run: Answers) -> list[vllm_pb2.GenerateResponse]:
    return [answer async for answer in run]


async def test_an_abort_counts_also_while_the_client_takes_a_chunk() -> None:
    site = Site()
    site.generate.may_end.set()
    run = site.run("x", stream=True)
    await anext(run)
    await site.abort("x")
    (last,) = await _rest(run)
    assert last.complete.finish_reason == "abort"
    # Of what came before it everything is told.
    only = site.run("y")
    site.generate.may_end.clear()
    ended = asyncio.ensure_future(anext(only))
    while not site.generate.num_open:
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    await site.abort("y")
    complete = (await ended).complete
    assert (complete.finish_reason, list(complete.output_ids)) == ("abort", [0])
    assert await _rest(only) == []
    assert site.is_empty()


async def test_one_abort_names_a_bounded_number() -> None:
    with pytest.raises(InvalidRequestError):
        await Site().abort(*["x"] * 5000)


async def test_leaving_ends_the_request() -> None:
    site = Site()
    run = site.run("x", stream=True)
    await anext(run)
    await run.aclose()
    assert site.is_empty()


async def test_what_is_collected_counts_as_held() -> None:
    site = Site(max_bytes=10)
    site.generate.may_end.set()
    with pytest.raises(OverloadedError):
        await _rest(site.run("x", sampling_params=vllm_pb2.SamplingParams(logprobs=2)))
    assert len(await _rest(site.run("x", stream=True, sampling_params=vllm_pb2.SamplingParams(logprobs=2)))) == 3
    assert site.is_empty()
    # Until it has been taken, and for more than its bytes: it is an object as well.
    site = Site()
    site.generate.may_end.set()
    run = site.run("x", sampling_params=vllm_pb2.SamplingParams(logprobs=2))
    answer = await anext(run)
    assert site.admission.num_bytes > 2 * answer.ByteSize()
    assert await _rest(run) == []
    assert site.is_empty()


async def test_a_gateway_with_several_models_says_why_it_can_not() -> None:
    served = catalog().get("demo")
    models = {name: replace(served, card=replace(served.card, name=name)) for name in ("one", "two")}
    site = Site(ModelCatalog(models))
    with pytest.raises(UnknownModelError, match="a key that is for one; here there are one, two"):
        await _rest(site.run("x"))
    assert len(site.refused) == 1
    with pytest.raises(UnknownModelError):
        await site.servicer.GetModelInfo(vllm_pb2.GetModelInfoRequest(), Caller())


async def test_a_key_sees_the_models_that_it_is_for(tmp_path: Path) -> None:
    served = catalog().get("demo")
    models = {
        name: replace(served, card=replace(served.card, name=name), directory=tmp_path / name)
        for name in ("one", "two", "three")
    }
    for name in models:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(name)
    keys = {name: new_key() for name in ("one", "two", "both", "none")}
    of = {"both": ["one", "three"], "none": ["other"]}
    (tmp_path / "keys.toml").write_text(
        "".join(
            f'[[keys]]\nname = "{name}"\nsha256 = "{hash_of(key)}"\ntenant = "a"\nmodels = {of.get(name, [name])}\n'
            for name, key in keys.items()
        )
    )
    site = Site(ModelCatalog(models), Keys(str(tmp_path / "keys.toml")))
    for name in ("one", "two", "one"):
        caller = Caller(key=keys[name])
        assert (await site.servicer.GetModelInfo(vllm_pb2.GetModelInfoRequest(), caller)).served_model_name == name
        pieces = [each.data async for each in site.servicer.GetTokenizer(vllm_pb2.GetTokenizerRequest(), caller)]
        with zipfile.ZipFile(io.BytesIO(b"".join(pieces))) as archive:
            assert archive.read("tokenizer.json").decode() == name
    site.generate.may_end.set()
    assert await _rest(site.servicer.Generate(a_request(), Caller(key=keys["two"])))
    assert [request.model for request in site.generate.started] == ["two"]
    for name, error, words in (
        ("both", UnknownModelError, "here there are one, three$"),
        ("none", ForbiddenError, "this key is for no model here"),
        ("", UnauthenticatedError, "a key is needed"),
    ):
        caller = Caller(key=keys.get(name, ""))
        with pytest.raises(error, match=words):
            await site.servicer.GetModelInfo(vllm_pb2.GetModelInfoRequest(), caller)
        with pytest.raises(error):
            await _rest(site.servicer.Generate(a_request(), caller))
        with pytest.raises(error):
            _ = [each async for each in site.servicer.GetTokenizer(vllm_pb2.GetTokenizerRequest(), caller)]
    assert len(site.generate.started) == 1


async def test_what_is_said_of_model_server_and_load() -> None:
    site = Site()
    info = await site.servicer.GetModelInfo(vllm_pb2.GetModelInfoRequest(), Caller())
    assert (info.served_model_name, info.vocab_size, info.max_context_length) == ("demo", CARD.vocab_size, 100)
    assert (list(info.eos_token_ids), info.is_generation) == ([0], True)
    assert (await site.servicer.HealthCheck(vllm_pb2.HealthCheckRequest(), Caller())).healthy
    valid = validate(inference_pb2.GenerateRequest(prompt="a"), catalog(), max_prompt_bytes=100)
    waiting, running = (an_open_request(valid, [1, 2, 3], 10) for _ in range(2))
    running.worker_id = "w"
    site.requests.add(waiting)
    site.requests.add(running)
    (load,) = (await site.servicer.GetLoads(vllm_pb2.GetLoadsRequest(), Caller())).loads
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs, load.num_used_tokens) == (1, 1, 2, 3)
    assert (await site.servicer.GetServerInfo(vllm_pb2.GetServerInfoRequest(), Caller())).active_requests == 2


async def test_the_tokenizers_files_make_one_archive_wherever_they_are(tmp_path: Path) -> None:
    served, archives = catalog().get("demo"), []
    for number in range(2):
        directory = tmp_path / str(number)
        directory.mkdir()
        for name in ("tokenizer.json", "model.safetensors", "a.py"):
            # Of more than a piece, packed.
            (directory / name).write_bytes(random.Random(1).randbytes(200_000))
            os.utime(directory / name, (number * 10**6, number * 10**6))
        site = Site(ModelCatalog({"demo": replace(served, directory=directory)}))
        calls = [site.servicer.GetTokenizer(vllm_pb2.GetTokenizerRequest(), Caller()) for _ in range(2)]
        for call in calls:
            pieces = [piece async for piece in call]
            archives.append(b"".join(piece.data for piece in pieces))
            assert pieces[-1].sha256 == hashlib.sha256(archives[-1]).hexdigest()
    assert len(set(archives)) == 1
    with zipfile.ZipFile(io.BytesIO(archives[0])) as archive:
        assert archive.namelist() == ["tokenizer.json"]
    with pytest.raises(NotFoundError):
        await anext(Site().servicer.GetTokenizer(vllm_pb2.GetTokenizerRequest(), Caller()))
