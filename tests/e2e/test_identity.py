"""A request has one identity: nobody else's label, worker, deployment or weights can touch it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import grpc
import pytest

from bucketserve.client import BucketServeClient, Chunk, Finished, Started
from bucketserve.rpc.deployment import Deployment
from bucketserve.v1 import common_pb2, delivery_pb2, delivery_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from bucketserve_cli.stack import LocalStack, StackSpec
from tests.chaos.oracle import expected_tokens
from tests.e2e.conftest import DEMO_MODEL, NewStack
from tests.e2e.observe import events, eventually, metric, status

pytestmark = pytest.mark.e2e

SLOW = {"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "20000"}
KIND = {"num_workers": 2, "num_gateways": 2, "environ": SLOW}


async def outcome(client: BucketServeClient, prompt: list[int], max_tokens: int, label: str) -> tuple[list[int], str]:
    tokens: list[int] = []
    async for event in client.generate(token_ids=prompt, max_tokens=max_tokens, ignore_eos=True, request_id=label):
        if isinstance(event, Started):
            assert event.request_id == label
        elif isinstance(event, Chunk):
            tokens += event.token_ids
        elif isinstance(event, Finished):
            return tokens, common_pb2.FinishReason.Name(event.reason)
    raise AssertionError("no end")


def right(prompt: list[int], max_tokens: int) -> tuple[list[int], str]:
    return expected_tokens(prompt, max_tokens, 0.0, 0), "FINISH_REASON_LENGTH"


@pytest.mark.stack(**KIND)
async def test_a_label_that_is_used_again_at_once_gets_its_own_tokens(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        for number in range(8):
            first = client.generate(token_ids=[9, number + 5], max_tokens=500, ignore_eos=True, request_id="again")
            assert isinstance(await anext(first), Started)
            await first.aclose()
            prompt = [number + 5, 11, 12]
            assert await outcome(client, prompt, 3, "again") == right(prompt, 3)


@pytest.mark.stack(**KIND)
async def test_one_label_at_two_gateways_and_twice_at_one_harms_nobody(stack: LocalStack) -> None:
    prompts = [[7 + number, 8, 9] for number in range(6)]
    async with contextlib.AsyncExitStack() as exit_stack:
        clients = [
            await exit_stack.enter_async_context(BucketServeClient(address)) for address in stack.gateway_addresses
        ]
        found = await asyncio.gather(*(outcome(clients[i % 2], prompt, 40, "same") for i, prompt in enumerate(prompts)))
    assert list(found) == [right(prompt, 40) for prompt in prompts]


@pytest.mark.stack(**KIND)
async def test_a_label_whose_deadline_passed_is_as_good_as_any(stack: LocalStack) -> None:
    async with BucketServeClient(stack.gateway_address) as client:
        for _ in range(2):
            with pytest.raises(Exception, match="eadline"):
                async for _ in client.generate(
                    token_ids=[5] * 20, max_tokens=1500, ignore_eos=True, request_id="late", timeout_s=0.5
                ):
                    pass
            assert await outcome(client, [5, 6], 4, "late") == right([5, 6], 4)


@pytest.mark.stack(**KIND)
async def test_strangers_at_internal_ports_get_nothing(stack: LocalStack) -> None:
    def worker(name: str) -> scheduler_pb2.WorkRequest:
        report = scheduler_pb2.WorkerReport(kv_total_tokens=10**6, kv_free_tokens=10**6, max_sequences=64)
        hello = scheduler_pb2.WorkerHello(worker_id=name, model="demo", context_tokens=2048, report=report)
        return scheduler_pb2.WorkRequest(hello=hello)

    async def once(message):
        yield message

    async def refused(method, message, metadata) -> grpc.StatusCode:
        code = grpc.StatusCode.INTERNAL
        # So the client itself tells a write to a call that has ended.
        while code is grpc.StatusCode.INTERNAL:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in method(once(message), metadata=metadata):
                    pass
            code = caught.value.code()
        return code

    name = stack.deployment.name
    for stranger in ((), Deployment(name, "guess").metadata, Deployment("other", stack.deployment.token).metadata):
        async with grpc.aio.insecure_channel(stack.scheduler_address) as channel:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            code = await refused(stub.Work, worker("rogue"), stranger)
            assert code is grpc.StatusCode.PERMISSION_DENIED
            hello = scheduler_pb2.SubmitRequest(hello=scheduler_pb2.GatewayHello(gateway_id="rogue"))
            assert await refused(stub.Submit, hello, stranger) is grpc.StatusCode.PERMISSION_DENIED
        async with grpc.aio.insecure_channel(stack.delivery_address) as channel:
            stub = delivery_pb2_grpc.DeliveryServiceStub(channel)
            hello = delivery_pb2.DeliverRequest(worker_id="worker-0")
            assert await refused(stub.Deliver, hello, stranger) is grpc.StatusCode.PERMISSION_DENIED
    # Another process under the name of a worker that is here is told, and changes nothing.
    async with grpc.aio.insecure_channel(stack.scheduler_address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        code = await refused(stub.Work, worker("worker-0"), stack.deployment.metadata)
        assert code is grpc.StatusCode.PERMISSION_DENIED
    assert {entry["worker_id"] for entry in events(stack, "scheduler", "worker.id_in_use")} == {"worker-0"}
    async with BucketServeClient(stack.gateway_address) as client:
        assert await outcome(client, [3, 4], 20, "x") == right([3, 4], 20)


async def test_an_engine_that_hangs_gives_its_requests_to_others_and_ends(tmp_path: Path) -> None:
    # The first worker's steps take a minute: as if it had hung.
    spec = StackSpec(
        model=DEMO_MODEL,
        engine="fake",
        num_workers=2,
        log_dir=tmp_path,
        environ={"BUCKETSERVE_WORKER_HANG_S": "0.5", "BUCKETSERVE_WORKER_CONTEXT_TOKENS": "2048"},
        worker_environ=({"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "60000000"}, {}),
    )
    prompts = [[5 + number, 6, 7] for number in range(6)]
    with LocalStack(spec) as stack:
        async with BucketServeClient(stack.gateway_address) as client:
            found = await asyncio.gather(*(outcome(client, prompt, 20, "h") for prompt in prompts))
        assert list(found) == [right(prompt, 20) for prompt in prompts]
        assert metric(stack, "gateway", "bucketserve_gateway_resumptions_total") >= 1
        hung = stack.services["worker-0"]
        # It does not wait for the step that hangs.
        await eventually(lambda: hung.exit_status is not None, 5)
        assert hung.exit_status != 0


@pytest.mark.parametrize("how", ["raise", "hang"])
async def test_the_last_of_the_old_weights_stay_until_what_only_they_can_finish_is_done(
    how: str, new_stack: NewStack, tmp_path: Path
) -> None:
    orders = tmp_path / "orders"
    orders.mkdir()
    environ = {
        **SLOW,
        "CHAOS_ORDERS": str(orders),
        "BUCKETSERVE_WORKER_HANG_S": "0.5",
        "BUCKETSERVE_WORKER_DRAIN_S": "60",
    }
    roles = ("prefill", "decode", "prefill", "decode")
    stack = new_stack(roles=roles, worker_module="tests.chaos.worker", environ=environ)

    async def leave(*names: str) -> None:
        for name in names:
            stack.services[name].signal(signal.SIGTERM)
        for name in names:
            await asyncio.to_thread(stack.services[name].wait, 40)
            assert stack.services[name].exit_status == 0

    async def seen(worker_id: str) -> scheduler_pb2.WorkerStatus:
        return next(worker for worker in (await status(stack)).workers if worker.worker_id == worker_id)

    async def all_decode() -> bool:
        return (await seen("worker-1")).report.num_running == len(prompts)

    async def prefill_leaves() -> bool:
        return (await seen("worker-0")).is_draining

    await leave("worker-2", "worker-3")
    prompts = [[5 + number, 6, 7] for number in range(6)]
    async with BucketServeClient(stack.gateway_address) as client:
        running = [asyncio.create_task(outcome(client, prompt, 500, "r")) for prompt in prompts]
        await eventually(all_decode, 10)
        # New weights come, and the old ones go: first the prefill worker, which has nothing to do.
        for name in ("worker-2", "worker-3"):
            (orders / f"{name}.weights").write_text("new")
            stack.restart(name)
        leaving = asyncio.create_task(leave("worker-0"))
        await eventually(prefill_leaves, 5)
        # All that decodes is lost just then.
        (orders / "worker-1.order").write_text(how)
        await asyncio.to_thread(stack.services["worker-1"].wait, 30)
        assert stack.services["worker-1"].exit_status == 1
        stack.restart("worker-1")
        assert await asyncio.gather(*running) == [right(prompt, 500) for prompt in prompts]
        # Then they go, and don't wait for the end of their time.
        await asyncio.wait_for(leaving, 15)
        await leave("worker-1")
    assert metric(stack, "gateway", "bucketserve_gateway_resumptions_total") >= len(prompts)
    for name in ("worker-0", "worker-1"):
        stack.restart(name)
    await asyncio.to_thread(stack.wait_until_serving, 120)
