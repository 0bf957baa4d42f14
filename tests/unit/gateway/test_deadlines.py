"""A deadline is kept by the gateway itself, whoever leads: one end, told to scheduler and worker."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from opentelemetry.trace import INVALID_SPAN

from bucketserve.core.errors import BucketServeError, DeadlineError
from bucketserve.v1 import common_pb2, delivery_pb2, inference_pb2, scheduler_pb2
from bucketserve_gateway.auth import Keys
from bucketserve_gateway.kserve import KserveServicer
from bucketserve_gateway.requests import OpenRequest, OpenRequests
from bucketserve_gateway.scheduler_link import _drop
from bucketserve_gateway.servicer import InferenceServicer
from bucketserve_gateway.settings import GatewaySettings
from tests.unit.gateway.builders import Caller, an_admission, catalog
from tests.unit.gateway.test_kserve_tensors import a_request, truth

DEADLINE_S, SLACK_S = 0.1, 0.5
Events = AsyncIterator[inference_pb2.GenerateResponse]


class Site:
    """A gateway, of whose scheduler and worker a test says what they do: by themselves they drop and end nothing."""

    def __init__(self, *, queues: bool = True) -> None:
        self.requests, self.admission = OpenRequests(), an_admission()
        self.submitted: list[OpenRequest] = []
        self.cancelled: set[str] = set()
        self.stopped: set[str] = set()
        self.closed: list[BucketServeError | None] = []
        self.refused: list[BucketServeError] = []
        self.tokenizes_s = 0.0
        self._queues = queues
        scheduler = SimpleNamespace(submit=self._submit, cancel=self.cancelled.add, problem="")
        self.servicer = InferenceServicer(
            cast(
                Any,
                SimpleNamespace(
                    settings=GatewaySettings(),
                    gateway_id="g",
                    delivery_address="",
                    catalog=catalog(),
                    admission=self.admission,
                    quotas=SimpleNamespace(take=self._take, settle=lambda charge, used: None),
                    tokenizers=SimpleNamespace(encode=self._encode, check_structure=self._check),
                    requests=self.requests,
                    schedulers=SimpleNamespace(of=lambda model: scheduler),
                    delivery=SimpleNamespace(stop=lambda opened: self.stopped.add(opened.run_id)),
                    telemetry=SimpleNamespace(
                        begin=lambda request, metadata: INVALID_SPAN,
                        tokenizing=lambda span: contextlib.nullcontext(),
                        context=lambda span: ("", ""),
                        opened=lambda opened: None,
                        refused=lambda model, request_class, error: self.refused.append(error),
                        closed=lambda opened, span: self.closed.append(opened.error),
                    ),
                ),
            )
        )

    def _submit(self, opened: OpenRequest) -> None:
        self.submitted.append(opened)
        if self._queues:
            opened.on_accepted()

    async def _take(self, tenant: str, num_tokens: int) -> None:
        return None

    async def _encode(self, model: object, text: str) -> list[int]:
        await asyncio.sleep(self.tokenizes_s)
        return [5, 6]

    async def _check(self, model: object, wanted: object) -> None:
        return None

    def generate(self, remaining_s: float | None = DEADLINE_S) -> Events:
        return self.servicer.generate(inference_pb2.GenerateRequest(prompt="the"), {}, remaining_s)

    def deliver(self, *token_ids: int, **more: Any) -> bool:
        (opened,) = self.submitted
        index = len(opened.tokens)
        delivery = delivery_pb2.TokenDelivery(run_id=opened.run_id, first_index=index, token_ids=token_ids, **more)
        return opened.deliver(delivery, "w", "f")

    def is_empty(self) -> bool:
        return (len(self.requests), self.admission.num_bytes) == (0, 0)


async def to_the_end(events: Events) -> tuple[list[inference_pb2.GenerateResponse], DeadlineError, float]:
    """Returns what came, the end and when that was."""
    start_s, found = time.monotonic(), []
    with pytest.raises(DeadlineError) as caught:
        async for event in events:
            found.append(event)
    return found, caught.value, time.monotonic() - start_s


def all_stopped(site: Site) -> bool:
    names = {opened.run_id for opened in site.submitted}
    return site.cancelled == site.stopped == names and len(names) == 1


@pytest.mark.parametrize("phase", ["not queued", "queued", "at a worker", "decoding"])
async def test_a_scheduler_that_drops_nothing_does_not_prolong_a_request(phase: str) -> None:
    site = Site(queues=phase != "not queued")
    ending = asyncio.create_task(to_the_end(site.generate()))
    await asyncio.sleep(0.01)
    if phase == "at a worker":
        (opened,) = site.submitted
        opened.on_dispatched(scheduler_pb2.RunDispatched(run_id=opened.run_id, worker_id="w"))
    elif phase == "decoding":
        site.deliver(7, 8)
    found, error, took_s = await ending
    assert (error.reason, str(error)) == ("DEADLINE", "the deadline passed before the request was served")
    assert DEADLINE_S - 0.01 <= took_s < DEADLINE_S + SLACK_S
    # What had come is not lost.
    assert [len(event.chunk.token_ids) for event in found[1:]] == ([2] if phase == "decoding" else [])
    assert all_stopped(site)
    assert site.closed == [error]
    assert site.is_empty()


async def test_a_request_that_is_still_being_read_by_its_deadline_is_not_submitted() -> None:
    site = Site()
    site.tokenizes_s = 60.0
    _, error, took_s = await to_the_end(site.generate())
    assert took_s < DEADLINE_S + SLACK_S
    assert (site.submitted, site.closed, site.refused) == ([], [], [error])
    assert site.is_empty()


async def test_work_ends_though_its_client_does_not_read() -> None:
    site = Site()
    events = site.generate()
    await anext(events)
    await asyncio.sleep(DEADLINE_S + 0.05)
    # Its client has not come back for more, and was told nothing yet.
    assert all_stopped(site)
    assert not site.deliver(7)
    assert site.closed == []
    assert (await to_the_end(events))[0] == []
    assert site.is_empty()


@pytest.mark.parametrize("who", ["scheduler", "worker", "gateway"])
async def test_whoever_is_first_ends_it_and_nobody_after(who: str) -> None:
    site = Site()
    events = site.generate()
    await anext(events)
    (opened,) = site.submitted
    length = delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_LENGTH)
    if who == "scheduler":
        _drop(opened, scheduler_pb2.DROP_REASON_DEADLINE)
    elif who == "worker":
        site.deliver(7, finished=length)
    first = (opened.error, opened.finished)
    await asyncio.sleep(DEADLINE_S + 0.05)
    if who != "gateway":
        assert (opened.error, opened.finished) == first
    ends = (opened.error, opened.finished)
    for reason in (scheduler_pb2.DROP_REASON_DEADLINE, scheduler_pb2.DROP_REASON_WORKER_LOST):
        _drop(opened, reason)
    site.deliver(8, finished=length)
    assert (opened.error, opened.finished, opened.attempt) == (*ends, 1)
    if who == "worker":
        assert [event.WhichOneof("event") async for event in events] == ["chunk", "finished"]
        assert (site.cancelled, site.closed) == (set(), [None])
    else:
        assert (await to_the_end(events))[1] is opened.error
        assert len(site.closed) == 1
    assert site.is_empty()


async def test_what_has_no_deadline_or_ends_before_it_leaves_no_timer() -> None:
    for remaining_s in (None, 60.0):
        site = Site()
        events = site.generate(remaining_s)
        await anext(events)
        site.deliver(7, finished=delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_STOP))
        assert [event.WhichOneof("event") async for event in events] == ["chunk", "finished"]
        loop: Any = asyncio.get_running_loop()
        assert not [timer for timer in loop._scheduled if not timer.cancelled() and "_expire" in repr(timer)]


async def test_the_timeout_of_a_kserve_request_is_kept() -> None:
    site = Site()
    servicer = KserveServicer(
        site.servicer.generate,
        catalog(),
        site.admission,
        identify=Keys("").identify,
        max_prompt_bytes=1000,
        max_streams=2,
        is_serving=lambda: True,
        is_leaving=lambda: False,
        on_refused=lambda error: None,
        on_unexpected=lambda method, error: None,
    )
    asked = a_request(truth(), id="late", parameters={"timeout": round(DEADLINE_S * 1e6)})

    async def requests() -> AsyncIterator[Any]:
        yield asked

    start_s = time.monotonic()
    (answer,) = [answer async for answer in servicer.ModelStreamInfer(requests(), Caller())]
    assert time.monotonic() - start_s < DEADLINE_S + SLACK_S
    assert answer.error_message == (
        "request late: DEADLINE_EXCEEDED: the deadline passed before the request was served"
    )
    assert all_stopped(site)
    assert site.is_empty()
