"""The whole system with vLLM in its workers: what is promised of streams holds there as well (docs/engines.md)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bucketserve.client import BucketServeClient, Chunk, Finished
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack
from tests.adapters import write_adapter
from tests.e2e.conftest import DEMO_MODEL, NewStack
from tests.e2e.observe import eventually, metric, status
from tests.e2e.test_cancellation import nothing_runs
from tests.e2e.test_disaggregation import is_clean, transfers
from tests.integration.engine import connectors

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]

ENVIRON = {
    "BUCKETSERVE_WORKER_ENGINE_ARGS": "enforce_eager=true,block_size=32",
    "BUCKETSERVE_WORKER_DTYPE": "float32",
    "BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": "8192",
    "BUCKETSERVE_WORKER_NUM_THREADS": "1",
    # Small steps, so that a prompt takes many of them.
    "BUCKETSERVE_WORKER_MAX_STEP_TOKENS": "64",
    "BUCKETSERVE_WORKER_MAX_SEQUENCES": "16",
}
SMALL = ENVIRON | {"BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": "512", "BUCKETSERVE_WORKER_CONTEXT_TOKENS": "448"}
PROMPT, OUTPUT = 1500, 500
ROOT = Path(__file__).resolve().parents[2]


async def run(client: BucketServeClient, number: int, max_tokens: int, **more) -> tuple[list[int], Finished]:
    """Tokens and end of a request; by turns greedy and seeded."""
    prompt = [2 + (i * 7 + number * 31) % 4000 for i in range(20 + number)]
    sampling = common_pb2.SamplingParams(temperature=0.9 * (number % 2), top_k=50, seed=number)
    tokens: list[int] = []
    async for event in client.generate(
        token_ids=prompt, max_tokens=max_tokens, ignore_eos=True, sampling=sampling, **more
    ):
        if isinstance(event, Chunk):
            tokens += event.token_ids
        elif isinstance(event, Finished):
            return tokens, event
    raise AssertionError("no end")


async def end(task: asyncio.Task) -> None:
    """As a client that goes away."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.stack(engine="vllm", num_workers=2, environ=ENVIRON)
