"""Several models and pools in one deployment: whose answer is whose, aliases everywhere, pools that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import httpx
import openai
import pytest

from bucketserve.client import BucketServeClient, Chunk, Finished, Started
from bucketserve.core.errors import ForbiddenError, UnavailableError, UnknownModelError
from bucketserve.facades import kserve_pb2, kserve_pb2_grpc, vllm_pb2, vllm_pb2_grpc
from bucketserve.job_client import JobClient, Result, request_from_json
from bucketserve.v1 import inference_pb2, job_pb2
from bucketserve_cli.plan import StackSpec
from bucketserve_cli.pools import Pool
from bucketserve_cli.stack import LocalStack
from bucketserve_cli.terminal import InputError
from bucketserve_gateway.keys import hash_of, new_key
from tests.chaos.oracle import expected_tokens
from tests.e2e.batch_client import ended, jsonl, rows, start, text_line
from tests.e2e.conftest import DEMO_MODEL
from tests.e2e.observe import begin, eventually, metric, models
from tests.e2e.openai_client import TEXT, sdk, url

pytestmark = pytest.mark.e2e

KEYS = {"all": new_key(), "toy": new_key(), "swift": new_key(), "ghost": new_key()}
DEMO, TOY = "demo", "toy"
ALIASES = {"swift": TOY, "org/toy:latest": TOY, "scripture": DEMO}
PROMPT = "And the king said"
OF_TOY = ("worker-1", "worker-2")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """The demo model, computed, and beside it one of the fake engine at two workers."""
    folder = tmp_path_factory.mktemp("two")
    of_models = {"all": "", "toy": 'models = ["toy"]\n', "swift": 'models = ["swift"]\n'}
    of_models["ghost"] = 'models = ["toy", "ghost", "toy:*"]\n'
    tables = [
        f'[[keys]]\nname = "{name}"\nsha256 = "{hash_of(key)}"\ntenant = "{name}"\n{of_models[name]}'
        for name, key in KEYS.items()
    ]
    (folder / "keys.toml").write_text("\n".join(tables))
    both = {"model": DEMO_MODEL, "context_tokens": "2048"}
    spec = StackSpec(
        pools=(
            Pool(1, {**both, "model_name": DEMO, "engine": "transformers", "kv_budget_tokens": "8192"}),
            Pool(2, {**both, "model_name": TOY, "engine": "fake"}),
        ),
        aliases=ALIASES,
        environ={"BUCKETSERVE_GATEWAY_KEYS_FILE": str(folder / "keys.toml")},
        log_dir=folder / "logs",
    )
    with LocalStack(spec) as stack:
        yield stack


@pytest.fixture(scope="module")
def truth() -> list[int]:
    """What transformers makes of the prompt with the demo model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(DEMO_MODEL)(PROMPT, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


@contextlib.asynccontextmanager
async def client_of(stack: LocalStack, key: str = "all") -> AsyncIterator[BucketServeClient]:
    async with BucketServeClient(stack.gateway_address, api_key=KEYS[key]) as client:
        yield client


async def answer(client: BucketServeClient, model: str, **more) -> tuple[str, list[int]]:
    """The name of the model that answers, and its tokens."""
    name, tokens = "", list[int]()
    asked = {"max_tokens": 8, "ignore_eos": True, "model": model, **more}
    async for event in client.generate(**asked):
        if isinstance(event, Started):
            name = event.model
        elif isinstance(event, Chunk):
            tokens += event.token_ids
        elif isinstance(event, Finished):
            return name, tokens
    raise AssertionError("no end")


async def test_each_model_has_its_own_answers_at_the_same_time(two: LocalStack, truth: list[int]) -> None:
    prompts = [[5 + i, 6, 7] for i in range(20)]
    async with client_of(two) as client:
        of_demo, of_toy = await asyncio.gather(
            asyncio.gather(*(answer(client, DEMO, prompt=PROMPT) for _ in prompts)),
            asyncio.gather(*(answer(client, TOY, token_ids=prompt) for prompt in prompts)),
        )
    assert of_demo == [(DEMO, truth)] * len(prompts)
    assert of_toy == [(TOY, expected_tokens(prompt, 8, 0.0, 0)) for prompt in prompts]
    seen = {model.model: {worker.worker_id for worker in model.workers} for model in await models(two)}
    assert seen == {DEMO: {"worker-0"}, TOY: set(OF_TOY)}


async def test_an_alias_is_its_model_in_the_native_api_and_in_metrics(two: LocalStack) -> None:
    begin(two)
    expected = TOY, expected_tokens([5, 6, 7], 8, 0.0, 0)
    async with client_of(two) as client:
        for alias in ("swift", "org/toy:latest"):
            assert await answer(client, alias, token_ids=[5, 6, 7]) == expected
        assert await client.tokenize(PROMPT, model="swift") == await client.tokenize(PROMPT, model=TOY)
        listed = {model.name: list(model.aliases) for model in await client.list_models()}
        assert listed == {DEMO: ["scripture"], TOY: ["org/toy:latest", "swift"]}
        found = await client.stub.GetModel(
            inference_pb2.GetModelRequest(name="swift"), metadata=[("authorization", f"Bearer {KEYS['all']}")]
        )
        assert found.model.name == TOY
        for name in ("Swift", "swift ", "toy:latest"):
            with pytest.raises(UnknownModelError, match=r"unknown model .*; served: demo, toy, org/toy:latest, "):
                await answer(client, name, prompt=PROMPT)
        with pytest.raises(UnknownModelError, match="name a model: several are served here"):
            await answer(client, "", prompt=PROMPT)
    assert metric(two, "gateway", "bucketserve_gateway_requests_total", model=TOY) == 2
    assert not any(metric(two, "gateway", "bucketserve_gateway_requests_total", model=alias) for alias in ALIASES)


async def test_an_alias_is_its_model_in_the_other_protocols(two: LocalStack) -> None:
    async with sdk(two, key=KEYS["all"]) as client:
        listed = {model.id: model.model_dump()["root"] for model in (await client.models.list()).data}
        assert listed == {DEMO: DEMO, TOY: TOY, **ALIASES}
        assert (await client.models.retrieve("org/toy:latest")).id == "org/toy:latest"
        for name, its in (("swift", TOY), ("scripture", DEMO)):
            done = await client.completions.create(model=name, prompt=PROMPT, max_tokens=4, temperature=0)
            same = await client.completions.create(model=its, prompt=PROMPT, max_tokens=4, temperature=0)
            assert (done.model, done.choices[0].text) == (its, same.choices[0].text)
        before = metric(two, "gateway", "bucketserve_gateway_requests_total", outcome="unknown_model")
        with pytest.raises(openai.NotFoundError, match="unknown model 'fast'; served: demo, toy"):
            await client.completions.create(model="fast", prompt=PROMPT)
        assert metric(two, "gateway", "bucketserve_gateway_requests_total", outcome="unknown_model") == before + 1
        lines = jsonl(text_line("a", model="swift", temperature=0), text_line("b", model=TOY, temperature=0))
        batch = await ended(client, (await start(client, lines, TEXT)).id)
        assert (batch.status, batch.request_counts and batch.request_counts.completed) == ("completed", 2)
        bodies = [row["response"]["body"] for row in await rows(client, batch.output_file_id)]
        assert {(body["model"], body["choices"][0]["text"]) for body in bodies} == {
            (TOY, bodies[0]["choices"][0]["text"])
        }
    metadata = [("authorization", f"Bearer {KEYS['all']}")]
    async with grpc.aio.insecure_channel(two.gateway_address) as channel:
        triton = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name, is_there in (("swift", True), ("fast", False)):
            ready = await triton.ModelReady(kserve_pb2.ModelReadyRequest(name=name), metadata=metadata)
            assert ready.ready is is_there
        request = kserve_pb2.ModelInferRequest(model_name="swift")
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(PROMPT.encode())
        assert (await triton.ModelInfer(request, metadata=metadata)).model_name == TOY
        with pytest.raises(grpc.aio.AioRpcError, match="serves exactly one") as caught:
            engine = vllm_pb2_grpc.VllmEngineStub(channel)
            await engine.GetModelInfo(vllm_pb2.GetModelInfoRequest(), metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("key", ["toy", "swift"])
async def test_a_key_for_a_model_is_for_all_its_names_and_no_other_model(two: LocalStack, key: str) -> None:
    async with client_of(two, key) as client, sdk(two, key=KEYS[key]) as other:
        for name in (TOY, "swift", "org/toy:latest"):
            assert (await answer(client, name, token_ids=[5]))[0] == TOY
            assert (await other.completions.create(model=name, prompt=[5], max_tokens=1)).model == TOY
        for name in (DEMO, "scripture", "fast", ""):
            with pytest.raises(ForbiddenError, match="not for model"):
                await answer(client, name, token_ids=[5])
        with pytest.raises(openai.PermissionDeniedError):
            await other.completions.create(model="scripture", prompt=[5], max_tokens=1)
        assert [model.name for model in await client.list_models()] == [TOY]
        assert {model.id for model in (await other.models.list()).data} == {TOY, "swift", "org/toy:latest"}
    async with JobClient(two.gateway_address, api_key=KEYS[key]) as jobs:
        job = await jobs.submit([request_from_json({"token_ids": [5], "max_tokens": 2, "model": "swift"})])
        results = [result async for result in jobs.results(job.job_id, follow=True)]
        assert [(len(result.token_ids), result.error_reason) for result in results] == [(2, "")]
        with pytest.raises(ForbiddenError):
            await jobs.submit([request_from_json({"token_ids": [5], "model": "scripture"})])


async def test_an_error_names_no_model_that_the_key_is_not_for(two: LocalStack) -> None:
    said: list[str] = []
    line = request_from_json({"token_ids": [5], "model": "ghost"})
    async with client_of(two, "ghost") as client, JobClient(two.gateway_address, api_key=KEYS["ghost"]) as jobs:
        for name in ("ghost", "toy:ghost"):
            for call in (answer(client, name, token_ids=[5]), client.tokenize(PROMPT, model=name), jobs.submit([line])):
                with pytest.raises(UnknownModelError) as unknown:
                    await call
                said.append(str(unknown.value))
    async with sdk(two, key=KEYS["ghost"]) as other:
        for call in (
            other.completions.create(model="ghost", prompt=PROMPT),
            other.chat.completions.create(model="toy:ghost", messages=[{"role": "user", "content": "a"}], stream=True),
            other.models.retrieve("ghost"),
        ):
            with pytest.raises(openai.NotFoundError) as missing:
                await call
            said.append(missing.value.message)
        batch = await ended(other, (await start(other, jsonl(text_line("a", model="ghost")), TEXT)).id)
        assert batch.errors and batch.errors.data
        said.append(str(batch.errors.data[0].message))
    metadata = [("authorization", f"Bearer {KEYS['ghost']}")]
    async with grpc.aio.insecure_channel(two.gateway_address) as channel:
        triton = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = kserve_pb2.ModelInferRequest(model_name="ghost")
        request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a")
        for call in (
            triton.ModelInfer(request, metadata=metadata),
            triton.ModelMetadata(kserve_pb2.ModelMetadataRequest(name="ghost"), metadata=metadata),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            said.append(str(failed.value.details()))
        said += [answer.error_message async for answer in triton.ModelStreamInfer(iter([request]), metadata=metadata)]
        engine = vllm_pb2_grpc.VllmEngineStub(channel)
        info = await engine.GetModelInfo(vllm_pb2.GetModelInfoRequest(), metadata=metadata)
        assert info.served_model_name == TOY
    assert len(said) == 13
    for text in said:
        assert text.endswith("served: toy, org/toy:latest, swift"), text


async def test_a_pool_goes_and_comes_while_the_other_serves(two: LocalStack, truth: list[int]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(client_of(two))
        jobs = await stack.enter_async_context(JobClient(two.gateway_address, api_key=KEYS["all"]))
        answers: list[tuple[str, list[int]]] = []
        is_over = asyncio.Event()

        async def ask_on() -> None:
            while not is_over.is_set():
                answers.append(await answer(client, DEMO, prompt=PROMPT))
                await asyncio.sleep(0.02)

        asking = asyncio.create_task(ask_on())
        for name, how in zip(OF_TOY, (signal.SIGTERM, signal.SIGKILL), strict=True):
            two.services[name].signal(how)
            await eventually(lambda name=name: two.services[name].exit_status is not None)
        job = await jobs.submit([request_from_json({"token_ids": [5, 6], "max_tokens": 3, "model": "swift"})])
        with pytest.raises(UnavailableError, match="no worker serves model 'toy' at present") as caught:
            await answer(client, "swift", token_ids=[5])
        assert (caught.value.reason, caught.value.retry_delay_s) == ("NO_WORKER", 5.0)
        # From now on nobody waits: a job alone, which has the time.
        num_refused = metric(two, "scheduler", "bucketserve_scheduler_refused_total", reason="no_worker")
        with pytest.raises(UnavailableError, match="no worker serves model 'toy' at present"):
            await answer(client, TOY, token_ids=[5])
        assert metric(two, "scheduler", "bucketserve_scheduler_refused_total", reason="no_worker") > num_refused
        async with httpx.AsyncClient(base_url=url(two), headers={"authorization": f"Bearer {KEYS['all']}"}) as http:
            refused = await http.post(TEXT, json={"model": "swift", "prompt": PROMPT})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert "no worker serves model 'toy'" in refused.json()["error"]["message"]
        assert (await jobs.get(job.job_id)).state == job_pb2.JOB_STATE_RUNNING
        for name in OF_TOY:
            two.restart(name)
        await asyncio.to_thread(two.wait_until_serving, 60)
        assert await answer(client, "swift", token_ids=[5, 6]) == (TOY, expected_tokens([5, 6], 8, 0.0, 0))
        results: list[Result] = [result async for result in jobs.results(job.job_id, follow=True)]
        assert [(len(result.token_ids), result.error_reason) for result in results] == [(3, "")]
        is_over.set()
        await asking
    assert len(answers) > 10
    assert all(each == (DEMO, truth) for each in answers)


def test_pools_that_are_no_whole_are_refused_before_anything_starts(tmp_path: Path) -> None:
    both = {"model": DEMO_MODEL, "engine": "fake"}
    for pools, problem in (
        ((Pool(1, {**both, "role": "decode"}), Pool(1, {**both, "model_name": "b"})), "prefill workers need a decode"),
        ((Pool(1, both), Pool(1, {**both, "model": "/elsewhere"})), "pools of model 'demo' are of"),
    ):
        with pytest.raises(InputError, match=problem):
            LocalStack(StackSpec(pools=pools, log_dir=tmp_path / "logs"))
    assert not (tmp_path / "logs").exists()
