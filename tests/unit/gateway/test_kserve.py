"""Requests of a stream: side by side, so many at once, each with an end of its own; none outlives its stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from bucketserve.core.errors import EngineError, InvalidRequestError, OverloadedError, UnknownModelError
from bucketserve.facades import kserve_pb2
from bucketserve_gateway import kserve as module
from bucketserve_gateway.auth import Keys
from bucketserve_gateway.kserve import KserveServicer
from tests.unit.gateway.builders import Caller, Generation, an_admission, catalog
from tests.unit.gateway.test_kserve_tensors import a_request, truth

Answers = AsyncGenerator[kserve_pb2.ModelStreamInferResponse, None]


class Requests:
    """A stream of requests that a test sends one by one."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[kserve_pb2.ModelInferRequest | Exception | None] = asyncio.Queue()
        self.num_read = 0

    def send(self, *requests: kserve_pb2.ModelInferRequest | Exception | None) -> None:
        for request in requests:
            self._queue.put_nowait(request)

    async def __aiter__(self) -> AsyncIterator[kserve_pb2.ModelInferRequest]:
        while (request := await self._queue.get()) is not None:
            if isinstance(request, Exception):
                raise request
            self.num_read += 1
            yield request


class Site:
    """A servicer, and what it works with."""

    def __init__(self, max_streams: int = 8, **limits: int) -> None:
        self.generate = Generation()
        self.admission = an_admission(**limits)
        self.unexpected: list[BaseException] = []
        self.refused: list[BaseException] = []
        self.is_serving, self.is_leaving = True, False
        self.servicer = KserveServicer(
            self.generate,
            catalog(),
            self.admission,
            identify=Keys("").identify,
            max_prompt_bytes=1000,
            max_streams=max_streams,
            is_serving=lambda: self.is_serving,
            is_leaving=lambda: self.is_leaving,
            on_refused=self.refused.append,
            on_unexpected=lambda method, error: self.unexpected.append(error),
        )

    @contextlib.asynccontextmanager
    async def stream(self, peer: str = "a") -> AsyncIterator[tuple[Requests, Answers]]:
        requests = Requests()
        answers = self.servicer.ModelStreamInfer(aiter(requests), Caller(peer))
        async with contextlib.aclosing(answers):
            yield requests, answers

    def is_empty(self) -> bool:
        return (self.generate.num_open, self.admission.num_calls, self.admission.num_bytes) == (0, 0, 0)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def texts(answers: list[kserve_pb2.ModelStreamInferResponse], label: str) -> list[str]:
    return [
        tensor.contents.bytes_contents[0].decode()
        for answer in answers
        if answer.infer_response.id == label
        for tensor in answer.infer_response.outputs
    ]


async def test_requests_of_a_stream_run_side_by_side_and_each_ends_once() -> None:
    site = Site()
    site.generate.may_end.set()
    async with site.stream() as (requests, answers):
        requests.send(a_request(truth(), id="many"), a_request(id="one"), a_request(truth(), id="again"), None)
        found = [answer async for answer in answers]
    assert texts(found, "many") == texts(found, "again") == ["a", "b", "", "stop"]
    assert texts(found, "one") == ["ab", "stop"]
    assert not any(answer.error_message for answer in found)
    lasts = [a.infer_response.id for a in found if a.infer_response.parameters["triton_final_response"].bool_param]
    assert sorted(lasts) == ["again", "many", "one"]
    assert site.is_empty()


async def test_a_request_that_fails_leaves_the_others() -> None:
    site = Site()
    async with site.stream() as (requests, answers):
        requests.send(a_request(truth(), id="good"))
        assert (await anext(answers)).infer_response.id == "good"
        requests.send(
            kserve_pb2.ModelInferRequest(id="bad"),
            a_request(id="x" * 1000, parameters={"nobody": 1}),
            a_request(id="late", model_version="7"),
        )
        failed = [await anext(answers) for _ in range(3)]
        assert [answer.infer_response.id for answer in failed] == ["bad", "", "late"]
        assert [answer.error_message for answer in failed] == [
            "request bad: INVALID_ARGUMENT: inputs: text_input is missing",
            failed[1].error_message,
            "request late: NOT_FOUND: model '' has version 1 only",
        ]
        assert failed[1].error_message.startswith("INVALID_ARGUMENT: parameters.nobody: unknown")
        assert all(answer.infer_response.parameters["triton_final_response"].bool_param for answer in failed)
        site.generate.may_end.set()
        requests.send(None)
        assert texts([answer async for answer in answers], "good") == ["b", "", "stop"]
    assert site.is_empty() and not site.unexpected
    assert len(site.refused) == 3


