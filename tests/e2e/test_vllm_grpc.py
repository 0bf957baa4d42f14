"""A client on the stubs of vLLM's engine service: the tokens of our API, and nothing is left of what it leaves."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from bucketserve.client import BucketServeClient, Chunk
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric
from tests.e2e.test_cancellation import nothing_runs
from tests.e2e.test_stack import SLOW

pytestmark = pytest.mark.e2e

PROMPT, IDS = "In the beginning", [5, 6, 7]


async def seen(stack: LocalStack, what: str) -> Any:
    """What a client saw that did that."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.e2e.smg_client", stack.gateway_address, what),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return json.loads(out)


async def tokens(client: BucketServeClient, **options) -> list[int]:
    events = client.generate(max_tokens=20, ignore_eos=True, **options)
    return [token_id async for event in events if isinstance(event, Chunk) for token_id in event.token_ids]


@pytest.mark.stack(environ=SLOW)
async def test_a_router_sees_model_server_and_load(stack: LocalStack) -> None:
    found = await seen(stack, "describe")
    assert found["HealthCheck"] == {"healthy": True, "message": "serving"}
    info = found["GetModelInfo"]
    assert (info["served_model_name"], info["is_generation"], info["vocab_size"]) == ("demo", True, 4096)
    assert info["max_context_length"] > 0 and info["eos_token_ids"]
    assert (info["tokenizer_path"], found["GetServerInfo"]["server_type"]) == ("", "bucketserve")
    (load,) = found["GetLoads"]["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"], load["num_total_reqs"]) == (0, 0, 0)
    assert found["Embed"] == "UNIMPLEMENTED"


@pytest.mark.stack(environ=SLOW)
async def test_a_router_gets_the_tokens_of_our_api(stack: LocalStack) -> None:
    found = await seen(stack, "generate")
    async with BucketServeClient(stack.gateway_address) as client:
        sampling = common_pb2.SamplingParams(temperature=0.9, top_k=20, seed=7)
        wanted = {
            "ids": await tokens(client, token_ids=IDS),
            "text": await tokens(client, prompt=PROMPT),
            "seeded": await tokens(client, token_ids=IDS, sampling=sampling),
        }
        prompt_tokens = len(await client.tokenize(PROMPT))
    assert {name: found[name]["tokens"] for name in wanted} == wanted
    (whole,) = found["whole"]["completes"]
    assert (whole["output_ids"], found["whole"]["chunks"]) == (wanted["ids"], 0)
    assert whole["output_logprobs"]["token_ids"] == wanted["ids"]
    assert [len(each["values"]) for each in whole["output_logprobs"]["top_logprobs"]] == [2] * 20
    for name in wanted:
        assert found[name]["chunks"] >= 1
        (complete,) = found[name]["completes"]
        assert (complete["finish_reason"], complete["completion_tokens"]) == ("length", 20)
        assert complete["prompt_tokens"] == (prompt_tokens if name == "text" else len(IDS))
        assert "output_ids" not in complete


@pytest.mark.stack(environ=SLOW)
async def test_a_router_gets_the_tokenizer_and_nothing_else_of_the_models_files(stack: LocalStack) -> None:
    found, again = await seen(stack, "tokenizer"), await seen(stack, "tokenizer")
    async with BucketServeClient(stack.gateway_address) as client:
        assert found["ids"] == await client.tokenize(PROMPT)
    assert found["is_whole"] and found == again
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(found["names"])
    assert not any(name.endswith((".safetensors", ".py")) for name in found["names"])


@pytest.mark.stack(environ=SLOW)
async def test_a_stop_token_ends_the_output_and_is_named(stack: LocalStack) -> None:
    found = await seen(stack, "stop_at")
    (complete,) = found["completes"]
    assert found["tokens"] == found["before"]
    assert (complete["finish_reason"], complete["matched_token_id"]) == ("stop", found["token"])


@pytest.mark.stack(environ=SLOW)
async def test_calls_that_are_left_leave_nothing(stack: LocalStack) -> None:
    assert await seen(stack, "cancel") == 5
    await eventually(lambda: nothing_runs(stack), 10)
    assert metric(stack, "gateway", "bucketserve_gateway_requests_total", outcome="cancelled") == 5


@pytest.mark.stack(environ=SLOW)
async def test_an_abort_ends_what_its_own_connection_sent_and_nothing_of_a_stranger(stack: LocalStack) -> None:
    ends = await seen(stack, "abort")
    assert [[complete["finish_reason"] for complete in completes] for completes in ends] == [["abort"]] * 3
    assert all(0 < complete["completion_tokens"] < 1500 for (complete,) in ends)
    await eventually(lambda: nothing_runs(stack), 10)
    assert metric(stack, "gateway", "bucketserve_gateway_requests_total", outcome="cancelled") == 3


@pytest.mark.stack(environ=SLOW)
async def test_a_deadline_of_a_router(stack: LocalStack) -> None:
    assert (await seen(stack, "deadline")).startswith("DEADLINE_EXCEEDED")
    await eventually(lambda: nothing_runs(stack), 10)


@pytest.mark.stack(environ=SLOW)
async def test_what_a_router_may_not_ask_for_is_told(stack: LocalStack) -> None:
    found = await seen(stack, "errors")
    assert {name: error.partition(":")[0] for name, error in found.items()} == dict.fromkeys(found, "INVALID_ARGUMENT")
    assert found["ids beyond the context"].endswith("2000000 tokens fill the context of 2048")
    assert metric(stack, "scheduler", "bucketserve_scheduler_admitted_total") == 0


async def test_a_router_that_wants_too_much_is_refused_and_then_served(new_stack: NewStack) -> None:
    stack = new_stack(environ={**SLOW, "BUCKETSERVE_GATEWAY_MAX_OPEN_CALLS": "8"})
    found, last = await seen(stack, "overload")
    assert found.keys() == {"OK", "RESOURCE_EXHAUSTED"} and found["OK"] + found["RESOURCE_EXHAUSTED"] == 21
    assert len(last) == 3
    refused = metric(stack, "gateway", "bucketserve_gateway_refused_total", reason="max_calls")
    assert refused == found["RESOURCE_EXHAUSTED"]
