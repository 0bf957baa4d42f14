"""The runner of batch jobs against a real store: what it must not lose, and what must not stop it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import pytest

from bucketserve.core.errors import BucketServeError, QuotaExceededError, UnavailableError, UnknownModelError
from bucketserve.store.embedded import EmbeddedServer
from bucketserve.store.jobs import JobInfo, JobStore
from bucketserve.store.redis import connect
from bucketserve.store.sealing import Sealer
from bucketserve.v1 import inference_pb2, job_pb2
from bucketserve_gateway import job_runner
from bucketserve_gateway.admission import Room
from bucketserve_gateway.job_runner import JobRunner
from bucketserve_gateway.settings import GatewaySettings
from bucketserve_gateway.telemetry import GatewayTelemetry
from tests.e2e.observe import eventually
from tests.unit.gateway.builders import an_admission

pytestmark = pytest.mark.redis

SETTINGS = GatewaySettings(job_lease_s=1.0, job_concurrency=8)


class Heard(GatewayTelemetry):
    """Keeps what the runner reports."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.stored: list[bool] = []
        self.unavailable: list[str] = []

    def unexpected(self, method: str, error: BaseException) -> None:
        self.errors.append(error)

    def job_store_unavailable(self, detail: str) -> None:
        self.unavailable.append(detail)

    def job_request_done(self, is_stored: bool, is_error: bool) -> None:
        self.stored.append(is_stored)


class Model:
    """Answers each request with its own prompt; holds answers back, or fails, as it is told."""

    def __init__(self) -> None:
        self.failures: dict[str, list[Exception]] = {}
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.num_open = 0
        self.takes_to_end_s = 0.0

    async def generate(
        self, request: inference_pb2.GenerateRequest, metadata: Mapping[str, str], remaining_s: float | None
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.num_open += 1
        try:
            if failures := self.failures.get(request.prompt):
                raise failures.pop(0)
            await self.may_answer.wait()
            yield inference_pb2.GenerateResponse(chunk=inference_pb2.GenerateChunk(text=request.prompt, token_ids=[1]))
            yield inference_pb2.GenerateResponse(finished=inference_pb2.GenerateFinished())
        finally:
            await asyncio.sleep(self.takes_to_end_s)
            self.num_open -= 1


@pytest.fixture(scope="module")
def valkey() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
async def store(valkey: EmbeddedServer) -> AsyncIterator[JobStore]:
    client = connect(valkey.url)
    await client.flushdb()
    yield JobStore(client)
    await client.aclose()


async def submit(store: JobStore, prompts: list[str], job_id: str = "j", tenant: str = "t") -> None:
    await store.begin(job_id, tenant, 60)
    items = [inference_pb2.GenerateRequest(prompt=prompt, request_id=prompt[:9]) for prompt in prompts]
    await store.put(job_id, "u", 0, [item.SerializeToString() for item in items])
    await store.start(job_id, "u", len(prompts), "d")


@contextlib.asynccontextmanager
async def running(runner: JobRunner) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(runner.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def results(store: JobStore, number: int) -> list[job_pb2.FetchJobResultsResponse]:
    async def is_completed() -> bool:
        return (await store.get("j")).state == "completed"

    await eventually(is_completed, 20)
    found = await store.results("j", range(number))
    return [job_pb2.FetchJobResultsResponse.FromString(result or b"") for result in found]


async def test_a_request_that_fails_as_nobody_foresaw_has_a_result_and_is_not_run_for_ever(store: JobStore) -> None:
    model, heard = Model(), Heard()
    model.failures["b"] = [ValueError("with details that are nobody's business")] * 10
    await submit(store, ["a", "b", "c"])
    async with running(JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())):
        found = await results(store, 3)
    assert [result.error_reason for result in found] == ["", "INTERNAL", ""]
    assert "business" not in found[1].error_message
    assert [type(error) for error in heard.errors] == [ValueError]
    assert heard.stored == [True] * 3


@pytest.mark.parametrize("what", ["all", "one"])
async def test_requests_that_the_store_has_lost_have_a_result_that_says_so(store: JobStore, what: str) -> None:
    model, heard = Model(), Heard()
    await submit(store, ["a", "b"])
    # Evicted, or what is left after it.
    await (store._client.delete("bs:{j}:item") if what == "all" else store._client.hdel("bs:{j}:item", "1"))
    async with running(JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())):
        found = await results(store, 2)
    lost = ("", "REQUEST_LOST")
    wanted = [("a", "") if what == "one" else lost, lost]
    assert [(result.text, result.error_reason) for result in found] == wanted
    assert heard.errors == []


