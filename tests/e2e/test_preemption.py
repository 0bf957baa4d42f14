"""Workers whose KV runs out let requests go: their clients see a pause, and nothing else."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.core.types import MAX_PREEMPTIONS, RequestId
from bucketserve.ports import Sampling, SequenceSpec
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack
from tests.chaos.oracle import Request, expected_tokens
from tests.e2e.conftest import DEMO_MODEL
from tests.e2e.observe import eventually, metric

pytestmark = pytest.mark.e2e

SMALL = {"BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": "500", "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "2000"}
MOST_TOKENS, NUM_SHORT = 300, 5
SHORT_SEEDS = range(100, 104)
Outputs = Callable[[Request], list[int]]
"""Whole output of a request."""


def requests(seed: int, number: int) -> list[Request]:
    """Returns requests that differ in their prompts, greedy and random by turns."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(2, 250) for _ in range(rng.randint(10, 40))) for _ in range(number)]
    return [
        Request(prompt, MOST_TOKENS, temperature=0.8 * (i % 2), seed=rng.randrange(1 << 30) * (i % 2))
        for i, prompt in enumerate(prompts)
    ]


def whole(request: Request) -> list[int]:
    return expected_tokens(request.prompt, request.max_tokens, request.temperature, request.seed)


async def run(client: BucketServeClient, request: Request, **more) -> tuple[list[int], Finished]:
    """Tokens and the one end of a request."""
    tokens: list[int] = []
    ends: list[Finished] = []
    sampling = common_pb2.SamplingParams(temperature=request.temperature, seed=request.seed)
    async for event in client.generate(
        token_ids=request.prompt, max_tokens=request.max_tokens, ignore_eos=True, sampling=sampling, **more
    ):
        assert not ends
        if isinstance(event, Chunk):
            tokens += event.token_ids
        elif isinstance(event, Finished):
            ends.append(event)
    (end,) = ends
    return tokens, end


async def show_short_outputs(client: BucketServeClient, outputs: Outputs = whole) -> None:
    """Sends requests that may be long and are short: whoever learns from them counts on less KV than others take."""
    for seed in SHORT_SEEDS:
        asked = requests(seed, 10)
        stops = [outputs(request)[NUM_SHORT] for request in asked]
        results = await asyncio.gather(
            *(run(client, request, stop_token_ids=[stop]) for request, stop in zip(asked, stops, strict=True))
        )
        for request, stop, (tokens, end) in zip(asked, stops, results, strict=True):
            assert tokens == outputs(request)[: outputs(request).index(stop)]
            assert end.reason == common_pb2.FINISH_REASON_STOP


def preempted(stack: LocalStack, **labels: str) -> float:
    return sum(metric(stack, name, "bucketserve_worker_preempted_total", **labels) for name in stack.worker_names())


def resumed(stack: LocalStack, cause: str) -> float:
    return metric(stack, "gateway", "bucketserve_gateway_resumptions_total", cause=cause)


@pytest.mark.stack(environ=SMALL)
async def test_outputs_are_whole_though_their_worker_has_kv_for_few_of_them(stack: LocalStack) -> None:
    asked = requests(1, 10)
    async with BucketServeClient(stack.gateway_address) as client:
        await show_short_outputs(client)
        results = await asyncio.gather(*(run(client, request, is_batch=i % 3 == 0) for i, request in enumerate(asked)))
    assert [tokens for tokens, _ in results] == [whole(request) for request in asked]
    assert {end.reason for _, end in results} == {common_pb2.FINISH_REASON_LENGTH}
    # They were let go by the worker for want of KV, or by the scheduler for interactive ones, each one seldom.
    assert 1 < max(end.attempts for _, end in results) <= 1 + MAX_PREEMPTIONS
    number = sum(end.attempts - 1 for _, end in results)
    await eventually(lambda: preempted(stack) == number)
    assert (resumed(stack, "preempted"), resumed(stack, "lost")) == (number, 0)
    (worker,) = stack.worker_names()
    assert metric(stack, worker, "bucketserve_worker_finished_total", reason="preempted") == number


def outputs_of_model(asked: Sequence[Request]) -> list[list[int]]:
    """Returns what the demo model generates where there is KV for all."""
    from bucketserve.engine.loader import LoadSettings, load_engine

    engine = load_engine(LoadSettings(model=DEMO_MODEL, num_threads=1))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(asked))}
    for i, request in enumerate(asked):
        one = SequenceSpec(
            request_id=RequestId(str(i)),
            token_ids=request.prompt,
            max_new_tokens=request.max_tokens,
            sampling=Sampling(temperature=request.temperature, seed=request.seed),
        )
        engine.add([one])
    while engine.has_work():
        for output in engine.step().tokens:
            assert output.token_id is not None
            tokens[output.request_id].append(output.token_id)
    return list(tokens.values())


@pytest.mark.engine
@pytest.mark.stack(engine="transformers", environ=SMALL | {"BUCKETSERVE_WORKER_NUM_THREADS": "1"})
async def test_a_model_says_the_same_with_kv_for_few_as_with_kv_for_all(stack: LocalStack) -> None:
    asked = requests(4, 8)
    short = [request for seed in SHORT_SEEDS for request in requests(seed, 10)]
    # Of the short ones no more is wanted than their beginning.
    begun = [replace(request, max_tokens=NUM_SHORT + 1) for request in short]
    outputs = await asyncio.to_thread(outputs_of_model, (*asked, *begun))
    known = dict(zip((*asked, *short), outputs, strict=True))
    async with BucketServeClient(stack.gateway_address) as client:
        await show_short_outputs(client, known.__getitem__)
        results = await asyncio.gather(*(run(client, request) for request in asked))
    assert [tokens for tokens, _ in results] == [known[request] for request in asked]
    assert 1 < max(end.attempts for _, end in results) <= 1 + MAX_PREEMPTIONS
    assert resumed(stack, "preempted") > 0
    assert resumed(stack, "lost") == 0


@pytest.mark.stack(roles=("prefill", "decode"), environ=SMALL)
async def test_what_a_decode_worker_lets_go_is_prefilled_again(stack: LocalStack) -> None:
    asked = requests(2, 10)
    async with BucketServeClient(stack.gateway_address) as client:
        await show_short_outputs(client)
        results = await asyncio.gather(*(run(client, request) for request in asked))
    assert [tokens for tokens, _ in results] == [whole(request) for request in asked]
    assert 1 < max(end.attempts for _, end in results) <= 1 + MAX_PREEMPTIONS
    assert resumed(stack, "lost") == 0


@pytest.mark.stack(num_workers=2, environ=SMALL)
async def test_a_worker_that_dies_while_it_lets_requests_go_costs_no_more_than_any_other(stack: LocalStack) -> None:
    asked = requests(3, 14)
    async with BucketServeClient(stack.gateway_address) as client:
        await show_short_outputs(client)
        running = [asyncio.create_task(run(client, request)) for request in asked]
        await eventually(lambda: preempted(stack) >= 2)
        victim = max(stack.worker_names(), key=lambda name: metric(stack, name, "vllm:num_requests_running"))
        stack.services[victim].signal(signal.SIGKILL)
        stack.services[victim].wait(5)
        stack.restart(victim)
        results = await asyncio.gather(*running)
    assert [tokens for tokens, _ in results] == [whole(request) for request in asked]
    assert resumed(stack, "preempted") >= 2
    assert resumed(stack, "lost") >= 1