async def test_what_nobody_foresaw_is_reported_and_not_told() -> None:
    site = Site()
    site.generate.error = ZeroDivisionError("secret")
    async with site.stream() as (requests, answers):
        requests.send(a_request(id="a"))
        assert (await anext(answers)).error_message == "request a: INTERNAL: internal error"
        assert [str(error) for error in site.unexpected] == ["secret"]
        site.generate.error = EngineError("secret")
        requests.send(a_request(id="b"))
        assert (await anext(answers)).error_message == "request b: INTERNAL: internal error"
    assert site.is_empty()


async def test_no_more_are_read_than_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RUNS", 3)
    site = Site()
    async with site.stream() as (requests, answers):
        requests.send(*(a_request(id=str(number)) for number in range(7)), None)
        first = asyncio.ensure_future(anext(answers))
        await settle()
        assert (requests.num_read, site.generate.num_open) == (3, 3)
        # Each is a call of its own.
        assert site.admission.num_calls == 3
        site.generate.may_end.set()
        assert len([await first, *[answer async for answer in answers]]) == 7
        assert len(site.generate.started) == 7
    assert site.is_empty()


async def test_who_does_not_read_holds_its_own_requests_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ANSWERS", 2)
    site = Site()
    site.generate.may_end.set()
    async with site.stream() as (requests, answers):
        requests.send(*(a_request(truth(), id=str(number)) for number in range(20)), None)
        await anext(answers)
        await settle()
        (stream,) = site.servicer._streams
        assert stream.answers.qsize() == 2
        assert site.generate.num_open >= 18
        assert len([answer async for answer in answers]) == 59
    assert site.is_empty()


async def test_leaving_a_stream_ends_what_runs_on_it() -> None:
    site = Site()
    async with site.stream() as (requests, answers):
        requests.send(*(a_request(truth(), id=str(number)) for number in range(5)))
        await anext(answers)
        await settle()
        assert site.generate.num_open == 5
    assert site.is_empty()
    assert not site.servicer._streams


async def test_a_message_that_can_not_be_read_ends_the_stream() -> None:
    site = Site()
    async with site.stream() as (requests, answers):
        requests.send(a_request(truth(), id="a"))
        await anext(answers)
        requests.send(InvalidRequestError([]))
        with pytest.raises(InvalidRequestError):
            await anext(answers)
    assert site.is_empty()


async def test_requests_of_a_stream_count_as_calls() -> None:
    site = Site(max_calls=4, max_calls_per_connection=2)
    async with site.stream() as (requests, answers):
        requests.send(*(a_request(id=str(number)) for number in range(3)))
        failed = await anext(answers)
        assert failed.error_message.startswith("request 2: RESOURCE_EXHAUSTED: ")
        assert failed.error_message.endswith("(again in 1 s)")
        assert site.generate.num_open == 2
    assert site.is_empty()


async def test_a_gateway_that_leaves_takes_no_more_of_a_stream() -> None:
    site = Site()
    async with site.stream() as (requests, answers):
        requests.send(a_request(truth(), id="old"))
        await anext(answers)
        site.is_leaving = True
        requests.send(a_request(id="new"))
        assert (await anext(answers)).error_message.startswith("request new: UNAVAILABLE: the gateway is shutting")
        site.generate.may_end.set()
        requests.send(None)
        assert texts([answer async for answer in answers], "old") == ["b", "", "stop"]


async def test_a_connection_has_as_many_streams_as_are_still_free() -> None:
    site = Site(max_streams=4)
    site.generate.may_end.set()
    async with contextlib.AsyncExitStack() as exits:

        async def open_stream(peer: str) -> str:
            requests, answers = await exits.enter_async_context(site.stream(peer))
            requests.send(a_request(id="a"))
            return (await anext(answers)).infer_response.id

        assert [await open_stream("a"), await open_stream("a")] == ["a", "a"]
        with pytest.raises(OverloadedError) as caught:
            await open_stream("a")
        assert (caught.value.reason, caught.value.retry_delay_s) == ("MAX_INFER_STREAMS", 1.0)
        assert await open_stream("b") == "a"
        assert await open_stream("c") == "a"
        with pytest.raises(OverloadedError):
            await open_stream("d")
    assert not site.servicer._streams


