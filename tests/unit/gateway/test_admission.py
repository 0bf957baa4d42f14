"""Counts at the door: what enters leaves, limits hold, slow requests make way."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketserve.core.errors import OverloadedError
from bucketserve_gateway import reads as module
from bucketserve_gateway.admission import Admission, _requests_of, text_bytes
from bucketserve_gateway.reads import Reads


def new(refused: list[str] | None = None, **limits: int) -> Admission:
    limits = {"max_calls": 5, "max_calls_per_connection": 3, "max_bytes": 1000, **limits}
    return Admission(**limits, on_refused=(refused if refused is not None else []).append)


@given(st.lists(st.sampled_from(["a", "b", "c", "leave"]), max_size=60))
def test_calls_never_exceed_their_limits_and_none_is_left(steps: list[str]) -> None:
    admission, open_calls = new(), list[tuple[str, ExitStack]]()
    for step in steps:
        if step == "leave":
            if open_calls:
                open_calls.pop(0)[1].close()
            continue
        call = ExitStack()
        of_peer = sum(peer == step for peer, _ in open_calls)
        if of_peer >= min(5 - len(open_calls), 3):
            with pytest.raises(OverloadedError):
                call.enter_context(admission.call(step))
            continue
        call.enter_context(admission.call(step))
        open_calls.append((step, call))
        assert admission.num_calls == len(open_calls)
    for _, call in open_calls:
        call.close()
    assert admission.num_calls == 0
    assert not admission._by_connection


@given(st.integers(1, 30))
def test_greedy_connections_leave_room_for_others(num_greedy: int) -> None:
    admission = new(max_calls=100, max_calls_per_connection=100)
    with ExitStack() as stack:
        for _ in range(100):
            for i in range(num_greedy):
                with contextlib.suppress(OverloadedError):
                    stack.enter_context(admission.call(f"greedy-{i}"))
        free = 100 - admission.num_calls
        assert free >= 100 // (num_greedy + 1)
        for i in range(free):
            stack.enter_context(admission.call(f"other-{i}"))


@given(st.lists(st.integers(0, 1500), max_size=30))
def test_bytes_are_bounded_and_given_back(sizes: list[int]) -> None:
    admission, rooms, refused = new(), ExitStack(), 0
    for size in sizes:
        room = rooms.enter_context(admission.room())
        before = admission.num_bytes
        try:
            room.resize(size // 2)
            room.resize(size)
        except OverloadedError as error:
            assert error.retry_delay_s > 0
            refused += 1
        # One alone may be larger than all together.
        assert admission.num_bytes <= 1000 or before in (0, admission.num_bytes)
    rooms.close()
    assert admission.num_bytes == 0


def test_what_would_not_even_fit_alone_is_known() -> None:
    admission = new()
    with admission.room() as others, admission.room() as room:
        others.resize(600)
        room.grow(300)
        for by, is_too_small in ((200, False), (701, True)):
            with pytest.raises(OverloadedError):
                room.grow(by)
            assert (room.num_bytes, room.is_too_small) == (300, is_too_small)
        room.grow(-100)
        assert (room.num_bytes, room.is_too_small, admission.num_bytes) == (200, False, 800)


def test_a_piece_of_a_text_counts_as_an_object_and_as_text() -> None:
    assert text_bytes("a") > 49
    assert text_bytes("a" * 1000) > 4000
    assert text_bytes("日" * 1000) > 2000 + 3 * 3000


def test_refusals_are_counted_and_say_why() -> None:
    refused: list[str] = []
    admission = new(refused, max_calls=1)
    with admission.call("a"), pytest.raises(OverloadedError) as caught, admission.call("b"):
        pass
    assert (caught.value.reason, refused) == ("MAX_CALLS", ["MAX_CALLS"])


@pytest.mark.parametrize("num_connections", [1, 3])
async def test_who_sends_slowly_delays_nobody_else(monkeypatch: pytest.MonkeyPatch, num_connections: int) -> None:
    monkeypatch.setattr(module, "HURRIED_READ_S", 0.02)
    refused: list[str] = []
    reads = Reads(4, new(refused).refusal)
    never = asyncio.Event()
    # Ten times more than can be refused while this test runs, if they had to be first.
    slow = [asyncio.create_task(reads.read(f"slow-{i % num_connections}", never.wait)) for i in range(4000)]
    await asyncio.sleep(0)
    for _ in range(20):
        assert await asyncio.wait_for(reads.read("other", lambda: asyncio.sleep(0, "message")), 20) == "message"
    done = [task for task in slow if task.done()]
    assert 0 < len(done) < 400
    assert all(isinstance(task.exception(), OverloadedError) for task in done)
    assert refused == ["SLOW_REQUEST"] * len(done)
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    # All places are free again.
    answers = await asyncio.gather(*(reads.read("other", lambda: asyncio.sleep(0, "message")) for _ in range(20)))
    assert answers == ["message"] * 20
    assert (reads._free, reads._waiting, reads._by_connection) == (4, {}, {})


async def test_nobody_is_hurried_while_there_are_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HURRIED_READ_S", 0.0)
    reads = Reads(2, new().refusal)
    may_come = asyncio.Event()
    slow = asyncio.create_task(reads.read("slow", may_come.wait))
    for _ in range(20):
        await reads.read("other", lambda: asyncio.sleep(0))
    may_come.set()
    assert await slow is True


async def test_a_stream_of_requests_keeps_none_of_them() -> None:
    class Request:
        """May be large."""

    async def read() -> Request:
        return Request()

    requests = _requests_of(read)
    for _ in range(2):
        request = await anext(requests)
        is_there = weakref.ref(request)
        del request
        assert is_there() is None
    await requests.aclose()
