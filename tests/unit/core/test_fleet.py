"""Rankings of workers."""

from __future__ import annotations

from dataclasses import replace

from bucketserve.core.fleet import Fleet
from bucketserve.core.messages import WorkerJoined
from bucketserve.core.settings import CoreSettings
from bucketserve.core.types import WorkerId, WorkerRole
from bucketserve.core.workers import WorkerState
from tests.builders import a_request, joined


def join(fleet: Fleet, event: WorkerJoined) -> None:
    fleet.join(WorkerState.joined(event, fleet.outputs))


def test_rankings_do_not_grow_with_changes_while_the_best_worker_stays() -> None:
    fleet = Fleet(CoreSettings())
    for name, free in (("idle", 9000), ("busy", 1000)):
        for role in WorkerRole:
            join(fleet, replace(joined(f"{name}-{role.value}", free=free), role=role))
    for _ in range(5_000):
        for worker in fleet:
            if worker.worker_id.startswith("busy"):
                fleet.changed(worker)
        fleet.candidates()
    rankings = [value for value in vars(fleet).values() if hasattr(value, "_heap")]
    assert len(rankings) == 6
    assert max(len(ranking._heap) for ranking in rankings) < 100
    assert [worker.worker_id for worker in fleet.decoders(a_request("r"), "")] == ["idle-decode", "busy-decode"]


def test_without_decode_workers_those_that_do_both_decode() -> None:
    fleet = Fleet(CoreSettings())
    join(fleet, replace(joined("p", free=500), role=WorkerRole.PREFILL))
    assert fleet.decoders(a_request("r"), "") == []
    join(fleet, replace(joined("b", free=500), role=WorkerRole.BOTH))
    assert [worker.worker_id for worker in fleet.decoders(a_request("r"), "")] == ["b"]


def test_a_worker_that_comes_again_is_ranked_by_what_it_is_now() -> None:
    fleet = Fleet(CoreSettings())
    join(fleet, joined("a", free=9000))
    join(fleet, joined("b", free=5000))
    fleet.leave(WorkerId("a"))
    join(fleet, joined("a", free=1000))
    # Nothing of its earlier life is taken for the present, however often it changes.
    for _ in range(3):
        assert [worker.worker_id for worker in fleet.decoders(a_request("r"), "")] == ["b", "a"]
        again = fleet.get(WorkerId("a"))
        assert again is not None
        fleet.changed(again)