async def test_a_model_that_is_unknown_for_a_while_is_waited_for(store: JobStore) -> None:
    model, heard = Model(), Heard()
    model.failures["b"] = [UnknownModelError("demo:one", ["demo"])] * 2
    await submit(store, ["a", "b"])
    async with running(JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())):
        found = await results(store, 2)
    assert [(result.text, result.error_reason) for result in found] == [("a", ""), ("b", "")]
    assert model.failures["b"] == []


async def test_what_nobody_foresaw_in_the_store_does_not_end_the_runner(store: JobStore) -> None:
    model, heard = Model(), Heard()
    look = store.open_jobs
    failures = [RuntimeError("of another kind than the server being away")]

    async def open_jobs(*told: object) -> list[JobInfo]:
        if failures:
            raise failures.pop()
        return await look()

    store.open_jobs = open_jobs  # type: ignore[method-assign]
    await submit(store, ["a"])
    async with running(JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())) as task:
        assert [result.text for result in await results(store, 1)] == ["a"]
        assert not task.done()
    assert [type(error) for error in heard.errors] == [RuntimeError]


async def test_jobs_that_can_not_be_opened_here_do_not_stop_the_others(store: JobStore, valkey: EmbeddedServer) -> None:
    model, heard = Model(), Heard()
    client = connect(valkey.url)
    other = JobStore(client, sealer=Sealer([b"o" * 32]))
    await other.begin("batch_1", "t", 60, note=b"{}", window_s=60)
    await submit(other, ["sealed"], "sealed", tenant="u")
    # Over, so that its requests are to be ended; what it is is older than the keys.
    await store.begin("over", "t", 60, note=b"{}", window_s=60)
    await other.put("over", "u", 0, [b"over"])
    await other.start("over", "u", 1, "d")
    await other.stop("over")
    await submit(store, ["a", "b"])
    async with running(JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())):
        assert [result.text for result in await results(store, 2)] == ["a", "b"]
    assert heard.errors == []
    assert any("a key that this gateway does not have" in detail for detail in heard.unavailable)
    for job_id in ("sealed", "over"):
        assert [index for index, _ in await other.claim(job_id, "another", 10, 1.0)] == [0]
        assert await other.losses(job_id, [0]) == [0]
    await client.aclose()


async def test_a_request_lost_and_claimed_again_is_the_runners_own_still(store: JobStore) -> None:
    model, heard = Model(), Heard()
    model.may_answer.clear()
    model.takes_to_end_s = 0.1
    runner = JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())
    await submit(store, ["a"])
    await runner._claim()
    await eventually(lambda: model.num_open == 1)
    # It was cut off for longer than its lease; another runner noticed that, but had no room itself.
    await asyncio.sleep(1.1)
    assert await store.claim("j", "another", 0, 1.0) == []
    await runner._renew()
    await runner._claim()
    await asyncio.sleep(0.3)
    # The former run has ended, and did not take the new one's place in the books with it.
    assert model.num_open == 1
    assert len(runner._tasks) == 1
    await asyncio.sleep(0.6)
    await runner._renew()
    await asyncio.sleep(0.6)
    assert await store.claim("j", "another", 1, 1.0) == []
    model.may_answer.set()
    assert [result.text for result in await results(store, 1)] == ["a"]
    assert heard.errors == []


async def test_what_has_not_finished_is_given_back_at_once(store: JobStore) -> None:
    model, heard = Model(), Heard()
    model.may_answer.clear()
    await submit(store, ["a", "b"])
    async with running(JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())):
        await eventually(lambda: model.num_open == 2)
    assert model.num_open == 0
    assert [index for index, _ in await store.claim("j", "another", 10, 1.0)] == [0, 1]


