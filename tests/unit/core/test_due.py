"""Lazy heaps hold what is current: what has ended does not gather behind entries that stay."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bucketserve.core.due import DueTimes
from bucketserve.core.fleet import Fleet
from bucketserve.core.handover import Handover
from bucketserve.core.messages import RequestCancelled, RequestSubmitted
from bucketserve.core.scheduler import SchedulerCore
from bucketserve.core.settings import CoreSettings
from bucketserve.core.tenants import TenantBook
from bucketserve.core.types import RequestId, WorkerId
from tests.builders import a_request

MANY = 2000
FEW = 200

orders = st.lists(st.tuples(st.sampled_from(["set", "forget", "pop"]), st.sampled_from("abcdef"), st.integers(0, 9)))


@given(orders)
def test_the_soonest_of_the_present_times_comes_first(script: list[tuple[str, str, int]]) -> None:
    times, expected = DueTimes(), dict[RequestId, float]()
    for order, name, at_s in script:
        match order:
            case "set":
                times.set(RequestId(name), at_s)
                expected[RequestId(name)] = at_s
            case "forget":
                times.forget(RequestId(name))
                expected.pop(RequestId(name), None)
            case "pop" if expected:
                soonest = min(expected.values())
                assert times.next_s() == soonest
                assert expected.pop(times.pop()) == soonest
        assert times.next_s() == min(expected.values(), default=None)


def test_requests_that_have_ended_leave_nothing_behind_a_deadline_that_is_near() -> None:
    core = SchedulerCore(CoreSettings(), 4096)
    slo = {"deadline_s": 1e6, "ttft_slo_s": 1e6}
    core.step([RequestSubmitted(a_request("stays", deadline_s=1e5, ttft_slo_s=1e5))], 0.0)
    for number in range(MANY):
        name = f"r{number}"
        core.step([RequestSubmitted(a_request(name, **slo)), RequestCancelled(RequestId(name))], 0.001 * number)
    assert core.status().num_waiting == 1
    assert len(core._patience._deadlines._heap) < FEW
    assert len(core._lanes._late._heap) < FEW


def test_what_is_no_longer_held_leaves_nothing_behind_one_that_waits() -> None:
    handover = Handover(Fleet(CoreSettings()), 600.0)
    handover.ready(a_request("stays"), WorkerId("p"))
    for number in range(MANY):
        request = a_request(f"r{number}", arrival_s=1.0)
        handover.ready(request, WorkerId("p"))
        handover.forget(request.request_id)
    assert len(handover._ready) < FEW
    assert handover.waiting_tokens() == 20


def test_a_tenant_far_ahead_does_not_keep_what_others_were() -> None:
    book = TenantBook()
    waits = a_request("waits", 1, 1, tenant="waits")
    book.entered(waits)
    # One that used little is remembered below those that use more again and again.
    for number in range(MANY):
        request = a_request(f"r{number}", 10, 10, tenant="busy")
        book.entered(request)
        book.left(request)
        book.ended(request, 10, has_run=True)
    assert len(book._ahead) < FEW
    assert len(book) == 2
