"""Several schedulers share the models: each leads some, takes over the others', and has its part again afterwards."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from bucketserve.client import BucketServeClient
from bucketserve_cli.plan import StackSpec
from bucketserve_cli.pools import Pool
from bucketserve_cli.stack import LocalStack
from tests.e2e.conftest import DEMO_MODEL
from tests.e2e.observe import answer, events, eventually, metric
from tests.e2e.test_cli import bucketserve
from tests.e2e.test_stack import SLOW, run

pytestmark = pytest.mark.e2e

MODELS = ("one", "two", "three")


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[LocalStack]:
    """Two schedulers, three models of the fake engine at a worker each."""
    same = {"model": DEMO_MODEL, "context_tokens": "2048", "engine": "fake"}
    pools = tuple(Pool(1, {**same, "model_name": name}) for name in MODELS)
    with LocalStack(StackSpec(pools=pools, num_schedulers=2, environ=SLOW, log_dir=tmp_path / "logs")) as stack:
        yield stack


async def led_by(stack: LocalStack) -> dict[str, list[str]]:
    """Which models each scheduler leads, with a worker there; nothing of one that does not answer."""
    found = {}
    for name, service in stack.services.items():
        if name.startswith("scheduler") and service.exit_status is None:
            try:
                told = await answer(stack, service.health_address)
            except grpc.aio.AioRpcError:
                continue
            found[name] = [model.model for model in told.models if model.workers]
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_models_are_shared_and_one_that_is_back_gets_its_part_again(
    stack: LocalStack, how: signal.Signals
) -> None:
    async def is_even() -> bool:
        led = await led_by(stack)
        shown = {name: metric(stack, name, "bucketserve_scheduler_leading") for name in led}
        return (
            sorted(map(len, led.values())) == [1, 2]
            and set().union(*led.values()) == set(MODELS)
            and shown == {name: len(models) for name, models in led.items()}
        )

    async with BucketServeClient(stack.gateway_address) as client:
        wanted = {model: (await run(client, 40, 5, model=model))[0] for model in MODELS}
        await eventually(is_even)
        both = [word for address in stack.scheduler_addresses for word in ("--address", address)]
        out, _ = await asyncio.to_thread(bucketserve, "status", "--json", *both)
        assert [model["model"] for model in json.loads(out)["models"]] == sorted(MODELS)
        assert len({model["scheduler"]["scheduler_id"] for model in json.loads(out)["models"]}) == 2
        running = {model: asyncio.create_task(run(client, 40, 400, model=model)) for model in MODELS}
        # What was dispatched and has not reached its worker would rightly begin again.
        workers = stack.worker_names()
        await eventually(lambda: sum(metric(stack, name, "vllm:num_requests_running") for name in workers) == 3)
        led = await led_by(stack)
        (ends,) = [name for name, names in led.items() if len(names) == 2]
        (stays,) = [name for name in led if name != ends]
        stack.services[ends].signal(how)
        stack.services[ends].wait(10)
        for model in MODELS:
            assert (await run(client, 40, 5, model=model))[0] == wanted[model]
        assert sorted((await led_by(stack))[stays]) == sorted(MODELS)
        stack.restart(ends)
        await eventually(is_even)
        assert events(stack, stays, "seat.handed_on")
        # Whoever leads it now.
        for model in MODELS:
            assert (await run(client, 40, 5, model=model))[0] == wanted[model]
        for model, task in running.items():
            tokens, finished = await task
            assert (len(tokens), tokens[:5], finished.attempts) == (400, wanted[model], 1)
