"""Placement of requests that name an adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bucketserve.core.messages import (
    AdaptersChanged,
    BatchPrefilled,
    Drop,
    DropReason,
    PullKv,
    RefuseReason,
    WorkerJoined,
    WorkerLost,
)
from bucketserve.core.types import RequestId, WorkerId, WorkerRole
from tests.builders import joined
from tests.unit.core.test_scheduler import W, batches, core, of_kind, prefilled_at, refusals, resumed, submitted

pytestmark = pytest.mark.usefixtures("all_that_may_be_is_expected")


def with_adapters(name: str, *adapters: str, **more) -> WorkerJoined:
    return replace(of_kind(name, "A", free=4000, **more), adapters=frozenset(adapters))


def test_an_adapter_s_requests_go_where_it_is() -> None:
    under_test = core()
    assert not refusals(under_test.step(submitted("early", adapter="X"), 0.0))
    # It waits for whoever may come; once somebody is here who has it not, it is known that nobody has.
    assert not batches(under_test.step([with_adapters("plain")], 0.1))
    assert refusals(under_test.step(submitted("a", adapter="X"), 0.2)) == [RefuseReason.NO_ADAPTER]
    assert refusals(under_test.step(submitted("b", adapter="X", needs_grammar=True), 0.2)) == [RefuseReason.NO_ADAPTER]
    found = batches(under_test.step([with_adapters("able", "X", "Y"), *submitted("c", adapter="Y")], 0.3))
    assert {batch.worker_id for batch in found} == {"able"}
    assert {"early", "c"} <= {request_id for batch in found for request_id in batch.request_ids}


def test_those_that_want_no_adapter_do_not_wait_behind_one_whose_worker_is_full() -> None:
    under_test = core(fill_tokens=1)
    under_test.step([with_adapters("able", "X"), *submitted("runs", adapter="X")], 0.0)
    events = [with_adapters("plain"), *submitted("first", adapter="X"), *submitted("second")]
    found = batches(under_test.step(events, 0.1))
    assert [(batch.worker_id, batch.request_ids) for batch in found] == [("plain", ("second",))]
    assert batches(under_test.step([prefilled_at("able", "runs")], 0.2))[0].request_ids == ("first",)


def test_workers_change_their_adapters() -> None:
    under_test = core()
    under_test.step([with_adapters("w", "X")], 0.0)
    assert batches(under_test.step(submitted("a", adapter="X"), 0.1))[0].worker_id == "w"
    under_test.step([AdaptersChanged(WorkerId("w"), frozenset("Y"))], 0.2)
    assert refusals(under_test.step(submitted("b", adapter="X"), 0.3)) == [RefuseReason.NO_ADAPTER]
    # One that was let in before waits for it, for a while.
    assert not batches(under_test.step(resumed("a.2", adapter="X"), 0.4))
    assert batches(under_test.step([AdaptersChanged(WorkerId("w"), frozenset("XY"))], 0.5))[0].request_ids == ("a.2",)
    under_test.step([AdaptersChanged(WorkerId("nobody"), frozenset("Z"))], 0.6)
    under_test.step([WorkerLost(W), with_adapters("other")], 0.7)
    assert refusals(under_test.step(submitted("c", adapter="X"), 0.8)) == [RefuseReason.NO_ADAPTER]


def test_what_one_prefills_another_decodes_only_with_the_adapter() -> None:
    under_test = core()
    prefill = replace(with_adapters("p", "X", "Y"), role=WorkerRole.PREFILL)
    decode, roomier = (replace(w, role=WorkerRole.DECODE) for w in (with_adapters("d", "X"), joined("e", free=9000)))
    under_test.step([prefill, decode, replace(roomier, fingerprint="A")], 0.0)
    assert refusals(under_test.step(submitted("a", adapter="Y"), 0.1)) == [RefuseReason.NO_ADAPTER]
    (batch,) = batches(under_test.step(submitted("b", "c", adapter="X"), 0.2))
    held = tuple(RequestId(name) for name in ("b", "c"))
    done = BatchPrefilled(worker_id=WorkerId("p"), assignment=batch.assignment, request_ids=held, held=held)
    pulls = [command for command in under_test.step([done], 0.3).commands if isinstance(command, PullKv)]
    assert {(pull.request_id, pull.target_id) for pull in pulls} == {("b", "d"), ("c", "d")}


@pytest.mark.parametrize("wants", [{"adapter": "X"}, {"needs_grammar": True}, {"tokenizer": "T2"}])
def test_after_a_takeover_what_nobody_may_serve_waits_for_workers_that_are_still_missing(wants: dict[str, Any]) -> None:
    plain = of_kind("plain", "A", tokenizer="T1", free=4000)
    able = replace(with_adapters("able", "X"), tokenizer=wants.get("tokenizer", "T1"), has_grammars=True)
    for has_come, latest_s in ((True, 29.0), (False, 31.0)):
        under_test = core()
        under_test.restore(parked=[], running={}, edges=(4097,), outputs={})
        assert not refusals(under_test.step([plain, *submitted("a", **wants)], 0.0))
        # Others are served meanwhile, and what is still to come has its own time.
        assert batches(under_test.step(submitted("b", tokenizer="T1"), 9.0))[0].request_ids == ("b",)
        assert not refusals(under_test.step(submitted("c", **wants), 9.9))
        decision = under_test.step([able] if has_come else [], latest_s)
        assert {request_id for batch in batches(decision) for request_id in batch.request_ids} == (
            {"a", "c"} if has_come else set()
        )
        assert decision.drops == (() if has_come else (Drop(RequestId("a"), DropReason.NO_LIKE_WORKER),))
    # By now it is known that there is none.
    assert len(refusals(under_test.step(submitted("d", **wants), 32.0))) == 1