async def test_an_idle_stream_makes_room_and_a_busy_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    site = Site(max_streams=2)
    async with site.stream("busy") as (requests, answers):
        requests.send(a_request(truth(), id="a"))
        await anext(answers)
        with pytest.raises(OverloadedError):
            async with site.stream("busy") as (_, others):
                await anext(others)
        async with site.stream("idle") as (_, idle):
            ending = asyncio.ensure_future(anext(idle))
            await settle()
            async with site.stream("new") as (more, following):
                more.send(a_request(truth(), id="b"))
                assert (await anext(following)).infer_response.id == "b"
                with pytest.raises(OverloadedError) as caught:
                    await ending
                assert caught.value.reason == "MAX_INFER_STREAMS"
        site.generate.may_end.set()
        requests.send(None)
        assert texts([answer async for answer in answers], "a") == ["b", "", "stop"]
    assert site.is_empty() and not site.servicer._streams


async def test_one_response_of_a_request_that_is_no_stream() -> None:
    site = Site()
    site.generate.may_end.set()
    answer = await site.servicer.ModelInfer(a_request(id="a"), Caller())
    assert [tensor.contents.bytes_contents[0] for tensor in answer.outputs] == [b"ab", b"stop"]
    with pytest.raises(InvalidRequestError, match="use ModelStreamInfer"):
        await site.servicer.ModelInfer(a_request(truth()), Caller())
    assert site.is_empty()


async def test_what_is_collected_counts_as_held() -> None:
    site = Site()
    asking = asyncio.create_task(site.servicer.ModelInfer(a_request(id="a"), Caller()))
    await settle()
    # A piece of a text is an object, however short it is.
    assert site.admission.num_bytes >= 50
    site.generate.may_end.set()
    await asking
    assert site.is_empty()
    site = Site(max_bytes=1)
    site.generate.may_end.set()
    with pytest.raises(OverloadedError):
        await site.servicer.ModelInfer(a_request(id="a"), Caller())
    assert site.is_empty()


@pytest.mark.parametrize(
    ("remaining_s", "timeout", "wanted"),
    [(None, 0, None), (5.0, 0, 5.0), (None, 2_000_000, 2.0), (1.0, 2_000_000, 1.0)],
)
async def test_the_earlier_deadline_counts(remaining_s: float | None, timeout: int, wanted: float | None) -> None:
    site = Site()
    site.generate.may_end.set()
    await site.servicer.ModelInfer(a_request(parameters={"timeout": timeout}), Caller(remaining_s=remaining_s))
    assert site.generate.remaining_s == [wanted]


async def test_what_is_said_of_server_and_models() -> None:
    site = Site()
    servicer, caller = site.servicer, Caller()
    assert (await servicer.ServerLive(kserve_pb2.ServerLiveRequest(), caller)).live
    for is_serving in (True, False):
        site.is_serving = is_serving
        assert (await servicer.ServerReady(kserve_pb2.ServerReadyRequest(), caller)).ready is is_serving
        assert (await servicer.ModelReady(kserve_pb2.ModelReadyRequest(name="demo"), caller)).ready is is_serving
    site.is_serving = True
    for name, version in (("nobody", ""), ("demo", "2")):
        assert not (await servicer.ModelReady(kserve_pb2.ModelReadyRequest(name=name, version=version), caller)).ready
        with pytest.raises(UnknownModelError):
            await servicer.ModelMetadata(kserve_pb2.ModelMetadataRequest(name=name, version=version), caller)
        with pytest.raises(UnknownModelError):
            await servicer.ModelConfig(kserve_pb2.ModelConfigRequest(name=name, version=version), caller)
    metadata = await servicer.ModelMetadata(kserve_pb2.ModelMetadataRequest(), caller)
    config = (await servicer.ModelConfig(kserve_pb2.ModelConfigRequest(version="1"), caller)).config
    assert metadata.name == config.name == "demo"
    assert config.model_transaction_policy.decoupled
    names = ["text_input", "stream", "sampling_parameters"]
    assert [tensor.name for tensor in metadata.inputs] == [tensor.name for tensor in config.input] == names
