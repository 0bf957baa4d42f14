"""The whole system over real processes: gateway, scheduler, workers, Valkey, gRPC, OTLP."""

from __future__ import annotations

import asyncio
import signal
from collections import defaultdict

import pytest

from bucketserve.client import BucketServeClient, Chunk, Finished, Started
from bucketserve.rpc.probe import check_health
from bucketserve.v1 import common_pb2
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric, status
from tests.otlp import OtlpReceiver

pytestmark = pytest.mark.e2e

SLOW = {"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "20000"}


async def run(client: BucketServeClient, prompt_tokens: int, max_tokens: int, **more) -> tuple[list[int], Finished]:
    """Tokens and end of one request whose prompt is made of token ids."""
    prompt = [2 + (i * 7 + prompt_tokens) % 4000 for i in range(prompt_tokens)]
    tokens: list[int] = []
    async for event in client.generate(token_ids=prompt, max_tokens=max_tokens, ignore_eos=True, **more):
        if isinstance(event, Chunk):
            tokens += event.token_ids
        elif isinstance(event, Finished):
            return tokens, event
    raise AssertionError("no end")


async def test_one_connected_trace_buckets_and_every_request_completed(new_stack: NewStack) -> None:
    with OtlpReceiver() as receiver:
        stack = new_stack(
            engine="transformers",
            num_workers=2,
            environ={
                "BUCKETSERVE_TELEMETRY_OTLP_ENDPOINT": receiver.endpoint,
                "BUCKETSERVE_WORKER_NUM_THREADS": "1",
                "BUCKETSERVE_WORKER_CONTEXT_TOKENS": "0",
            },
        )
        caller = "4bf92f3577b34da6a3ce929d0e0e4736"
        async with BucketServeClient(stack.gateway_address) as client:
            first = await run(client, 8, 4, metadata=[("traceparent", f"00-{caller}-00f067aa0ba902b7-01")])
            lengths = [5, 700, 20, 350, 9, 600, 40, 3, 12, 500]
            results = await asyncio.gather(*(run(client, length, 12) for length in lengths))
        stack.stop_services()
        spans = receiver.spans()
    for tokens, finished in (first, *results):
        assert finished.reason == common_pb2.FINISH_REASON_LENGTH
        assert finished.usage.output_tokens == len(tokens)
        assert finished.timings.total_ms >= finished.timings.ttft_ms > 0
    buckets = {(f.batch.bucket_low_tokens, f.batch.bucket_high_tokens) for _, f in results}
    assert len(buckets) >= 2
    for length, (_, finished) in zip(lengths, results, strict=True):
        batch = finished.batch
        assert batch.bucket_low_tokens <= length < batch.bucket_high_tokens, (length, finished)
    # One trace per request; the first continues its caller's.
    traces = defaultdict(list)
    for span in spans:
        if span.name != "bucketserve.batch":
            traces[span.trace_id].append(span)
    assert len(traces) == len(results) + 1
    assert caller in traces
    for trace in traces.values():
        services = {span.service for span in trace}
        assert services == {"bucketserve-gateway", "bucketserve-scheduler", "bucketserve-worker"}
        root = next(span for span in trace if span.name == "bucketserve.generate")
        others = {span.name: span for span in trace if span is not root}
        assert set(others) >= {"bucketserve.queue", "bucketserve.prefill", "bucketserve.decode"}
        assert all(span.parent_id == root.span_id for span in others.values())
        assert others["bucketserve.queue"].end_ns <= others["bucketserve.prefill"].end_ns
    batches = [span for span in spans if span.name == "bucketserve.batch"]
    assert {link for batch in batches for link in batch.links} == set(traces)


async def test_batches_shrink_with_the_reported_headroom(new_stack: NewStack) -> None:
    with OtlpReceiver() as receiver:
        stack = new_stack(
            environ={
                "BUCKETSERVE_TELEMETRY_OTLP_ENDPOINT": receiver.endpoint,
                "BUCKETSERVE_WORKER_KV_BUDGET_TOKENS": "4000",
                # Slow prefill: requests gather while a batch is computed.
                "BUCKETSERVE_WORKER_FAKE_PREFILL_US_PER_TOKEN": "500",
                "BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "10000",
            },
        )
        async with BucketServeClient(stack.gateway_address) as client:
            free = [run(client, 200, 40, request_id=f"free-{i}") for i in range(12)]
            first = await asyncio.gather(*free)
            # Four long ones hold 3,200 of 4,000 tokens, and some more, while the rest is served.
            holders = [asyncio.create_task(run(client, 800, 150, request_id=f"hold-{i}")) for i in range(4)]
            await eventually(lambda: metric(stack, "worker-0", "bucketserve_worker_kv_free_tokens") <= 800)
            tight = [run(client, 200, 40, request_id=f"tight-{i}") for i in range(12)]
            second = await asyncio.gather(*tight)
            third = await asyncio.gather(*holders)
    assert all(f.reason == common_pb2.FINISH_REASON_LENGTH for _, f in (*first, *second, *third))
    limited_first, limited_second = (
        {f.batch.num_requests for _, f in answers if f.batch.limited_by == "memory"} for answers in (first, second)
    )
    # 0.9 x 4,000 tokens hold all 12 of 240, 0.9 x 800 hold 3.
    assert not limited_first
    assert min(limited_second) <= 3


@pytest.mark.stack(num_workers=2, environ=SLOW)
async def test_worker_dies_and_it_costs_a_pause_and_no_token(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        wanted = [(await run(client, 10 + i, 60))[0] for i in range(2)]
        so_far = {name: metric(stack, name, "vllm:generation_tokens_total") for name in stack.worker_names()}
        running = [asyncio.create_task(run(client, 10 + i % 2, 60)) for i in range(8)]

        def busy() -> list[str]:
            # All eight may be one batch: whoever has some will do, once they have come some way.
            streamed = {name: metric(stack, name, "vllm:generation_tokens_total") for name in stack.worker_names()}
            return [
                name
                for name in stack.worker_names()
                if metric(stack, name, "vllm:num_requests_running") >= 2 and streamed[name] >= so_far[name] + 20
            ]

        await eventually(busy)
        stack.services[busy()[0]].signal(signal.SIGKILL)
        results = await asyncio.gather(*running)
    assert [tokens for tokens, _ in results] == [wanted[i % 2] for i in range(8)]
    assert max(finished.attempts for _, finished in results) == 2


@pytest.mark.stack(environ=SLOW)
async def test_a_restarted_scheduler_disturbs_no_stream(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, 30, 150)
        running = [asyncio.create_task(run(client, 30, 150)) for _ in range(4)]
        await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") >= 4)
        stack.services["scheduler"].signal(signal.SIGKILL)
        stack.services["scheduler"].wait(5)
        waiting = asyncio.create_task(run(client, 30, 5))
        stack.restart("scheduler")
        results = await asyncio.gather(*running)
        late, _ = await waiting
    assert [tokens for tokens, _ in results] == [wanted] * 4
    assert {finished.attempts for _, finished in results} == {1}
    assert late == wanted[:5]


@pytest.mark.stack(environ=SLOW)
async def test_client_goes_away_and_nothing_is_left_behind(stack: LocalStack) -> None:

    async def start_and_leave(client: BucketServeClient, after: type) -> None:
        async for event in client.generate(token_ids=[5] * 50, max_tokens=1000, ignore_eos=True):
            if isinstance(event, after):
                return

    async with BucketServeClient(stack.gateway_address) as client:
        await asyncio.gather(*(start_and_leave(client, Started if i % 2 else Chunk) for i in range(20)))
        # A deadline is a cancellation by the clock.
        deadlines = await asyncio.gather(
            *(run(client, 50, 1000, timeout_s=0.5) for _ in range(3)), return_exceptions=True
        )
        assert {type(error).__name__ for error in deadlines} == {"DeadlineError"}

        async def is_clean() -> bool:
            now = await status(stack)
            report = now.workers[0].report
            at_rest = now.num_waiting == now.num_running == report.num_running == report.num_waiting == 0
            return at_rest and report.kv_free_tokens == report.kv_total_tokens

        await eventually(is_clean)
        assert metric(stack, "gateway", "bucketserve_gateway_open_requests") == 0


@pytest.mark.stack(environ=SLOW)
async def test_sigterm_lets_streams_finish(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        wanted, _ = await run(client, 12, 150)
        running = [asyncio.create_task(run(client, 12, 150)) for _ in range(5)]
        await eventually(lambda: metric(stack, "worker-0", "vllm:num_requests_running") >= 5)
        for name in ("worker-0", "gateway", "scheduler"):
            stack.services[name].signal(signal.SIGTERM)
        # Whoever asks for their health is told at once, while they finish what they have.
        for name in ("worker-0", "gateway"):
            address = stack.services[name].health_address
            await eventually(lambda address=address: check_health(address) == "NOT_SERVING", 2)
        assert not any(task.done() for task in running)
        results = await asyncio.gather(*running)
    assert [tokens for tokens, _ in results] == [wanted] * 5
    assert [stack.services[name].wait(15) for name in ("worker-0", "gateway", "scheduler")] == [0, 0, 0]
