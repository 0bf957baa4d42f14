"""When the next attempt of a request is submitted."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from bucketserve.v1 import common_pb2, delivery_pb2, inference_pb2
from bucketserve_gateway import servicer as servicer_module
from bucketserve_gateway.requests import OpenRequests
from bucketserve_gateway.servicer import InferenceServicer
from bucketserve_gateway.validation import validate
from tests.unit.gateway.builders import an_open_request, catalog


def a_servicer(requests: OpenRequests, submitted: list[str]) -> InferenceServicer:
    """Returns one that names the runs which it submits."""
    scheduler = SimpleNamespace(cancel=lambda run_id: None, submit=lambda opened: submitted.append(opened.run_id))
    parts: Any = SimpleNamespace(
        requests=requests,
        schedulers=SimpleNamespace(of=lambda model: scheduler),
        telemetry=SimpleNamespace(resumed=lambda opened: None),
    )
    return InferenceServicer(parts)


async def test_the_second_attempt_goes_at_once_and_a_further_one_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer_module, "RETRY_S", 0.2)
    submitted: list[str] = []
    requests = OpenRequests()
    servicer = a_servicer(requests, submitted)
    valid = validate(inference_pb2.GenerateRequest(prompt="the"), catalog(), max_prompt_bytes=1000)
    fails = delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_ERROR, is_retryable=True)
    for is_closed in (False, True):
        submitted.clear()
        request = an_open_request(valid, [5, 6], 8, servicer._resume)
        requests.add(request)
        request.deliver(delivery_pb2.TokenDelivery(run_id=request.run_id, finished=fails), "w", "")
        assert submitted == [request.run_id]
        request.deliver(delivery_pb2.TokenDelivery(run_id=request.run_id, finished=fails), "w", "")
        assert request.attempt == 3
        await asyncio.sleep(0.05)
        assert len(submitted) == 1
        if is_closed:
            requests.remove(request)
        await asyncio.sleep(0.4)
        assert submitted[1:] == ([] if is_closed else [request.run_id])


async def test_a_preempted_one_goes_at_once_however_often_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer_module, "RETRY_S", 60.0)
    submitted: list[str] = []
    requests = OpenRequests()
    servicer = a_servicer(requests, submitted)
    valid = validate(inference_pb2.GenerateRequest(prompt="the"), catalog(), max_prompt_bytes=1000)
    request = an_open_request(valid, [5, 6], 8, servicer._resume)
    requests.add(request)
    fails = delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_ERROR, is_retryable=True)
    let_go = delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_PREEMPTED)
    # The first failure is the second start for a cause, whatever came before.
    for end, is_at_once in ((let_go, True), (fails, True), (let_go, True), (fails, False), (let_go, True)):
        before = len(submitted)
        request.deliver(delivery_pb2.TokenDelivery(run_id=request.run_id, finished=end), "w", "")
        assert submitted[before:] == [request.run_id] * is_at_once