async def test_a_cancelled_job_stops_its_requests(store: JobStore) -> None:
    model, heard = Model(), Heard()
    model.may_answer.clear()
    await submit(store, ["a", "b"])
    async with running(JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())):
        await eventually(lambda: model.num_open == 2)
        await store.cancel("j")
        await eventually(lambda: model.num_open == 0, 5)
    assert await store.results("j", [0, 1]) == [None, None]


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("no worker serves it", reason="NO_WORKER", retry_delay_s=0.1),
        QuotaExceededError("t", "requests a minute", retry_delay_s=0.1),
        UnknownModelError("demo:one", ["demo"]),
    ],
    ids=lambda error: error.reason,
)
async def test_a_job_that_can_not_be_served_takes_no_place_from_another(
    store: JobStore, error: BucketServeError
) -> None:
    model, heard = Model(), Heard()
    model.failures["gone"] = [error] * 10_000
    runner = JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())
    await submit(store, ["gone"] * 20)
    async with running(runner):
        await eventually(lambda: Counter(job for job, _ in runner._tasks) == {"j": 7})
        model.may_answer.clear()
        await submit(store, [f"p{i}" for i in range(20)], job_id="other")
        # Each has all places but the one that is kept.
        await eventually(lambda: Counter(job for job, _ in runner._tasks) == {"j": 7, "other": 7})


async def test_a_small_job_does_not_wait_for_a_large_one(store: JobStore) -> None:
    model, heard = Model(), Heard()
    model.may_answer.clear()
    await submit(store, [f"large-{i}" for i in range(500)], "large", "a")
    runner = JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())
    await runner._claim()
    # The large one has all places but one.
    assert len(runner._tasks) == SETTINGS.job_concurrency - 1
    # Of the same tenant or of another one: it is next.
    await submit(store, ["small"], "small", "a")
    await runner._claim()
    assert ("small", 0) in runner._tasks
    await submit(store, ["other"], "other", "b")
    model.may_answer.set()
    await asyncio.gather(*runner._tasks.values())
    model.may_answer.clear()
    await runner._claim()
    assert ("other", 0) in runner._tasks
    await runner._give_back()


async def test_tenants_have_equal_shares_however_many_jobs_they_have(store: JobStore) -> None:
    model, heard = Model(), Heard()
    model.may_answer.clear()
    for i in range(6):
        await submit(store, [f"{i}-{k}" for k in range(20)], f"a{i}", "a")
    await submit(store, [f"b-{k}" for k in range(20)], "b0", "b")
    settings = SETTINGS.model_copy(update={"job_concurrency": 16})
    runner = JobRunner(store, model.generate, "g", settings, heard, an_admission())
    await runner._claim()
    tenants = [tenant for tenant, _ in runner._running.values()]
    assert abs(tenants.count("a") - tenants.count("b")) <= 3
    assert len(tenants) == 16
    # And none of a tenant's jobs is left out.
    assert len({job_id for job_id, _ in runner._tasks}) == 7
    await runner._give_back()


async def test_a_store_that_does_not_answer_does_not_keep_a_gateway_that_ends(
    store: JobStore, valkey: EmbeddedServer
) -> None:
    model, heard = Model(), Heard()
    model.may_answer.clear()
    for name in ("j", "k", "l"):
        await submit(store, ["x", "y"], name)
    runner = JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())
    task = asyncio.create_task(runner.run())
    await eventually(lambda: len({job_id for job_id, _ in runner._tasks}) == 3, 10)
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=job_runner.GIVE_BACK_S + 2)
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    assert done
    assert task.cancelled()
    assert not model.num_open


async def test_a_request_that_ends_its_gateways_is_given_up_and_the_others_run(store: JobStore) -> None:
    model, heard = Model(), Heard()
    await submit(store, ["deadly", "harmless"])
    # Two gateways take it, and are never heard of again.
    for name in ("first", "second"):
        assert [index for index, _ in await store.claim("j", name, 1, 0.05)] == [0]
        await asyncio.sleep(0.1)
    async with running(JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())):
        found = await results(store, 2)
    assert [(result.request_id, result.error_reason, result.text) for result in found] == [
        ("deadly", "ATTEMPTS_EXHAUSTED", ""),
        ("harmless", "", "harmless"),
    ]