async def test_streams_go_on_with_the_same_tokens_when_their_worker_is_killed(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        wanted = [(await run(client, number, 200))[0] for number in range(8)]
        running = [asyncio.create_task(run(client, number, 200)) for number in range(8)]
        workers = stack.worker_names()
        await eventually(lambda: sum(metric(stack, name, "vllm:num_requests_running") for name in workers) >= 6)
        victim = max(workers, key=lambda name: metric(stack, name, "vllm:num_requests_running"))
        stack.services[victim].signal(signal.SIGKILL)
        stack.services[victim].wait(5)
        results = await asyncio.gather(*running)
    assert [tokens for tokens, _ in results] == wanted
    assert max(finished.attempts for _, finished in results) == 2
    assert metric(stack, "gateway", "bucketserve_gateway_resumptions_total", cause="lost") >= 1


@pytest.mark.stack(engine="vllm", num_workers=2, environ=ENVIRON)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_client_that_goes_away_leaves_nothing(stack: LocalStack, phase: str) -> None:
    has_token = asyncio.Event()

    async def ask() -> None:
        async for event in client.generate(token_ids=[5] * PROMPT, max_tokens=OUTPUT, ignore_eos=True):
            if isinstance(event, Chunk):
                has_token.set()

    def num_prefilled() -> float:
        return sum(metric(stack, name, "bucketserve_worker_prefill_tokens_total") for name in stack.worker_names())

    async with BucketServeClient(stack.gateway_address) as client:
        task = asyncio.create_task(ask())
        if phase == "decode":
            await has_token.wait()
        else:
            await eventually(lambda: num_prefilled() > 0)
        await end(task)
        await eventually(lambda: nothing_runs(stack))
        # The worker is as good as before.
        tokens, finished = await run(client, 3, 10)
        assert (len(tokens), finished.reason) == (10, common_pb2.FINISH_REASON_LENGTH)


@pytest.mark.stack(engine="vllm", environ=ENVIRON | {"BUCKETSERVE_WORKER_MAX_SEQUENCES": "1"})
async def test_a_client_that_goes_away_while_it_is_queued_leaves_nothing(stack: LocalStack) -> None:
    async def num_waiting() -> int:
        return (await status(stack)).num_waiting

    async def nobody_waits() -> bool:
        return await num_waiting() == 0

    async with BucketServeClient(stack.gateway_address) as client:
        holder = asyncio.create_task(run(client, 2, 1500))
        await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") == 1)
        leaver = asyncio.create_task(run(client, 4, 100))
        await eventually(num_waiting)
        await end(leaver)
        await eventually(nobody_waits)
        await end(holder)
        await eventually(lambda: nothing_runs(stack))


@pytest.mark.stack(engine="vllm", environ=SMALL)
async def test_outputs_are_whole_though_their_worker_has_kv_for_few_of_them(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        wanted = [(await run(client, number, 300))[0] for number in range(6)]
        # Short outputs, from which the scheduler learns to count on less than the next ones take.
        stops = [tokens[5] for tokens in wanted]
        for _ in range(10):
            short = await asyncio.gather(*(run(client, n, 300, stop_token_ids=[stops[n]]) for n in range(6)))
            for (tokens, finished), whole, stop in zip(short, wanted, stops, strict=True):
                assert tokens == whole[: whole.index(stop)]
                assert (finished.reason, finished.matched_stop_token_id) == (common_pb2.FINISH_REASON_STOP, stop)
        results = await asyncio.gather(*(run(client, number, 300, is_batch=number == 5) for number in range(6)))
    assert [tokens for tokens, _ in results] == wanted
    assert metric(stack, "worker-0", "bucketserve_worker_preempted_total") > 0
    assert metric(stack, "gateway", "bucketserve_gateway_resumptions_total", cause="lost") == 0


@pytest.mark.stack(engine="vllm", environ=SMALL)
async def test_log_probabilities_come_with_every_token(stack: LocalStack) -> None:
    sampling = common_pb2.SamplingParams(temperature=5.0, seed=1)
    chunks: list[Chunk] = []
    async with BucketServeClient(stack.gateway_address) as client:
        events = client.generate(token_ids=[5, 6, 7], max_tokens=8, ignore_eos=True, num_logprobs=3, sampling=sampling)
        async for event in events:
            if isinstance(event, Chunk):
                chunks.append(event)
    logprobs = [each for chunk in chunks for each in chunk.logprobs]
    assert [each.chosen.token_id for each in logprobs] == [token for chunk in chunks for token in chunk.token_ids]
    assert all(len(each.top) == 3 for each in logprobs)
    # Before temperature: what is drawn at such a one is mostly none of the best.
    assert all(each.chosen.logprob <= each.top[0].logprob < 0 for each in logprobs)
    assert any(each.chosen.logprob < each.top[-1].logprob for each in logprobs)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"BUCKETSERVE_WORKER_ROLE": "decode"}, "vLLM hands KV over by a connector only; set both, not decode"),
        ({"BUCKETSERVE_WORKER_ENGINE_ARGS": "no_such=1"}, "has no engine argument no_such"),
        ({"BUCKETSERVE_WORKER_ENGINE_ARGS": "max_num_seqs=1"}, "is the worker's setting max_sequences"),
        ({"BUCKETSERVE_WORKER_ENGINE_ARGS": "enable_lora=true"}, "is the worker's setting adapters_dir"),
        ({"BUCKETSERVE_WORKER_DEVICE": "cuda"}, "built for cpu, not for cuda"),
    ],
    ids=str,
)
def test_a_worker_that_can_not_start_says_why_in_its_last_line(environ: dict[str, str], said: str) -> None:
    own = {"BUCKETSERVE_WORKER_ENGINE": "vllm", "BUCKETSERVE_WORKER_MODEL": DEMO_MODEL}
    listens = {"BUCKETSERVE_WORKER_LISTEN": "127.0.0.1:0", "BUCKETSERVE_WORKER_METRICS_LISTEN": ""}
    done = subprocess.run(
        [sys.executable, "-m", "bucketserve_worker"],
        env={**os.environ, **own, **listens, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert said in (done.stdout + done.stderr).splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr


async def test_streams_with_adapters_go_on_with_the_same_tokens_when_their_worker_is_killed(
    new_stack: NewStack, tmp_path: Path
) -> None:
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / "there" / name, Path(DEMO_MODEL), seed)
    environ = ENVIRON | {"BUCKETSERVE_WORKER_ADAPTERS_DIR": str(tmp_path / "there")}
    stack = new_stack(engine="vllm", num_workers=2, environ=environ)
    names = [("demo", "demo:one", "demo:two")[number % 3] for number in range(6)]
    async with BucketServeClient(stack.gateway_address) as client:

        async def are_listed() -> bool:
            return {model.name for model in await client.list_models()} == set(names)

        await eventually(are_listed)
        wanted = [(await run(client, number, 150, model=name))[0] for number, name in enumerate(names)]
        running = [asyncio.create_task(run(client, number, 150, model=name)) for number, name in enumerate(names)]
        workers = stack.worker_names()
        await eventually(lambda: sum(metric(stack, name, "vllm:num_requests_running") for name in workers) >= 5)
        victim = max(workers, key=lambda name: metric(stack, name, "vllm:num_requests_running"))
        stack.services[victim].signal(signal.SIGKILL)
        stack.services[victim].wait(5)
        results = await asyncio.gather(*running)
        # Of one prompt each says something else.
        said = [(await run(client, 2, 20, model=name))[0] for name in names[:3]]
    assert [tokens for tokens, _ in results] == wanted
    assert max(finished.attempts for _, finished in results) == 2
    assert len({tuple(tokens) for tokens in said}) == 3


def apart(folder: Path, **extra: float) -> dict[str, str]:
    """Settings of workers that fetch KV from each other through a folder."""
    folder.mkdir()
    transfer = json.dumps(connectors.folder(folder, **extra))
    arguments = {"enforce_eager": "true", "block_size": "32", "kv_transfer_config": transfer}
    return ENVIRON | {
        "BUCKETSERVE_WORKER_ENGINE_ARGS": json.dumps(arguments),
        # The connector is the tests' own.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


async def test_prefill_and_decode_apart_give_the_tokens_of_one_worker_that_does_both(
    new_stack: NewStack, tmp_path: Path
) -> None:
    lengths = [1, 2, 12, 30, 40, 100]
    both = new_stack(engine="vllm", environ=ENVIRON)
    async with BucketServeClient(both.gateway_address) as client:
        wanted = [(await run(client, length, 30))[0] for length in lengths]
    split = new_stack(engine="vllm", roles=("prefill", "decode"), environ=apart(tmp_path / "kv"))
    async with BucketServeClient(split.gateway_address) as client:
        results = await asyncio.gather(*(run(client, length, 30) for length in lengths * 2))
        assert (await run(client, 3, 1))[1].reason == common_pb2.FINISH_REASON_LENGTH
    assert [tokens for tokens, _ in results] == wanted * 2
    assert {finished.attempts for _, finished in results} == {1}
    assert transfers(split) == 12
    # Of each the last prompt token.
    assert metric(split, "worker-1", "bucketserve_worker_prefill_tokens_total") == 12
    await eventually(lambda: is_clean(split))
    assert not list((tmp_path / "kv").iterdir())


@pytest.mark.parametrize("victim", ["worker-0", "worker-1"])
async def test_either_side_may_die_while_kv_goes_from_vllm_to_vllm(
    new_stack: NewStack, tmp_path: Path, victim: str
) -> None:
    # What was to be fetched by one that died is let go when the connector's lease is over.
    environ = apart(tmp_path / "kv", lease_s=10.0)
    # A third one goes on, for vLLM takes longer to start than requests wait.
    stack = new_stack(engine="vllm", roles=("prefill", "decode", "both"), environ=environ)
    async with BucketServeClient(stack.gateway_address) as client:
        wanted = [(await run(client, number, 150))[0] for number in range(6)]
        running = [asyncio.create_task(run(client, number, 150)) for number in range(6)]
        await eventually(lambda: metric(stack, "worker-1", "vllm:num_requests_running") >= 1)
        stack.services[victim].signal(signal.SIGKILL)
        stack.services[victim].wait(5)
        results = await asyncio.gather(*running)
    assert [tokens for tokens, _ in results] == wanted


async def test_kv_that_is_lost_on_its_way_is_computed_again(new_stack: NewStack, tmp_path: Path) -> None:
    environ = apart(tmp_path / "kv", fails_every=3)
    stack = new_stack(engine="vllm", roles=("prefill", "decode"), environ=environ)
    async with BucketServeClient(stack.gateway_address) as client:
        first = [await run(client, number, 40) for number in range(6)]
        again = await asyncio.gather(*(run(client, number, 40) for number in range(6)))
    assert [tokens for tokens, _ in first] == [tokens for tokens, _ in again]
    assert max(finished.attempts for _, finished in first) == 2
    assert metric(stack, "gateway", "bucketserve_gateway_resumptions_total") >= 4
