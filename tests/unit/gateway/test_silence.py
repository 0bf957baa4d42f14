"""A request of which nothing is heard any more, or that a full store did not take, is submitted again, as it is."""

from __future__ import annotations

import asyncio

import pytest

from bucketserve.rpc.deployment import Deployment
from bucketserve.rpc.outbox import Outbox
from bucketserve.v1 import common_pb2, delivery_pb2, inference_pb2, scheduler_pb2
from bucketserve_gateway import scheduler_link
from bucketserve_gateway.requests import OpenRequest, OpenRequests
from bucketserve_gateway.scheduler_link import FEW, LOOK_S, SILENCE_S, SPREAD_S, SchedulerLink
from bucketserve_gateway.validation import validate
from tests.unit.gateway.builders import an_open_request, catalog

MODEL = "demo"


async def test_silent_requests_are_asked_for_again() -> None:
    requests, served = OpenRequests(), catalog()
    link = SchedulerLink(MODEL, ["127.0.0.1:1"], Deployment(), "gateway", requests, lambda *_: None, lambda *_: None)

    def opened(name: str, *, runs: bool) -> OpenRequest:
        valid = validate(inference_pb2.GenerateRequest(request_id=name, prompt="the"), served, max_prompt_bytes=1000)
        request = an_open_request(valid, [5, 6], 8)
        requests.add(request)
        if runs:
            request.on_dispatched(scheduler_pb2.RunDispatched(run_id=request.run_id))
        return request

    silent, talks, waits, over = (
        opened("silent", runs=True),
        opened("talks", runs=True),
        opened("waits", runs=False),
        opened("over", runs=True),
    )
    late_s = silent.heard_s + SILENCE_S + 1
    # Without a scheduler nobody is asked, and it is not forgotten that somebody must be.
    assert link.ask_again(late_s) == 0
    outbox: Outbox[scheduler_pb2.SubmitRequest] = Outbox(10)
    link._outbox = outbox
    assert link.ask_again(silent.heard_s + SILENCE_S / 2) == 0
    talks.heard_s = late_s - 1
    over.deliver(
        delivery_pb2.TokenDelivery(
            run_id=over.run_id,
            token_ids=[7],
            finished=delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_LENGTH),
        ),
        "w",
        "",
    )
    # One that waits in the queue as well: the word of its dispatch may have been lost.
    assert link.ask_again(late_s) == 2
    # Not in every round, and again if it stays silent.
    assert link.ask_again(late_s + 1) == 0
    assert link.ask_again(late_s + SILENCE_S + 1) == 3
    asyncio.get_running_loop().call_soon(outbox.close)
    sent = [m.run.ticket.run_id async for m in outbox.messages()]
    assert sent[:2] == [silent.run_id, waits.run_id]
    assert not waits.is_over
    # What the scheduler answers changes nothing for one that it knows.
    silent.on_dispatched(scheduler_pb2.RunDispatched(run_id=silent.run_id))
    assert silent.attempt == 1


async def test_many_that_are_silent_are_asked_for_bit_by_bit_and_soon_enough() -> None:
    requests, served = OpenRequests(), catalog()
    link = SchedulerLink(MODEL, ["127.0.0.1:1"], Deployment(), "gateway", requests, lambda *_: None, lambda *_: None)
    valid = validate(inference_pb2.GenerateRequest(prompt="the"), served, max_prompt_bytes=1000)
    number = 10 * FEW
    for _ in range(number):
        requests.add(an_open_request(valid, [5, 6], 8))
    link._outbox = Outbox(2 * number)
    now_s = max(opened.heard_s for opened in requests) + SILENCE_S
    # The bound for a wait without a fault.
    assert SILENCE_S + SPREAD_S + 2 * LOOK_S < 15.0
    looks = [link.ask_again(now_s + look * LOOK_S) for look in range(int(SPREAD_S / LOOK_S))]
    assert sum(looks) == number
    assert max(looks) <= number * LOOK_S / SPREAD_S
    # They stay spread, and none is left out.
    assert link.ask_again(now_s + SPREAD_S) == 0
    again = [link.ask_again(now_s + SILENCE_S + look * LOOK_S) for look in range(int(SPREAD_S / LOOK_S))]
    assert again == looks


async def test_a_request_that_was_stopped_while_its_gateway_was_away_goes_on_with_the_next_attempt() -> None:
    requests, resumed = OpenRequests(), []
    link = SchedulerLink(MODEL, ["127.0.0.1:1"], Deployment(), "gateway", requests, lambda *_: None, lambda *_: None)
    valid = validate(inference_pb2.GenerateRequest(prompt="the"), catalog(), max_prompt_bytes=1000)
    request = an_open_request(valid, [5, 6], 8, lambda opened, former: resumed.append((opened.attempt, former)))
    requests.add(request)
    former = request.run_id
    dropped = scheduler_pb2.RunDropped(run_id=former, reason=scheduler_pb2.DROP_REASON_CANCELLED)
    link._take(scheduler_pb2.SubmitResponse(dropped=dropped))
    assert resumed == [(2, former)]
    assert not request.is_over


def full_of(opened: OpenRequest) -> scheduler_pb2.RunRefused:
    return scheduler_pb2.RunRefused(run_id=opened.run_id, reason=scheduler_pb2.REFUSE_REASON_STORE_FULL)


async def test_a_full_store_refuses_what_is_new_and_delays_what_was_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_link, "FULL_S", 0.0)
    requests, served = OpenRequests(), catalog()
    link = SchedulerLink(MODEL, ["127.0.0.1:1"], Deployment(), "gateway", requests, lambda *_: None, lambda *_: None)
    outbox: Outbox[scheduler_pb2.SubmitRequest] = Outbox(10)
    link._outbox = outbox
    valid = validate(inference_pb2.GenerateRequest(prompt="the"), served, max_prompt_bytes=1000)
    new, admitted, cancelled = (an_open_request(valid, [5, 6], 8) for _ in range(3))
    for opened in (new, admitted, cancelled):
        requests.add(opened)
    for opened in (admitted, cancelled):
        opened.on_accepted()
        opened.restart("its worker was lost")
        requests.resumed(opened, opened.run_id.replace(".2", ".1"))
    for opened in (new, admitted, cancelled):
        link._take(scheduler_pb2.SubmitResponse(refused=full_of(opened)))
    # However often it is refused meanwhile, it is said again once.
    for _ in range(5):
        link._take(scheduler_pb2.SubmitResponse(refused=full_of(admitted)))
    requests.remove(cancelled)
    await asyncio.sleep(0.01)
    assert new.error is not None
    assert new.error.reason == "STORE_FULL"
    assert not admitted.is_over
    asyncio.get_running_loop().call_soon(outbox.close)
    assert [message.run.ticket.run_id async for message in outbox.messages()] == [admitted.run_id]