async def test_what_runs_at_once_is_bounded_in_bytes(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_runner, "MAX_RUNNING_BYTES", 10_000)
    model, heard = Model(), Heard()
    model.may_answer.clear()
    await submit(store, ["x" * 4000 for _ in range(6)])
    runner = JobRunner(store, model.generate, "g", SETTINGS, heard, an_admission())
    for _ in range(3):
        await runner._claim()
    assert len(runner._tasks) == 3
    model.may_answer.set()
    async with running(runner):
        assert len(await results(store, 6)) == 6


async def test_what_is_collected_counts_until_it_is_stored(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, heard, admission = Model(), Heard(), an_admission(max_bytes=100_000)
    await submit(store, ["a" * 10_000])
    may_store = asyncio.Event()
    finish = store.finish

    async def slow(*args: Any, **more: Any) -> bool:
        await may_store.wait()
        return await finish(*args, **more)

    monkeypatch.setattr(store, "finish", slow)
    async with running(JobRunner(store, model.generate, "g", SETTINGS, heard, admission)):
        await eventually(lambda: admission.num_bytes > 0)
        assert 4 * 10_000 < admission.num_bytes < 5 * 10_000
        may_store.set()
        found = await results(store, 1)
        await eventually(lambda: admission.num_bytes == 0)
    assert found[0].text == "a" * 10_000


async def test_a_request_waits_for_room_and_fails_where_there_never_is_enough(store: JobStore) -> None:
    model, heard, admission = Model(), Heard(), an_admission(max_bytes=100_000)
    await submit(store, ["a" * 10_000, "b" * 30_000])
    with admission.room() as others:
        others.resize(90_000)
        async with running(JobRunner(store, model.generate, "g", SETTINGS, heard, admission)):
            await eventually(lambda: heard.stored == [True])
            # The other one has given back what it had, and is tried again.
            await eventually(lambda: (admission.num_bytes, model.num_open) == (90_000, 0))
            assert (await store.get("j")).num_done == 1
            others.resize(0)
            found = await results(store, 2)
    assert [(result.text[:1], result.error_reason) for result in found] == [("a", ""), ("", "TOO_LARGE")]
    assert admission.num_bytes == 0
    assert heard.errors == []


class Lines:
    """Work that never ends by itself; says for each request what became of it."""

    def __init__(self) -> None:
        self.num_open = 0

    async def run(self, job: JobInfo, index: int, item: bytes, room: Room) -> bytes:
        self.num_open += 1
        try:
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")
        finally:
            self.num_open -= 1

    def failed(self, job: JobInfo, index: int, item: bytes, error: BucketServeError | None) -> bytes:
        assert error is None
        return b"over:" + item


@pytest.mark.parametrize("how", ["stopped", "expired"])
async def test_a_batch_that_is_over_has_a_result_for_each_request(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(job_runner, "ENDED_AT_ONCE", 30)
    model, heard, lines = Model(), Heard(), Lines()
    await store.begin("j", "t", 60, note=b"a batch", window_s=3600 if how == "stopped" else 2)
    await store.put("j", "u", 0, [b"%d" % i for i in range(100)])
    await store.start("j", "u", 100, "d")
    runners = [
        JobRunner(store, model.generate, f"g{i}", SETTINGS, heard, an_admission(), batches=lines) for i in range(2)
    ]
    async with running(runners[0]), running(runners[1]):
        await eventually(lambda: lines.num_open > 0)
        if how == "stopped":
            await store.stop("j")

        async def is_completed() -> bool:
            return (await store.get("j")).state == "completed"

        await eventually(is_completed, 20)
    assert lines.num_open == 0
    assert await store.results("j", range(100)) == [b"over:%d" % i for i in range(100)]
    assert (await store.get("j")).num_failed == 100
    assert heard.errors == []
