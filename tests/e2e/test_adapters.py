"""Adapters by name, through real processes: where they are, what they say, how they come and go."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import openai
import pytest

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.core.errors import UnavailableError, UnknownModelError
from bucketserve.core.types import RequestId
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.engine.fingerprint import adapter_fingerprint
from bucketserve.facades import kserve_pb2, kserve_pb2_grpc
from bucketserve.job_client import JobClient, request_from_json
from bucketserve.ports import Adapter, SequenceSpec
from bucketserve_cli.stack import LocalStack
from tests.adapters import write_adapter
from tests.e2e.conftest import DEMO_MODEL, NewStack
from tests.e2e.observe import events, eventually, leader, metric
from tests.e2e.openai_client import sdk
from tests.e2e.test_cli import bucketserve

pytestmark = pytest.mark.e2e

MODEL = Path(DEMO_MODEL)
SLOW = {"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "20000"}
PROMPT = list(range(5, 40))


def expected(adapter: Path | None, prompt: list[int], max_tokens: int) -> list[int]:
    """What the fake engine says with an adapter."""
    engine = FakeEngine(FakeSettings(max_adapters=1))
    fingerprint = ""
    if adapter is not None:
        fingerprint = adapter_fingerprint(adapter)
        engine.load_adapter(Adapter(fingerprint=fingerprint, directory=adapter))
    name = RequestId("r")
    engine.add([SequenceSpec(request_id=name, token_ids=tuple(prompt), max_new_tokens=max_tokens, adapter=fingerprint)])
    tokens: list[int] = []
    while engine.has_work():
        tokens += [token.token_id for token in engine.step().tokens if token.token_id is not None]
    return tokens


def here(directory: Path, number: int = 1) -> tuple[dict[str, str], ...]:
    """Settings of workers of which so many have the adapters of a directory."""
    return ({"BUCKETSERVE_WORKER_ADAPTERS_DIR": str(directory)},) * number + ({},)


async def run(stack: LocalStack, model: str, prompt: list[int] = PROMPT, max_tokens: int = 12) -> list[int]:
    return [token async for token in stream(stack, model, prompt, max_tokens)]


async def stream(stack: LocalStack, model: str, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
    async with BucketServeClient(stack.gateway_address) as client:
        async for event in client.generate(token_ids=prompt, model=model, max_tokens=max_tokens, ignore_eos=True):
            if isinstance(event, Chunk):
                for token in event.token_ids:
                    yield token
            elif isinstance(event, Finished):
                return
    raise AssertionError("no end")


async def names(stack: LocalStack) -> dict[str, str]:
    """Names of models with their parents."""
    async with BucketServeClient(stack.gateway_address) as client:
        return {model.name: model.parent for model in await client.list_models()}


async def listed(stack: LocalStack, *adapters: str) -> None:
    wanted = {"demo": "", **{f"demo:{name}": "demo" for name in adapters}}

    async def is_so() -> bool:
        return await names(stack) == wanted

    await eventually(is_so)


async def test_every_front_takes_the_name_and_requests_go_where_the_adapter_is(
    new_stack: NewStack, tmp_path: Path
) -> None:
    one, two = (write_adapter(tmp_path / "there" / name, MODEL, seed) for seed, name in enumerate(("one", "two")))
    stack = new_stack(num_workers=2, worker_environ=here(tmp_path / "there"))
    await listed(stack, "one", "two")
    wanted = {"demo": expected(None, PROMPT, 12), "demo:one": expected(one, PROMPT, 12)}
    wanted["demo:two"] = expected(two, PROMPT, 12)
    assert len({tuple(tokens) for tokens in wanted.values()}) == 3
    for _ in range(4):
        found = await asyncio.gather(*(run(stack, name) for name in (*wanted, "")))
        assert found == [*wanted.values(), wanted["demo"]]

    async with sdk(stack) as client:
        models = {model.id: model.model_dump()["parent"] for model in (await client.models.list()).data}
        assert models == {"demo": None, "demo:one": "demo", "demo:two": "demo"}
        assert (await client.models.retrieve("demo:two")).model_dump()["parent"] == "demo"
        more = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
        texts = {name: (await client.completions.create(model=name, **more)).choices[0].text for name in wanted}
        assert len(set(texts.values())) == 3
        assert (await client.completions.create(model="demo:one", **more)).model == "demo:one"
        with pytest.raises(openai.NotFoundError, match="served: demo, demo:one, demo:two"):
            await client.completions.create(model="demo:three", **more)

    async with grpc.aio.insecure_channel(stack.gateway_address) as channel:
        stub = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert (await stub.ModelReady(kserve_pb2.ModelReadyRequest(name="demo:one"))).ready

    async with JobClient(stack.gateway_address) as jobs:
        rows = [{"custom_id": n, "model": n, "token_ids": PROMPT, "max_tokens": 12, "ignore_eos": True} for n in wanted]
        job = await jobs.submit([request_from_json(row) for row in rows])
        results = [result async for result in jobs.results(job.job_id, follow=True)]
    assert {result.request_id: list(result.token_ids) for result in results} == wanted
    # Who names no model means the only one, whatever adapters it has.
    await asyncio.to_thread(bucketserve, "bench", "--number", "2", "--address", stack.gateway_address)
    # Nothing was sent to a worker that has not its adapter, to be sent back.
    assert metric(stack, "gateway", "bucketserve_gateway_resumptions_total") == 0


@pytest.mark.parametrize("roles", [("both", "both", "both"), ("prefill", "decode", "decode")], ids="-".join)
async def test_streams_keep_their_adapter_when_a_worker_is_killed(
    new_stack: NewStack, tmp_path: Path, roles: tuple[str, ...]
) -> None:
    adapter = write_adapter(tmp_path / "there" / "one", MODEL, 1)
    stack = new_stack(roles=roles, environ=SLOW, worker_environ=here(tmp_path / "there", 2))
    await listed(stack, "one")
    prompts = [[number, *PROMPT] for number in range(8)]
    wanted = [expected(adapter, prompt, 400) for prompt in prompts]
    running = [asyncio.create_task(run(stack, "demo:one", prompt, 400)) for prompt in prompts]
    able = ("worker-0", "worker-1")

    def num_running(name: str) -> float:
        return metric(stack, name, "vllm:num_requests_running")

    await eventually(lambda: sum(map(num_running, able)) >= 6)
    victim = max(able, key=num_running)
    stack.services[victim].signal(signal.SIGKILL)
    stack.services[victim].wait(5)
    stack.restart(victim)
    assert await asyncio.gather(*running) == wanted
    assert metric(stack, "gateway", "bucketserve_gateway_resumptions_total", cause="lost") >= 1


async def test_adapters_come_and_go_while_their_worker_runs(new_stack: NewStack, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for name in ("not an adapter", ".hidden", "a:b"):
        (there / name).mkdir()
    stack = new_stack(num_workers=2, environ=SLOW, worker_environ=here(there))
    with pytest.raises(UnknownModelError, match=r"served: demo$"):
        await run(stack, "demo:one")
    first = write_adapter(there / "one", MODEL, 1)
    await listed(stack, "one")
    old = expected(first, PROMPT, 400)
    assert await run(stack, "demo:one") == old[:12]
    # A stream that runs keeps what it began with, whatever becomes of the name.
    began = stream(stack, "demo:one", PROMPT, 400)
    tokens = [await anext(began)]
    first.rename(tmp_path / "former")
    second = write_adapter(there / "one", MODEL, 2)
    new = expected(second, PROMPT, 12)

    async def says_new() -> bool:
        try:
            return await run(stack, "demo:one") == new
        except UnavailableError as error:
            # Of that name there was none for a moment.
            assert error.reason == "NO_ADAPTER"
            return False

    await eventually(says_new)
    assert [*tokens, *[token async for token in began]] == old
    await eventually(lambda: events(stack, "worker-0", "adapter.unloaded"))
    # What can't be served is told, once, and what is served stays.
    (there / "torn").mkdir()
    (there / "torn" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (there / "torn" / "adapter_model.safetensors").write_bytes((second / "adapter_model.safetensors").read_bytes()[:-1])
    await eventually(lambda: events(stack, "worker-0", "adapter.refused"))
    assert await run(stack, "demo:one") == new
    (refused,) = events(stack, "worker-0", "adapter.refused")
    assert (refused["name"], "truncated" in refused["detail"]) == ("torn", True)
    shutil.rmtree(second)

    async def is_unknown() -> bool:
        try:
            await run(stack, "demo:one")
        except UnknownModelError:
            return True
        except UnavailableError as error:
            assert error.reason == "NO_ADAPTER"
        return False

    await eventually(is_unknown)
    await listed(stack)
    assert await run(stack, "demo") == expected(None, PROMPT, 12)


async def test_an_adapter_whose_last_worker_has_left_is_unknown(new_stack: NewStack, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "there" / "one", MODEL, 1)
    stack = new_stack(num_workers=2, worker_environ=here(tmp_path / "there"))
    await listed(stack, "one")
    stack.services["worker-0"].signal(signal.SIGTERM)
    stack.services["worker-0"].wait(30)
    await listed(stack)
    with pytest.raises(UnknownModelError, match=r"served: demo$"):
        await run(stack, "demo:one")
    stack.restart("worker-0")
    await listed(stack, "one")
    assert await run(stack, "demo:one") == expected(adapter, PROMPT, 12)


async def test_adapters_are_known_through_a_change_of_schedulers(new_stack: NewStack, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "there" / "one", MODEL, 1)
    stack = new_stack(num_schedulers=2, num_workers=2, worker_environ=here(tmp_path / "there"), environ=SLOW)
    await listed(stack, "one")
    running = [asyncio.create_task(run(stack, "demo:one", [number, *PROMPT], 300)) for number in range(4)]
    await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") >= 1)
    victim = await leader(stack)
    stack.services[victim].signal(signal.SIGKILL)
    stack.services[victim].wait(5)
    # Nobody is told meanwhile that there is no such adapter.
    for number in range(20):
        try:
            assert await run(stack, "demo:one") == expected(adapter, PROMPT, 12)
        except UnavailableError as error:
            assert error.reason == "NO_ADAPTER"
        if number < 10:
            assert "demo:one" in await names(stack)
    assert await asyncio.gather(*running) == [expected(adapter, [number, *PROMPT], 300) for number in range(4)]


async def test_jobs_wait_for_an_adapter_of_which_no_worker_is_here(new_stack: NewStack, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "there" / "one", MODEL, 1)
    stack = new_stack(worker_environ=here(tmp_path / "there")[:1], environ=SLOW)
    await listed(stack, "one")
    async with JobClient(stack.gateway_address) as jobs:
        row = {"model": "demo:one", "token_ids": PROMPT, "max_tokens": 200, "ignore_eos": True}
        job = await jobs.submit([request_from_json({**row, "custom_id": str(number)}) for number in range(8)])
    for name in ("gateway", "worker-0"):
        stack.services[name].signal(signal.SIGTERM)
        stack.services[name].wait(30)
    stack.restart("gateway")
    await eventually(lambda: stack.is_serving("gateway"))
    await listed(stack)
    # Its runner has looked for work by then.
    await asyncio.sleep(1.0)
    stack.restart("worker-0")
    async with JobClient(stack.gateway_address) as jobs:
        results = [result async for result in jobs.results(job.job_id, follow=True)]
    assert [result.error_reason for result in results] == [""] * 8
    assert [list(result.token_ids) for result in results] == [expected(adapter, PROMPT, 200)] * 8
